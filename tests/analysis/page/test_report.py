"""The report: what it says for small studies of every shape, that nothing a user wrote becomes markup, and, in a real
browser, that it draws its figures offline and fits a phone."""

import base64
import dataclasses
import gzip
import itertools
import json
import math
import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from analysis.page.gallery import comparison_plot
from analysis.page.report import HowFound, render_report
from analysis.page.tables import MAX_ROWS
from analysis.page.wrong_answers import wrong_answers
from analysis.stats.bootstrap import MeasuredAgain
from analysis.stats.comparison import Measured, cautions, compare, moved
from analysis.stats.importance import what_matters
from analysis.stats.pick import RULE, ranked, recommend
from analysis.stats.table import by_setting, results_frame
from tests.browsing import WIDTHS, assert_it_fits, browser, tabs  # noqa: F401

EVIL = "<script>alert('x')</script>\"&"

STUDY = {
    "name": "layer-sweep", "model": "tiny-model", "edits_source": "atlas", "n_edits": 100,
    "findings": ["2 edits contradict each other, so at most 99% can be reached."], "capability_source": "probes",
    "n_items": 640, "trials_planned": 5, "trials_done": 4, "trials_failed": 1, "started": "2026-03-02 09:14",
    "finished": "2026-03-02 11:02", "environment": {"torch": "2.13.0", "hardware": {"cpus": 2}},
    "settings_yaml": "name: layer-sweep\n",
}  # fmt: skip
BASELINE = {"capability": 0.62, "reliability": 0.02}


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """The bootstrap has tests of its own."""
    monkeypatch.setattr("analysis.stats.bootstrap.DRAWS", 20)


def row(trial_id, layer=0, reliability=0.9, change=-0.01, **others):
    base = {
        "trial_id": trial_id, "status": "done", "layers": 30, "layer": layer, "module": "mlp_down",
        "pipeline": "breadth_first", "batch_size": 32, "learning_rate": 0.004, "seed": 0, "epochs": 25, "loss_average": "edit",
        "run_id": f"run-{trial_id}", "reliability": reliability, "generalization": 0.7, "locality": 0.8, "n_edits": 100,
        "diverged": 0, "capability": 0.62 + change, "capability_change": change, "capability_change_low": change - 0.008,
        "capability_change_high": change + 0.007, "capability.world": 0.5, "drift_kl": 0.01, "seconds": 30.0,
        "seconds_per_edit": 0.2, "epoch_losses": [3.0, 1.0, 0.1],
    }  # fmt: skip
    return base | others


def failure(trial_id, error="out of memory", **others):
    kept = ("trial_id", "layers", "layer", "module", "pipeline", "batch_size", "learning_rate", "seed")
    base = row(trial_id, **others)
    return {name: base[name] for name in kept} | {"status": "failed", "error": error}


def study_results():
    return results_frame(
        [
            row("a", 22, 0.98, -0.004),
            row("b", 23, 0.97, -0.02, module="mlp"),
            row("c", 5, 0.50, 0.001),
            row("d", 5, 1.0, 0.0, module="mlp", diverged=1),
            failure("e", layer=7),
        ]
    )


def study_outcomes(trial_id="a"):
    rows = [
        ("e1", "reliability", "The capital of Peru is", "Lyon", "Lima", False),
        ("e2", "reliability", "The capital of Chile is", "Oslo", "Oslo", True),
        ("e2", "generalization", "Chile's capital is", "Oslo", "Santiago", False),
        ("e2", "locality", "The capital of Spain is", "Madrid", "Madrid", True),
    ]
    columns = ["edit_id", "kind", "prompt", "expected", "got", "correct"]
    return pd.DataFrame(rows, columns=columns).assign(trial_id=trial_id, correct_tf=True)


class Page(HTMLParser):
    """The visible text, by section heading, and every tag opened."""

    def __init__(self, text):
        super().__init__()
        self.sections, self.tags, self.ids, self.links, self._skip, self._heading = {"": ""}, [], [], [], 0, False
        self._current = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        self.links += [value for name, value in attributes if name in ("href", "src")]
        self._skip += tag in ("script", "style")
        if tag == "h2":
            self._heading, self._current = True, ""

    def handle_endtag(self, tag):
        self._skip -= tag in ("script", "style")
        if tag in ("td", "th"):
            self.sections[self._current] += " "
        if tag == "h2":
            self._heading = False
            self.sections[self._current] = ""

    def handle_data(self, text):
        if self._skip:
            return
        if self._heading:
            self._current += text
        else:
            self.sections[self._current] += text

    def __getitem__(self, heading):
        return " ".join(self.sections[heading].split())


def compared_with(other, results):
    """The options of `render_report` for a comparison of the study, with these results, with another one."""
    return {"compared": compare(Measured(STUDY, results, BASELINE), other)}


def page(results=None, study=STUDY, **options):
    options = {"baseline": BASELINE} | options
    return Page(render_report(study, study_results() if results is None else results, **options))


def test_the_questions_are_answered_in_order():
    got = page(outcomes=study_outcomes())
    assert list(got.sections)[1:] == [
        "What was asked", "Which position", "What went wrong, and what to change", "At what cost", "How sure", "What else is on the front", "What matters",
        "What failed", "Which edits fail", "Figures", "All trials", "How it was made",
    ]  # fmt: skip


def test_what_was_asked_names_model_edits_findings_suite_and_trials():
    asked = page()["What was asked"]
    for part in (
        "tiny-model", "100 edits from atlas", "unedited model already gives 2.0% of the new answers",
        "at most 99% can be reached",
        "probes: 640 items of 1 task (world)", "scores 62.0%", "4 trials done of 5 planned, 1 failed",
        "2026-03-02 09:14 to 2026-03-02 11:02",
    ):  # fmt: skip
        assert part in asked, part


def test_the_pick_is_one_sentence_with_the_command_that_repeats_it():
    found = page()["Which position"]
    assert (
        "Edit 22.mlp_down: reliability 98.0% [93.0, 99.4], generalization 70.0% [60.4, 78.1], locality 80.0% [71.1, 86.7],"
        " capability change −0.4 points [−1.2, +0.3]." in found
    )
    assert "breadth-first, batch 32, rate 0.004, loss by edit, at most 25 epochs" in found
    assert "locft edit tiny-model --from-run run-a --out tiny-model-22.mlp_down" in found
    assert RULE in found


def test_the_command_is_safe_to_paste_and_works_without_a_tracked_run():
    results = results_frame([row("a", run_id=None)])
    found = page(results, STUDY | {"model": "/models/my model; rm -rf", "edits_source": "a'b.jsonl"})["Which position"]
    assert "locft edit '/models/my model; rm -rf' --from-run a --out 'my model; rm -rf-0.mlp_down'" in found


def test_how_sure_says_intervals_choice_runner_up_and_seeds():
    sure = page()["How sure"]
    for part in (
        "a fraction of 100 edits", "95% interval",
        "Of 3 settings, 2 are about as reliable as the best; 1 of them shows no loss of capability",
        "23.mlp (breadth-first, batch 32, rate 0.004, loss by edit): reliability 97.0%",
        "One seed only",
    ):  # fmt: skip
        assert part in sure, part
    assert "which chance could explain (same items before and after)" in page()["At what cost"]


def test_several_seeds_are_one_setting_on_front_and_in_the_pick():
    got = page(results_frame([row("a", seed=0), row("b", seed=1, reliability=0.94)]))
    assert "reliability 92.0%" in got["Which position"] and "Mean of 2 seeds" in got["How sure"]


def test_intervals_stand_beside_fractions_and_what_the_seeds_did_beside_drift():
    one = page(results_frame([row("a"), row("b", 4)]))
    two = page(results_frame([row("a"), row("b", seed=1, generalization=0.6, drift_kl=0.014)]))
    front = one["What else is on the front"]
    assert "90.0% [82.6, 94.5]" in front and "70.0% [60.4, 78.1]" in front and "80.0% [71.1, 86.7]" in front
    assert "90.0% [82.6, 94.5]" in one["All trials"] and "−1.0 [−1.8, −0.3]" in one["All trials"]
    assert "80.0% [71.1, 86.7] of the tokens of answers to unrelated prompts" in one["At what cost"]
    assert "0.01 nats per token on plain text" in one["At what cost"]
    assert "0.012 nats per token (0.01 to 0.014 over the seeds) on plain text" in two["At what cost"]
    shares = re.search(r"65.0% \[([\d.]+), ([\d.]+)\]", two["Which position"])
    assert float(shares[1]) < 52 and float(shares[2]) > 76, "wider than the edits alone make it: the seeds differ"
    unknown = page(results_frame([row("a", n_edits=math.nan)]))
    assert "reliability 90.0%, generalization 70.0%," in unknown["Which position"]


def test_failures_are_counted_by_cause_and_diverged_ones_told_apart():
    rows = [row("a"), row("d", 3, diverged=1), failure("e"), failure("f"), failure("g", "worker died")]
    failed = page(results_frame(rows))["What failed"]
    assert "2 out of memory 1 worker died" in failed and "1 further trial has diverged" in failed
    assert page(results_frame([row("a")]))["What failed"] == "No trial failed."
    again = page(results_frame([row("a", retried="out of memory\nits node died"), row("b", retried="its node died")]))
    assert (
        "2 times because of: its node died" in again["What failed"]
        and "1 time because of: out of memory" in again["What failed"]
    )


def test_edits_that_fail_at_the_pick_are_listed_with_what_the_model_says():
    got = page(outcomes=pd.concat([study_outcomes("a"), study_outcomes("b")]))["Which edits fail"]
    assert "1 of 2 edit prompts do not get the new answer" in got and "The capital of Peru is Lyon Lima" in got
    assert "1 of 1 rephrased prompts" in got and "1 of 1 unrelated prompts are answered as before." in got
    assert "Chile is" not in got


def test_every_setting_on_the_front_leads_to_its_edits_that_fail():
    results = results_frame([row("a", 22, 0.98, -0.02), row("b", 23, 0.6, 0.01), row("c", 5, 0.5, -0.1)])
    got = page(results, outcomes=pd.concat([study_outcomes(trial) for trial in "abc"]))
    assert "22.mlp_down (pick): 1 of 2 edit prompts" in got["Which edits fail"]
    listed, _, more = got["Which edits fail"].partition("1 more settings that the controls below can pick")
    assert "23.mlp_down: 1 of 2 edit prompts" in listed and "5.mlp_down:" not in listed and "5.mlp_down:" in more
    assert {"#misses-1", "#misses-2"} <= set(got.links) and {"misses-1", "misses-2", "misses-3"} <= set(got.ids)


def test_edits_that_fail_are_those_of_all_seeds_that_are_known():
    results = results_frame([row("a"), row("b", seed=1), row("c", seed=2)])
    other = study_outcomes("b")
    other["got"] = ["Quito", "Lyon", "Oslo", "Madrid"]
    other["correct"] = [False, False, True, True]
    got = page(results, outcomes=pd.concat([study_outcomes("a"), other]))["Which edits fail"]
    assert "2 of 2 edit prompts, 1 of 1 rephrased prompts" in got
    assert "With at least one of 2 seeds (0, 1); the answers of the other 1 of 3 are in their runs." in got
    assert "The capital of Peru is Lyon Lima / Quito 2 The capital of Chile is Oslo Lyon 1" in got
    assert (
        "With seed 0; the answers of the other 2 of 3"
        in page(results, outcomes=study_outcomes("a"))["Which edits fail"]
    )


def test_chances_stand_beside_the_front_and_every_trial():
    got = page()
    assert "chance" in got["What else is on the front"]
    assert re.search(r"Measured again.*, the rule picks this setting in \d+%", got["How sure"])
    assert "on front" in got["All trials"]


def test_what_it_costs_by_task_and_on_plain_text():
    results = results_frame([row("a", **{"capability.grammar": 0.7, "perplexity": 33.0})])
    baseline = BASELINE | {"capability.world": 0.6, "capability.grammar": 0.65, "perplexity": 30.0}
    cost = page(results, baseline=baseline)["At what cost"]
    for part in (
        "−1.0 points [−1.8, −0.3], more than chance would explain (same items before and after).",
        "The unedited model scores 62.0%.",
        "grammar 65.0% → 70.0%",
        "world 60.0% → 50.0%",
        "perplexity 30 → 33",
        "80.0%",
    ):
        assert part in cost, part


def test_what_went_wrong_is_told_with_the_one_setting_to_change():
    study = STUDY | {
        "command": ("locft", "sweep", "my study.yaml"),
        "edit_counts": {"contradictions": 2, "reachable": 0.9},
    }
    told = page(results_frame([row("a", locality=0.2)]), study)["What went wrong, and what to change"]
    assert "Locality lost" in told and "Locality is 20.0%" in told and "Edits fight each other" in told
    assert "locft sweep 'my study.yaml' --set space.method=natural_gradient" in told
    assert "What went wrong, and what to change" not in page(results_frame([row("a")])).sections


def test_settings_are_told_by_what_is_away_from_the_defaults():
    rows = [row("a", 1, method="lora", rank=4, train_formats="raw,qa"), row("b", 2, 0.5, train_formats="raw,qa")]
    found = page(results_frame(rows))
    said = found["All trials"]
    assert (
        "trained raw,qa" in said.split("The same for all:")[1].split("layer")[0] and "method" in said and "rank" in said
    )
    assert "rate" not in page(results_frame([row("a", method="natural_gradient")]))["All trials"]
    assert "curvature" not in said and "guard" not in said and "shrink" not in said
    assert re.search(r"lora, rate [\d.]+, loss by edit, rank 4, trained raw,qa", found["Which position"])


def test_each_format_is_told_where_edits_were_asked_in_several():
    formats = {"unseen": 0.5, "chat": 0.8, "raw": 1.0}
    asked = {f"{name}.{form}": share for name in ("reliability", "generalization") for form, share in formats.items()}
    found = page(results_frame([row("a", **asked)]))
    answer = " ".join(found["Which position"].split())
    assert "the means over these, without the wording never trained" in answer
    assert "raw 100% [96.3, 100] 100% [96.3, 100] chat 80.0% [71.1, 86.7]" in answer
    assert "a wording never trained 50.0%" in answer and "By prompt format" in answer
    assert "By prompt format" not in page()["Which position"], "the plain form alone needs no table"
    (reason,) = [text for text in recommend(results_frame([row("a", **asked)])).reasons if "prompt format" in text]
    assert reason == "Reliability by prompt format: 100% raw, 80.0% chat, 50.0% a wording never trained."
    assert "by format" not in page(results_frame([row("a", **{"reliability.raw": 0.9})]))["At what cost"]


def test_locality_is_told_by_all_its_measures():
    measures = {"locality_first": 0.9, "locality_kl": 0.25, "locality_exact": 0.1}
    cost = page(results_frame([row("a", **measures)]))["At what cost"]
    assert (
        "are still the most likely ones; 90.0% of the first tokens; 0.25 nats of divergence at the first token; "
        "10.0% of the answers are the same, word for word."
    ) in cost
    before = page(results_frame([row("a", locality_tf=0.9)]))["At what cost"]
    assert "80.0% of unrelated prompts are answered as before." in before, "an earlier version's"


def test_unrelated_answers_that_changed_in_substance_come_first():
    answers = [
        ("p1", "Leonardo da Vinci", "Leonardo", 0.2),
        ("p2", "Paris", "Rome", 0.6),
        ("p3", "Madrid", "", 0.9),
        ("p4", "Lima", "Lima, Peru", 0.1),
        ("p5", "Oslo", "Bergen", 0.4),
        ("p6", "Quito", "Quito", 1.0),
    ]
    outcomes = pd.DataFrame(
        [
            {"trial_id": "a", "edit_id": "e", "kind": "locality", "prompt": prompt, "format": "raw", "kept": kept}
            | {"expected": expected, "got": got, "correct": got == expected}
            for prompt, expected, got, kept in answers
        ]
    )
    (found,) = wrong_answers(outcomes, by_setting(study_results()), ["a"], 1)
    assert [answer["prompt"] for answer in found.groups[0].shown] == ["p5", "p2", "p3", "p4", "p1"]
    assert (found.groups[0].wrong, found.groups[0].total) == (5, 6)


def test_prompts_that_fail_are_told_apart_by_format_and_the_unseen_wording_from_all():
    outcomes = pd.DataFrame(
        [
            {"trial_id": "a", "edit_id": "e", "kind": kind, "prompt": "Q", "format": form, "expected": "x", "got": form}
            | {"correct": form == "raw", "kept": None}
            for kind in ("reliability", "generalization")
            for form in ("raw", "qa", "chat", "unseen")
        ]
    )
    (found,) = wrong_answers(outcomes, by_setting(study_results()), ["a"], 1)
    listed = {group.kind: [answer["format"] for answer in group.shown] for group in found.groups}
    assert listed == {"reliability": ["qa", "chat"], "generalization": ["qa", "chat"], "unseen": ["unseen"] * 2}
    assert [group.total for group in found.groups] == [3, 3, 2]
    got = page(results_frame([row("a")]), outcomes=outcomes)["Which edits fail"]
    assert "2 of 3 edit prompts do not get the new answer" in got and "Q qa" in got
    assert "2 of 2 prompts in a wording never trained" in got


def test_one_trial_no_trial_and_no_result_at_all():
    one = page(results_frame([row("a", 3)]))
    assert "Edit 3.mlp_down" in one["Which position"] and "only setting" in one["How sure"]
    for rows in ([], [failure("e")], [row("a", reliability=math.nan)]):
        got = page(results_frame(rows), outcomes=study_outcomes())
        assert "No trial gave a result" in got["Which position"]
        assert "How sure" not in got.sections and "What else is on the front" not in got.sections


def test_without_capability_it_speaks_of_what_there_is():
    bare = {
        name: math.nan
        for name in ("capability", "capability_change", "capability_change_low", "capability_change_high", "drift_kl")
    }
    rows = [row("a", 3, **bare), row("b", 4, generalization=0.8, **bare)]
    for item in rows:
        del item["capability.world"]
    got = page(results_frame(rows), STUDY | {"capability_source": None, "n_items": None}, baseline={})
    assert "Edit 4.mlp_down" in got["Which position"] and "capability change" not in got["Which position"]
    assert "Capability" not in got["What was asked"]
    assert "beats one of these in reliability without losing in generalization" in got["What else is on the front"]


def test_a_selection_tells_how_it_found_its_answer():
    rows = [
        row("a", 3, drift_kl=0.02),
        row("b", 4, drift_kl=0.2),
        row("c", 5, diverged=1),
        failure("d", layer=6),
        row("e", 7, drift_kl=0.3),
    ]
    runs = [
        {"trial_id": name, "position": f"{layer}.mlp_down", "learning_rate": 0.004, "seed": 0}
        for layer, name in enumerate("abcdx", 3)
    ]
    found = HowFound(
        how="The probe orders all positions.",
        command="locft edit m --position p.json",
        facts=(("Budget", "40 minutes"),),
        probe=tuple((layer, "mlp_down", 10.0**layer) for layer in range(30)),
        rungs=(("The survey", "the first of the probe", runs),),
    )
    got = page(results_frame(rows), found=found)
    assert "Budget40 minutes" in got["What was asked"] and "locft edit m --position p.json" in got["Which position"]
    assert "planned" not in got["What was asked"], "the grid was never to be run in full"
    told = got["How it was found"]
    assert "The probe orders all positions." in told and "3 of 30 that were probed" in told
    for part in (
        "3.mlp_down 0.004 0 90.0% 70.0% 0.02",
        "failed: out of memory",
        "7.mlp_down 0.004 0 – – – did not finish",
    ):
        assert part in told, part
    assert told.count("diverged") == 1 and told.count("the pick") == 1 + 1, "in the caption and at the run"
    nothing = page(results_frame([]), found=dataclasses.replace(found, unmeasured="Edit 3.mlp as a guess."))
    assert "Edit 3.mlp as a guess." in nothing["Which position"]


def test_a_comparison_has_both_studies_in_one_report():
    here = [row(f"a{layer}", layer, 0.9 + layer / 100, drift_kl=0.01 + layer / 100) for layer in range(6)]
    there = [row(f"a{layer}", layer, 0.9 + layer / 100, drift_kl=0.01 + (5 - layer) / 100) for layer in range(7)]
    got = page(
        results_frame(here),
        **compared_with(Measured(STUDY | {"name": "later"}, results_frame(there), BASELINE), results_frame(here)),
    )
    told = got["Compared with later"]
    for part in (
        "The pick moved: 1.mlp_down here, 6.mlp_down there.", "6.mlp_down has no result in layer-sweep.",
        "In later, 1.mlp_down against its own pick 6.mlp_down: reliability −5.0 points",
        "6 shared", "reliability 1.00 [1.00, 1.00] 0.0 points [0.0, 0.0]", "drift −1.00 [−1.00, −1.00]",
        "1.mlp_downpick here 91.0% 91.0% 70.0% 70.0% −1.0 −1.0 0.02 0.05", "Pick 1.mlp_down 6.mlp_down",
    ):  # fmt: skip
        assert part in told, part
    assert "later: a6" in got["All trials"] and "13 trials" in got["All trials"]
    apart = Measured(
        STUDY | {"name": "other", "n_items": 10}, results_frame([row("a", 40, layers=60, module="mlp")]), {}
    )
    told = page(results_frame(here), **compared_with(apart, results_frame(here)))["Compared with other"]
    assert "Capability was measured on different items" in told and "share no position" in told


def test_studies_of_other_depths_are_matched_by_relative_depth():
    here = results_frame([row(f"a{layer}", layer, layers=5) for layer in range(5)])
    there = results_frame([row(f"b{layer}", layer, layers=9, batch_size=8) for layer in range(9)])
    found = compare(Measured(STUDY, here, {}), Measured(STUDY | {"name": "other"}, there, {}))
    assert [(a["layer"], b["layer"]) for a, b in found.shared] == [(layer, 2 * layer) for layer in range(5)]
    said = cautions(found)
    assert "relative depth" in said[0] and "batch size (32 here, 8 there)" in said[1]
    assert moved(found)[0].startswith("The pick did not move") and found.agreements[0].difference[0] == 0


OTHER = {"edits": "b"}


@pytest.mark.parametrize(
    ("study", "values", "said"),
    [
        (
            {"edits_source": "b.json", "fingerprints": OTHER},
            {},
            "here 100 edits from atlas; there 100 edits from b.json",
        ),
        ({"fingerprints": OTHER}, {}, "same edits (100 edits from atlas, but not the same)"),
        ({"edits_source": "copy.json"}, {}, None),
        ({"edits_asked": 10}, {}, "(here 100 edits from atlas; there 100 edits from atlas, 10 of them asked)"),
        ({"edits_asked": 5000}, {}, None),
        ({"ask_formats": ("raw", "qa", "unseen")}, {}, "different formats (here raw; there raw, qa)"),
        ({"prose_tokens": 64}, {}, "(here up to 2,048 tokens of the built-in prose; there up to 64 tokens of the"),
        ({"fingerprints": {"prose": "b"}}, {}, "different prose (up to 2,048 tokens of the built-in prose, but not"),
        ({"fingerprints": {"items": "b"}}, {}, "different items (probes, but not the same), so changes of capability"),
        ({"capability_source": "a copy"}, {}, None),
        ({}, {"epochs": 100}, "The studies differ in epochs (25 here, 100 there)."),
        ({}, {"dtype": "bfloat16"}, "The studies differ in dtype (float32 here, bfloat16 there)."),
        ({}, {"precision": "bfloat16"}, "The studies differ in precision (float32 here, bfloat16 there)."),
        ({}, {"learning_rate": 0.1}, "(0.004 here, 0.1 there); each position is represented by its best setting."),
    ],
)
def test_a_comparison_says_what_was_measured_otherwise(study, values, said):
    plain = {"dtype": "float32", "precision": "float32"}
    tables = [results_frame([row("a", 1, **one), row("b", 2, **one)]) for one in (plain, plain | values)]
    about = STUDY | {"edits_asked": 1000, "ask_formats": ("raw",), "prose_tokens": 2048}
    hashes = {"edits": "a", "items": "a", "prose": "a"}
    abouts = (about | one | {"fingerprints": hashes | one.get("fingerprints", {})} for one in ({}, study))
    found = compare(*(Measured(one, table, BASELINE) for one, table in zip(abouts, tables, strict=True)))
    told = cautions(found)
    assert [said in one for one in told] == [True] if said else told == []
    assert found.capability == ("items" not in study.get("fingerprints", {}))


def test_the_picks_of_both_studies_are_ringed():
    results = results_frame([row("a", 1), row("b", 2, 0.5)])
    found = compare(Measured(STUDY, results, BASELINE), Measured(STUDY | {"name": "later"}, results, BASELINE))
    rings = [one for one in json.loads(comparison_plot(found).data)["data"] if one["name"].startswith("pick")]
    assert [one["name"] for one in rings] == ["pick", "pick of later"] and found.picks[1].trial_id == "later: a"


def test_only_name_and_model_are_needed():
    got = page(study={"name": "n", "model": "m"}, baseline={})
    assert "4 trials done, 1 failed" in got["What was asked"]


def test_nothing_a_user_wrote_becomes_markup():
    names = ("name", "model", "edits_source", "capability_source", "settings_yaml", "started", "finished")
    study = STUDY | {name: EVIL for name in names} | {"findings": [EVIL], "environment": {EVIL: EVIL}}
    rows = [
        row("a" + EVIL, 3, module=EVIL, pipeline=EVIL, run_id="r"),
        row("b", 4, **{"capability." + EVIL: 0.5}),
        failure("c", EVIL),
    ]
    outcomes = pd.concat(
        [study_outcomes(trial).assign(prompt=EVIL, expected=EVIL, got=EVIL) for trial in ("a" + EVIL, "b")]
    )
    text = render_report(study, results_frame(rows), baseline=BASELINE, outcomes=outcomes)
    # outside of the data scripts no tag of theirs; inside nothing that ends them
    assert "<script>alert" not in re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.S)
    clean = Page(render_report(STUDY, study_results(), baseline=BASELINE, outcomes=study_outcomes()))
    kinds = {tag for tag, _ in clean.tags}
    assert {tag for tag, _ in Page(text).tags} <= kinds
    assert not any(name.startswith("on") for _, attributes in Page(text).tags for name in attributes)
    scripts = re.findall(r"<script[^>]*>", text)
    plots = text.count('<script type="application/json"')
    assert len(scripts) == plots + 3, "with the packed plotly.js and the page's own"
    assert text.count("</script>") == len(scripts)
    for data in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, flags=re.S):
        assert not re.search("<[/!sS]", data)


def test_the_page_is_one_file_that_loads_nothing():
    text = render_report(STUDY, study_results(), baseline=BASELINE)
    assert len(text.encode()) < 6_000_000
    packed = re.findall(r'<script type="application/gzip" id="plotly">(.*?)</script>', text)
    assert len(packed) == 1 and gzip.decompress(base64.b64decode(packed[0])).count(b"plotly.js v") == 1
    got = Page(re.sub(r"<script>.*?</script>", "", text, flags=re.S))
    assert got.links and all(link.startswith("#") for link in got.links)
    assert {link[1:] for link in got.links} <= set(got.ids) and len(got.ids) == len(set(got.ids))
    assert "@import" not in text.split("</style>")[0] and "url(" not in text.split("</style>")[0]


def test_ten_thousand_trials_compared_with_as_many_stay_under_six_megabytes(monkeypatch):
    monkeypatch.setattr("analysis.page.report.what_matters", lambda results: what_matters(results.head(200)))

    def many(shift):
        grid = itertools.product(
            range(30), ("mlp_down", "mlp_up", "mlp", "attn", "layer"), range(33), ("breadth", "depth")
        )
        rows = [
            row(
                f"{i:015x}{shift}", layer, (0.5 + (i * 37 % 997) / 2000) - shift / 50, (i * 61 % 499 - 400) / 4000, module=module,
                pipeline=f"{pipeline}_first", learning_rate=1e-4 * (1 + rate), run_id=f"{i:032x}", locality=i * 13 % 101 / 101,
                epoch_losses=[3.0 / (1 + epoch) + i / 1e5 for epoch in range(25)],
            )
            for i, (layer, module, rate, pipeline) in enumerate(grid)
        ]  # fmt: skip
        rows += [failure(f"failed{i}-{shift}", layer=i, learning_rate=1.0) for i in range(30)]
        return results_frame([*rows, row(f"diverged{shift}", 3, math.nan, diverged=1, learning_rate=2.0)])

    results, then = many(0), many(1)
    assert len(results) > 9900
    other = Measured(STUDY, then, BASELINE)
    text = render_report(STUDY, results, baseline=BASELINE, **compared_with(other, results))
    assert len(text.encode()) < 6_000_000
    got = Page(re.sub(r"<script>.*?</script>", "", text, flags=re.S))
    table, figures = got["All trials"], got["Figures"]
    assert f"The first {MAX_ROWS} of 19,862" in table
    assert "8,900 more settings are not drawn" in figures and "Compared with layer-sweep (other run)" in got.sections
    front = json.loads(re.search(r'data-for="plot-front">(.*?)</script>', text, flags=re.S)[1])
    drawn = {trial for trace in front["data"] for trial in trace.get("customdata", ())}
    known = json.loads(re.search(r'id="explore-data">(.*?)</script>', text, flags=re.S)[1])
    assert drawn.issuperset(ranked(by_setting(results))["trial_id"][:200])
    assert len(known["settings"]) == 9900 and len(drawn) == 1000


# in a browser


def browsed_results():
    """Sixty settings that trade reliability for drift, generalization and, from the middle on, capability; one in four has
    no drift or no capability."""
    rows = [
        row(
            f"t{i}", i % 30, 0.5 + i / 130, -i / 3000, module=("mlp_down", "attn")[i // 30], drift_kl=(i % 7) / 150 + i / 1000,
            generalization=0.4 + (i * 17 % 23) / 50, seconds_per_edit=0.1 + i % 3,
        )
        for i in range(60)
    ]  # fmt: skip
    for i in range(0, 60, 8):
        rows[i]["drift_kl"] = math.nan
        rows[i + 3] |= dict.fromkeys(("capability_change", "capability_change_low", "capability_change_high"), math.nan)
    rows += [row(f"p{i}", i, batch_size=1, pipeline=("breadth_first", "depth_first")[i % 2]) for i in range(4)]
    rows += [row(f"q{i}", i, batch_size=1, pipeline=("depth_first", "breadth_first")[i % 2]) for i in range(4)]
    return results_frame(rows)


@pytest.fixture
def opened(tabs, tmp_path):  # noqa: F811
    """Opens a report at a width."""

    def open_report(width, results=None, **options):
        results = browsed_results() if results is None else results
        outcomes = study_outcomes(recommend(results).trial_id).assign(prompt="An unusually long prompt " * 8)
        options = {"outcomes": outcomes} | options
        file = tmp_path / "report.html"
        file.write_text(render_report(STUDY, results, baseline=BASELINE, **options), encoding="utf-8")
        return tabs(file, width)

    return open_report


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS)
def test_it_draws_every_figure_offline_and_does_not_scroll_sideways(opened, width):
    tab = opened(width)
    assert_it_fits(tab, width)
    assert tab.locator("figure").count() == 8
    assert tab.locator("#plot-front .scatterlayer .point").count() >= 60
    assert tab.locator("#plot-map-reliability .hm image").count() == 1
    assert tab.locator("#plot-losses .scatterlayer path.js-line").count() >= 2
    assert tab.locator("#plot-front .errorbar").count() >= 2, "intervals of the front"


@pytest.mark.browser
def test_the_table_sorts_by_keyboard_with_absent_values_last(opened, monkeypatch):
    known = MeasuredAgain(
        {"t0": 0.5, "t1": 0.004, "t2": 0.998}, dict.fromkeys(browsed_results()["trial_id"], 0.0), True
    )
    monkeypatch.setattr("analysis.page.report.measured_again", lambda *_: known)
    tab = opened(1280)
    tab.locator("#trials + details > summary").click()
    column = tab.locator("#all-trials thead th").filter(has_text="reliability")
    index = column.evaluate("cell => cell.cellIndex")

    def values():
        cells = tab.locator(f"#all-trials tbody td:nth-child({index + 1})").all_inner_texts()
        return [float(cell.split("%")[0]) for cell in cells]

    column.locator("button").focus()
    tab.keyboard.press("Enter")
    assert column.get_attribute("aria-sort") == "descending" and values() == sorted(values(), reverse=True)
    tab.keyboard.press("Enter")
    assert column.get_attribute("aria-sort") == "ascending" and values() == sorted(values())

    column = tab.locator("#all-trials thead th").filter(has_text="on front")
    index = column.evaluate("cell => cell.cellIndex")
    column.locator("button").focus()
    tab.keyboard.press("Enter")
    chances = tab.locator(f"#all-trials tbody td:nth-child({index + 1})").all_inner_texts()
    assert chances[:4] == [">99%", "50%", "<1%", "–"]


@pytest.mark.browser
def test_hovering_a_mark_names_its_trial(opened):
    tab = opened(1280)
    tab.locator("#plot-front").scroll_into_view_if_needed()
    tab.evaluate("Plotly.Fx.hover('plot-front', [{curveNumber: 1, pointNumber: 0}])")
    assert "0.mlp_down" in tab.locator("#plot-front .hovertext").first.text_content()


@pytest.mark.browser
def test_the_floor_moves_the_pick_as_the_rule_does_and_filters_reach_every_figure(opened):
    tab = opened(1280)
    results = browsed_results()

    def shown_pick():
        tab.wait_for_timeout(60)
        return tab.locator("#floor-pick").get_attribute("data-pick")

    def expect(floor, keep=slice(None)):
        found = recommend(results[keep], floor)
        assert shown_pick() == (found.trial_id if found else ""), floor

    def expect_ruled(keep):
        """Without a floor: of what is shown, the settings that are reliable in the whole study."""
        rows = ranked(by_setting(results))
        kept = results[keep & results["trial_id"].isin(rows["trial_id"][rows["reliable"]])]
        assert shown_pick() == recommend(kept, 0.0).trial_id

    def pull(name, value):
        tab.locator(name).evaluate(
            "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", value
        )

    assert shown_pick() == recommend(results).trial_id, "untouched it is the rule's own"
    for percent in (0, 55.5, 72.3, 90, 95.3, 96.9):
        pull("#floor", percent)
        expect(min(percent, 95.3) / 100)  # the slider ends at the best, 95.38%
    pull("#floor", 60)
    tab.locator("#floor").focus()
    tab.keyboard.press("ArrowRight")
    tab.wait_for_timeout(60)
    assert "60.1%" in tab.locator("#floor-value").inner_text()

    tab.get_by_role("checkbox", name="attn").uncheck()
    expect(0.601, results["module"] == "mlp_down")
    pull("#from-layer", 10)
    pull("#to-layer", 20)
    kept = (results["module"] == "mlp_down") & results["layer"].between(10, 20)
    expect(0.601, kept)
    assert tab.locator("#all-trials tbody tr:not([hidden])").count() == kept.sum() == 11
    drawn = "name => document.getElementById(name).data.flatMap(t => t.z ? t.z.flat() : t.customdata ? t.y : [])"
    for name in ("plot-front", "plot-map-reliability"):
        assert len([y for y in tab.evaluate(drawn, name) if y is not None]) == 11, name
    assert tab.evaluate("document.getElementById('plot-parallel').data[0].line.color.length") == 11
    assert tab.evaluate("document.getElementById('plot-front').data.at(-1).x[0]") == pytest.approx(
        recommend(results[kept], 0.601).metrics["reliability"], abs=1e-5
    )

    for percent in (0, 55.5, 66, 72.3):
        pull("#floor", percent)
        expect(percent / 100, kept)
    tab.get_by_role("button", name="Reset", exact=True).click()
    assert shown_pick() == recommend(results).trial_id
    plot = tab.locator("#plot-map-reliability .nsewdrag").first
    tab.evaluate("document.getElementById('plot-map-reliability').scrollIntoView({block: 'center'})")
    box = plot.bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 0.52, box["y"] + box["height"] * 0.6)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] * 0.98, box["y"] + box["height"] * 0.9, steps=4)
    tab.mouse.up()
    expect_ruled((results["module"] == "attn") & (results["layer"] >= 15))
    assert tab.complaints == []


@pytest.mark.browser
def test_a_frame_keeps_the_layers_of_its_map_beside_those_of_another_study_and_the_floor_ends_at_the_best(opened):
    results = results_frame(
        [row(f"t{layer}", layer, 29 / 30 - (20 - layer) / 40, n_edits=30) for layer in (10, 15, 20)]
    )
    later = Measured(
        STUDY | {"name": "later"}, results_frame([row(f"u{layer}", layer) for layer in range(30)]), BASELINE
    )
    tab = opened(1280, results, **compared_with(later, results))
    tab.locator("#floor").evaluate("slider => { slider.value = slider.max; slider.dispatchEvent(new Event('input')); }")
    tab.wait_for_timeout(60)
    assert tab.locator("#floor-value").inner_text() == "96.6%", "29 of 30, and not more"
    assert tab.locator("#floor-pick").get_attribute("data-pick") == "t20"
    tab.evaluate("document.getElementById('plot-map-reliability').scrollIntoView({block: 'center'})")
    box = tab.locator("#plot-map-reliability .nsewdrag").first.bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.3)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] * 0.98, box["y"] + box["height"] * 0.8, steps=4)
    tab.mouse.up()
    tab.get_by_text("15 to 20", exact=True).wait_for(timeout=5_000)
    assert tab.complaints == []


@pytest.mark.browser
def test_the_pick_of_the_floor_leads_to_the_edits_that_fail_there(opened):
    results = browsed_results()
    lower = recommend(results, 0.6).trial_id
    tab = opened(1280, outcomes=study_outcomes(lower))
    assert tab.locator("#floor-pick a").count() == 0, "the answers of the rule's own pick are not known here"
    tab.locator("#floor").evaluate("slider => { slider.value = 60; slider.dispatchEvent(new Event('input')); }")
    link = tab.locator("#floor-pick a")
    link.wait_for()
    answer = tab.get_by_text("Lyon")
    tab.locator("details.trial").evaluate("details => { details.open = false; }")
    assert not answer.is_visible()
    link.focus()
    tab.keyboard.press("Enter")
    assert answer.is_visible() and tab.locator("details.trial").bounding_box()["y"] < 900


@pytest.mark.browser
def test_a_range_along_an_axis_filters_the_other_figures_also_after_axes_were_moved(opened):
    tab = opened(1280)
    marks = "document.getElementById('plot-front').data.flatMap(t => t.customdata ? t.y : []).filter(y => y !== null).length"
    drawn = tab.evaluate(marks)

    def brush(name, ranges):
        tab.evaluate(
            """([name, ranges]) => { const plot = document.getElementById('plot-parallel'), axes = plot.data[0].dimensions;
            const key = `dimensions[${axes.findIndex(axis => axis.label === name)}].constraintrange`;
            return Plotly.restyle(plot, {[key]: ranges}, [0]); }""",
            [name, ranges],
        )
        tab.wait_for_timeout(100)

    def shown(trials):
        return tab.locator("#all-trials tbody tr:not([hidden])").count() == trials

    results = browsed_results()
    tab.locator("#floor").evaluate("slider => { slider.value = 60; slider.dispatchEvent(new Event('input')); }")
    brush("layer", [[9.5, 20.5]])
    inside = results[results["layer"].between(10, 20)]
    assert tab.evaluate(marks) == len(inside) == 22 and shown(22)
    assert tab.locator("#floor-pick").get_attribute("data-pick") == recommend(inside, 0.6).trial_id
    assert tab.evaluate("document.getElementById('plot-parallel').data[0].line.color.length") == drawn, (
        "its own lines stay"
    )
    tab.evaluate(
        """() => { const plot = document.getElementById('plot-parallel'), axes = plot.data[0].dimensions;
        return Plotly.restyle(plot, {dimensions: [[...axes].reverse()]}, [0]); }"""
    )
    tab.get_by_role("checkbox", name="attn").uncheck()
    tab.wait_for_timeout(100)
    assert tab.evaluate(marks) == 11 and shown(11)
    axes = tab.evaluate("document.getElementById('plot-parallel').data[0].dimensions.map(a => [a.label, a.values])")
    assert max(dict(axes)["layer"]) == 29 and max(dict(axes)["reliability"]) <= 1, "values stay with their axes"
    tab.get_by_role("button", name="Reset", exact=True).click()
    tab.wait_for_timeout(100)
    assert tab.evaluate(marks) == drawn and shown(len(results)) and tab.complaints == []


@pytest.mark.browser
def test_a_browser_that_cannot_unpack_the_figures_says_so_and_the_controls_still_filter_the_tables(browser, tmp_path):  # noqa: F811
    file = tmp_path / "report.html"
    file.write_text(render_report(STUDY, browsed_results(), baseline=BASELINE), encoding="utf-8")
    context = browser.new_context(offline=True)
    context.add_init_script("delete window.DecompressionStream")
    tab = context.new_page()
    tab.goto(file.as_uri())
    tab.get_by_text("The figures are not drawn").wait_for()
    assert not tab.locator("figure:visible").count()
    tab.get_by_role("checkbox", name="attn").uncheck()
    tab.get_by_text("38 of 68 settings shown").wait_for()
    context.close()


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS)
def test_two_dates_of_a_study_side_by_side(opened, width):
    results = browsed_results()
    later = results.assign(
        reliability=results["reliability"] - 0.02,
        drift_kl=results["drift_kl"] * (1 + results["layer"].astype("float64")),
    )
    tab = opened(width, **compared_with(Measured(STUDY | {"started": "2026-05-01 10:00"}, later, BASELINE), results))
    assert_it_fits(tab, width)
    assert tab.get_by_role("heading", name="Compared with layer-sweep (other run)").is_visible()
    section = tab.locator("section", has=tab.locator("#compared"))
    assert "The pick" in section.inner_text() and "2026-05-01" in section.locator("table").first.inner_text()
    marks = "document.getElementById('plot-compared-fronts').data.flatMap(t => t.customdata ? t.y : []).filter(y => y !== null).length"
    assert tab.evaluate(marks) == 2 * 60, "eight of 68 have no capability"
    tab.get_by_role("checkbox", name="attn").uncheck()
    tab.wait_for_timeout(100)
    assert tab.evaluate(marks) == 2 * 34
