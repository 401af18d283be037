"""Tasks of lm-evaluation-harness: found by name, and read as capability items.

Needs the extra `harness`; `locft.data.suites.harness_tasks` imports this module and says so where it is missing.
"""

import itertools
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.tasks import TaskManager

from locft.data.capability_item import CapabilityItem, spread
from locft.errors import InputError, did_you_mean, one_line

PAPER = {"paper": ("mmlu", "nq_open", "sst2", "wmt16-de-en", "gsm8k")}
"""The tasks whose mean arXiv 2509.22072 calls capability, under one name."""
SEED = 1234
"""For the choice of few-shot examples; the harness's default."""


def load_tasks(names: Sequence[str], folder: str | Path | None = None) -> dict[str, dict[str, Any]]:
    """The tasks under each name: a task, a group or a tag of the harness, or "paper" for the paper's five.

    folder: more task files. Raises InputError with every name that is unknown or cannot be loaded or run.
    """
    folder = None if folder is None else Path(folder).expanduser()
    if folder is not None and not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected one with task files of lm-evaluation-harness (YAML)")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    random.seed(0)  # for tasks that draw while they are loaded, as in the harness's own command
    np.random.seed(SEED)
    manager, problems = TaskManager(include_path=folder), []
    wanted = dict.fromkeys(one for name in names for one in PAPER.get(name, (name,)))
    found: dict[str, dict[str, Any]] = {}
    for name in wanted:
        if name not in manager.all_tasks:
            near = did_you_mean(name, (*PAPER, *manager.all_tasks))
            problems.append(f"task {name!r}: lm-evaluation-harness has none of this name{near}")
    for name in wanted if not problems else ():
        try:
            found[name] = manager.load([name])["tasks"]
        except Exception as error:  # of the data set, the network, or the task file's own code
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
    """Items of the tasks under each name, whose answers are given: right by the metric `acc`, as the harness counts it.

    limit: the most items of each name, evenly spaced over all. Raises InputError with every task that generates its answers,
    or scores them in a way that is not a choice of one among several.
    """
    problems: list[str] = []
    read: dict[str, list[CapabilityItem]] = {}
    for name, tasks in load_tasks(names, folder).items():
        read[name] = []
        places = [(task, at) for task in tasks.values() for at in range(len(task.eval_docs))]
        for task, own in itertools.groupby(spread(places, limit), lambda place: place[0]):
            try:
                read[name] += _items(task, name, [at for _, at in own])
            except InputError as error:
                problems += error.problems
    if problems:
        raise InputError(problems)
    return read


def _items(task: Any, name: str, places: Sequence[int]) -> Iterator[CapabilityItem]:
    """The items at these places of a task's documents."""
    own = task.config.task
    if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood") or "acc" not in task.aggregation():
        raise InputError(
            f"task {own!r}: got answers of the kind {task.OUTPUT_TYPE}, scored by {', '.join(task.aggregation())}; a study "
            f"compares given answers by the metric acc. `locft evaluate --lm-eval {own}` measures it on an edit"
        )
    task.set_fewshot_seed(seed=SEED)
    task.build_all_requests(samples=list(places))
    by_document = itertools.groupby(task.instances, lambda request: request.doc_id)  # its place among those chosen
    for place, requests in zip(places, (list(own) for _, own in by_document), strict=True):
        doc, several, count = requests[0].doc, [request.args for request in requests], len(requests)
        if task.OUTPUT_TYPE == "multiple_choice":
            count = len(task.doc_to_choice(doc))  # more requests are for other metrics
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
    """What the harness calls a result: log-likelihood, and whether greedy decoding gives it."""
    return (0.0, True) if said else (-1e4, False)


def _counts(task: Any, doc: Any, results: Sequence[tuple[float, bool]]) -> bool:
    """Whether the task counts these results of its requests as right."""
    return bool(task.process_results(doc, list(results))["acc"])
