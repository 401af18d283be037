"""From a study to its trials: which configurations, and in which order. Nothing here runs or writes anything."""

import itertools
import json
import math
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from analysis.stats.axes import AXES, AXIS, SWEPT
from locft.cache import digest
from locft.errors import InputError
from sweeps.study.schema import MAX_TRIALS, EveryLayer, LogUniform, Study, nearest
from sweeps.study.trial_types import METHOD_VERSION, StudyFacts, TrialConfig, every_asked_place, method_version

if TYPE_CHECKING:
    from locft.data.requests import EditSet
    from locft.data.suites import Suite

INNER = tuple(axis.name for axis in SWEPT if axis.name not in ("layer", "module", "seed"))
POINT = ("layer", "module", *INNER, "seed")
"""The axes that a point of the space has values for: every swept one."""
POSITION = "position"
"""Replaces layer and module if not every layer has every module: {"position": "22.mlp_down", ...}."""


@dataclass(frozen=True)
class Plan:
    """The trials of a study."""

    trials: tuple[TrialConfig, ...]
    """In the order they are started. Empty for optuna, which chooses while running."""
    count: int
    """Number of trials; for optuna an upper limit; for both searches fewer than asked for if the space has no more."""
    sample: tuple[TrialConfig, ...]
    """What the estimate is computed on: the trials, or for optuna a random sample of the space."""


@dataclass(frozen=True)
class PreparedStudy:
    """A study whose model, edits and items were resolved (`sweeps.study.resolve.prepare`), ready to be run and reported."""

    study: Study
    facts: StudyFacts
    plan: Plan
    edits: "EditSet"
    suite: "Suite | None"
    notices: tuple[str, ...] = ()
    """What in the study file has no effect here, a sentence each."""
    command: tuple[str, ...] = ()
    """The words of the command line that runs it, such as locft sweep quickstart; empty if it is not run from one."""
    chosen_axes: ClassVar[tuple[str, ...]] = ()
    """Axes whose values the command chooses, not the user."""

    @property
    def id(self) -> str:
        return study_id(self.study, self.facts)

    @property
    def inputs(self) -> "PreparedStudy":
        """What every worker gets: all but the trials."""
        return replace(self, plan=Plan((), 0, ()))

    @property
    def workbench_key(self) -> tuple:
        """Equal for studies that the same workbench can serve."""
        study, facts, suite = self.study, self.facts, self.suite
        model = (study.model, facts.model_fingerprint, facts.model_setup, study.dtype)
        items = (suite.fingerprint, study.capability.prose_tokens) if suite else None
        asked = (study.ask_formats, study.space.edit_count, study.edits.asked)
        return (model, study.trial_device, study.resources, self.edits.fingerprint, items, asked)

    @property
    def every_asked_place(self) -> tuple[int, ...] | None:
        """Places of the edits that any trial asks about; None for all."""
        return every_asked_place(self.study.space.edit_count, len(self.edits.requests), self.study.edits.asked)

    @property
    def n_items(self) -> int:
        """Capability items over all tasks."""
        return sum(len(task.items) for task in self.suite.tasks) if self.suite else 0

    @property
    def capability_source(self) -> str:
        """Human-readable list of the tasks with their numbers of items."""
        return ", ".join(f"{task.name} ({len(task.items)})" for task in self.suite.tasks) if self.suite else "none"


def selected_layers(study: Study, n_layers: int) -> tuple[int, ...]:
    """The layers of the space in ascending order. Layers that a model of `n_layers` does not have are not filtered out."""
    layer = study.space.layer
    if isinstance(layer, EveryLayer):
        return tuple(range(0, n_layers, layer.every))
    return tuple(range(n_layers)) if layer == "all" else tuple(sorted(layer))


def check_against_model(study: Study, n_layers: int, modules_by_layer: Mapping[int, Sequence[str]]) -> None:
    """Raise `InputError` with every layer and module of the space that this model does not have.

    modules_by_layer: for each layer index, the modules that can be trained there (in a hybrid model they differ).
    """
    chosen = selected_layers(study, n_layers)
    in_range = [layer for layer in chosen if layer < n_layers]
    there = f"{study.model} has layers 0 to {n_layers - 1}"
    problems = [f"space.layer: layer {layer}: {there}" for layer in chosen if layer >= n_layers]
    if isinstance(study.space.layer, EveryLayer) and study.space.layer.every >= n_layers > 1:
        problems.append(f"space.layer.every: got {study.space.layer.every}: {study.model} has only {n_layers} layers")
    for module in study.space.module:
        having = [layer for layer in sorted(modules_by_layer) if module in modules_by_layer[layer]]
        if not having:
            known = dict.fromkeys(name for layer in sorted(modules_by_layer) for name in modules_by_layer[layer])
            problems.append(f"space.module: {study.model} has no module {module!r}{nearest(module, known)}")
        elif in_range and not set(having) & set(in_range):
            without = f"{_listed(in_range)} of {study.model} {'has' if len(in_range) == 1 else 'have'} no {module!r}"
            problems.append(f"space.module: {without}; it is in {_listed(having)}")
    if problems:
        raise InputError(problems)


def _listed(layers: Sequence[int]) -> str:
    shown = map(str, layers if len(layers) <= 8 else (*layers[:7], f"... {layers[-1]}"))
    return f"{'layer' if len(layers) == 1 else 'layers'} {', '.join(shown)}"


def idle_axes(study: Study) -> tuple[str, ...]:
    """A sentence for each axis of the space that is set but has no effect in any trial."""
    space = study.space
    return tuple(
        f"space.{axis.name} has no effect: it needs space.{other} {values}"
        for axis in SWEPT
        if axis.only and getattr(space, axis.name) != (axis.default,)
        for other, values in axis.unmet({name: getattr(space, name) for name, _ in axis.only})
    )


def study_id(study: Study, facts: StudyFacts) -> str:
    """12 hexadecimal digits that hash what makes results comparable: name, model, data, dtype and method.

    Space, search, resources and thresholds are left out, so that a study can be widened and stays the same study.
    """
    parts = [study.name, facts.model_fingerprint, facts.data_fingerprint, study.dtype, METHOD_VERSION]
    return digest(json.dumps(parts))[:12]


def make_plan(study: Study, facts: StudyFacts) -> Plan:
    """The trials of a study, without duplicates.

    grid: every combination, in the order of `grid_points`. random: `search.trials` points; asking for more
    continues the same sequence. Positions that a layer does not have are left out.

    Raises `InputError` for layers and modules that the model does not have, and a grid of more than `MAX_TRIALS`.
    """
    check_against_model(study, facts.n_layers, facts.modules_by_layer)
    draw = grid_points if study.search.method == "grid" else random_points
    points = list(itertools.islice(draw(study, facts), MAX_TRIALS + 1))
    if len(points) > MAX_TRIALS:
        message = f"space: the grid has more than {MAX_TRIALS:,} trials"
        raise InputError(message + "; sample it instead: search: {method: random, trials: ...}")
    trials = tuple(trial_config(study, facts, point) for point in points)
    if study.search.method == "optuna":
        endless = isinstance(study.space.learning_rate, LogUniform)
        return Plan((), (study.search.trials or 0) if endless else len(trials), trials)
    return Plan(trials, len(trials), trials)


def trial_config(study: Study, facts: StudyFacts, point: Mapping[str, Any]) -> TrialConfig:
    """The full configuration at one point of the space.

    point: a value for each of `POINT`, or "position" in place of layer and module. A log-uniform learning rate is
    rounded to three significant digits, so that a trial's id survives being written and read. An axis without
    effect, given the values of the others, is set to its default, so that each trial has only one id.
    """
    values = {axis: point[axis] for axis in POINT if axis in point}
    if POSITION in point:
        layer, _, module = point[POSITION].partition(".")
        values |= {"layer": int(layer), "module": module}
    if isinstance(study.space.learning_rate, LogUniform):
        values["learning_rate"] = _rounded(values["learning_rate"], study.space.learning_rate)
    values = _effective(values)
    values |= {axis.name: getattr(study, axis.name) for axis in AXES if not axis.swept} | {"precision": facts.precision}
    return TrialConfig(
        model_fingerprint=facts.model_fingerprint,
        data_fingerprint=facts.data_fingerprint,
        layers=facts.n_layers,
        method_version=method_version(values),
        **values,
    )


def optuna_space(study: Study, facts: StudyFacts) -> dict[str, list | tuple]:
    """The space as plain data: axis -> list of values, or ("log_uniform", low, high).

    If some layer lacks some module, the axes layer and module are replaced by "position", which has existing ones only.
    """
    positions, space = _positions(study, facts), study.space
    layers = selected_layers(study, facts.n_layers)
    if len(positions) == len(layers) * len(space.module):
        axes: dict[str, list | tuple] = {"layer": list(layers), "module": list(space.module)}
    else:
        axes = {POSITION: [f"{layer}.{module}" for layer, module in positions]}
    for axis in (*INNER, "seed"):
        values = getattr(space, axis)
        axes[axis] = ("log_uniform", *values.log_uniform) if isinstance(values, LogUniform) else list(values)
    return axes


def point_of(study: Study, facts: StudyFacts, config: TrialConfig) -> dict[str, Any] | None:
    """The point of `optuna_space` at which a configuration lies; None if it lies outside, as after a change of space.

    An axis that has no effect there takes the first of its values."""
    known, point = config.to_dict() | {POSITION: config.position}, {}
    idle = {axis.name for axis in SWEPT if not axis.counts(known)}
    for axis, values in optuna_space(study, facts).items():
        bounds = values[1:] if isinstance(values, tuple) else None
        point[axis] = (bounds or values)[0] if axis in idle else known[axis]
        inside = bounds[0] <= point[axis] <= bounds[1] if bounds else point[axis] in values
        if not inside:
            return None
    return point if trial_config(study, facts, point) == config else None


def grid_points(study: Study, facts: StudyFacts) -> Iterator[dict[str, Any]]:
    """Every combination once. Seeds vary slowest, then layers, then the other axes in the order of `POINT`.

    Layers come in van der Corput order (0, 16, 8, 24, 4, ... of 30): a study stopped half way has covered the
    whole depth with every setting, and the rest only refines it. Each further seed repeats the whole grid.
    """
    space, modules = study.space, defaultdict[int, list[str]](list)
    for layer, module in _positions(study, facts):
        modules[layer].append(module)
    layers, settings = list(modules), [{}]
    for name in INNER:  # an axis without effect is only tried at its default
        axis, values = AXIS[name], getattr(space, name)
        grown = ({**s, name: value} for s in settings for value in (values if axis.counts(s) else (axis.default,)))
        settings = list(itertools.islice(grown, MAX_TRIALS + 1))
    for seed, place in itertools.product(space.seed, van_der_corput_order(len(layers))):
        for module, setting in itertools.product(modules[layers[place]], settings):
            yield {"layer": layers[place], "module": module, **setting, "seed": seed}


def _effective(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with every axis that has no effect given the others set to its default."""
    return {**values, **{axis.name: axis.default for axis in SWEPT if not axis.counts(values)}}


def random_points(study: Study, facts: StudyFacts) -> Iterator[dict[str, Any]]:
    """`search.trials` distinct points, or as many as there are, drawn with `search.seed`.

    Each axis runs through shuffled rounds of its values, so that a small sample is spread evenly over every axis; a
    log-uniform axis is spread by a shifted van der Corput sequence. More trials continue the same sequence.
    """
    positions, space, wanted = set(_positions(study, facts)), study.space, study.search.trials or 0
    values = {axis: getattr(space, axis) for axis in POINT} | {"layer": selected_layers(study, facts.n_layers)}
    streams = [_spread(values[axis], random.Random(f"{study.search.seed} {axis}")) for axis in POINT]
    draws = itertools.islice(zip(*streams, strict=False), 20 * wanted + 1000)
    points = (_effective(dict(zip(POINT, draw, strict=True))) for draw in draws if draw[:2] in positions)
    if not isinstance(space.learning_rate, LogUniform):  # once the draws run out: the rest, in order
        points = itertools.chain(points, grid_points(study, facts))
    seen: set[tuple] = set()
    while len(seen) < wanted and (point := next(points, None)):
        if tuple(point.values()) not in seen:
            seen.add(tuple(point.values()))
            yield point


def van_der_corput_order(n: int) -> list[int]:
    """0 to n - 1, each far from the ones before it: the indices sorted by their reversed binary digits."""
    bits = max(1, (n - 1).bit_length())
    reversed_digits = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits))
    return [i for i in reversed_digits if i < n]


def _spread(values: Sequence[Any] | LogUniform, rng: random.Random) -> Iterator[Any]:
    """An endless sequence in which every value comes once per round; log-uniform values spread evenly over the exponents."""
    if isinstance(values, LogUniform):
        low, high = map(math.log, values.log_uniform)
        shift = rng.random()
        for i in itertools.count():
            digits = f"{i:b}"[::-1]
            yield _rounded(math.exp(low + (high - low) * ((int(digits, 2) / 2 ** len(digits) + shift) % 1)), values)
    while True:
        yield from rng.sample(values, len(values))


def _rounded(rate: float, bounds: LogUniform) -> float:
    low, high = bounds.log_uniform
    return min(max(float(f"{rate:.3g}"), low), high)


def _positions(study: Study, facts: StudyFacts) -> tuple[tuple[int, str], ...]:
    """The selected pairs of layer and module that the model has, by ascending layer."""
    layers = selected_layers(study, facts.n_layers)
    pairs = itertools.product(layers, study.space.module)
    return tuple((layer, module) for layer, module in pairs if module in facts.modules_by_layer.get(layer, ()))
