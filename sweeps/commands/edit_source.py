"""What `locft edit` trains: new edits alone, or edits that continue an earlier edit and its ledger."""

import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis.stats.wording import percent, plural
from locft.cache import file_sha256
from locft.errors import InputError
from sweeps.commands.console import notice
from sweeps.commands.options import (
    EditsOptions,
    FormatsOption,
    LoadOptions,
    TrainingOptions,
    UriOption,
    comma_separated,
)

if TYPE_CHECKING:
    from locft.data.edit_request import EditRequest
    from locft.data.ledger import Ledger
    from locft.data.requests import EditSet
    from locft.model.delta import EditDelta
    from locft.model.positions import TuningPosition
    from locft.train.pipelines import Training, TrainingSettings
    from locft.workbench import Measurement, Workbench
    from sweeps.commands.settings import EditSettings

EARLIER_MEASURED = 100
"""Number of earlier edits that are sampled and measured after new ones are trained."""
DIGEST = "delta_sha256"
"""Key of edit.json for the digest of the delta's file, which ties the files of an edit together; edit.json is written last."""


@dataclass(frozen=True)
class SourceOptions(EditsOptions):
    """What to edit and where: options, a position file, or the trial to repeat."""

    ask_formats: FormatsOption = None
    position: Annotated[
        str | None, typer.Option(help="LAYER.MODULE, such as 22.mlp_down, or the file `locft select` wrote.")
    ] = None
    from_run: Annotated[
        str | None, typer.Option(help="Repeat the trial of this MLflow run; other options override its settings.")
    ] = None
    tracking_uri: UriOption = None

    def settings(self, training: TrainingOptions, dtype: str | None, tracking_uri: str | None) -> "EditSettings":
        """All settings of an edit. Raises InputError with every bad option."""
        from sweeps.commands.settings import edit_settings

        given = asdict(training) | {"ask_formats": self.ask_formats}
        return edit_settings(self.position, given, dtype, self.named_edits(), self.from_run, tracking_uri)


@dataclass(frozen=True)
class ContinueOptions:
    """An earlier edit to continue."""

    onto: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Continue the edit in this folder; the result is one delta of all edits so far."
        ),
    ] = None
    without: Annotated[
        str | None,
        typer.Option(metavar="IDS", help="With --onto: take back the edits with these ids, separated by commas."),
    ] = None
    within: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="With --onto: stop training after this many seconds.")
    ] = None
    consolidate: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Retrain all edits in this folder's ledger together, from the unedited model."
        ),
    ] = None

    def earlier(self, folder: Path, source: SourceOptions, training: TrainingOptions) -> "EarlierEdit | None":
        """The edit to continue; None for a new one. Raises InputError with every option that does not fit."""
        if problems := list(self._problems(folder, source, training)):
            raise InputError(problems)
        named = self.onto or self.consolidate
        return EarlierEdit.load(named, anew=self.consolidate is not None) if named else None

    def _problems(self, folder: Path, source: SourceOptions, training: TrainingOptions) -> Iterator[str]:
        if self.onto and self.consolidate:
            yield "--consolidate: it retrains all edits from the unedited model, so it does not go with --onto"
        for name, value in (("--without", self.without), ("--within", self.within)):
            if value is not None and not self.onto:
                yield f"{name}: needs --onto FOLDER, the edit to continue"
        if self.without is not None and not comma_separated(self.without):
            yield f"--without: got {self.without!r}, expected ids of edits, separated by commas"
        if self.within is not None and not self.within > 0:
            yield f"--within: got {self.within:g}, expected a number of seconds above 0"
        if self.onto and not source.edits and self.without is None:
            yield "--onto: expected new edits (--edits) or edits to take back (--without)"
        if self.consolidate and source.edits:
            yield "--consolidate: it trains only the edits in the ledger; add new ones with --onto"
        named = self.onto or self.consolidate
        if not named:
            return
        place = "an edit that continues another keeps that edit's position"
        order = "--onto trains new edits as one arrival, and --consolidate trains breadth_first"
        for name, value, why in (
            ("--position", source.position, place), ("--from-run", source.from_run, place),
            ("--pipeline", training.pipeline, order), ("--arrival", training.arrival, order),
        ):  # fmt: skip
            if value is not None:
                yield f"{name}: leave it out; {why}"
        if folder.resolve() == named.resolve():
            yield f"--out {folder}: this folder holds the edit to continue, which stays unchanged; name another folder"

    def batch(self, earlier: "EarlierEdit | None", source: SourceOptions, chosen: "EditSettings") -> "Batch":
        """The edits to train, and the resulting ledger. Raises InputError when no edit is new or none would be left."""
        from locft.data.ledger import FILE_NAME, Ledger
        from locft.data.requests import EditSet

        if earlier is None:
            edits = chosen.edits.load().first(chosen.edit_count)
            return Batch(edits, Ledger.of(edits.requests, now()), new=edits.requests)
        held = EditSet.made(earlier.ledger.active, str(earlier.folder / FILE_NAME))
        if self.consolidate:
            return Batch(held, earlier.ledger, new=held.requests)
        edits = chosen.edits.load(only_marked=True) if source.edits else held
        new = edits.requests if source.edits else ()
        arrival = earlier.ledger.add(new, now(), comma_separated(self.without), edits.retracted)
        if not arrival.new and not arrival.retracted:
            raise InputError([*arrival.sentences, "--edits: nothing new to train"])
        if not arrival.ledger.active:
            raise InputError("--without: no edit would be left; use the unedited model instead")
        notice(*arrival.sentences)
        fresh = {request.id for request in arrival.new}
        kept = tuple(request for request in arrival.ledger.active if request.id not in fresh)
        sample = random.Random(0).sample(kept, min(EARLIER_MEASURED, len(kept)))
        measured = replace(edits.of((*arrival.new, *sample)), retracted=())  # the arrival has reported these
        within = math.inf if self.within is None else self.within
        return Batch(measured, arrival.ledger, arrival.new, kept, arrival.retracted, earlier.delta, within)


@dataclass(frozen=True)
class EarlierEdit:
    """An edit as `locft edit` wrote it."""

    folder: Path
    delta: "EditDelta"
    ledger: "Ledger"
    about: Mapping[str, Any]
    """Content of its edit.json."""
    anew: bool = False
    """Its edits are trained again, from an unedited model, which may be another one than before."""

    @classmethod
    def load(cls, folder: Path, *, anew: bool = False) -> "EarlierEdit":
        from locft.data.ledger import Ledger
        from locft.model.checkpoint import DELTA
        from locft.model.delta import EditDelta

        about = folder / "edit.json"
        try:
            described = json.loads(about.read_text(encoding="utf-8"))
            if not isinstance(described, dict):
                raise ValueError("not a JSON object")
        except (OSError, ValueError) as error:
            raise InputError(f"{about}: expected the description of an edit that `locft edit` wrote: {error}") from None
        found = cls(folder, EditDelta.load(folder), Ledger.load(folder), described, anew)
        if described.get(DIGEST, digest := file_sha256(folder / DELTA)) != digest:
            raise InputError(
                f"{folder}: {DELTA} is not the one that edit.json describes, as when writing the edit was interrupted; "
                "make the edit again to continue it"
            )
        return found

    def settings(
        self, model: str, training: TrainingOptions, load: LoadOptions, source: SourceOptions
    ) -> "EditSettings":
        """The settings of the earlier edit, overridden by the options that are given; where it is trained anew, without what
        ties them to its model."""
        from locft.model.models import folder_fingerprint, model_folder
        from sweeps.commands.settings import continued_settings

        pipeline = "breadth_first" if self.anew else "stream"
        given = asdict(training) | {"pipeline": pipeline, "ask_formats": source.ask_formats}
        chosen = continued_settings(self.delta, self.about, given, load.dtype, source.named_edits())
        if not self.anew:
            return chosen
        run_id, before = chosen.run_id, self.delta.base_fingerprint
        found = folder_fingerprint(model_folder(model, trust_remote_code=load.trust_remote_code))
        if found != before:
            left_out = f"; its MLflow run {run_id} is left out" if run_id else ""
            notice(
                f"{self.folder}: made on a model with fingerprint {before}; all its edits are trained anew on {model}, which has "
                f"{found}{left_out}"
            )
        return replace(chosen, model_fingerprint=None, run_id=run_id if found == before else None)


@dataclass(frozen=True)
class Batch:
    """Edits to train, alone or on top of earlier ones."""

    measured: "EditSet"
    """Edits that are asked at the end: the new ones and a sample of the earlier ones."""
    ledger: "Ledger"
    """Includes the new edits."""
    new: tuple["EditRequest", ...]
    kept: tuple["EditRequest", ...] = ()
    """The earlier edits that are still active."""
    retracted: tuple["EditRequest", ...] = ()
    delta: "EditDelta | None" = None
    """The earlier edits' delta; None if training starts from the unedited model."""
    seconds: float = math.inf
    """Time limit for training."""

    def train(self, bench: "Workbench", position: "TuningPosition", settings: "TrainingSettings") -> "Training":
        """Train new edits alone as the settings say, or on top of earlier ones, which are replayed. Retracted edits are trained
        to other answers (`_undone`)."""
        from locft.edit_trainer import EditTrainer
        from locft.train.encoding import encode_edits
        from locft.train.pipelines import Earlier

        if self.delta is None:
            return bench.train(position, settings)
        undone = self._undone(bench)
        if silent := [request.id for request in undone if not request.target]:
            notice(
                f"the unedited model's answer to {', '.join(silent)} is empty, so there is nothing to train these edits back to: "
                "they may persist until the next --consolidate"
            )
        new = (*(request for request in undone if request.target), *self.new)
        requests = (*self.kept, *new)
        trainer = EditTrainer(bench.loaded, requests, encode_edits(bench.loaded.tokenizer, requests), bench.engine)
        settings = replace(settings, pipeline="stream", arrival=max(1, len(new)))
        return trainer.train(position, settings, Earlier(self.delta, len(self.kept), self.seconds))

    def _undone(self, bench: "Workbench") -> list["EditRequest"]:
        """The retracted edits with the answers to train in place of theirs: that of an active edit to the same prompt, else the
        unedited model's, which may be empty. Without those whose prompt is that of a new edit, which is trained anyway."""
        from locft.measure.generation import greedy_answers

        active = (*self.kept, *self.new)
        answers = {text: request.target for request in active for text in request.rephrases}
        answers |= {request.prompt: request.target for request in active}
        fresh = {request.prompt for request in self.new}
        undone = [request for request in self.retracted if request.prompt not in fresh]
        if asked := [request.prompt for request in undone if request.prompt not in answers]:
            said = greedy_answers(bench.loaded, asked)
            answers |= {prompt: answer.text for prompt, answer in zip(asked, said, strict=True)}
        return [replace(request, target=answers[request.prompt]) for request in undone]

    def counted(self) -> str:
        """The numbers of edits as text: new, earlier and taken back."""
        if self.delta is None:
            return plural(len(self.new), "edit")
        back = f", {len(self.retracted):,} taken back" if self.retracted else ""
        return f"{plural(len(self.new), 'new edit')} on top of {len(self.kept):,}{back}"

    def told(self, found: Mapping[str, Any]) -> Iterator[str]:
        """The result of `came_of_it` as sentences."""
        for name in ("new", "earlier"):
            if name in found:
                yield f"Reliability of {name} edits: {percent(found[name]['reliability'])}"
        if missing := found.get("not_learnt"):
            yield f"Not yet right in every format: {', '.join(missing)}"

    def came_of_it(self, measured: "Measurement") -> dict[str, Any]:
        """For an edit that continues another: reliability of the new and of the sampled earlier edits, and the ids of new ones
        that are not right in every asked format."""
        if self.delta is None:
            return {}
        fresh = {request.id for request in self.new}
        asked = [one for one in measured.outcomes if one.kind == "reliability" and one.format != "unseen"]
        found: dict[str, Any] = {}
        for name, edits, is_new in (("new", self.new, True), ("earlier", self.kept, False)):
            if right := [one.correct for one in asked if (one.edit_id in fresh) == is_new]:
                found[name] = {"edits": len(edits), "reliability": sum(right) / len(right)}
        found["not_learnt"] = sorted({one.edit_id for one in asked if one.edit_id in fresh and not one.correct})
        return found


def now() -> str:
    """The current time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
