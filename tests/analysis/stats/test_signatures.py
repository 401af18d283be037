"""Failure signatures: each on a small table made by hand, none on a healthy one, and the command that each ends in."""

import shlex

import pytest

from analysis.stats.pick import recommend
from analysis.stats.signatures import CORRECTED, WORDING, signatures
from analysis.stats.table import pack_right, results_frame

WORDS = ("locft", "sweep", "mine.yaml")


def row(trial_id="a", layer=0, **values):
    """A trial that is all right."""
    base = {
        "trial_id": trial_id, "status": "done", "layers": 4, "layer": layer, "module": "mlp_down", "seed": 0,
        "pipeline": "breadth_first", "batch_size": 8, "learning_rate": 0.004, "n_edits": 40, "diverged": 0, "epochs": 25,
        "dtype": "bfloat16", "method": "low_curvature", "train_formats": "raw,qa,chat", "prefix_share": 0.5,
        "reliability": 1.0, "reliability.raw": 1.0, "reliability.qa": 1.0, "reliability.chat": 1.0,
        "reliability.unseen": 0.85, "generalization": 0.6, "locality": 0.75, "drift_kl": 0.02, "capability": 0.6,
        "capability_change": -0.01, "capability_change_low": -0.03, "capability_change_high": 0.01,
        "seconds_per_edit": 1.0, "epochs_run": 20, "epoch_losses": [4.0, 1.0, 0.2, 0.01], "train_loss": 0.01,
        "trained_loss": 0.01, "merged_loss": 0.012,
    }  # fmt: skip
    return base | values


def seen(*rows, findings=None, fixed=()):
    results = results_frame(list(rows))
    baseline = {"capability": 0.61}
    return signatures(results, recommend(results), baseline=baseline, findings=findings or {}, fixed=fixed)


def only(*rows, **about):
    (found,) = seen(*rows, **about)
    return found


def test_nothing_is_said_of_what_is_all_right():
    assert seen(row()) == ()
    assert seen(row("a"), row("b", 1, reliability=0.2), row("c", 2, status="failed")) == (), "the pick is what counts"
    assert seen(row(**dict.fromkeys(("locality", "capability", "capability_change", "generalization"), None))) == ()
    plain = {name: None for name in ("reliability.qa", "reliability.chat", "reliability.unseen")}
    assert seen(row(train_formats="raw", **plain)) == ()


def test_nothing_is_said_of_nothing():
    assert signatures(results_frame([]), None) == ()
    assert seen(row(status="failed")) == ()


LEARNING = {"epoch_losses": [4.0, 3.0, 2.0, 1.5], "epochs_run": 25, "trained_loss": 1.4, "merged_loss": 1.4}
STUCK = LEARNING | {"epoch_losses": [4.0, 1.5, 1.5, 1.5]}
FORMATS = ("reliability.raw", "reliability.qa", "reliability.chat", "reliability.unseen")
LOW = {"reliability": 0.5} | dict.fromkeys(FORMATS, 0.5)
UNPRICED = {"method": "natural_gradient", "curvature_strength": 0.0}
LEFT = {"capability": 0.5, "capability_change": -0.11}


@pytest.mark.parametrize(
    ("name", "values", "setting", "value", "text"),
    [
        ("capability fell", LEFT | {"method": "full"}, "method", "natural_gradient", "61.0% to 50.0%, by 18.0% of it"),
        ("capability fell", LEFT | {"method": "lora"}, "method", "natural_gradient", "61.0%"),
        ("capability fell", LEFT, "curvature_strength", 30.0, "61.0%"),
        ("locality lost", {"locality": 0.4, "method": "full"}, "method", "natural_gradient", "40.0%"),
        ("locality lost", {"locality": 0.4}, "guard", "same_relation", "40.0%"),
        ("locality lost", {"locality": 0.4, "guard": "prose"}, "curvature_strength", 30.0, "40.0%"),
        ("low reliability", LOW | STUCK | {"method": "natural_gradient"}, "curvature_strength", 3.3, "50.0%"),
        ("low reliability", LOW | STUCK | UNPRICED, "epochs", 50, "50.0%"),
        ("low reliability", LOW | LEARNING, "epochs", 50, "50.0%"),
        ("low reliability", LOW | STUCK, "curvature_strength", 3.3, "50.0%"),
        ("low reliability", LOW | STUCK | {"method": "norm_bounded"}, "norm_bound", 0.005, "50.0%"),
        ("low reliability", LOW | STUCK | {"method": "lora", "rank": 4}, "rank", 16, "50.0%"),
        ("low reliability", LOW | STUCK | {"method": "full"}, "learning_rate", 0.008, "50.0%"),
        (
            "low reliability",
            LOW | STUCK | {"method": "full", "epoch_losses": [4.0, 0.5, 2.0]},
            "learning_rate",
            0.002,
            "50.0%",
        ),
        ("low reliability", LOW | {"merged_loss": 1.2}, "dtype", "float32", "50.0%"),
        ("low reliability", LOW | {"merged_loss": 1.2, "dtype": "float32"}, "epochs", 50, "50.0%"),
        ("low reliability", LOW | {"merged_loss": 1.2, "further_steps": 300}, "further_steps", 30, "50.0%"),
        ("capability fell", LEFT | UNPRICED, "curvature_strength", 10.0, "61.0%"),
        ("locality lost", {"locality": 0.4, "further_steps": 8}, "further_steps", 0, "40.0%"),
        ("low reliability", LOW, "epochs", 50, "50.0%"),
        ("low reliability", LOW | {"train_formats": "raw,chat"}, "train_formats", "raw,chat,qa", "50.0%"),
        (
            "low generalization",
            {"generalization": 0.4, "train_formats": "raw"},
            "train_formats",
            "raw,qa,chat",
            "40.0%",
        ),
        ("low generalization", {"generalization": 0.4, "prefix_share": 0}, "prefix_share", 0.5, "40.0%"),
        ("low generalization", {"generalization": 0.4}, "layer", "all", "40.0%"),
        ("low generalization", {"generalization": 0.4, "layers": 1}, "batch_size", 16, "40.0%"),
        (
            "one format lost",
            {"reliability.chat": 0.02, "train_formats": "raw"},
            "train_formats",
            "raw,chat",
            "2.0% in chat, and 100% in raw",
        ),
        ("one format lost", {"reliability.qa": 0.7}, "epochs", 50, "70.0% in Q/A"),
        (
            "one format lost",
            {"reliability.unseen": 0.5, "train_formats": "raw,qa"} | {"reliability.chat": None},
            "train_formats",
            "raw,qa,chat",
            "50.0% in a wording never trained",
        ),
        (
            "one format lost",
            {"reliability.unseen": 0.5},
            "train_formats",
            "raw,qa,chat,Answer briefly: {prompt}",
            "50.0% in a wording never trained",
        ),
        (
            "one format lost",
            {"reliability.unseen": 0.5, "train_formats": f"raw,qa,chat,{WORDING}"},
            "epochs",
            50,
            "50.0% in a wording never trained",
        ),
    ],
)
def test_each_signature_names_one_setting(name, values, setting, value, text):
    found = only(row(**values))
    assert (found.name, found.setting, found.value) == (name, setting, value)
    assert text in found.seen and found.cause.endswith(".")
    assert found.value != recommend(results_frame([row(**values)])).settings[setting], "it changes something"
    assert "Rounding" not in found.cause or setting == "dtype"


def test_a_study_with_several_troubles_tells_them_all():
    found = seen(
        row(**LEFT, locality=0.1, generalization=0.1, method="full"), row("b", 1, diverged=1, learning_rate=0.1)
    )
    names = ["training diverged", "capability fell", "low generalization", "locality lost"]
    assert [one.name for one in found] == names


def test_a_divergence_is_the_rates_or_the_positions():
    gone = {"diverged": 1, "reliability": 0.0}
    found = only(row("a"), row("b", 1, learning_rate=0.02, **gone), row("c", 2, learning_rate=0.05, **gone))
    assert (found.name, found.setting, found.value) == ("training diverged", "learning_rate", 0.004)
    assert found.seen.startswith("2 of 3 finished trials diverged") and "at least 0.02" in found.cause
    assert only(row("a"), row("b", 1, **gone)).value == 0.001, "the same rate is fine elsewhere"
    assert only(row("b", **gone)).value == 0.001, "nothing was left to pick"
    chosen = only(row("a"), row("b", 1, **gone), fixed=("learning_rate",))
    assert (chosen.setting, chosen.value) == ("batch_size", 16)


def test_edits_fight_where_they_contradict_each_other():
    found = only(row(), findings={"contradictions": 4, "duplicates": 1, "reachable": 0.95})
    assert (found.name, found.setting, found.value) == ("edits fight each other", "edits.source", CORRECTED)
    assert "4 edits" in found.seen and "95.0%" in found.cause
    assert seen(row(), findings={"contradictions": 0, "duplicates": 3, "reachable": 1.0}) == ()


def test_edits_fight_where_later_ones_overwrite_earlier_ones():
    depth = {"pipeline": "depth_first", "epoch_losses": [0.009, 0.008, 0.007], "epochs_run": 1}
    found = only(row(**depth, trained_loss=1.9, reliability=0.85))
    assert (found.name, found.setting, found.value) == ("edits fight each other", "pipeline", "breadth_first")
    assert "0.008" in found.cause and "1.9" in found.cause
    both = seen(row(**depth, **LOW, trained_loss=1.9))
    assert {(one.name, one.setting) for one in both} == {
        ("low reliability", "pipeline"),
        ("edits fight each other", "pipeline"),
    }
    assert seen(row(**depth, trained_loss=0.02)) == ()


def test_edits_fight_where_every_setting_gets_the_same_ones_wrong():
    def answered(wrong):
        right = [edit not in wrong for edit in range(40)]
        return {"right": pack_right(right), "reliability": sum(right) / 40}

    rows = [row("a", 0, **answered({3, 7})), row("b", 1, **answered({3, 7, 8})), row("c", 2, **answered({3, 7}))]
    found = only(*rows)
    assert (found.name, found.setting, found.value) == ("edits fight each other", "batch_size", 16)
    assert found.seen == "The same 2 edits of 40 are answered wrong in all 3 settings."
    assert only(*(one | {"batch_size": 40} for one in rows)).setting == "epochs"
    assert seen(*rows[:2]) == (), "two settings may be alike by chance"
    assert seen(*rows, row("d", 3, **answered({4}))) == ()


def test_each_signature_ends_in_a_command_that_its_command_line_takes(tmp_path):
    from sweeps.study.reader import load_study

    found = [only(row(**values)) for values in (LEFT, {"reliability.unseen": 0.5}, {"generalization": 0.4}, LOW)]
    commands = [shlex.split(one.command(("locft", "sweep", "quickstart"))) for one in found]
    assert commands[0] == ["locft", "sweep", "quickstart", "--set", "space.curvature_strength=30.0"]
    for one, words in zip(found, commands):
        study = load_study(words[2], words[4:])
        holder = study if one.setting == "epochs" else study.space
        assert getattr(holder, one.setting) in (one.value, (one.value,))
    assert (
        found[1].edit_command(("locft", "edit", "M")).endswith("--train-formats 'raw,qa,chat,Answer briefly: {prompt}'")
    )
    assert found[3].edit_command(["locft", "edit", "M"]) == "locft edit M --epochs 50"
    again = ("locft", "sweep", "quickstart", "--set", "epochs=3")
    words = shlex.split(found[3].command(again))
    assert load_study(words[2], words[4::2]).epochs == 50, "what was set before is replaced"
    assert found[3].to_dict("do this")["command"] == "do this"
