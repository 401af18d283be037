"""Memory and disk that trials take, as far as predictable before they run, and how many trials fit side by side."""

import math
from collections.abc import Sequence

import psutil

from analysis.stats.axes import AXIS
from locft.machine import usable_cores
from sweeps.study.schema import Resources
from sweeps.study.trial_types import StudyFacts, TrialConfig

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DEPTHS = (0.25, 0.5, 0.7, 0.9)
"""Relative depths for which memory is reported."""
_FOR_TRIALS = 0.7
"""Share of the free memory that Ray leaves to trials; the rest is for its object store."""
_TRAINED_BYTES = 4 * 4
"""Bytes per trained parameter: weight, gradient and Adam's two moments in float32."""
_FACTORS = 3
"""Copies of the curvature factors (`locft.curvature`): as measured, damped, and in the precision of training."""
_DRIVER_BYTES = 1_050_000_000
"""Memory of the driver with Ray, MLflow and its tables, and of Ray's own processes."""
_PROCESS_BYTES = 380_000_000
"""Memory of a worker with its imports, before it loads a model, without the libraries that it shares."""
_READ_AT_ONCE = 2048
"""Tokens in a forward pass of the unedited model, all of whose logits are held."""
_CONTEXT_BYTES = 600_000_000
"""GPU memory that CUDA and its kernels take in each process."""
_GPU_SIZES = (24 * 2**30, 80 * 2**30)
"""Memory of common GPUs, in bytes."""
_RUN_BYTES, _OUTCOME_BYTES, _STUDY_BYTES = 30_000, 400, 10_000_000
"""Bytes in MLflow's store for a run with its metrics, a question with its answer, and a study's dashboard, tables and files."""


def this_machine() -> dict[str, float]:
    """The resources that Ray will count for this machine."""
    import torch

    memory = _FOR_TRIALS * psutil.virtual_memory().available
    return {"CPU": usable_cores(), "GPU": torch.cuda.device_count(), "memory": memory}


def most_memory_bytes(trials: Sequence[TrialConfig], facts: StudyFacts) -> int:
    """Peak memory of the worker that takes the most, in bytes."""
    return max((memory_bytes(trial, facts) for trial in trials), default=0)


def memory_bytes(trial: TrialConfig, facts: StudyFacts) -> int:
    """Peak memory of one worker, in bytes."""
    return _shared_bytes(trial, facts) + _kept_bytes(trial, facts) + _added_bytes(trial, facts)


def gpu_bytes(trial: TrialConfig, facts: StudyFacts) -> int:
    """Peak memory of one worker on a GPU, in bytes. Counted, not measured: no GPU has run this yet.

    Each worker has its own frozen weights, in both precisions if they differ. Besides the trained parameters there
    are their base and start values, in float32, and the states of the edits. Each layer above keeps the inputs and outputs of
    a batch's matrix products. Copies of stored states use only memory that is still free.
    """
    precise, trained, hidden = BYTES[trial.precision], _trained(trial, facts), facts.hidden
    layers = facts.n_layers - trial.layer
    kept = 2 * precise * _batch_tokens(trial, facts) * layers * facts.layer_parameters // hidden
    states = precise * facts.edit_tokens * (hidden + trained // hidden)
    held = _CONTEXT_BYTES + _shared_bytes(trial, facts) + (_TRAINED_BYTES + 2 * 4) * trained
    return held + states + kept + _added_bytes(trial, facts)


def gpu_sentence(resources: Resources, trials: Sequence[TrialConfig], facts: StudyFacts) -> str | None:
    """How many trials fit on one GPU: this machine's, or one of a common size where it has none. None for trials that use no
    GPU, or more than one."""
    if not trials or not 0 < resources.gpus <= 1:
        return None
    import torch

    most, share = max(gpu_bytes(trial, facts) for trial in trials), int(1 / resources.gpus + 1e-9)
    here = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    sizes = [here] if here else _GPU_SIZES
    fitting = " and ".join(f"{size // most} on a GPU of {size / 2**30:.0f} GiB" for size in sizes)
    sentence = (
        f"GPU memory: a trial may take {most / 2**30:.1f} GiB (counted, not measured), so there is room for {fitting}"
    )
    if here and share > max(1, here // most):
        expected = "a smaller dtype or batch, or gpus: 2"
        if here >= most:
            expected = f"at least {math.ceil(100 / (here // most)) / 100:g}"
        return f"{sentence}, but resources.gpus: {resources.gpus:g} puts {share} on it; expected {expected}"
    return f"{sentence}; resources.gpus: {resources.gpus:g} puts {share} on each"


def depth_bytes(trial: TrialConfig, facts: StudyFacts) -> dict[int, int]:
    """By layer, at several depths: memory that this trial would keep if it trained that layer, in bytes.

    Where `dtype` is that of the checkpoint, weights are read from their file, so those below the trained layer are needed only
    once and need not stay: a model may be larger than memory. Those above, the head and what is trained are needed in each step.
    """
    own = _kept_bytes(trial, facts) + _added_bytes(trial, facts)
    layers = [int(depth * facts.n_layers) for depth in DEPTHS]
    above = [(facts.n_layers - layer) * facts.layer_parameters + facts.head_parameters for layer in layers]
    return {layer: own + _weight_bytes(trial) * size for layer, size in zip(layers, above, strict=True)}


def depth_sentence(trials: Sequence[TrialConfig], facts: StudyFacts) -> str | None:
    """How much memory the first trial keeps, by depth, and how much is free here; None for trials that train all weights."""
    if not trials or trials[0].further_steps:
        return None
    found, free = depth_bytes(trials[0], facts), psutil.virtual_memory().available
    kept = ", ".join(f"{size / 2**30:.1f} at layer {layer}" for layer, size in found.items())
    fitting = [layer for layer, size in found.items() if size <= free]
    fits = (
        "all fit" if len(fitting) == len(found) else f"from layer {fitting[0]} up they fit" if fitting else "none fits"
    )
    said = f"memory a trial keeps, in GiB, with weights read from their file: {kept}"
    return f"{said}; {fits} in the {free / 2**30:.1f} GiB that are free"


def memory_range(trials: Sequence[TrialConfig], facts: StudyFacts, concurrent: int) -> tuple[int, int]:
    """Bytes that the driver and `concurrent` workers hold in any case, and with everything that may come on top."""
    if not trials:
        return 0, 0
    at_once, always = min(concurrent, len(trials)), _DRIVER_BYTES + _shared_bytes(trials[0], facts)
    kept = [_kept_bytes(trial, facts) for trial in trials]
    most = max(own + _added_bytes(trial, facts) for own, trial in zip(kept, trials, strict=True))
    return always + at_once * min(kept), always + at_once * most


def _shared_bytes(trial: TrialConfig, facts: StudyFacts) -> int:
    """Size of the files that all workers of a machine map: the frozen weights, in both dtypes if training has another."""
    return facts.parameters * _weight_bytes(trial)


def _weight_bytes(trial: TrialConfig) -> int:
    """Bytes per frozen weight, in both dtypes if they differ."""
    return sum(BYTES[name] for name in {trial.dtype, trial.precision})


def _trained(trial: TrialConfig, facts: StudyFacts) -> int:
    return facts.trained_parameters.get(trial.position, facts.layer_parameters)


def _kept_bytes(trial: TrialConfig, facts: StudyFacts) -> int:
    """What a worker holds while it trains: the process, and the trained parameters with their gradients and moments."""
    further = facts.parameters if trial.further_steps else 0
    return _PROCESS_BYTES + _TRAINED_BYTES * (_trained(trial, facts) + further)


def curvature_bytes(trial: TrialConfig, facts: StudyFacts) -> int:
    """Bytes of the curvature factors that a method needs."""
    if not AXIS["curvature_strength"].counts({"method": trial.method}):
        return 0
    inverted = 2 if trial.method == "natural_gradient" else 1
    return inverted * _FACTORS * facts.factor_bytes[trial.position]


def _added_bytes(trial: TrialConfig, facts: StudyFacts) -> int:
    """What a worker may add to `_kept_bytes`: the largest logits and the curvature factors."""
    batch_tokens = _batch_tokens(trial, facts)
    reading = min(_READ_AT_ONCE, facts.edit_tokens + facts.evaluation_tokens + facts.capability_tokens)
    return 4 * facts.vocabulary * max(3 * batch_tokens, int(1.5 * reading)) + curvature_bytes(trial, facts)


def _batch_tokens(trial: TrialConfig, facts: StudyFacts) -> int:
    rows = min(trial.batch_size, facts.trained(trial))
    return int(rows * facts.edit_tokens * facts.row_size(trial.train_formats)) // facts.n_edits


def disk_range(trials: Sequence[TrialConfig], count: int, facts: StudyFacts) -> tuple[int, int]:
    """Bytes of weights in the precision of training and MLflow's records, without and with the hidden states of trained layers."""
    if not trials:
        return 0, 0
    dtype, precision = trials[0].dtype, trials[0].precision
    layers = {trial.layer for trial in trials} | {facts.n_layers - 1}
    states = BYTES[dtype] * facts.hidden * (facts.evaluation_tokens + facts.capability_tokens) * len(layers)
    cast = 0 if precision == dtype else BYTES[precision] * facts.parameters
    records = _STUDY_BYTES + count * (_RUN_BYTES + 4 * facts.n_asked * _OUTCOME_BYTES)
    return cast + records, states + cast + records
