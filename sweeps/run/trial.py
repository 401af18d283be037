"""One trial: configuration in, result out. The only code of a study that runs on a Ray worker.

A worker process keeps its model, its tokenized data and the unedited model's measurements between trials. Training reads
the model and returns a delta; measuring puts every edited weight back. So a trial's result does not depend on what ran
before it in the process.
"""

import gc
import math
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import numpy as np
import torch

from analysis.stats.axes import STAGES
from locft.engine.tail_engine import TailEngine
from locft.errors import InputError
from locft.machine import usable_cores
from locft.measure.evaluation import asked_counts, edit_metrics
from locft.model.delta import EditDelta
from locft.model.models import LoadedModel, folder_setup, load_model, model_folder
from locft.model.positions import TuningPosition
from locft.train.pipelines import Training, TrainingSettings, Watch
from locft.workbench import Baseline, Measurement, Workbench, diverged_metrics
from sweeps.study.plan import PreparedStudy, selected_layers
from sweeps.study.trial_types import TrialConfig, TrialResult, asked_places

STAGE_METRICS = ("reliability", "generalization", "locality", "drift_kl", "capability_change")
"""Metrics measured on the way through a stream as well as at its end."""
_resident: dict[tuple, Workbench] = {}
"""This process's workbench by the key of its study; at most one."""


def resident_workbench(
    inputs: PreparedStudy, baseline: Baseline | None = None, threads: int | None = None
) -> Workbench:
    """The process's workbench for a study, made on first use in place of another study's. threads: of PyTorch; by default
    as many as a trial has CPUs.

    Raises InputError when the model on this machine is not that of the plan (`planned_model`).
    """
    study, key = inputs.study, inputs.workbench_key
    torch.set_num_threads(threads or study.resources.cpus)
    if key not in _resident:
        _resident.clear()
        _resident[key] = Workbench.prepare(
            planned_model(inputs),
            inputs.edits,
            inputs.suite,
            study.capability.prose_tokens,
            baseline,
            # the hidden states entering these layers are computed in one pass
            engine=partial(TailEngine, layers=selected_layers(study, inputs.facts.n_layers)),
            ask_formats=study.ask_formats,
            asked_places=inputs.every_asked_place,
        )
    return _resident[key]


def planned_model(inputs: PreparedStudy) -> LoadedModel:
    """The study's model, its layers divided among the GPUs of a trial. Raises InputError if its weights, its configuration or
    its tokenizer are not the plan's."""
    study, facts = inputs.study, inputs.facts
    loaded = load_model(study.model, dtype=study.dtype, device=study.trial_device, spread=study.resources.gpus > 1)
    setup = folder_setup(model_folder(study.model))
    for what, found, planned in (
        ("weights with fingerprint", loaded.fingerprint, facts.model_fingerprint),
        ("a configuration or tokenizer with digest", setup, facts.model_setup),
    ):
        if found != planned:
            raise InputError(
                f"model {study.model!r} on node {socket.gethostname()}: got {what} {found}, expected {planned}, for which the "
                "study was planned; every node needs the same files"
            )
    return loaded


def measure_baseline(inputs: PreparedStudy) -> Baseline:
    """Measure the unedited model on all cores, since trials wait for it, and free the memory that they need next."""
    baseline = resident_workbench(inputs, threads=usable_cores()).baseline
    _resident.clear()
    gc.collect()
    return baseline


def train(bench: Workbench, config: TrialConfig, watch: Watch | None = None) -> Training:
    """Train a trial; on a CPU the result is bitwise the same every time. watch: called on the way through a stream."""
    torch.manual_seed(config.seed)  # nothing here draws from it; a model's own code might
    return bench.train(TuningPosition(config.layer, config.module), TrainingSettings(**config.training), watch)


def trained_delta(inputs: PreparedStudy, baseline: Baseline, config: TrialConfig) -> EditDelta:
    """The delta of a trial, trained once more; on a CPU it is bitwise the one that was measured."""
    return train(_trial_workbench(inputs, baseline, config), config).delta


def train_and_measure(config: TrialConfig, inputs: PreparedStudy, baseline: Baseline) -> TrialResult:
    """Run a trial on this process's workbench."""
    return run_trial(_trial_workbench(inputs, baseline, config), config)


def _trial_workbench(inputs: PreparedStudy, baseline: Baseline, config: TrialConfig) -> Workbench:
    """The process's workbench, reduced to the edits that a trial trains and asks about."""
    asked = asked_places(config.edit_count or len(inputs.edits.requests), inputs.study.edits.asked)
    return resident_workbench(inputs, baseline).first(config.edit_count, asked)


def run_trial(bench: Workbench, config: TrialConfig) -> TrialResult:
    """Train and measure one configuration. A divergence is a result, with finite worst values and `diverged` = 1."""
    started = time.perf_counter()

    def watch(arrived: int, change: Callable[[], EditDelta]) -> dict[str, float] | None:
        """Measures after each further tenth of the edits except the last, since the end is measured in any case."""
        before, now = (STAGES * edits // len(bench.rows) for edits in (arrived - config.arrival, arrived))
        return stage_metrics(bench, arrived, bench.first(arrived).measure(change())) if before < now < STAGES else None

    training = train(bench, config, watch)
    stages = [*training.watched]
    if training.diverged:
        metrics, outcomes = diverged_metrics(bench.questions, bench.baseline) | asked_counts(bench.questions), ()
    else:
        change, further = training.delta, (config.further_steps, config.precision, config.seed)
        measured = bench.measure_later(change, *further) if config.further_steps else bench.measure(change)
        metrics, outcomes = measured.metrics, tuple(asdict(outcome) for outcome in measured.outcomes)
        if config.pipeline == "stream":
            stages.append(stage_metrics(bench, len(bench.rows), measured))
    metrics = training_metrics(training, config.pipeline, len(bench.rows)) | metrics
    size = sum(change.numel() for change in training.delta.tensors.values())
    metrics["bits_per_parameter"] = float(bench.bits.sum()) / size
    metrics["seconds"] = time.perf_counter() - started
    return TrialResult(config, "done", None, metrics, training.losses, outcomes, tuple(stages))


def stage_metrics(bench: Workbench, arrived: int, measured: Measurement) -> dict[str, float]:
    """How well a stream's edits hold when `arrived` of them have arrived: the reliability of all, of the first tenth of the
    whole stream and of the latest tenth to arrive, and what the edits have cost so far."""
    ids, tenth = [request.id for request in bench.requests], max(1, len(bench.requests) // STAGES)
    stage = {"arrived": float(arrived)}
    stage |= {name: measured.metrics[name] for name in STAGE_METRICS if name in measured.metrics}
    parts = {"first_tenth": set(ids[:tenth]), "last_tenth": set(ids[max(0, arrived - tenth) : arrived])}
    for name, part in parts.items():
        found = edit_metrics([outcome for outcome in measured.outcomes if outcome.edit_id in part])
        if "reliability" in found:  # if only a sample of the edits is asked about, it may have none of these
            stage[name] = found["reliability"]
    return stage


def training_metrics(training: Training, pipeline: str, edits: int) -> dict[str, float]:
    """Metrics of the training itself, by their names in the results table. edits: how many it trained."""
    metrics = {
        "n_edits": float(edits),
        "diverged": float(training.diverged),
        "train_seconds": training.seconds,
        "seconds_per_edit": training.seconds / edits,
        "steps": float(training.steps),
        "batch_pieces": float(training.pieces),
        "epochs_run": float(len(training.losses)) if pipeline == "breadth_first" else 1.0,
    }
    if training.trained_loss is not None and math.isfinite(training.trained_loss):
        metrics["trained_loss"] = training.trained_loss
    if training.losses:
        metrics["train_loss"] = training.losses[-1]
    if training.arrival_seconds:
        for name, share in (("arrival_seconds", 0.5), ("arrival_seconds_p95", 0.95)):
            metrics[name] = float(np.quantile(training.arrival_seconds, share))
    return metrics
