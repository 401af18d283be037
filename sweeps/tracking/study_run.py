"""The record of a study in MLflow: one flat run a trial, one run for the study.

A run is found by its tags, never by what this process remembers. So a result may be delivered again (after a retry, a
restart, an answer that was lost) and there is still one run of the trial. A trial counts as finished only when its run
is closed: a run whose logging broke off is completed by the next delivery.

`tracking_store` makes the requests, `tracking_runs` says how a trial is written, `tracking_view` what people see;
`tracking_lookup` finds a run or a study in any experiment.
"""

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

from sweeps.tracking import trial_run as runs
from sweeps.tracking import pages as tracking_view
from sweeps.study.trial_types import TrialResult
from sweeps.tracking.registry import add_version, registered_name
from sweeps.tracking.trial_run import DatasetRecord, ModelRecord, StudyInputs
from sweeps.tracking.address import check_reachable, resolve_uri, sqlite_path
from sweeps.tracking.store import NothingThere, Store, TrackingError, asking, connect, open_experiment

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["DatasetRecord", "ModelRecord", "StudyInputs", "Tracker", "TrackingError", "find_tracker"]

_log = logging.getLogger(__name__)


class Tracker:
    """One experiment of an MLflow store. Create with `Tracker.open`."""

    def __init__(self, store: Store, uri: str):
        self._store = store
        self._client = store.client
        self.uri = uri
        """Absolute, without a password."""
        self.experiment_id = store.experiment_id

    @classmethod
    def open(cls, uri: str | None, experiment: str, *, create: bool = True) -> "Tracker":
        """Connects to the store.

        uri: None takes MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the working directory.
        create: whether a store or an experiment that is not there is created; without, it is an error.

        Raises:
            InputError: within seconds when the store cannot be reached or written, or the name cannot be used;
                `NothingThere` when the experiment is what is not there.
        """
        name = experiment.strip()
        client, shown = connect(uri, create=create)

        tags = {
            "locft.kind": "experiment",
            "mlflow.experimentKind": "custom_model_development",  # else the page asks, and shows tabs for agents
            tracking_view.VIEW_TAG: tracking_view.view_state(),
        }
        return cls(Store(client, open_experiment(client, shown, name, tags if create else None)), shown)

    def open_study(
        self,
        study_id: str,
        name: str,
        *,
        study_yaml: str,
        description: str,
        environment: Mapping[str, Any],
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """The open run of the study, new or taken over from an earlier driver; returns its id.

        Runs of trials that a killed driver left open are closed as KILLED: the next delivery completes them.
        """
        with asking(f"study {name!r}"):
            if found := self._store.find(runs.matching("study", study_id)):
                run_id = found[0].info.run_id
                self._client.update_run(run_id, status="RUNNING", name=name)
            else:
                run_id = self._store.create(name, {"locft.kind": "study", "locft.study_id": study_id}).info.run_id
            note = tracking_view.study_note(description, self.experiment_id, run_id)
            self._store.log(run_id, tags={**(tags or {}), "locft.status": "running", "mlflow.note.content": note})
            about = tracking_view.experiment_note(name, self.experiment_id, run_id)
            self._client.set_experiment_tag(self.experiment_id, "mlflow.note.content", about)
            environment_json = json.dumps(environment, indent=2, default=str)
            self._store.put(run_id, {"study.yaml": study_yaml, "environment.json": environment_json})
            left_open = f"{runs.matching('trial', study_id)} and attributes.status = 'RUNNING'"
            for run in list(self._store.search(left_open)):
                self._store.close(run.info.run_id, "KILLED", "incomplete")
        return run_id

    def create_inputs(
        self,
        study_id: str,
        model: ModelRecord,
        datasets: Sequence[DatasetRecord],
        tags: Mapping[str, str] | None = None,
    ) -> StudyInputs:
        """Prepares what `log_trial` links to every run; the model is created once in the experiment.

        tags: further ones that every run shall have.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        made = tuple(
            DatasetInput(
                Dataset(
                    name=data.name[:500],
                    digest=data.fingerprint[:36],  # MLflow's limit
                    source_type="local",
                    source=json.dumps({"uri": data.source}),
                    profile=json.dumps(data.profile, default=str),
                ),
                [InputTag("mlflow.data.context", data.context)],
            )
            for data in datasets
        )
        name = re.sub(r"[/:.%\"']", "-", model.name) or "model"
        names = {"locft.model": model.name, **{f"locft.{data.context}": data.source for data in datasets}}
        with asking("the inputs of the study"):
            study_run = self._study_run(study_id)
            model_id = self._store.model(name, model.fingerprint, study_run, {"locft.model": model.name}, model.facts)
        return StudyInputs(made, model_id, {**names, **(tags or {})})

    def log_inputs(self, run_id: str, inputs: StudyInputs) -> None:
        """Links the data sets and the unedited model to a run, in one request."""
        from mlflow.entities import LoggedModelInput

        with asking(f"the inputs of run {run_id}"):
            self._client.log_inputs(run_id, list(inputs.datasets), [LoggedModelInput(inputs.model_id)])

    def log_trial(self, study_id: str, result: TrialResult, inputs: StudyInputs | None = None) -> str:
        """Writes the run of one trial and closes it; returns its id. May be called again with the same result.

        Raises:
            TrackingError: the store did not take all of it; the run is closed as FAILED where that is still possible.
        """
        config = result.config
        with asking(f"trial {config.id}"):
            found = self._store.find(runs.matching("trial", study_id, config.id))
            for double in found[1:]:  # a create whose answer was lost and that was then sent again
                self._client.delete_run(double.info.run_id)
            before = runs.recorded(found[0]) if found else None
            if before == "done":
                return found[0].info.run_id
            tags = runs.trial_tags(study_id, result, inputs.tags if inputs else {})
            started = runs.now() - int(1000 * result.metrics.get("seconds", 0))
            run = found[0] if found else self._store.create(tracking_view.run_name(config), tags, started)
            run_id = run.info.run_id
            try:
                self._store.log(
                    run_id,
                    metrics=result.metrics,
                    losses=result.epoch_losses,
                    # Going on where a delivery broke off repeats the same points; another attempt adds new ones.
                    when=runs.now() if before == "failed" else run.info.start_time,
                    parameters=runs.trial_parameters(config),
                    tags={**tags, "mlflow.note.content": tracking_view.trial_note(result, run_id)},
                )
                if result.status == "done" and "locft.error" in run.data.tags:
                    self._client.delete_tag(run_id, "locft.error")
                if result.outcomes:
                    self._store.put(run_id, {"outcomes.json": runs.outcomes_table(result.outcomes)})
                if inputs:
                    self.log_inputs(run_id, inputs)
            except BaseException:
                self._store.abandon(run_id)
                raise
            self._client.set_terminated(run_id, "FINISHED" if result.status == "done" else "FAILED")
        return run_id

    def finish_study(
        self,
        study_id: str,
        results: "pd.DataFrame",
        report_html: str,
        recommendation: Mapping[str, Any],
        summary_metrics: Mapping[str, float],
        status: Literal["done", "stopped", "failed"],
        *,
        answer: str = "",
    ) -> None:
        """Puts the results table, the dashboard and the answer into the study's run, and closes it.

        recommendation: stored whole. Its `trial_ids` and `position`, where present, become tags, and the runs of
            those trials are the ones tagged `locft.pick`.
        answer: markdown, the description of the run from now on; without it that of `open_study` stays.

        Of a trial with several runs (an answer that was lost, two drivers) the best is kept.
        """
        state = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[status]
        picked = list(recommendation.get("trial_ids", ()))
        with asking("the end of the study"), tempfile.TemporaryDirectory() as folder:
            run_id = self._study_run(study_id)
            self._drop_doubles(study_id)
            results.to_parquet(Path(folder, "results.parquet"), index=False)
            Path(folder, "dashboard.html").write_text(report_html, encoding="utf-8")
            recommended = json.dumps(recommendation, indent=2, default=str)
            Path(folder, "recommendation.json").write_text(recommended, encoding="utf-8")
            self._client.log_artifacts(run_id, folder)
            position = recommendation.get("position", "")
            tags = {"locft.pick.trial_ids": ", ".join(picked), "locft.pick.position": position}
            said = tracking_view.study_note(answer, self.experiment_id, run_id)
            note = {"mlflow.note.content": said} if answer else {}
            self._store.log(run_id, metrics=summary_metrics, when=runs.now(), tags={**tags, **note})
            self._mark_pick(study_id, picked)
            self._store.close(run_id, state, status)

    def describe_study(self, study_id: str, description: str, tags: Mapping[str, str]) -> None:
        """Another description of the study's run, in markdown, and further tags."""
        with asking("the description of the study"):
            run_id = self._study_run(study_id)
            note = tracking_view.study_note(description, self.experiment_id, run_id)
            self._store.log(run_id, tags={**tags, "mlflow.note.content": note})

    def abandon_study(self, study_id: str) -> None:
        """Closes the run of a study that is still open, as stopped; says nothing where even that does not work."""
        with contextlib.suppress(TrackingError), asking("the study"):
            for run in self._store.find(runs.matching("study", study_id))[:1]:
                if run.info.status == "RUNNING":
                    self._store.close(run.info.run_id, "KILLED", "stopped")

    def register_position(self, study_id: str, model: str, position: Mapping[str, Any]) -> str:
        """A new version of the model's registered position, with the alias `recommended`; returns "models:/NAME@ALIAS".

        position: the content of the position file that lies with the study's run.
        """
        name = registered_name("position", model)
        with asking(f"the registered model {name!r}"):
            run_id = self._study_run(study_id)
            return add_version(
                self._client,
                name,
                f"Where to edit {model}, as selections found it.",
                f"{self._client.get_run(run_id).info.artifact_uri}/position.json",
                run_id,
                "recommended",
                tags={"locft.position": position["position"], "locft.study_id": study_id},
                description=json.dumps(position["settings"]),
            )

    def put_study_file(self, study_id: str, name: str, text: str) -> None:
        """Keeps a text file with the study's run (`open_study` comes first)."""
        with asking(f"the study's file {name}"):
            self._store.put(self._study_run(study_id), {name: text})

    def study_file(self, study_id: str, name: str) -> str | None:
        """The text of a file of the study's run; None when there is no such file or the study never ran."""
        with asking(f"the study's file {name}"):
            study = self._store.find(runs.matching("study", study_id))
            content = self._store.get(study[0].info.run_id, name) if study else None
        return None if content is None else content.decode("utf-8")

    def study_tag(self, study_id: str, key: str) -> str | None:
        """The value of a tag of the study's run; None when it has none or the study never ran."""
        with asking(f"the study's tag {key}"):
            study = self._store.find(runs.matching("study", study_id))
        return study[0].data.tags.get(key) if study else None

    def tag_study(self, study_id: str, key: str, value: str | None) -> None:
        """Sets a tag of the study's run (`open_study` comes first); None removes it."""
        with asking(f"the study's tag {key}"):
            run_id = self._study_run(study_id)
            if value is None:
                self._client.delete_tag(run_id, key)
            else:
                self._store.log(run_id, tags={key: value})

    def study_times(self, study_id: str) -> tuple[datetime | None, datetime | None]:
        """When the study first began and last ended (UTC); None for what did not happen, or is going on again."""
        with asking("the times of the study"):
            study = self._store.find(runs.matching("study", study_id))
        times = (study[0].info.start_time, study[0].info.end_time) if study else (None, None)
        first, last = (datetime.fromtimestamp(ms / 1000, UTC) if ms else None for ms in times)
        return first, last

    def finished(self, study_id: str | None) -> dict[str, str]:
        """Trial id -> run id of every trial that is done (`load_results` has the failed ones). None: of all studies."""
        wanted = f"{runs.matching('trial', study_id)} and attributes.status = 'FINISHED'"
        with asking("the finished trials"):
            done = [run for run in self._store.search(wanted) if runs.recorded(run) == "done"]
        return {run.data.tags["locft.trial_id"]: run.info.run_id for run in done}

    def load_results(self, study_id: str | None, *, curves: bool = True) -> "pd.DataFrame":
        """The results table (columns: `analysis.stats.table`) with `run_id` and `retried` (why attempts were lost, one a line, or
        None), one row a trial, in the order of their start.

        Failed trials are in it, incomplete ones are not. The loss curves of a finished study come from its table
        artifact: reading each from its run takes milliseconds. curves: without, they stay empty. study_id: None for the
        trials of all studies of the experiment.
        """
        from analysis.stats.table import results_frame

        rows: dict[str, dict[str, Any]] = {}
        with asking("the results"):
            stored = self._stored_curves(study_id) if curves else {}
            for run in self._store.search(runs.matching("trial", study_id)):
                status, run_id = runs.recorded(run), run.info.run_id
                if status is None:
                    continue
                try:
                    config = runs.config_of(run)
                except ValueError as error:
                    _log.warning("run %s is no readable trial: %s", run_id, error)
                    continue
                known = rows.get(config.id)
                if known and (known["status"] == "done" or status == "failed"):  # as `Store.find` has it
                    continue
                curve = ()
                if curves and "epoch_loss" in run.data.metrics:
                    curve = stored.get(run_id) or self._store.curve(run_id)
                rows[config.id] = {**runs.result_of(run, config, status, curve).to_row(), "run_id": run_id}
        return results_frame(list(rows.values()))

    def load_outcomes(self, trial_run_id: str) -> "pd.DataFrame":
        """The outcomes of a trial, one row a prompt; empty when none were logged."""
        import pandas as pd

        with asking(f"the outcomes of run {trial_run_id}"):
            stored = self._store.get(trial_run_id, "outcomes.json")
            table = json.loads(stored) if stored else {"columns": runs.OUTCOMES, "data": []}
        return pd.DataFrame(table["data"], columns=table["columns"])

    def links(self, study_id: str, trial_runs: Sequence[str] | None = None, base: str = "") -> dict[str, str]:
        """Addresses of the study's pages (`tracking_view.links`). trial_runs: what to compare, None for the best."""
        with asking("the links"):
            if trial_runs is None:
                wanted = f"{runs.matching('trial', study_id)} and attributes.status = 'FINISHED'"
                limit, order = tracking_view.COMPARED, ["metrics.reliability DESC"]
                best = self._client.search_runs([self.experiment_id], wanted, max_results=limit, order_by=order)
                trial_runs = [run.info.run_id for run in best]
            study = self._store.find(runs.matching("study", study_id))
        return tracking_view.links(self.experiment_id, study[0].info.run_id if study else None, trial_runs, base)

    def _study_run(self, study_id: str) -> str:
        found = self._store.find(runs.matching("study", study_id))
        if not found:
            raise TrackingError(f"study {study_id} has no run in {self.uri}: open_study comes first")
        return found[0].info.run_id

    def _drop_doubles(self, study_id: str) -> None:
        seen = set()
        for run in self._store.find(runs.matching("trial", study_id)):
            if (trial_id := run.data.tags["locft.trial_id"]) in seen:
                self._client.delete_run(run.info.run_id)
            seen.add(trial_id)

    def _mark_pick(self, study_id: str, trial_ids: Sequence[str]) -> None:
        for run in list(self._store.search(f"{runs.matching('trial', study_id)} and tags.`locft.pick` = 'pick'")):
            if run.data.tags["locft.trial_id"] not in trial_ids:
                self._client.delete_tag(run.info.run_id, "locft.pick")
        for trial_id in trial_ids:
            for run in self._store.find(runs.matching("trial", study_id, trial_id))[:1]:
                self._store.log(run.info.run_id, tags={"locft.pick": "pick"})

    def _stored_curves(self, study_id: str | None) -> dict[str, list[float]]:
        """Run id -> losses per epoch, from the table artifact of the study; {} when there is none yet."""
        import pandas as pd

        study = self._store.find(runs.matching("study", study_id)) if study_id is not None else []
        stored = self._store.get(study[0].info.run_id, "results.parquet") if study else None
        if stored is None:
            return {}
        try:
            table = pd.read_parquet(io.BytesIO(stored))
            done = table[table["status"] == "done"]
            pairs = zip(done["run_id"], done["epoch_losses"], strict=True)
            return {run_id: [float(loss) for loss in curve] for run_id, curve in pairs}
        except (OSError, KeyError, ValueError, TypeError) as error:  # broken off while written; or without run_id
            _log.warning("the stored results table is not readable (%s); reading the runs instead", error)
            return {}


def find_tracker(uri: str | None, experiment: str) -> Tracker | None:
    """The tracking store of an experiment; None when the store or the experiment does not exist. Creates neither.

    Raises InputError when the store cannot be reached or written, or does not say what it has.
    """
    resolved = resolve_uri(uri)
    path = sqlite_path(resolved)
    if path is not None and not path.exists():
        check_reachable(resolved)
        return None
    try:
        return Tracker.open(uri, experiment, create=False)
    except NothingThere:
        return None
