"""A study while this process runs it: its lock, results that an earlier driver could not deliver, Ray, and its run in MLflow.

A driver is the process that runs a study. The lock refuses a second one on this machine. A second driver on another machine
would only repeat work, since trials are identified by content. `locft status` reads the driver from a tag of the study's run.
"""

import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

import filelock
import psutil

from locft.errors import InputError
from locft.workbench import Baseline
from sweeps.run.cluster import on_workers, ray_cluster
from sweeps.run.dispatch import Ending, Reporter, Room, Search
from sweeps.run.trial import train_and_measure
from sweeps.study.estimate import machine, patience_seconds
from sweeps.study.footprint import most_memory_bytes
from sweeps.study.plan import PreparedStudy
from sweeps.study.reader import study_to_yaml
from sweeps.study.trial_types import TrialConfig
from sweeps.tracking.outbox import Recorder, open_outbox, study_folder
from sweeps.tracking.store import Refused, TrackingError
from sweeps.tracking.study_run import Tracker, find_tracker
from sweeps.tracking.trial_run import StudyInputs, dataset_input, environment

T = TypeVar("T")

SETUP_TAG = "locft.model_setup"
"""Tag of a study's run: hash of the configuration and the tokenizer of the model that its trials edit."""
DRIVER_TAG = "locft.driver"
"""Tag of a study's run that names the driver while one is running."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Driver:
    """The process that runs a study."""

    host: str
    process: int
    began: str
    """In ISO 8601, to the second."""


def driver_of(tracker: Tracker | None) -> Driver | None:
    """The driver of a study according to its run; None when there is none. tracker: None when nothing of the study is recorded yet.

    A driver of this machine whose process is gone counts as none. A killed driver of another machine keeps its tag until the
    next driver ends.
    """
    try:
        driver = Driver(**json.loads((tracker and tracker.tag(DRIVER_TAG)) or "{}"))
        if driver.host == socket.gethostname():
            created = psutil.Process(driver.process).create_time()
            if created > datetime.fromisoformat(driver.began).timestamp() + 2:  # a later process has the same id
                return None
    except (ValueError, TypeError, psutil.NoSuchProcess):  # the first two: no tag, or that of an earlier version
        return None
    return driver


@contextmanager
def study_lock(folder: Path, name: str) -> Iterator[None]:
    """Lock the study against other drivers on this machine; the lock of a killed process ends with the process.

    folder: `sweeps.tracking.outbox.study_folder`. name: of the study. Raises InputError when another process holds the lock,
    or when the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / "driver.lock", timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise InputError(
            f"study {name!r} is already being run by another process (`locft status` names it): wait for it, or stop it"
            " (Ctrl-C there keeps what is finished)"
        ) from None
    except OSError as error:
        raise InputError(f"cannot write {folder} ({error.strerror or error}); set XDG_STATE_HOME") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def study_session(
    prepared: PreparedStudy, store: str, description: str, *, address: str | None = None
) -> Iterator["StudySession"]:
    """Hold a study's lock and deliver what an earlier driver could not; at the end, close the study's run whatever happened.

    store: address of the tracking store, resolved. description: of the study's run, in markdown. address: of a Ray cluster; None
    runs on this machine. Raises InputError before anything is written when another driver on this machine runs the study,
    when the study began with another configuration or tokenizer of the model, or when the store cannot be used; TrackingError
    when the store does not take an undelivered result.
    """
    with ExitStack() as stack:
        stack.enter_context(study_lock(study_folder(prepared.id, store), prepared.study.name))
        session = StudySession(prepared, store, description, address, stack)
        before, now = session.tracker and session.tracker.tag(SETUP_TAG), prepared.facts.model_setup
        if before and before != now:  # earlier versions did not record it
            raise InputError(
                f"study {prepared.study.name!r}: the configuration or the tokenizer of {prepared.study.model} is not the one "
                f"that the study began with (digest {now}, expected {before}; the weights are the same), so its trials could "
                "not be compared: restore the files, or give the study another name to start afresh"
            )
        session.deliver_kept()
        yield session


class StudySession:
    """What a study needs while it runs. Call `start_ray` before `open_run`, so that a study that cannot run writes nothing."""

    def __init__(self, prepared: PreparedStudy, store: str, description: str, address: str | None, stack: ExitStack):
        """As for `study_session`. stack: collects what has to be undone at the end."""
        self.prepared, self.store = prepared, store
        self.tracker = find_tracker(store, prepared.study.name, prepared.id)
        """None until the study's experiment exists (`open_run` creates it)."""
        self.room: Room | None = None
        """How many trials run at a time; None before `start_ray`."""
        self.outbox = open_outbox(prepared.id, store)
        self.runs_here = address is None and not prepared.study.resources.gpus
        """Trials run only on this machine's CPUs: this process can then do what a worker could, and sooner."""
        self._description, self._address, self._stack = description, address, stack
        self._run_is_open = False

    def start_ray(self) -> Room:
        """Connect to the cluster, or start Ray on this machine, until the session ends. Raises InputError."""
        study, trial_bytes = self.prepared.study, most_memory_bytes(self.prepared.plan.sample, self.prepared.facts)
        self.room = self._stack.enter_context(ray_cluster(self._address, study.resources, trial_bytes, study.model))
        return self.room

    def run_alone(self, work: Callable[[], T]) -> T:
        """Run a function while no trial runs: in this process if trials run on its CPUs, which saves starting a worker;
        otherwise on a worker."""
        return work() if self.runs_here else on_workers([work], self.prepared.study.resources)[0]

    def open_run(self) -> Tracker:
        """Open the study's run in the tracking store, which is created if missing; a second call does nothing.

        Raises InputError when the store cannot be used, TrackingError when it does not take the run.
        """
        study = self.prepared.study
        self.tracker = tracker = self.tracker or Tracker.open(self.store, study.name, self.prepared.id)
        if not self._run_is_open:
            self._run_is_open = True
            self._stack.callback(self._close_run)
            driver = Driver(socket.gethostname(), os.getpid(), datetime.now(UTC).isoformat(timespec="seconds"))
            tracker.open_run(
                study.name,
                study_yaml=study_to_yaml(study),
                description=self._description,
                environment=environment(),
                tags={DRIVER_TAG: json.dumps(asdict(driver)), SETUP_TAG: self.prepared.facts.model_setup},
            )
        return tracker

    def _close_run(self) -> None:
        """Close the study's run; does nothing when the store is unreachable."""
        self.tracker.abandon()  # unless it was finished
        with suppress(TrackingError):
            self.tracker.set_tag(DRIVER_TAG, None)

    def recorder(self, reporter: Reporter) -> Recorder:
        """Passes trials on to `reporter` and records the finished ones in the study's open run. A context manager."""
        return Recorder(partial(self.tracker.log_trial, inputs=self._inputs()), self.outbox, reporter)

    def run_trials(
        self,
        source: Sequence[TrialConfig] | Search,
        baseline: Baseline,
        reporter: Reporter,
        deadline: float,
        *,
        some_done: bool,
    ) -> Ending:
        """Run trials on Ray, which `start_ray` started, and record them in the study's open run; returns why no further trial runs.

        source, deadline, some_done: as for `sweeps.run.runner.run_trials`. baseline: the unedited model's measurements. Raises
        TrackingError when the store stayed unreachable; finished trials are then in the outbox.
        """
        from sweeps.run.runner import run_trials  # imports Ray, which takes seconds

        prepared, resources = self.prepared, self.prepared.study.resources
        with self.recorder(reporter) as recorder:
            return run_trials(
                source,
                partial(train_and_measure, inputs=prepared.inputs, baseline=baseline),
                resources=resources,
                room=self.room,
                reporter=recorder,
                deadline=deadline,
                patience=partial(patience_seconds, facts=prepared.facts, resources=resources),
                some_done=some_done,
            )

    def deliver_kept(self) -> None:
        """Record in the study's run the results that an earlier driver could not deliver. Raises InputError, TrackingError.

        A result that the store refuses, although it has just taken the study, is set aside, and its trial counts as not done.
        """
        if kept := self.outbox.kept():
            tracker, inputs = self.open_run(), self._inputs()
            for result in kept:
                try:
                    tracker.log_trial(result, inputs)
                    self.outbox.drop(result)
                except Refused as error:
                    file = self.outbox.set_aside(result)
                    said = "%s will be run again: the store refused its result (kept as %s): %s"
                    _log.warning(said, result.config.position, file, error)

    def _inputs(self) -> StudyInputs:
        """The data sets and the unedited model, for the runs of the trials."""
        study, facts, edits, suite = self.prepared.study, self.prepared.facts, self.prepared.edits, self.prepared.suite
        source, found = study.edits.source, {"edits": len(edits.requests), **asdict(edits.findings)}
        data = [dataset_input(source, edits.fingerprint, source, "edits", found)]
        if suite:
            name, tasks = study.capability.suite or "capability", self.prepared.capability_source
            items = {task.name: len(task.items) for task in suite.tasks}
            data.append(dataset_input(name, suite.fingerprint, tasks, "capability", items))
        about_model = {"layers": facts.n_layers, "dtype": study.dtype}
        return StudyInputs(study.model, facts.model_fingerprint, about_model, tuple(data), machine(study.resources))
