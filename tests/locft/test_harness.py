"""Tasks of lm-evaluation-harness on an edited model, held to what the harness's own model class makes of them."""

import json
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra `harness`)")

import lm_eval
from lm_eval.api.metrics import bleu
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from locft.data.harness_tasks import load_tasks
from locft.data.requests import load_edits
from locft.data.suites import load_suite
from locft.errors import InputError
from locft.harness import measure_tasks, paired_change
from locft.measure.capability import SuiteScores, capability_change, encode_suite, score_suite
from locft.measure.generation import complete_answers
from locft.model.delta import EditDelta, applied
from locft.model.positions import TuningPosition, parameter_names
from locft.train.reference import full_forward
from locft.workbench import Workbench
from tests.tiny import SENTENCES, tiny_loaded

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
num_fewshot: {shots}
output_type: multiple_choice
doc_to_text: "{{{{text}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{right}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
REST = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{choices[0]}}}}"
"""
SAID = """
task: said
output_type: generate_until
generation_kwargs: {{until: [".", "q"], max_gen_toks: 9}}
metric_list: [{{metric: bleu}}, {{metric: exact_match}}]
"""
ROLLING = """
task: rolling
output_type: loglikelihood_rolling
metric_list: [{{metric: word_perplexity}}]
"""
GROUP = """
group: both
task: [zero, two]
aggregate_metric_list: [{{metric: acc, weight_by_size: true}}]
"""
LONG = 70
"""Words of one text: more tokens than the model below is said to read."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Task files and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    words = [word for sentence in SENTENCES for word in sentence.split()]
    texts = [" ".join(words[at : at + 6]) for at in range(12)] + [" ".join(words[at % 40] for at in range(LONG))]
    items = [
        {"text": text, "choices": [f" {words[at]}", f" {words[at + 9]} is", " yen"][: 2 + at % 2], "right": at % 2}
        for at, text in enumerate(texts)
    ]
    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    files = {
        "zero": CHOICE.format(name="zero", data=data, shots=0),
        "two": CHOICE.format(name="two", data=data, shots=2),
        "said": SAID.format() + REST.format(data=data),
        "rolling": ROLLING.format() + REST.format(data=data),
        "both": GROUP.format(),
    }
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=["llama", "mamba"])
def loaded(request):
    """mamba is computed whole where it has no tail, or a row at a time."""
    found = tiny_loaded(request.param)
    found.tokenizer.model_max_length = 100
    return found


def delta_of(loaded, size: float = 0.3) -> EditDelta:
    position = "1.mlp_down" if loaded.model.config.model_type == "llama" else "1.layer"
    names = parameter_names(loaded.model, TuningPosition.parse(position))
    generator = torch.Generator().manual_seed(0)
    shapes = {name: loaded.model.get_parameter(name).shape for name in names}
    tensors = {name: size * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return EditDelta(position, loaded.fingerprint, tensors)


def by_the_harness(loaded, names: list[str], folder: Path, longest: int = 100) -> dict:
    """Everything that it finds, with the samples."""
    own = HFLM(
        loaded.model, tokenizer=loaded.tokenizer, batch_size=4, max_length=longest, device="cpu", max_batch_size=4
    )
    manager = TaskManager(include_path=folder, include_defaults=False)
    return lm_eval.simple_evaluate(own, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True)


def test_both_models_score_as_in_the_harness(loaded, folder):
    names = ["zero", "two", "said", "rolling"]
    delta, told = delta_of(loaded), []
    scores = measure_tasks(loaded, delta, load_tasks(names, folder), tell=told.append)
    unedited = by_the_harness(loaded, names, folder)["results"]
    with applied(loaded, delta):
        edited = by_the_harness(loaded, names, folder)["results"]
    assert {(one.task, one.metric) for one in scores} == {
        ("zero", "acc"), ("zero", "acc_norm"), ("two", "acc"), ("two", "acc_norm"), ("said", "bleu"),
        ("said", "exact_match"), ("rolling", "word_perplexity"),
    }  # fmt: skip
    for one in scores:
        key = f"{one.metric},none"
        assert one.unedited == pytest.approx(unedited[one.task][key], rel=1e-4), one
        assert one.edited == pytest.approx(edited[one.task][key], rel=1e-4), one
        assert one.items == 13 and one.change.low - 1e-9 <= one.change.mean <= one.change.high + 1e-9
    assert any(one.change.mean for one in scores), "the edit changes something"
    assert told == ["texts longer than the model's context of 100 tokens are truncated at the beginning"]


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gptj"])
def test_a_long_text_is_read_in_windows_that_the_model_has_positions_for(tmp_path, architecture):
    loaded = tiny_loaded(architecture)
    text = " ".join(SENTENCES * 6)
    assert len(loaded.tokenizer(text)["input_ids"]) > 256 == loaded.model.config.max_position_embeddings
    data = tmp_path / "items.jsonl"
    data.write_text(json.dumps({"text": text, "choices": [text]}) + "\n", encoding="utf-8")
    (tmp_path / "rolling.yaml").write_text(ROLLING.format() + REST.format(data=data), encoding="utf-8")
    (found,) = measure_tasks(loaded, None, load_tasks(["rolling"], tmp_path))
    expected = by_the_harness(loaded, ["rolling"], tmp_path, 255)["results"]["rolling"]["word_perplexity,none"]
    assert found.unedited == pytest.approx(expected, rel=1e-4)


def test_answers_leave_room_for_their_prompts(folder):
    loaded, told = tiny_loaded(), []
    loaded.tokenizer.model_max_length = 12
    measure_tasks(loaded, None, load_tasks(["said"], folder), 2, told.append)
    assert "answers are cut off after 6 tokens, half of the model's context" in told


def test_without_a_delta_the_model_alone_is_measured(folder):
    loaded = tiny_loaded()
    (one, _) = measure_tasks(loaded, None, load_tasks(["zero"], folder), limit=5)
    assert (one.items, one.edited, one.change) == (5, None, None)
    nothing = replace(delta_of(loaded), tensors={n: 0 * t for n, t in delta_of(loaded).tensors.items()})
    for same in measure_tasks(loaded, nothing, load_tasks(["zero", "said"], folder), limit=5):
        assert same.unedited == same.edited and (same.change.low, same.change.high) == (0, 0)


def test_a_group_pools_the_items_of_its_tasks(folder):
    loaded = tiny_loaded()
    delta = delta_of(loaded)
    group = {one.metric: one for one in measure_tasks(loaded, delta, load_tasks(["both"], folder))}
    parts = measure_tasks(loaded, delta, load_tasks(["zero", "two"], folder))
    accuracies = [one.edited for one in parts if one.metric == "acc"]
    assert group["acc"].items == 26 and group["acc"].edited == pytest.approx(sum(accuracies) / 2)


def test_a_task_that_cannot_be_run_is_told(folder, tmp_path):
    with pytest.raises(InputError) as told:
        load_tasks(["zerro", "gsm8kk"], folder)
    assert "'zerro': lm-evaluation-harness has no task of this name; did you mean zero?" in told.value.problems[0]
    assert "did you mean gsm8k?" in told.value.problems[1]
    (tmp_path / "lost.yaml").write_text(SAID.format().replace("said", "lost") + REST.format(data=tmp_path / "no.jsonl"))
    with pytest.raises(InputError, match=r"task 'lost': could not be loaded"):
        load_tasks(["lost"], tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        load_tasks(["zero"], tmp_path / "nowhere")


def test_changes_are_paired():
    """By hand: two of four items lost, none won. Drawn together with its other value, no item can be won."""
    before, after = [1, 1, 1, 0], [1, 0, 0, 0]
    change = paired_change(before, after)
    assert change.mean == -0.5 and change.low == -1 and change.high == 0
    general = paired_change(before, after, combine=lambda values: float(np.mean(values)))
    assert general.mean == change.mean and -1 <= general.low < general.high <= 0


WHICH = """
task: which
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{right}}}}"
doc_to_target: "is it so"
doc_to_choice: "{{{{[text ~ choices[0], text ~ choices[1]]}}}}"
metric_list: [{{metric: acc}}]
"""
WORD = """
task: word
output_type: loglikelihood
metric_list: [{metric: perplexity}, {metric: acc}]
"""


def test_tasks_are_read_as_items_that_score_as_in_the_harness(loaded, folder):
    """With shots, in groups, with a text before each choice, and where one answer has to be the likeliest."""
    data = folder / "items.jsonl"
    (folder / "which.yaml").write_text(WHICH.format(data=data), encoding="utf-8")
    (folder / "word.yaml").write_text(WORD + REST.format(data=data), encoding="utf-8")
    names = ["zero", "two", "which", "word", "both"]
    suite = load_suite(None, lm_eval=names, lm_eval_path=str(folder))
    assert {task.name: len(task.items) for task in suite.tasks} == {name: 13 + 13 * (name == "both") for name in names}
    encoded = encode_suite(loaded.tokenizer, suite, prose_tokens=64)
    found = score_suite(full_forward(loaded.model), encoded).accuracy
    expected = by_the_harness(loaded, names[:4], folder)["results"]
    for name in names[:4]:
        assert found[name] == pytest.approx(expected[name]["acc,none"]), name
    assert found["both"] == pytest.approx((found["zero"] + found["two"]) / 2)
    assert 0 < sum(found.values()) < len(names), "neither everything is right nor everything wrong"
    few = load_suite(None, limit=4, lm_eval=["both"], lm_eval_path=str(folder))
    assert [item.id for item in few.tasks[0].items] == ["zero#0", "zero#6", "two#0", "two#6"]


GENERATED = """
task: {name}
output_type: generate_until
generation_kwargs: {{until: ["q"], max_gen_toks: 9}}
metric_list: [{metrics}]
filter_list:
  - {{name: first-word, filter: [{{function: regex, regex_pattern: "([a-z]+)"}}, {{function: take_first}}]}}
  - {{name: whole, filter: [{{function: take_first}}]}}
"""


def test_generated_answers_score_as_in_the_harness(loaded, folder):
    """By the first filter and the first metric that is a mean; translations by BLEU of each sentence."""
    rest = REST.format(data=folder / "items.jsonl")
    by = {"word-said": "{metric: ter}, {metric: exact_match, ignore_punctuation: true}", "translated": "{metric: bleu}"}
    for name, metrics in by.items():
        (folder / f"{name}.yaml").write_text(GENERATED.format(name=name, metrics=metrics) + rest, encoding="utf-8")
    names = ["word-said", "translated", "zero"]
    suite = pickle.loads(pickle.dumps(load_suite(None, lm_eval=names, lm_eval_path=str(folder))))
    kinds = {
        task.name: {(item.rule, item.generation and item.generation.metric) for item in task.items}
        for task in suite.tasks
    }
    assert kinds == {
        "word-said": {("generated", "exact_match")},
        "translated": {("generated", "bleu")},
        "zero": {("sum", None)},
    }
    encoded = encode_suite(loaded.tokenizer, suite, prose_tokens=64)
    complete = partial(complete_answers, loaded)
    found = score_suite(full_forward(loaded.model), encoded, complete=complete)
    samples = by_the_harness(loaded, names, folder)["samples"]
    said = [one for one in samples["word-said"] if one["filter"] == "first-word"]
    assert list(found.correct["word-said"]) == [one["exact_match"] for one in said]
    sentences = [one["bleu"] for one in samples["translated"] if one["filter"] == "first-word"]
    assert list(found.correct["translated"]) == pytest.approx([bleu([one]) / 100 for one in sentences])
    assert found.accuracy["zero"] == pytest.approx(np.mean([one["acc"] for one in samples["zero"]]))
    again = SuiteScores.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    change = capability_change(found, again)
    assert (change.mean, change.low, change.high) == (0, 0, 0)


CHECKED = """
def said(doc, results):
    return {{"exact_match": float(results[0].strip() {sign} doc["choices"][0])}}
"""


def test_another_way_to_score_answers_is_another_suite(tmp_path):
    data = tmp_path / "items.jsonl"
    data.write_text(json.dumps({"text": "one", "choices": ["it is so"]}) + "\n", encoding="utf-8")
    plain = GENERATED.format(name="scored", metrics="{metric: exact_match}") + REST.format(data=data)

    def fingerprint(text: str, sign: str, folder: str) -> str:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        (place / "scored.yaml").write_text(text, encoding="utf-8")
        (place / f"checked_{sign == '=='}.py").write_text(CHECKED.format(sign=sign), encoding="utf-8")
        return load_suite(None, lm_eval=["scored"], lm_eval_path=str(place)).fingerprint

    ways = [
        (plain, "=="),
        (plain.replace("[a-z]+", "[a-z ]+"), "=="),
        (plain.replace("exact_match}", "exact_match, ignore_case: true}"), "=="),
        (plain + "process_results: !function checked_True.said\n", "=="),
        (plain + "process_results: !function checked_False.said\n", "in"),
    ]
    assert len({fingerprint(*way, "a") for way in ways}) == len(ways)
    assert [fingerprint(*way, "a") for way in ways] == [fingerprint(*way, "b") for way in ways]


def test_right_answers_count(loaded, folder):
    """What the model says is not by chance wrong: the expected text scores 1, another one 0."""
    data = folder / "answers.jsonl"
    data.write_text(json.dumps({"text": "one", "choices": ["it is so"]}) + "\n", encoding="utf-8")
    for name, metric in (("matched", "exact_match"), ("likened", "chrf")):
        text = GENERATED.format(name=name, metrics=f"{{metric: {metric}}}").split("filter_list")[0]
        (folder / f"{name}.yaml").write_text(text + REST.format(data=data), encoding="utf-8")
    suite = load_suite(None, lm_eval=["matched", "likened"], lm_eval_path=str(folder))
    encoded = encode_suite(loaded.tokenizer, suite, prose_tokens=64)
    for said, right in (("it is so", 1), ("x", 0)):
        scores = score_suite(full_forward(loaded.model), encoded, complete=lambda asked, said=said: [said] * len(asked))
        assert scores.capability == pytest.approx(right)


def test_a_trial_measures_generated_answers(folder):
    loaded, edits = tiny_loaded(), load_edits("atlas", limit=3)
    suite = load_suite(None, limit=5, lm_eval=["said", "zero"], lm_eval_path=str(folder))
    bench = Workbench.prepare(loaded, edits, suite, prose_tokens=64)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    metrics = bench.measure(delta_of(loaded)).metrics
    with applied(loaded, delta_of(loaded)):
        expected = score_suite(full_forward(loaded.model), bench.suite, complete=partial(complete_answers, loaded))
    assert metrics["capability.said"] == pytest.approx(expected.accuracy["said"])
    assert metrics["capability.zero"] == expected.accuracy["zero"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())


def test_what_is_scored_in_no_known_way_is_refused_by_a_study(folder):
    text = GENERATED.format(name="edited-words", metrics="{metric: ter}") + REST.format(data=folder / "items.jsonl")
    (folder / "edited-words.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as told:
        load_suite(None, lm_eval=["edited-words", "zero", "rolling"], lm_eval_path=str(folder))
    ter, rolling = told.value.problems
    assert "'edited-words': got answers of the kind generate_until, scored by ter" in ter
    assert "`locft evaluate --lm-eval rolling` measures this task" in rolling
