"""The engine against the reference loop, side by side in one process: `locft bench`, or `python -m
tests.benchmarks.bench`.

Both sides get the same batches, the same starting weights and the same questions, one side right after the other, at
every layer anew, so that whatever else the machine does hits both; a ratio is that of a pair, two steps on the same
batch or two measurements of the same edit. What they compute is compared too: a fast wrong answer is not a fast answer.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel

from locft.data.requests import EditSet
from locft.data.suites import Suite, load_suite
from locft.engine.tail import supports_tail
from locft.engine.tail_engine import TailEngine
from locft.errors import InputError
from locft.machine import usable_cores
from locft.measure.evaluation import locality_prompts
from locft.measure.generation import greedy_answers
from locft.model.models import DTYPES, LoadedModel, load_model, load_structure
from locft.model.positions import TuningPosition, n_layers, parameter_names
from locft.model.precision import training_precision
from locft.process import describe_machine, torch_device
from locft.train.reference import full_forward
from locft.train.token_rows import TokenRow
from locft.workbench import Baseline, Workbench, in_memory, measure_unedited
from sweeps.commands.console import notice, print_json, print_table, say
from sweeps.commands.options import EditsOption, EditsOptions, JsonOption, RemoteCodeOption, ThreadsOption
from tests.benchmarks.bench_stages import (
    LEARNING_RATE,
    SEED,
    BenchSettings,
    Say,
    measurements,
    plain_beside,
    study_race,
    training_step,
)
from tests.benchmarks.machine_speed import device_facts, matrix_rows, matrix_speed, peak_memory, timed
from tests.benchmarks.random_weights import LEARNING_RATE as RANDOM_RATE
from tests.benchmarks.random_weights import configuration, random_loaded, random_model, texts_of

STAGES = ("training_step", "edit_metrics", "capability", "study")
PRECISIONS = ("float32", "bfloat16")
DEPTHS = (1.0, 0.76, 0.52, 0.21)
"""Relative depths of the layers measured when none are named: 29, 22, 15 and 6 of 30."""
COLUMNS = ("layer", "stage", "reference s", "engine s", "ratio", "tokens/s", "of speed", "added MiB", "differing")
"""Of the table. Tokens/s and the share of the measured speed are the engine's; added memory is reference / engine."""


def read_settings(
    structure: PreTrainedModel,
    edits: int,
    *,
    threads: int,
    layers: str | None = None,
    module: str = "mlp_down",
    batch_size: str = "10,100",
    repeats: int = 5,
    epochs: int = 25,
    precision: str | None = None,
    stages: str = ",".join(STAGES),
    whole_study: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    beside: str = "",
    learning_rate: float = LEARNING_RATE,
) -> BenchSettings:
    """Check the options as they are written. structure: the model, with or without weights; edits: how many there are.
    dtype: of the model.

    layers: "all", numbers with commas, or None for four over the depth. Raises one InputError with every problem.
    """
    problems: list[str] = []
    count = n_layers(structure)
    if layers is None:
        chosen = tuple(dict.fromkeys(round(depth * (count - 1)) for depth in DEPTHS))
    elif layers.strip() == "all":
        chosen = tuple(reversed(range(count)))
    else:
        chosen = _numbers("--layers", layers, "all, or layer numbers with commas such as 29,22", problems)
    for layer in chosen:
        try:
            parameter_names(structure, TuningPosition(layer, module))
        except InputError as error:
            problems += [f"--layers {layer}, --module {module}: {problem}" for problem in error.problems]
    sizes = _numbers("--batch-size", batch_size, "numbers of edits with commas such as 10,100", problems)
    wrong = [size for size in sizes if not 1 <= size <= edits]
    problems += [f"--batch-size {size}: there are {edits} edits; expected 1 to {edits}" for size in wrong]
    counts = (("--repeats", repeats), ("--epochs", epochs), ("--threads", threads))
    problems += [f"{name} {value}: expected at least 1" for name, value in counts if value < 1]
    precision = precision or training_precision(device)
    more = tuple(dict.fromkeys(part.strip() for part in beside.split(",") if part.strip() and part.strip() != dtype))
    named = [("--precision", precision), ("--dtype", dtype), *(("--plain", name) for name in more)]
    problems += [
        f"{name} {value!r}: expected one of {', '.join(PRECISIONS)}" for name, value in named if value not in PRECISIONS
    ]
    wanted = tuple(dict.fromkeys(part.strip() for part in stages.split(",")))
    unknown = [stage for stage in wanted if stage not in STAGES]
    problems += [f"--stages: there is no stage {stage!r}; stages are {', '.join(STAGES)}" for stage in unknown]
    if whole_study and "study" not in wanted:
        problems.append("--whole-study: the stage study is not among --stages")
    if not problems and (reason := supports_tail(structure)):
        problems.append(f"there is no engine to compare the reference with: {reason}")
    if problems:
        raise InputError(dict.fromkeys(problems))
    return BenchSettings(
        *(chosen, module, sizes, repeats, epochs, precision, wanted, threads, learning_rate, more, whole_study)
    )


def run_bench(
    loaded: LoadedModel, edits: EditSet, suite: Suite | None, settings: BenchSettings, say: Say = lambda line: None
) -> dict[str, Any]:
    """Measure; JSON-able: machine, layers (layer -> stage -> figures), mean_ratio (stage -> mean over layers), study.

    suite: of the stages capability and study. say: told what is going on, a line at a time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(SEED)
    try:
        machine = describe_machine() | device_facts(loaded.model.device) | _matrix_gflops(loaded.model, settings)
        say(_machine_line(machine))
        bench, prepared = _prepare(loaded, edits, suite, settings, say)
        layers: dict[str, dict[str, Any]] = {}
        for layer in settings.layers:
            position = TuningPosition(layer, settings.module)
            found: dict[str, Any] = {}
            if "training_step" in settings.stages:
                for number, size in enumerate(settings.batch_sizes):
                    name = f"training_step_batch_{size}" if number else "training_step"
                    found[name] = training_step(bench, position, size, settings, machine["matrix_gflops"])
            if {"edit_metrics", "capability"} & set(settings.stages):
                found |= measurements(bench, position, settings)
            for name, one in found.items():
                sides = f"{one['reference_seconds']:.3f} s against {one['engine_seconds']:.3f} s"
                say(f"{position} {name}: {sides}, {one['ratio']:.1f}x")
            layers[str(layer)] = found
        for name in settings.beside:
            plain_beside(bench, settings, name, layers, say)
        study = {"model": loaded.name, "edits": len(edits.requests), "seed": SEED}
        study |= {name: getattr(settings, name) for name in ("module", "precision", "learning_rate")} | prepared
        if "study" in settings.stages:
            study |= study_race(bench, prepared, settings, say)
        machine["peak_memory_bytes"] = peak_memory()
        names = dict.fromkeys(name for found in layers.values() for name in found)
        ratios = {name: statistics.mean(found[name]["ratio"] for found in layers.values()) for name in names}
        return {"machine": machine, "layers": layers, "mean_ratio": ratios, "study": study}
    finally:
        torch.set_num_threads(threads)


def report_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The figures of every layer and stage as the cells of a table, under `COLUMNS`."""
    rows = []
    for layer, found in result["layers"].items():
        for name, entry in found.items():
            spread = f"{entry['ratio']:.1f}x ({entry['ratio_low']:.1f} to {entry['ratio_high']:.1f})"
            cells = [layer, name, _seconds(entry["reference_seconds"]), _seconds(entry["engine_seconds"]), spread]
            if "share_of_matrix_speed" in entry:
                memory = [entry[f"{side}_added_bytes"] for side in ("reference", "engine")]
                cells += [
                    f"{entry['engine_tokens_per_second']:,.0f}",
                    f"{100 * entry['share_of_matrix_speed']:.0f}%",
                    "-" if None in memory else " / ".join(f"{value / 2**20:.0f}" for value in memory),
                    f"loss by {entry['loss_difference']:.1g}",
                ]
            else:
                compared = [what for what in ("questions", "items") if what in entry]
                differing = [f"{entry[f'{what}_differing']} of {entry[what]} {what}" for what in compared]
                cells += ["", "", "", ", ".join(differing)]
            rows.append(tuple(cells))
    return rows


def report_lines(result: Mapping[str, Any]) -> list[str]:
    """Machine, mean ratios, boundary pass and study in sentences."""
    machine, study = result["machine"], result["study"]
    lines = [
        f"{_machine_line(machine)}; peak resident memory {machine['peak_memory_bytes'] / 2**30:.2f} GiB",
        _boundary_line(study["boundary"]),
        *(f"mean ratio of {name}: {ratio:.1f}x" for name, ratio in result["mean_ratio"].items()),
    ]
    for layer, found in result["layers"].items():
        for name, entry in found.items():
            if "engine_launches" in entry:
                counts = " / ".join(f"{entry[f'{side}_launches']:,}" for side in ("reference", "engine"))
                what = "operations" if machine["device"] == "cpu" else "kernels and copies"
                lines.append(f"layer {layer}, {name}: {what} {counts}")
            lines += [
                f"layer {layer}, {name}: the plain loop in {precision}: "
                + ("no memory for it" if seconds is None else f"{_seconds(seconds)} s, {ratio:.1f}x")
                for precision, (seconds, ratio) in entry.get("beside", {}).items()
            ]
    if "ratio" in study:
        how = ""
        if study["estimated"]:
            at = ", ".join(map(str, study["reference_measured_at_layers"]))
            how = f" (the reference's is estimated from steps and measurements at layers {at})"
        lines.append(
            f"study of {study['positions']} positions, {study['edits']} edits, at most {study['epochs']} epochs: "
            f"{study['reference_seconds']:.0f} s against {study['engine_seconds']:.0f} s, {study['ratio']:.1f}x{how}"
        )
    return lines


def _prepare(
    loaded: LoadedModel, edits: EditSet, suite: Suite | None, settings: BenchSettings, say: Say
) -> tuple[Workbench, dict[str, Any]]:
    """The workbench with only what the stages ask for, and what its parts took. The states stay in memory."""
    asks = bool({"edit_metrics", "study"} & set(settings.stages))
    scores = bool({"capability", "study"} & set(settings.stages))
    if scores and suite is None:
        raise ValueError("the stages capability and study need a suite")
    prompts = locality_prompts(edits.requests if asks else ())
    answers, asking = timed(lambda: greedy_answers(loaded, prompts))  # the same on both sides
    boundary: dict[str, Any] = {}

    def make(loaded: LoadedModel, rows: Sequence[TokenRow]) -> TailEngine:
        with torch.no_grad():
            full_forward(loaded.model)(rows[:1])  # reads the weights into memory, which is no part of the pass
        engine, boundary["seconds"] = timed(partial(in_memory, loaded, rows, settings.layers), loaded.model.device)
        boundary["seconds"] += timed(partial(engine.views, DTYPES[settings.precision]))[1]  # made once a process
        return engine

    given = {"baseline": Baseline(tuple(answers), None), "asked_places": None if asks else ()}
    bench = Workbench.prepare(loaded, edits, suite if scores else None, engine=make, **given)
    states = bench.engine.states.layers.values()
    boundary |= {"tokens": len(bench.engine.tree), "bytes": sum(s.nbytes for s in states), "layers": len(states)}
    say(_boundary_line(boundary))
    prepared: dict[str, Any] = {"boundary": boundary}
    if asks or scores:
        measure = partial(measure_unedited, loaded, answers=answers, questions=bench.questions, suite=bench.suite)
        baseline, seconds = timed(lambda: measure(logits=bench.engine.unedited()))
        prepared["unedited"] = {"engine_seconds": asking + seconds}
        if "study" in settings.stages:
            seconds = timed(lambda: measure(logits=full_forward(loaded.model)))[1]
            prepared["unedited"]["reference_seconds"] = asking + seconds
        say("unedited model measured: " + ", ".join(f"{n} {s:.2f}" for n, s in prepared["unedited"].items()))
        bench = replace(bench, baseline=baseline)
    return bench, prepared


def _matrix_gflops(model: PreTrainedModel, settings: BenchSettings) -> dict[str, Any]:
    """Measured at the largest trained matrix, in billions of operations per second."""
    position = TuningPosition(settings.layers[0], settings.module)
    shapes = [model.get_parameter(name).shape for name in parameter_names(model, position)]
    matrices = [shape for shape in shapes if len(shape) == 2] or [model.get_output_embeddings().weight.shape]
    leaving, entering = max(matrices, key=math.prod)
    speeds = {name: matrix_speed(entering, leaving, DTYPES[name], device=model.device) / 1e9 for name in PRECISIONS}
    return {"matrix_gflops": speeds, "matrix_shape": [matrix_rows(model.device), entering, leaving]}


def _boundary_line(boundary: Mapping[str, Any]) -> str:
    size, seconds = boundary["bytes"] / 2**20, _seconds(boundary["seconds"])
    return f"boundary pass: {boundary['tokens']:,} tokens, {boundary['layers']} layer(s), {size:.0f} MiB in {seconds} s"


def _machine_line(machine: Mapping[str, Any]) -> str:
    speeds = ", ".join(f"{name} {value:.0f}" for name, value in machine["matrix_gflops"].items())
    where = "" if machine["device"] == "cpu" else f"{machine['device']}, "
    return f"{where}{machine['cpu']}, {machine['threads']} threads; GFLOP/s of matrix products: {speeds}"


def _numbers(name: str, text: str, expected: str, problems: list[str]) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        problems.append(f"{name} {text!r}: expected {expected}")
        return ()


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Built-in name, hub id, folder or .gguf file.")
    ] = None,
    random_weights: Annotated[
        str | None,
        typer.Option(metavar="CONFIG", help="In place of MODEL: the shape of this folder, .json file or hub id."),
    ] = None,
    edits: EditsOption = "atlas",
    limit: Annotated[int, typer.Option("--limit", min=1, help="Use the first N edits.")] = 100,
    layers: Annotated[str | None, typer.Option(help="29,22 or all; default four over the depth.")] = None,
    module: Annotated[str, typer.Option(help="What is trained in the layer.")] = "mlp_down",
    batch_size: Annotated[str, typer.Option(help="Edits per step; the first is the study's.")] = "10,100",
    repeats: Annotated[int, typer.Option(help="Pairs of steps; of measurements, at most 2.")] = 5,
    epochs: Annotated[int, typer.Option(help="Of the study's trials, at most.")] = 25,
    threads: ThreadsOption = None,
    device: Annotated[str, typer.Option(help="Where both sides compute: cpu, cuda, cuda:N or auto.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="Of the model: float32 or bfloat16; default float32 on a CPU, else bfloat16.")
    ] = None,
    plain: Annotated[
        str | None, typer.Option(help="Further precisions of the plain loop; default on a GPU both.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Of the engine: float32 or bfloat16; default the faster.")
    ] = None,
    stages: Annotated[str, typer.Option(help="Which are measured.")] = "training_step,edit_metrics,capability,study",
    whole_study: Annotated[bool, typer.Option("--whole-study", help="Run the reference's study, too: hours.")] = False,
    as_json: JsonOption = False,
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Measure the engine against the plain full forward pass on this machine, side by side. MODEL is smollm2-135m by default."""
    if model and random_weights:
        raise InputError(f"got MODEL {model} and --random-weights {random_weights}; expected one of them")
    target = torch_device(device)
    on_gpu = target.type != "cpu"
    dtype, model = dtype or ("bfloat16" if on_gpu else "float32"), model or "smollm2-135m"
    config = configuration(random_weights) if random_weights else None
    requests = EditsOptions(edits, limit).named_edits().load()
    settings = read_settings(
        random_model(config, torch.float32, torch.device("meta"))
        if config
        else load_structure(model, trust_remote_code=trust_remote_code),
        len(requests.requests),
        threads=threads or usable_cores(),
        layers=layers,
        module=module,
        batch_size=batch_size,
        repeats=repeats,
        epochs=epochs,
        precision=precision,
        stages=stages,
        whole_study=whole_study,
        device=device,
        dtype=dtype,
        beside=(",".join(PRECISIONS) if on_gpu else "") if plain is None else plain,
        learning_rate=RANDOM_RATE if config else LEARNING_RATE,
    )
    suite = load_suite("probes")
    if config:
        loaded = random_loaded(config, dtype, target, texts_of(requests, suite))
    else:
        loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    result = run_bench(loaded, requests, suite, settings, say=notice)
    if as_json:
        return print_json(result)
    print_table(COLUMNS, report_rows(result))
    for line in report_lines(result):
        say(line)


if __name__ == "__main__":
    app()
