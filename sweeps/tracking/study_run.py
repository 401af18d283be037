"""The record of a study in MLflow: one run for the study, one flat run for each trial.

Runs are found by their tags, so a result that is delivered again (after a retry, a restart, a lost response) still has one run.
A trial counts as finished only when its run is closed; the next delivery completes a run whose logging broke off.
"""

# MLflow takes seconds to import; commands that never reach the store start without it.

import contextlib
import io
import json
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from analysis.stats.table import done, results_frame
from locft.errors import InputError
from sweeps.study.trial_types import TrialConfig, TrialResult
from sweeps.tracking import pages, trial_run
from sweeps.tracking.store import (
    NoStore,
    Store,
    TrackingError,
    best_first,
    connect,
    now,
    outcome_of,
    refusable,
    store_errors,
)
from sweeps.tracking.trial_run import StudyInputs

if TYPE_CHECKING:
    from mlflow.entities import Run

_log = logging.getLogger(__name__)


class Tracker:
    """A study's runs in an MLflow store. Create with `Tracker.open` or `find_tracker`.

    Its methods raise TrackingError when a request to the store fails.
    """

    def __init__(self, store: Store, experiment_id: str, study_id: str):
        self._store, self.client = store, store.client
        self.uri = store.uri
        """The store's address, without a password."""
        self.experiment_id = experiment_id
        self.study_id = study_id

    @classmethod
    def open(cls, uri: str, name: str, study_id: str) -> "Tracker":
        """Connects to the store at a resolved address; creates it, and the experiment of that name, if they are missing.

        Raises InputError within seconds when the store cannot be reached or written, or the experiment was deleted.
        """
        store = connect(uri, create=True)
        tags = {
            "locft.kind": "experiment",
            "mlflow.experimentKind": "custom_model_development",  # else MLflow's page asks for it, and shows tabs for agents
            pages.VIEW_TAG: pages.view_state(),
        }
        return cls(store, store.open_experiment(name, tags), study_id)

    def open_run(
        self,
        name: str,
        *,
        study_yaml: str,
        description: str,
        environment: Mapping[str, Any],
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Opens the study's run, new or taken over from an earlier driver; returns its id.

        Runs of trials that a killed driver left open are closed as KILLED: the next delivery completes them.
        """
        with store_errors(f"study {name!r}"):
            if found := self._run():
                run_id = found.info.run_id
                self.client.update_run(run_id, status="RUNNING", name=name)
            else:
                own = {"locft.kind": "study", "locft.study_id": self.study_id}
                run_id = self._store.create_run(self.experiment_id, name, own).info.run_id
            self.describe(description, {**(tags or {}), "locft.status": "running"})
            about = pages.experiment_note(name, self.experiment_id, run_id)
            self.client.set_experiment_tag(self.experiment_id, "mlflow.note.content", about)
            self.client.log_text(run_id, study_yaml, "study.yaml")
            self.client.log_text(run_id, json.dumps(environment, indent=2, default=str), "environment.json")
            for run in self._trial_runs(status="RUNNING"):
                self._store.close_run(run.info.run_id, "KILLED", "incomplete")
        return run_id

    def log_trial(self, result: TrialResult, inputs: StudyInputs | None = None) -> str:
        """Writes the run of one trial and closes it; returns its id. May be called again with the same result.

        Outcomes that the store refuses, as where a proxy limits the size of files, are left out with a warning. Raises
        TrackingError when the store did not take the rest; the run is then closed as FAILED where possible.
        """
        config = result.config
        with store_errors(f"trial {config.id}"):
            found = best_first(self._trial_runs(trial_id=config.id))
            before = outcome_of(found[0]) if found else None
            if before == "done":
                return found[0].info.run_id
            tags = trial_run.trial_tags(self.study_id, result, inputs)
            name, started = pages.run_name(config), now() - int(1000 * result.metrics.get("seconds", 0))
            run = found[0] if found else self._store.create_run(self.experiment_id, name, tags, started)
            run_id = run.info.run_id
            try:
                self._store.log(
                    run_id,
                    metrics=result.metrics,
                    curves=trial_run.curves_of(result),
                    # Resuming a delivery that broke off repeats the same points; another attempt adds new ones.
                    when=now() if before == "failed" else run.info.start_time,
                    parameters=trial_run.trial_parameters(config),
                    tags={**tags, "mlflow.note.content": pages.trial_note(result, run_id)},
                )
                if result.status == "done" and "locft.error" in run.data.tags:
                    self.client.delete_tag(run_id, "locft.error")
                if result.outcomes:
                    with refusable(f"outcomes.json of trial {config.id}"):
                        self.client.log_text(run_id, trial_run.outcomes_table(result.outcomes), "outcomes.json")
                if inputs:
                    self._link_inputs(run_id, inputs)
            except BaseException:
                with contextlib.suppress(TrackingError), store_errors("a run"):  # else the next delivery closes it
                    self._store.close_run(run_id, "FAILED", "incomplete")
                raise
            self.client.set_terminated(run_id, "FINISHED" if result.status == "done" else "FAILED")
        return run_id

    def finish(
        self,
        results: pd.DataFrame,
        report_html: str,
        recommendation: Mapping[str, Any],
        summary_metrics: Mapping[str, float],
        status: Literal["done", "stopped", "failed"],
        *,
        answer: str,
    ) -> None:
        """Puts the results table, the dashboard and the answer into the study's run, and closes it.

        recommendation: stored whole; its `trial_ids` and `position`, if present, become tags, and the runs of those trials are
        the ones tagged `locft.pick`. answer: the run's new description, in markdown. If a trial has several runs (a lost response,
        two drivers), the best is kept. A file that the store refuses is left out, with a warning.
        """
        state = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[status]
        picked = list(recommendation.get("trial_ids", ()))
        with store_errors("the end of the study"), tempfile.TemporaryDirectory() as folder:
            run_id = self.run_id()
            trial_runs: dict[str, Run] = {}
            for run in best_first(self._trial_runs()):
                if trial_runs.setdefault(run.data.tags["locft.trial_id"], run) is not run:
                    self.client.delete_run(run.info.run_id)
            files = {
                "dashboard.html": report_html.encode(),
                "recommendation.json": json.dumps(recommendation, indent=2, default=str).encode(),
                "results.parquet": results.to_parquet(index=False),
            }
            for name, content in files.items():
                (file := Path(folder, name)).write_bytes(content)
                with refusable(f"the study's file {name}"):
                    self.client.log_artifact(run_id, str(file))
            self._store.log(run_id, metrics=summary_metrics, when=now())
            pick = {"trial_ids": ", ".join(picked), "position": recommendation.get("position", "")}
            self.describe(answer, {f"locft.pick.{key}": value for key, value in pick.items()})
            for trial_id, run in trial_runs.items():
                if trial_id in picked:
                    self._store.log(run.info.run_id, tags={"locft.pick": "pick"})
                elif "locft.pick" in run.data.tags:
                    self.client.delete_tag(run.info.run_id, "locft.pick")
            self._store.close_run(run_id, state, status)

    def run_id(self) -> str:
        """The id of the study's run (call `open_run` first)."""
        with store_errors(f"study {self.study_id}"):
            run = self._run()
        if run is None:
            raise TrackingError(f"study {self.study_id} has no run in {self.uri}: call open_run first")
        return run.info.run_id

    def describe(self, description: str, tags: Mapping[str, str]) -> None:
        """Replaces the description of the study's run, in markdown, and sets further tags (call `open_run` first)."""
        with store_errors("the description of the study"):
            run_id = self.run_id()
            note = pages.study_note(description, self.experiment_id, run_id)
            self._store.log(run_id, tags={**tags, "mlflow.note.content": note})

    def abandon(self) -> None:
        """Closes the study's run as stopped if it is still open; does nothing when the store is away."""
        with contextlib.suppress(TrackingError), store_errors("the study"):
            run = self._run()
            if run and run.info.status == "RUNNING":
                self._store.close_run(run.info.run_id, "KILLED", "stopped")

    def write_file(self, name: str, text: str) -> None:
        """Stores a text file with the study's run (call `open_run` first)."""
        with store_errors(f"the study's file {name}"):
            self.client.log_text(self.run_id(), text, name)

    def read_file(self, name: str) -> str | None:
        """The text of a file of the study's run; None when there is no such file or the study never ran."""
        with store_errors(f"the study's file {name}"):
            run = self._run()
            content = self._store.read_artifact(run.info.run_id, name) if run else None
        return None if content is None else content.decode("utf-8")

    def set_tag(self, key: str, value: str | None) -> None:
        """Sets a tag of the study's run (call `open_run` first); None removes it."""
        with store_errors(f"the study's tag {key}"):
            if value is None:
                self.client.delete_tag(self.run_id(), key)
            else:
                self._store.log(self.run_id(), tags={key: value})

    def tag(self, key: str) -> str | None:
        """The value of a tag of the study's run; None when it has no such tag or the study never ran."""
        with store_errors(f"the study's tag {key}"):
            run = self._run()
        return run.data.tags.get(key) if run else None

    def times(self) -> tuple[datetime | None, datetime | None]:
        """When the study first began and when it ended (UTC); None if it has not, or runs again: MLflow keeps the earlier end."""
        with store_errors("the times of the study"):
            run = self._run()
        over = run is not None and run.info.status != "RUNNING"
        times = (run.info.start_time if run else None, run.info.end_time if over else None)
        return tuple(datetime.fromtimestamp(ms / 1000, UTC) if ms else None for ms in times)

    def load_results(self, *, curves: bool = True) -> pd.DataFrame:
        """The results table (columns: `analysis.stats.table`), a row for each finished or failed trial, oldest first.

        curves: whether to read the loss curves; those of a finished study come from its table artifact, since reading each
        from its run takes milliseconds.
        """
        rows: dict[str, dict[str, Any]] = {}
        with store_errors("the results"):
            stored = self._stored_curves() if curves else {}
            for run in self._trial_runs():
                status, run_id = outcome_of(run), run.info.run_id
                if status is None:
                    continue
                try:
                    config = trial_run.config_of(run)
                except ValueError as error:
                    _log.warning("run %s is not a readable trial: %s", run_id, error)
                    continue
                known = rows.get(config.id)
                if known and (known["status"] == "done" or status == "failed"):  # the order of `best_first`
                    continue
                losses: Sequence[float] = ()
                if curves and trial_run.EPOCH_LOSS in run.data.metrics:
                    losses = stored.get(run_id) or self._store.loss_curve(run_id)
                rows[config.id] = {**trial_run.result_of(run, config, status, losses).to_row(), "run_id": run_id}
        return results_frame(list(rows.values()))

    def load_curve(self, trial_run_id: str) -> list[float]:
        """The loss curve of a trial; empty when none was logged."""
        with store_errors(f"the losses of run {trial_run_id}"):
            return self._store.loss_curve(trial_run_id)

    def load_outcomes(self, trial_run_id: str) -> pd.DataFrame:
        """The outcomes of a trial, one row per prompt; empty when none were logged."""
        with store_errors(f"the outcomes of run {trial_run_id}"):
            stored = self._store.read_artifact(trial_run_id, "outcomes.json")
            table = json.loads(stored) if stored else {"columns": trial_run.OUTCOMES, "data": []}
        return pd.DataFrame(table["data"], columns=table["columns"])

    def links(self, base: str = "") -> dict[str, str]:
        """Addresses of the study's pages (`pages.links`); the comparison shows its most reliable trials."""
        with store_errors("the links"):
            order = "metrics.reliability DESC"
            best = self._trial_runs(status="FINISHED", order=order, limit=pages.MAX_COMPARED)
            return pages.links(self.experiment_id, self.run_id(), [run.info.run_id for run in best], base)

    def _run(self) -> "Run | None":
        tags = {"kind": "study", "study_id": self.study_id}
        return next(iter(best_first(self._store.find_runs(self.experiment_id, tags))), None)

    def _trial_runs(self, *, trial_id: str | None = None, **search: Any) -> list["Run"]:
        """The runs of the study's trials, or of one trial, oldest first. search: further options of `find_runs`."""
        tags = {"kind": "trial", "study_id": self.study_id} | ({"trial_id": trial_id} if trial_id else {})
        return self._store.find_runs(self.experiment_id, tags, **search)

    def _link_inputs(self, run_id: str, inputs: StudyInputs) -> None:
        """Links a trial's run to the data sets and the unedited model, which is logged for the experiment when it is new."""
        from mlflow.entities import LoggedModelInput

        name, tags = re.sub(r"[/:.%\"']", "-", inputs.model), {"locft.fingerprint": inputs.model_fingerprint}
        known = self.client.search_logged_models([self.experiment_id], filter_string=f"name = '{name}'")
        model = next((one for one in known if one.tags.items() >= tags.items()), None)
        if model is None:
            tags["locft.model"], facts = inputs.model, {key: str(value) for key, value in inputs.model_facts.items()}
            source, kind = self.run_id(), "unedited model"
            model = self.client.create_logged_model(self.experiment_id, name, source, tags, facts, kind)
            self.client.finalize_logged_model(model.model_id, "READY")
        self.client.log_inputs(run_id, list(inputs.datasets), [LoggedModelInput(model.model_id)])

    def _stored_curves(self) -> dict[str, list[float]]:
        """Run id -> losses per epoch, from the table artifact of the study; {} when there is none yet."""
        run = self._run()
        stored = self._store.read_artifact(run.info.run_id, "results.parquet") if run else None
        if stored is None:
            return {}
        try:
            curves = done(pd.read_parquet(io.BytesIO(stored))).set_index("run_id")["epoch_losses"]
            return {run: list(map(float, curve)) for run, curve in curves.items()}
        except (OSError, KeyError, ValueError, TypeError) as error:  # a write that broke off, or a table without run_id
            _log.warning("the stored results table is not readable (%s); reading the runs instead", error)
            return {}


def find_tracker(uri: str, name: str, study_id: str) -> Tracker | None:
    """The tracker of a study; None when its store or its experiment does not exist. Creates neither.

    Raises InputError when the store at the resolved address cannot be reached or written.
    """
    try:
        store = connect(uri)
    except NoStore:
        return None
    experiment = store.find_experiment(name)
    return Tracker(store, experiment.experiment_id, study_id) if experiment else None


def find_trial(run_id: str, uri: str) -> tuple[TrialConfig, str | None]:
    """The trial of a run: its configuration, and the text of its study file (None when the study's run is gone).

    Raises InputError when there is no such run, or the run is not that of a trial.
    """
    store = connect(uri)
    with store_errors(f"run {run_id!r} in {store.uri}", InputError):
        run = store.client.get_run(run_id)
    if (kind := run.data.tags.get("locft.kind")) != "trial":
        what = "the run of a whole study" if kind == "study" else "not a run of locft"
        raise InputError(f"run {run_id!r} is {what}; expected the run of a trial (its tag locft.kind is trial)")
    try:
        config = trial_run.config_of(run)
    except ValueError as error:
        raise InputError(
            f"run {run_id!r} is incomplete ({error}): run the study again or choose another trial"
        ) from None
    study = Tracker(store, run.info.experiment_id, run.data.tags["locft.study_id"])
    return config, study.read_file("study.yaml")


def list_studies(uri: str, base: str = "") -> list[dict[str, Any]]:
    """The ten latest studies of a store. Creates no store. base: the address that the links begin with (`pages.links`)."""
    return [
        {
            "name": run.info.run_name,
            "status": run.data.tags.get("locft.status"),
            "study_id": study.study_id,
            "run_id": run.info.run_id,
            "experiment_id": study.experiment_id,
            "links": study.links(base),
        }
        for run, study in _latest_runs(uri, {"kind": "study"}, 10)
    ]


def earlier_trials(model_fingerprint: str, machine: str, limit: int, uri: str) -> list[TrialResult]:
    """The latest finished trials of a model on a machine (the tag `locft.machine`), in all studies of a store.

    Without losses and outcomes. Creates no store.
    """
    tags = {"kind": "trial", "model_fingerprint": model_fingerprint, "machine": machine}
    results = []
    for run, _ in _latest_runs(uri, tags, limit, status="FINISHED"):
        with contextlib.suppress(ValueError):  # a trial of another version
            results.append(trial_run.result_of(run, trial_run.config_of(run), "done"))
    return results


def _latest_runs(
    uri: str, tags: Mapping[str, str], limit: int, status: str | None = None
) -> list[tuple["Run", Tracker]]:
    """The latest runs of a store with these tags, each with its study; [] when the store does not exist."""
    try:
        store = connect(uri)
    except NoStore:
        return []
    with store_errors(f"the runs in {store.uri}"):
        runs = store.find_runs(None, tags, status=status, order="attributes.start_time DESC", limit=limit)
    return [(run, Tracker(store, run.info.experiment_id, run.data.tags["locft.study_id"])) for run in runs]
