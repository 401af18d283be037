"""The command `locft export`: an edit as a LoRA adapter, or a position as the configuration of another trainer.

Registered in `sweeps.commands.cli`.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis.stats.axes import AXES, AXIS
from analysis.stats.wording import number, percent, plural
from locft.errors import InputError, did_you_mean
from sweeps.commands.console import new_folder, notice, print_json, print_table, say, writable, write
from sweeps.commands.options import EDITS_HELP, EditsOptions, FormatsOption, JsonOption, LoadOptions, UriOption
from sweeps.commands.workbench import asked_formats, workbench

if TYPE_CHECKING:
    from locft.data.requests import EditSet
    from locft.model.adapter import LowRank
    from locft.model.delta import EditDelta
    from sweeps.commands.settings import EditSettings

    Measure = Callable[[EditDelta], tuple[dict[str, float], set[tuple[str, str]]]]
    """Takes a delta; returns its metrics, and the (edit id, format) pairs that are right."""

PEFT, FORMATS = "peft", ("peft", "axolotl", "trl", "llamafactory")
AS_THEY_ARE = ("axolotl", "llamafactory")
"""Trainers that use texts as they are and put no start token before them (LLaMA-Factory in its template `empty`)."""
DRIFT = 1.1
"""Largest drift at which an adapter still counts as keeping the edit, as a multiple of the edit's own drift."""
KEPT = 0.99
"""Share of the change's norm that an adapter has to keep where no edits are asked."""
TOLD = ("learning_rate", "batch_size", "epochs", "seed", "precision")
"""Settings of an edit that every trainer supports."""


@dataclass(frozen=True)
class ExportOptions(EditsOptions):
    """What the command takes in addition to an edit or a position and its model."""

    rank: Annotated[
        str | None,
        typer.Option(help="Rank of the adapter; of several, such as 16,64,256, use the smallest that keeps the edit."),
    ] = None
    edits: Annotated[
        str | None,
        typer.Option(help=f"Edits to measure at every rank, or to write alongside the configuration. {EDITS_HELP}"),
    ] = None
    ask_formats: FormatsOption = None
    tracking_uri: UriOption = None

    def load_edits(self) -> "EditSet | None":
        """The edits, if any. Raises InputError."""
        named = self.named_edits()
        return named.load() if named else None


@dataclass(frozen=True)
class Row:
    """Measurements of the edit at one rank."""

    rank: int | None
    """None for the edit itself."""
    size: int
    """Number of values."""
    kept: float
    """Norm of the change that is kept, as a share of the edit's."""
    metrics: dict[str, float]
    lost: int | None
    """Number of edits that are wrong in a format in which the edit itself has them right; None if none are asked or were right."""

    def holds(self, own: "Row") -> bool:
        """True if this is as good as the edit itself."""
        held = self.kept >= KEPT if self.lost is None else self.lost == 0
        return held and self.metrics.get("drift_kl", math.inf) <= DRIFT * own.metrics.get("drift_kl", math.inf)


def export(
    what: Annotated[
        str,
        typer.Argument(
            metavar="DELTA|POSITION", help="A delta as in `locft apply`, or a position as in `locft edit --position`."
        ),
    ],
    model: Annotated[str, typer.Option(help="The unedited model.")],
    form: Annotated[
        str,
        typer.Option("--format", help="peft: DELTA as a LoRA adapter; axolotl, trl, llamafactory: train at POSITION."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the adapter, or file for the configuration.")],
    options: ExportOptions,
    load: LoadOptions,
    as_json: JsonOption = False,
) -> None:
    """Write DELTA as a LoRA adapter for MODEL, or a configuration that makes another trainer train exactly POSITION."""
    if form not in FORMATS:
        raise InputError(f"--format {form}: expected one of {', '.join(FORMATS)}{did_you_mean(form, FORMATS)}")
    if form == PEFT:
        return _adapter(what, model, out, options, load, as_json)
    given = {
        "--rank": options.rank, "--ask-formats": options.ask_formats, "--tracking-uri": options.tracking_uri,
        "--dtype": load.dtype, "--device": load.device, "--threads": load.threads,
    }  # fmt: skip
    if wrong := [name for name, value in given.items() if value is not None]:
        raise InputError(f"{', '.join(wrong)}: only for --format peft; --format {form} runs no model")
    _configuration(what, model, form, out, options, load.trust_remote_code, as_json)


def _adapter(what: str, model: str, out: Path, options: ExportOptions, load: LoadOptions, as_json: bool) -> None:
    from locft.model.adapter import LowRank, base_address
    from locft.model.models import folder_fingerprint, load_structure, model_folder
    from sweeps.tracking.registry import load_delta

    ranks = _ranks(options.rank)
    new_folder(out, "adapter_config.json")
    edits, formats = options.load_edits(), asked_formats(options.ask_formats)
    change = load_delta(what, options.tracking_uri)
    structure = load_structure(model, trust_remote_code=load.trust_remote_code)
    change.require_base(model, folder_fingerprint(model_folder(model, trust_remote_code=load.trust_remote_code)))
    low_rank = LowRank.of(structure, change)
    notice(*low_rank.sentences())
    if (most := max(ranks)) > low_rank.full_rank:
        notice(
            f"rank {most}: the change has at most rank {low_rank.full_rank}, so {low_rank.full_rank} is used, which is exact"
        )
        ranks = sorted({min(rank, low_rank.full_rank) for rank in ranks})
    measure = _on_edits(model, change, edits, formats, load) if edits else _on_prose(model, load)
    own, *adapters = rows = list(_rows(low_rank, ranks, measure))
    chosen = adapters[0] if len(adapters) == 1 else next((row for row in adapters if row.holds(own)), None)
    base = base_address(model)
    if chosen:
        low_rank.save(chosen.rank, out, base)
    if as_json:
        found = {"rank": chosen and chosen.rank, "holds": chosen and chosen.holds(own), "folder": chosen and str(out)}
        about = {"model": model, "position": change.position, "base": base, "left_out": low_rank.left_out}
        print_json({**about, **found, "rows": [asdict(row) for row in rows]})
    else:
        _print_rows(rows)
        if chosen:
            say(f"\nRank {chosen.rank} {_reason(chosen, own, len(adapters))}: {out}", style="bold")
            say(f"Base: {base}")
    if not chosen:
        notice(f"no rank up to {max(ranks)} keeps the edit, so nothing was written. Try a larger rank, or give a single rank to "
               "write it anyway")  # fmt: skip
        raise typer.Exit(1)


def _ranks(text: str | None) -> list[int]:
    """The ranks to try, in ascending order. Raises InputError."""
    words = [word.strip() for word in (text or "").split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise InputError(f"--rank: got {text or 'nothing'}, expected whole numbers above 0, such as 16 or 16,64,256")
    return sorted({int(word) for word in words})


def _rows(low_rank: "LowRank", ranks: list[int], measure: "Measure") -> Iterator[Row]:
    """Measurements of the edit itself, then of each rank."""
    own, right = measure(low_rank.delta)
    size = sum(change.numel() for change in low_rank.delta.tensors.values())
    yield Row(None, size, 1.0, own, 0 if right else None)
    for rank in ranks:
        notice(f"measuring rank {rank}")
        metrics, still = measure(low_rank.at(rank))
        lost = len({edit for edit, _ in right - still}) if right else None
        yield Row(rank, low_rank.size(rank), low_rank.kept(rank), metrics, lost)


def _on_edits(
    model: str, change: "EditDelta", edits: "EditSet", formats: tuple[str, ...], load: LoadOptions
) -> "Measure":
    """A function that measures a delta on the edits' questions, and its drift on the built-in prose."""
    from locft.train.formats import UNSEEN
    from sweeps.study.schema import Capability

    few = Capability(limit=1)  # only its prose is used
    bench = workbench(model, load, edits, few, formats, fingerprint=change.base_fingerprint)

    def measure(delta: "EditDelta") -> tuple[dict[str, float], set[tuple[str, str]]]:
        measured = bench.measure(delta)
        formats = sorted(name for name in measured.metrics if name.startswith("reliability."))
        names = ("reliability", *formats, "generalization", "locality", "drift_kl")
        asked = [one for one in measured.outcomes if one.kind == "reliability" and one.format != UNSEEN]
        shown = {name: measured.metrics[name] for name in names if name in measured.metrics}
        return shown, {(one.edit_id, one.format) for one in asked if one.correct}

    return measure


def _on_prose(model: str, load: LoadOptions) -> "Measure":
    """A function that measures only the drift of a delta, on the built-in prose."""
    from locft.data.suites import load_suite
    from locft.engine.tail_engine import logits_with, unedited_logits
    from locft.measure.capability import encode_suite, measure_drift
    from locft.model.positions import TuningPosition

    loaded = load.load(model)
    suite = encode_suite(loaded.tokenizer, load_suite(limit=1))

    def measure(delta: "EditDelta") -> tuple[dict[str, float], set[tuple[str, str]]]:
        layer = TuningPosition.parse(delta.position).layer
        edited = logits_with(loaded, None, layer, delta.weights(loaded.model))
        return {"drift_kl": measure_drift(edited, unedited_logits(loaded, None), suite).kl}, set()

    return measure


def _print_rows(rows: list[Row]) -> None:
    names = list(rows[0].metrics)
    lost = ["edits lost"] if rows[0].lost is not None else []
    lines = []
    for row in rows:
        values = (number(row.metrics.get(name)) if name == "drift_kl" else percent(row.metrics[name]) for name in names)
        label = "the edit" if row.rank is None else str(row.rank)
        lines.append([label, f"{row.size:,}", percent(row.kept), *values, *([str(row.lost)] if lost else [])])
    print_table(("rank", "values", "change kept", *names, *lost), lines)


def _reason(chosen: Row, own: Row, tried: int) -> str:
    if not chosen.holds(own):
        return "does not keep the edit in full; it was written because it is the only rank given"
    held = f"keeps at least {KEPT:.0%} of the change" if chosen.lost is None else "loses no edit"
    first = "is the smallest that " if tried > 1 else ""
    return f"{first}{held}, with drift within {DRIFT - 1:.0%} of the edit's"


def _configuration(
    what: str, model: str, form: str, out: Path, options: ExportOptions, trust_remote_code: bool, as_json: bool
) -> None:
    from locft.model.adapter import base_address
    from locft.model.delta import require_base
    from locft.model.models import folder_fingerprint, is_hub_id, load_structure, load_tokenizer, model_folder
    from locft.model.positions import TuningPosition, parameter_names
    from locft.model.trainer_configs import Recipe, trainer_config
    from sweeps.commands.settings import edit_settings
    from sweeps.study.schema import Edits
    from sweeps.tracking.registry import PREFIX

    if Path(what).is_dir() or Path(what).suffix == ".safetensors" or what.startswith(PREFIX):
        raise InputError(
            f"{what}: got a delta, which is for --format peft; --format {form} takes LAYER.MODULE such as 22.mlp_down, or the "
            "file `locft select` wrote"
        )
    data = out.with_name(f"{out.stem}-edits.jsonl")
    for file in (out, data) if options.edits else (out,):
        writable(file, what, model, options.edits)
    edits = options.load_edits()
    chosen = edit_settings(what, {}, None, Edits(), None, "")
    structure = load_structure(model, trust_remote_code=trust_remote_code)
    if chosen.model_fingerprint and not is_hub_id(model):
        require_base(what, chosen.model_fingerprint, model, folder_fingerprint(model_folder(model)))
    training, where = chosen.training, TuningPosition.parse(chosen.position)
    about = tuple(_about(chosen, what))
    recipe = Recipe(
        base_address(model), where, training.learning_rate, training.batch_size, training.epochs, training.seed,
        training.precision == "bfloat16", data.name, about,
    )  # fmt: skip
    text = trainer_config(form, recipe, structure)
    if edits:
        write(data, _records(edits, form, load_tokenizer(model, trust_remote_code=trust_remote_code)))
    write(out, text)
    names = parameter_names(structure, where)
    if as_json:
        return print_json(
            {"model": model, "position": str(where), "parameters": names, "format": form, "file": str(out),
             "data": str(data) if edits else None, "notes": about}
        )  # fmt: skip
    notice(*about)
    say(f"{form} trains {', '.join(names[:4])}{', …' if len(names) > 4 else ''}: {out}")
    say(f"{plural(len(edits.requests), 'edit')}: {data}" if edits else f"Put the edits into {data}, or give --edits")


def _about(chosen: "EditSettings", what: str) -> Iterator[str]:
    """Where the settings come from, and which of them the trainer lacks."""
    values = asdict(chosen.training)
    source = f"those of {what}" if chosen.model_fingerprint else "the defaults of `locft edit`"
    yield f"Learning rate {values['learning_rate']:g}, batch size {values['batch_size']}, epochs {values['epochs']}: {source}."
    if not AXIS["learning_rate"].counts(values):
        yield f"The learning rate is a guess: `locft edit` would train with {values['method']}, which has none. Try several."
    yield "Prompts are used as they are (raw), the loss is the mean over the tokens of a batch, and training runs all epochs."
    others = (axis for axis in AXES if axis.trained and axis.name not in TOLD and values[axis.name] != axis.default)
    missing = [f"{axis.name} {values[axis.name]}" for axis in others if axis.counts(values)]
    if missing:
        yield f"Left out, because this trainer has no equivalent: {'; '.join(missing)}. Results will differ from `locft edit`'s."


def _records(edits: "EditSet", form: str, tokenizer: Any) -> str:
    """The edits as JSON lines for a trainer: the prompt, after the start token where the trainer adds none, and the target
    with its leading space and the EOS token."""
    from locft.data.answers import space_before_answer

    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    before = tokenizer.bos_token if starts and form in AS_THEY_ARE else ""
    lines = []
    for request in edits.requests:
        prompt = before + request.prompt
        answer = space_before_answer(request.prompt, request.target) + request.target + tokenizer.eos_token
        record: dict[str, Any] = {"prompt": prompt, "completion": answer}
        if form == "axolotl":
            record = {"segments": [{"label": False, "text": prompt}, {"label": True, "text": answer}]}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)
