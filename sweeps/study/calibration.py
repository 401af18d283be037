"""What the pieces of a study's trials take on this machine, measured within seconds.

The study's own code runs on a part of its edits and items, on a few layers of the model with random weights: nothing is
loaded, and how long a layer takes does not depend on what its weights are.
"""

import copy
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sweeps.study.estimate import GENERATED_SHARE, Costs, Pass, default_costs

if TYPE_CHECKING:
    from locft.model.models import LoadedModel
    from locft.train.encoding import TokenRow
    from locft.model.positions import TuningPosition
    from locft.data.edit_request import EditRequest
    from locft.workbench import Workbench
    from sweeps.study.plan import PreparedStudy

EDITS, ITEMS, PROSE_TOKENS = 16, 8, 256
"""What is worked on at most; items are of each task."""
MOST_LAYERS = 8
WARM_UP, TIMED = 1, 4
"""Steps."""

_log = logging.getLogger(__name__)


def calibrated(prepared: "PreparedStudy") -> Costs:
    """Measured on this machine; the rough rates where that cannot be done (another device, more CPUs than there are, a model
    whose layers cannot be made alone)."""
    import torch

    study = prepared.study
    rough = default_costs(prepared.facts, study.resources.cpus)
    elsewhere = study.resources.gpus or study.resources.cpus > (os.cpu_count() or 1)
    if elsewhere or study.device not in ("auto", "cpu") or not prepared.plan.sample:
        return rough
    before = torch.get_num_threads()
    torch.set_num_threads(study.resources.cpus)
    try:
        return _measured(prepared, rough)
    except Exception as error:  # the configurations of some architectures cannot be shortened: no reason to plan nothing
        _log.info("no calibration: %s", error)
        return rough
    finally:
        torch.set_num_threads(before)


class _Stopwatch:
    """Processor seconds of a thread, which other work on the machine hardly changes; and how much slower the clock was."""

    def __init__(self, threads: int):
        self.threads = threads
        self.processor = self.clock = 0.0

    def time(self, work: Callable[[], Any]) -> tuple[Any, float]:
        clock, processor = time.perf_counter(), time.process_time()
        made = work()
        spent = (time.process_time() - processor) / self.threads
        self.clock += time.perf_counter() - clock
        self.processor += spent
        return made, spent

    @property
    def busy(self) -> float:
        return max(1.0, self.clock / self.processor) if self.processor else 1.0


def _measured(prepared: "PreparedStudy", rough: Costs) -> Costs:
    """The time of a piece of work through all layers of the short model, and through the last one, gives both its parts."""
    from locft.train.pipelines import TrainingSettings
    from locft.model.positions import TuningPosition

    study, facts = prepared.study, prepared.facts
    watch = _Stopwatch(study.resources.cpus)
    loaded = _short_model(prepared)
    n = loaded.model.config.get_text_config().num_hidden_layers
    bench = watch.time(lambda: _small_bench(prepared, loaded, n))[0]
    sizes = [min(trial.batch_size, len(bench.rows)) for trial in prepared.plan.sample]
    sizes = sorted({min(sizes), max(sizes)})
    found: dict[int, list[float]] = {}
    for layers in (1, n):
        position = TuningPosition(n - layers, _usual_module(prepared))
        steps = [_step_seconds(bench, position, size, facts.precision, watch) for size in sizes]
        settings = TrainingSettings(batch_size=sizes[-1], epochs=1, precision=facts.precision)
        delta = bench.train(position, settings).delta
        bench.measure(delta)  # what is done once a process (imports, packed weights) would be counted as often as items are read
        measured, spent = watch.time(partial(bench.measure, delta))
        parts = [measured.metrics["evaluate_seconds"], measured.metrics.get("capability_seconds", 0.0)]
        found[layers] = [*steps, *(spent * part / sum(parts) for part in parts)]
    *stepping, evaluation, capability = (_pass(a, b, n) for a, b in zip(found[1], found[n], strict=True))
    step, edit = _by_edits(stepping, sizes)
    generating = GENERATED_SHARE * evaluation.per_layer * (facts.n_layers - n)
    asked = sum(map(_questions, prepared.edits.requests)) / len(bench.questions)
    read = facts.capability_tokens / _tokens_read(bench) if bench.suite else 0.0
    clock, edit_layer, item_layer = watch.busy, asked * evaluation.per_layer, read * capability.per_layer
    slowed = f", {clock:.1f} times slowed by other work" if clock > 1.3 else ""
    return replace(
        rough,
        step=step.scaled(clock),
        edit=edit.scaled(clock),
        evaluation=Pass(evaluation.fixed + generating, evaluation.per_layer).scaled(clock * asked),
        capability=capability.scaled(clock * read),
        unedited=clock * facts.n_layers * (2 * edit_layer + item_layer),  # read once, and half of the answers generated
        source=f"a calibration on this machine{slowed}",
        spread=1.4,
        busy=clock,
    )


def _short_model(prepared: "PreparedStudy") -> "LoadedModel":
    """The model's first layers with random weights, not more of them than the output projection weighs, but two."""
    from transformers import AutoModelForCausalLM

    from locft.model.models import DTYPES, LoadedModel, load_structure, load_tokenizer

    study, facts = prepared.study, prepared.facts
    config = copy.deepcopy(load_structure(study.model).config)
    text = config.get_text_config()
    wanted = min(MOST_LAYERS, max(2, facts.head_parameters // max(1, facts.layer_parameters)))
    text.num_hidden_layers = min(facts.n_layers, wanted)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[study.dtype]).eval().requires_grad_(False)
    return LoadedModel(study.model, model, load_tokenizer(study.model), "calibration")


def _small_bench(prepared: "PreparedStudy", loaded: "LoadedModel", layers: int) -> "Workbench":
    from locft.workbench import Workbench

    # The unedited model answers the unrelated prompts at length, and one with random weights does not come to an end.
    requests = tuple(replace(request, locality=()) for request in prepared.edits.requests[:EDITS])
    edits = replace(prepared.edits, requests=requests)
    suite = prepared.suite
    if suite:
        tasks = (replace(task, items=task.items[:: -(-len(task.items) // ITEMS)]) for task in suite.tasks)
        suite = replace(suite, tasks=tuple(tasks))
    prose = min(PROSE_TOKENS, prepared.study.capability.prose_tokens)
    return Workbench.prepare(loaded, edits, suite, prose, layers=range(layers))


def _usual_module(prepared: "PreparedStudy") -> str:
    """The study's module of middle size."""
    sizes = prepared.facts.trained_parameters
    modules = sorted({trial.module: sizes.get(trial.position, 0) for trial in prepared.plan.sample}.items(), key=lambda m: m[1])
    return modules[len(modules) // 2][0]


def _step_seconds(
    bench: "Workbench", position: "TuningPosition", size: int, precision: str, watch: _Stopwatch
) -> float:
    from locft.model.models import DTYPES
    from locft.train.pipelines import PositionTrainer, TrainingSettings
    from locft.train.reference import full_forward

    if bench.engine:
        forward = bench.engine.training_forward(position, bench.rows, DTYPES[precision])
    else:
        forward = partial(full_forward, bench.loaded.model)
    trainee = PositionTrainer(bench.loaded, position, TrainingSettings(skip_below=0.0), forward)
    batches = drawn_batches(bench.rows, size, WARM_UP + TIMED)
    for batch in batches[:WARM_UP]:
        trainee.step(batch)
    return watch.time(lambda: [trainee.step(batch) for batch in batches[WARM_UP:]])[1] / TIMED


def drawn_batches(rows: Sequence["TokenRow"], size: int, count: int) -> list[list["TokenRow"]]:
    """So many whole batches, drawn as epochs are; the same for both sides and in every run."""

    import torch

    def forever() -> "Iterator[list[TokenRow]]":
        order = torch.Generator().manual_seed(0)
        while True:
            drawn = torch.randperm(len(rows), generator=order).tolist()
            for start in range(0, len(rows) - size + 1, size):
                yield [rows[index] for index in drawn[start : start + size]]

    batches = forever()
    return [next(batches) for _ in range(count)]


def _questions(request: "EditRequest") -> int:
    return 1 + len(request.rephrases) + len(request.locality)


def _tokens_read(bench: "Workbench") -> int:
    """Counted as the study's facts do: all choices, and the prose twice."""
    choices = (row for items in bench.suite.tasks.values() for item in items for row in item.rows)
    return sum(len(row.token_ids) for row in (*choices, *bench.suite.prose, *bench.suite.prose))


def _pass(short: float, long: float, layers: int) -> Pass:
    """short: through one layer; long: through all of them."""
    per_layer = max(0.0, (long - short) / (layers - 1)) if layers > 1 else long
    return Pass(max(0.0, short - per_layer), per_layer)


def _by_edits(steps: Sequence[Pass], sizes: Sequence[int]) -> tuple[Pass, Pass]:
    """The part of a step that does not depend on its edits, and that of each edit; the whole is each edit's where the study
    has one batch size only."""
    if len(sizes) == 1:
        return Pass(0.0, 0.0), steps[0].scaled(1 / sizes[0])

    def split(few: float, many: float) -> tuple[float, float]:
        each = max(0.0, (many - few) / (sizes[1] - sizes[0]))
        return max(0.0, few - sizes[0] * each), each

    fixed, per_layer = split(steps[0].fixed, steps[1].fixed), split(steps[0].per_layer, steps[1].per_layer)
    return Pass(fixed[0], per_layer[0]), Pass(fixed[1], per_layer[1])
