"""Trials on their way from the runner: to whoever watches, and to MLflow with all that they were made from."""

import logging
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from sweeps.tracking.outbox import Delivery, Outbox
from sweeps.study.forecast import machine
from sweeps.tracking.heartbeat import Heartbeat
from sweeps.study.resolve import PreparedStudy
from sweeps.study.trial_types import TrialConfig, TrialResult
from sweeps.run.runner import Reporter
from sweeps.tracking.study_run import DatasetRecord, ModelRecord, StudyInputs, Tracker
from sweeps.tracking.store import Refused

_log = logging.getLogger(__name__)


class Recorder:
    """Passes trials on to a reporter, and sends finished ones to MLflow, as runs of a study that is open there.

    A context manager: leaving it waits for what is under way, and raises TrackingError when that does not arrive
    (`sweeps.tracking.outbox`).
    """

    def __init__(
        self,
        reporter: Reporter,
        heartbeat: Heartbeat,
        prepared: PreparedStudy,
        tracker: Tracker,
        study_id: str,
        outbox: Outbox,
    ):
        self.reporter, self.heartbeat = reporter, heartbeat
        self._lost: dict[str, tuple[str, ...]] = {}
        """Trial id -> why attempts at it were lost."""
        deliver = partial(tracker.log_trial, study_id, inputs=_inputs(prepared, tracker, study_id))
        self._delivery = Delivery(deliver, outbox, reporter.note)

    def __enter__(self) -> "Recorder":
        self._delivery.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._delivery.__exit__(*error)

    def note(self, text: str) -> None:
        self.reporter.note(text)

    def started(self, running: int) -> None:
        self.heartbeat.heard(running)
        self.reporter.started(running)

    def retried(self, config: TrialConfig, cause: str) -> None:
        self._lost[config.id] = (*self._lost.get(config.id, ()), cause)
        self.reporter.retried(config, cause)

    def finished(self, result: TrialResult, running: int) -> None:
        result = replace(result, retried=self._lost.pop(result.config.id, ()))
        self._delivery.put(result)
        self.heartbeat.heard(running)
        self.reporter.finished(result, running)


def deliver_kept(prepared: PreparedStudy, tracker: Tracker, study_id: str, outbox: Outbox) -> None:
    """Record what an earlier driver could not, in a study that is open in the store. Raises TrackingError.

    What the store refuses, though it has just taken the study, is set aside: its trial counts as not done.
    """
    if kept := outbox.kept():
        inputs = _inputs(prepared, tracker, study_id)
        for result in kept:
            try:
                tracker.log_trial(study_id, result, inputs)
                outbox.drop(result)
            except Refused as error:
                file = outbox.set_aside(result)
                said = "%s is tried again: the store refuses its result (kept as %s): %s"
                _log.warning(said, result.config.position, file, error)


def _inputs(prepared: PreparedStudy, tracker: Tracker, study_id: str) -> StudyInputs:
    """The data sets and the unedited model, for the runs of the trials."""
    study, facts = prepared.study, prepared.facts
    model = ModelRecord(study.model, facts.model_fingerprint, {"layers": facts.n_layers, "dtype": study.dtype})
    found = {"edits": len(prepared.edits.requests), **asdict(prepared.edits.findings)}
    data = [DatasetRecord(study.edits.source, prepared.edits.fingerprint, study.edits.source, "edits", found)]
    if prepared.suite:
        items = {task.name: len(task.items) for task in prepared.suite.tasks}
        name = study.capability.suite or "capability"
        data.append(DatasetRecord(name, prepared.suite.fingerprint, prepared.capability_source, "capability", items))
    return tracker.create_inputs(study_id, model, data, {"locft.machine": machine(study.resources)})
