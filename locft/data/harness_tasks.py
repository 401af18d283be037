"""Tasks of lm-evaluation-harness: found by name, and read as capability items.

Needs the extra `harness`; `locft.data.suites.harness_tasks` imports this module and says so if the extra is missing.
"""

import inspect
import itertools
import json
import logging
import os
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from locft.cache import digest
from locft.data.capability_item import CapabilityItem, Generation, spread
from locft.errors import InputError, did_you_mean, one_line

PAPER = {"paper": ("mmlu", "nq_open", "sst2", "wmt16-de-en", "gsm8k")}
"""The tasks whose mean arXiv 2509.22072 calls capability, under one name."""
SEED = 1234
"""Seed for the choice of few-shot examples; the harness's default."""
NEW_TOKENS = 256
"""Length limit of an answer where the task sets none, as in the harness."""
SCORED_BY = ("filter_list", "metric_list", "process_results", "repeats")
"""Entries of a task's configuration that decide how an answer is scored."""
IN_HUNDREDTHS = ("bleu", "chrf")
"""Corpus-level metrics, from 0 to 100, that are also meaningful for a single sentence."""


def load_tasks(names: Sequence[str], folder: str | Path | None = None) -> dict[str, dict[str, Any]]:
    """The tasks under each name: a task, a group or a tag of the harness, or "paper" for the paper's five.

    folder: where more task files are. Raises InputError with every name that is unknown or cannot be loaded or run.
    """
    folder = None if folder is None else Path(os.path.expanduser(folder))
    if folder is not None and not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected one with task files of lm-evaluation-harness (YAML)")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    random.seed(0)  # for tasks that draw random numbers while loading, as in the harness's own command
    np.random.seed(SEED)
    manager, problems = TaskManager(include_path=folder), []
    wanted = dict.fromkeys(one for name in names for one in PAPER.get(name, (name,)))
    found: dict[str, dict[str, Any]] = {}
    for name in wanted:
        if name not in manager.all_tasks:
            near = did_you_mean(name, (*PAPER, *manager.all_tasks))
            problems.append(f"task {name!r}: lm-evaluation-harness has no task of this name{near}")
    for name in wanted if not problems else ():
        try:
            found[name] = manager.load([name])["tasks"]
        except Exception as error:  # from the data set, the network, or the task file's own code
            problems.append(f"task {name!r}: could not be loaded: {type(error).__name__}: {one_line(error)}")
            continue
        for own, task in found[name].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                problems.append(f"task {own!r}: it runs code that the model writes, or needs images; leave it out")
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
    if problems:
        raise InputError(problems)
    return found


def read_tasks(
    names: Sequence[str], folder: str | Path | None = None, limit: int | None = None
) -> dict[str, list[CapabilityItem]]:
    """Items of the tasks under each name. Given answers are judged by the metric `acc`, as the harness counts it; generated
    ones are scored by the task's first metric that is a mean of values from 0 to 1, else by BLEU or chrF of each sentence.

    limit: maximum number of items per name, evenly spaced over all. Raises InputError with every task that scores answers
    in another way.
    """
    problems: list[str] = []
    read: dict[str, list[CapabilityItem]] = {}
    for name, tasks in load_tasks(names, folder).items():
        read[name] = []
        places = [(task, at) for task in tasks.values() for at in range(len(task.eval_docs))]
        for task, own in itertools.groupby(spread(places, limit), lambda place: place[0]):
            try:
                read[name] += _items(task, name, [at for _, at in own], None if folder is None else str(folder))
            except InputError as error:
                problems += error.problems
    if problems:
        raise InputError(problems)
    return read


def asked_generation(given: dict[str, Any]) -> tuple[tuple[str, ...], int, bool]:
    """What a request says about its answer: texts that end it, its token limit, and whether it should be sampled."""
    asked = normalize_gen_kwargs(given, NEW_TOKENS)
    until = tuple(stop for stop in asked["until"] if stop)
    return until, int(asked["max_gen_toks"]), bool(asked.get("do_sample"))


def score_answer(item: CapabilityItem, text: str) -> float:
    """Score of a generated answer by the item's task, from 0 to 1. The task is loaded once per process."""
    assert item.generation
    own, place = item.id.rsplit("#", 1)
    task = _loaded(item.task, item.generation.folder)[own]
    return _scored(task, task.eval_docs[int(place)], item.generation.metric, text)


@lru_cache
def _loaded(name: str, folder: str | None) -> dict[str, Any]:
    return load_tasks([name], folder)[name]


def _scored(task: Any, doc: Any, metric: str, text: str) -> float:
    """A metric of what the first of the task's filters extracts from an answer."""
    said = Instance("generate_until", doc, ("", {}), 0, resps=[text] * (task.get_config("repeats") or 1))
    task._filters[0].apply([said])
    (found,) = said.filtered_resps.values()
    value = task.process_results(doc, [found])[metric]
    return float(task.aggregation()[metric]([value])) / (100 if metric in IN_HUNDREDTHS else 1)


def _metric_of_answers(task: Any) -> str | None:
    """The metric of a task that scores single answers from 0 to 1, higher being better; None if it has none."""
    better = {name for name, higher in task.higher_is_better().items() if higher}
    kinds = {name: getattr(combine, "__name__", "") for name, combine in task.aggregation().items() if name in better}
    means = [name for name, kind in kinds.items() if kind in ("mean", "nanmean")]
    return next(iter([*means, *(name for name in IN_HUNDREDTHS if name in kinds)]), None)


def _scoring(task: Any) -> str:
    """A hash of the parts of a task's configuration that decide how an answer is scored, functions by their source."""

    def source(function: Any) -> str:
        try:
            return inspect.getsource(function)
        except (TypeError, OSError):
            return getattr(function, "__qualname__", type(function).__qualname__)

    method = type(task).process_results
    own = None if method.__module__.startswith("lm_eval.api.") else method
    parts = [getattr(task.config, name) for name in SCORED_BY], own
    return digest(json.dumps(parts, sort_keys=True, default=source))


def _generated_item(
    task: Any, name: str, place: int, request: Instance, metric: str, folder: str | None, scoring: str
) -> CapabilityItem:
    """scoring: `_scoring`. Raises InputError if the metric does not score it from 0 to 1."""
    (context, given), doc, own = request.args, request.doc, task.config.task
    expected = str(task.doc_to_target(doc))
    ends = [_scored(task, doc, metric, text) for text in ("", expected)]
    if not all(0 <= score <= 1.0 + 1e-9 for score in ends):
        raise InputError(f"task {own!r}, item {place}: got {metric} of {ends[0]:g} and {ends[1]:g}; {_expected(own)}")
    until, tokens, _ = asked_generation(given)
    generation = Generation(until, tokens, metric, folder, scoring)
    return CapabilityItem(name, f"{own}#{place}", context, (expected,), 0, "generated", generation=generation)


def _expected(own: str) -> str:
    return (
        "a study scores multiple-choice and log-likelihood answers by the metric acc, and generated ones by a mean of "
        f"values from 0 to 1, BLEU or chrF; `locft evaluate --lm-eval {own}` measures this task on an edit"
    )


def _items(task: Any, name: str, places: Sequence[int], folder: str | None) -> Iterator[CapabilityItem]:
    """The items at these places of a task's documents."""
    own = task.config.task
    metric = _metric_of_answers(task) if task.OUTPUT_TYPE == "generate_until" else None
    given = task.OUTPUT_TYPE in ("multiple_choice", "loglikelihood") and "acc" in task.aggregation()
    if not given and metric is None:
        got = f"answers of the kind {task.OUTPUT_TYPE}, scored by {', '.join(task.aggregation())}"
        raise InputError(f"task {own!r}: got {got}; {_expected(own)}")
    scoring = _scoring(task)
    task.set_fewshot_seed(seed=SEED)
    task.build_all_requests(samples=list(places))
    by_document = itertools.groupby(task.instances, lambda request: request.doc_id)  # its index among those chosen
    for place, requests in zip(places, (list(own) for _, own in by_document), strict=True):
        doc, several, count = requests[0].doc, [request.args for request in requests], len(requests)
        if metric is not None:
            yield _generated_item(task, name, place, requests[0], metric, folder, scoring)
            continue
        if task.OUTPUT_TYPE == "multiple_choice":
            count = len(task.doc_to_choice(doc))  # further requests are for other metrics
            right = [at for at in range(count) if _counts(task, doc, [_sure(at == one) for one in range(len(several))])]
        else:
            right = [0] if _counts(task, doc, [_sure(True)]) else []
        if len(right) != 1:
            raise InputError(f"task {own!r}, item {place}: got {len(right)} right answers of {count}, expected one")
        contexts, choices = zip(*several[:count], strict=True)
        same = len(set(contexts)) == 1
        yield CapabilityItem(
            task=name, id=f"{own}#{place}", context=contexts[0] if same else "", choices=choices, answer=right[0],
            rule="sum" if task.OUTPUT_TYPE == "multiple_choice" else "exact", contexts=() if same else contexts,
        )  # fmt: skip


def _sure(said: bool) -> tuple[float, bool]:
    """A result as the harness represents it: log-likelihood, and whether greedy decoding gives the answer."""
    return (0.0, True) if said else (-1e4, False)


def _counts(task: Any, doc: Any, results: Sequence[tuple[float, bool]]) -> bool:
    """Whether the task counts these results of its requests as right."""
    return bool(task.process_results(doc, list(results))["acc"])
