"""A study of several numbers of edits, from the command to the report, and one of its trials made again."""

from tests.conftest import write_study


def test_a_study_of_several_numbers_of_edits(locft, workplace, tiny_folder, trials_here):
    edits = {"source": "fictitious", "limit": 5, "asked": 3}
    file = write_study(workplace, tiny_folder, edits=edits, space__layer=[0], space__edit_count=[2, 0])
    done = locft("sweep", file, "--no-register", "--out", "out.html", "--json")
    assert done.code == 0 and done.json["trials"]["done"] == 2
    assert "How many edits fit" in (workplace / "out.html").read_text(encoding="utf-8")

    from sweeps.notebook import load_results

    rows = load_results(str(file)).sort_values("bits_per_parameter").to_dict("records")
    assert [(row["edit_count"], row["n_edits"]) for row in rows] == [(2, 2), (0, 3)]
    assert 0 < rows[0]["bits_per_parameter"] < rows[1]["bits_per_parameter"]
    again = locft("edit", tiny_folder, "--from-run", rows[0]["run_id"], "--out", "again", "--json").json
    assert again["edits"]["count"] == 2 and again["metrics"]["delta_norm"] == rows[0]["delta_norm"]
    more = locft("plan", file, "--set", "space.edit_count=[6]")
    assert more.code == 2 and "got 6, but fictitious has 5 edits here" in more.err
