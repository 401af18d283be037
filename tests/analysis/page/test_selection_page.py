"""The page of a selection: what it says, and that it can be read in a browser, at a desk and on a phone."""

import re

import pytest

from analysis.stats.choice import FAILED, Outcome
from analysis.page.selection_page import Ranked, RungRun, render_selection
from tests.browsing import WIDTHS, assert_it_fits, browser, tabs  # noqa: F401

MODULES = ("mlp_down", "mlp_up", "mlp", "attn", "layer")
PICK = Outcome(0.98, 0.02, 0.61, 0.05, -0.004, 0.009, 0.062, 0.006)
NEXT = Outcome(0.97, 0.02, 0.58, 0.05, 0.002, 0.009, 0.055, 0.006)
EVIL = "<script>alert('x')</script>&"
ABOUT = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "pick": {"position": "9.mlp", "rate": "0.001"},
    "lead": "For 100 edits like those of a_rather_long_name_of_a_file.jsonl, found with 9.1% of the full grid's cost.",
    "command": "locft edit HuggingFaceTB/SmolLM2-135M-Instruct --edits a_rather_long_name_of_a_file.jsonl --position"
    " select-SmolLM2-135M-Instruct-a_rather_long_name_of_a_file.json --out edited",
    "settings": "breadth-first, 10 edits a step, at most 25 epochs, Adam, loss averaged by edit",
    "level_edits": 100,
    "how": "The probe reads gradients of the unedited model.",
    "caveat": None,
    "facts": [("Model", "HuggingFaceTB/SmolLM2-135M-Instruct, fingerprint " + "f" * 64), ("Cost", "17 runs, 41 min in all")],
    "settings_yaml": "name: select\n",
}


def selection(**changes):
    ranking = [
        Ranked("9.mlp", 9, "mlp", 0.001, 2, PICK, 0.62),
        Ranked("12.mlp_down", 12, "mlp_down", 0.002, 1, NEXT, 0.3),
        Ranked("29.attn", 29, "attn", 0.004, 1, FAILED, 0.0),
    ]
    runs = [RungRun("9.mlp", 0.001, seed, True, PICK, "the pick", True) for seed in (0, 1)]
    runs += [
        RungRun("29.attn", 0.004, 0, True, FAILED, "", False),
        RungRun("3.layer", 0.004, 0, False, None, "did not finish", False),
    ]
    probe = [(layer, module, 10.0 ** (place - layer / 10)) for place, module in enumerate(MODULES) for layer in range(30)]
    given = {"ranking": ranking, "rungs": [("The survey", "the best first", runs)], "probe": probe} | changes
    return render_selection(ABOUT | given.pop("about", {}), **given)


def words(page):
    return " ".join(re.sub("<[^>]+>", " ", re.sub("<(script|style).*?</\\1>", "", page, flags=re.S)).split())


def test_it_says_where_to_edit_what_to_expect_and_what_else_was_close():
    said = words(selection(plotly_js=False))
    for part in (
        "Edit 9.mlp with learning rate 0.001 .", "98.0% of the edits [93%, 99%]", "61.0% of the rephrased [51%, 70%]",
        "−0.4 points [−2.2, +1.4]", "0.062 nats per token [0.0502, 0.0738]", "9.mlp pick rate 0.001 62.0% 98.0% [93.0, 99.4] 61.0% [51.2, 70.0] −0.4 [−2.2, +1.4] 0.062 2",
        "12.mlp_down rate 0.002 30.0%", "29.attn rate 0.004 0% – – – diverged 1", "29.attn 0.004 0 0% 0% diverged", "3.layer 0.004 0 not finished", "did not finish",
    ):  # fmt: skip
        assert part in said, part


def test_without_a_run_that_finished_there_is_no_position():
    said = words(selection(ranking=[], rungs=[], probe=[], about={"pick": None}, plotly_js=False))
    assert "No run finished, so there is no position to recommend." in said and "What to expect" not in said


def test_nothing_a_user_wrote_becomes_markup():
    page = selection(
        about={name: EVIL for name in ("model", "lead", "command", "settings", "how", "settings_yaml")},
        ranking=[Ranked("9." + EVIL, 9, EVIL, 0.001, 1, PICK, 1.0), Ranked("8." + EVIL, 8, EVIL, 0.001, 1, NEXT, 0.0)],
        probe=[(9, EVIL, 1.0), (8, EVIL, 2.0)],
        plotly_js=False,
    )
    assert "<script>alert" not in page


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS)
def test_it_draws_offline_and_fits(tabs, tmp_path, width):  # noqa: F811
    file = tmp_path / "select.html"
    file.write_text(selection(), encoding="utf-8")
    assert file.stat().st_size < 6_000_000
    tab = tabs(file, width)
    assert_it_fits(tab, width)
    assert tab.get_by_text("Edit 9.mlp with learning rate").is_visible()
    assert tab.locator("#plot-probe .hm image").count() == 1
    assert tab.locator("#plot-trade .errorbar path").count() == 4, "two settings, both intervals"
    for name in ("probe", "trade"):  # inside its frame, whatever the width
        plot, frame = (tab.locator(f"#plot-{name}{inner}").bounding_box() for inner in (" .main-svg >> nth=0", ""))
        assert plot["x"] >= frame["x"] - 1 and plot["x"] + plot["width"] <= frame["x"] + frame["width"] + 1
    tab.locator("body").press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
