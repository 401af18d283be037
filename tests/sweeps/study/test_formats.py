"""Formats in a study: what is trained and what is asked, in one spelling, as far as the model's tokenizer has them."""

import pytest

from locft.errors import InputError
from sweeps.study.plan import make_plan
from sweeps.study.reader import load_study, study_from_yaml, study_to_yaml
from sweeps.study.resolve import prepare
from sweeps.study.schema import read_value
from tests.sweeps.study.test_plan import FACTS, make_study


def ids(study):
    return [trial.id for trial in make_plan(study, FACTS).trials]


def test_ids_do_not_depend_on_how_formats_are_written():
    one, other = ({"layer": 3, "train_formats": [text]} for text in ("raw,qa,chat", " chat , qa,raw,qa"))
    assert make_study(one) == make_study(other) and ids(make_study(one)) == ids(make_study(other))
    assert ids(make_study({"layer": 3, "train_formats": "raw"})) == ids(make_study({"layer": 3}))
    assert make_study(ask_formats="chat, raw") == make_study(ask_formats=["raw", "chat"])
    wording = "Answer, briefly: {prompt}, please"
    assert make_study({"train_formats": f"{wording},qa"}).space.train_formats == (f"qa,{wording}",)
    study = make_study({"train_formats": ["raw", f"raw,{wording}"]}, ask_formats=["unseen", "raw", wording])
    assert study_from_yaml(study_to_yaml(study)) == study
    gone = study_to_yaml(study).replace("space:", "space:\n  curvature_share: [0.0]\n  adam_basis: [weights]")
    assert study_from_yaml(gone) == study, "axes that are gone are read where they changed nothing"
    assert study.ask_formats == ("raw", "unseen", wording)


@pytest.mark.parametrize("text", ["{prompt} a,qa,b, {prompt}", "a {prompt} b, c {prompt},raw", "x, {prompt},y"])
def test_one_spelling_reads_back_as_itself(text):
    once = read_value("train_formats", text)
    assert read_value("train_formats", once) == once


def test_wrong_formats_are_told_with_all_other_problems(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\nspace:\n  train_formats: [rwa, 'raw,unseen', 3, 'raw,qa', 'qa, raw']\nask_formats: [raw, chta]\n"
    )
    with pytest.raises(InputError) as refused:
        load_study(str(file))
    said = "\n".join(refused.value.problems)
    assert "space.train_formats[0]: got 'rwa', expected raw, qa, chat or a text that contains {prompt}" in said
    assert "did you mean raw?" in said and "did you mean chat?" in said
    assert "space.train_formats[1]: got 'unseen', which is reserved for measurement" in said
    assert "space.train_formats[2]: got 3, expected text" in said
    assert "mine.yaml:4: ask_formats: got 'chta'" in said
    with pytest.raises(InputError, match=r'space.train_formats\[1\]: got "raw,qa" twice'):
        load_study("pipeline-check", ["space.train_formats=['raw,qa', 'qa, raw']"])
    for nothing in ("ask_formats=", "ask_formats=[]", "ask_formats=3", "ask_formats={a: 1}"):
        with pytest.raises(InputError, match="ask_formats: got"):
            load_study("pipeline-check", [nothing])
    with pytest.raises(InputError, match="expected raw"):
        read_value("train_formats", "q")


def test_only_other_formats_than_the_plain_one_make_other_data(study_file, chat_folder):
    def facts(*changes):
        return prepare(load_study(str(study_file(model=str(chat_folder))), changes)).facts

    plain, asked = facts(), facts("ask_formats=[raw, chat]")
    assert facts("ask_formats=raw").data_fingerprint == plain.data_fingerprint != asked.data_fingerprint
    assert asked.evaluation_tokens > plain.evaluation_tokens
    trained = facts("space.train_formats=[raw, 'raw,chat,Say: {prompt}']")
    assert trained.data_fingerprint == plain.data_fingerprint
    chat, wording = (trained.row_sizes[name] for name in ("chat", "Say: {prompt}"))
    assert chat > wording > 1
    assert trained.row_size("raw,chat,Say: {prompt}") == pytest.approx((1 + chat + wording) / 3)


def test_what_the_tokenizer_lacks_is_left_out_and_said(study_file, tiny_folder):
    changes = ("ask_formats=[raw, qa, chat]", "space.train_formats=[chat, raw, 'raw,qa,chat']")
    prepared = prepare(load_study(str(study_file()), changes))
    assert prepared.inputs.study.ask_formats == ("raw", "qa", "unseen")
    assert [trial.train_formats for trial in prepared.plan.trials] == ["raw", "raw,qa"] * 2
    (said,) = prepared.notices
    assert said.startswith(f"space.train_formats and ask_formats: the tokenizer of {tiny_folder} has no chat template")
    alone = prepare(load_study(str(study_file()), ["ask_formats=chat"]))
    assert alone.study.ask_formats == ("raw",) and alone.notices[0].startswith("ask_formats: the tokenizer")
    assert alone.facts.data_fingerprint == prepare(load_study(str(study_file()))).facts.data_fingerprint


def test_what_is_not_read_of_a_capability_file_is_said(study_file, tmp_path):
    (tmp_path / "sums.jsonl").write_text('{"context": "One and one is", "choices": [" two"], "answer": 0, "note": "?"}')
    (said,) = prepare(load_study(str(study_file(capability__tasks={"sums": str(tmp_path / "sums.jsonl")})))).notices
    assert said == "capability task 'sums': not read: note (1 of 1 records)"


def test_the_workbench_of_other_formats_is_another(study_file, chat_folder):
    def inputs(*changes):
        return prepare(load_study(str(study_file(model=str(chat_folder))), changes)).inputs

    assert inputs().workbench_key == inputs("ask_formats=raw", "space.train_formats=chat").workbench_key
    assert inputs().workbench_key != inputs("ask_formats=[raw, chat]").workbench_key


def test_an_axis_that_changes_nothing_in_any_trial_is_said(study_file):
    def notices(*changes):
        return prepare(load_study(str(study_file()), changes)).notices

    assert notices() == notices("space.method=[full, lora]", "space.rank=4") == ()
    assert notices("space.rank=[4, 8]", "space.guard_weight=1.0") == (
        "space.rank has no effect: it needs space.method lora or adalora",
    )
