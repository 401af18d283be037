"""Requests to one experiment of an MLflow store, with every error turned into one that is safe to show."""

import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locft.errors import InputError
from sweeps.tracking import trial_run as runs
from sweeps.tracking import address as tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_log = logging.getLogger(__name__)

_LARGEST = 1.7976931348623157e308
"""MLflow stores infinities as the largest float."""
_MOST_METRICS = 900
"""Metrics in one request; servers refuse more than 1,000 entries."""


_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
"""MLflow's codes for what is wrong with what it was given. Without permission (another code) everything waits."""


class TrackingError(RuntimeError):
    """The store did not take or give something. The study's results are unharmed: deliver again later."""


class Refused(TrackingError):
    """The store answers, and will not take this very thing: delivering it again helps little."""


class NothingThere(InputError):
    """The store answers, and holds no experiment of that name."""


@contextmanager
def asking(what: str, as_error: type[Exception] = TrackingError) -> Iterator[None]:
    """Turns every error of MLflow, of its database and of its connection into `as_error`, without passwords."""
    try:
        yield
    except (InputError, TrackingError):
        raise
    except Exception as error:
        cause = tracking_uri.redact(str(error) or type(error).__name__)[:1000]
        if as_error is TrackingError and getattr(error, "error_code", None) in _REFUSALS:
            as_error = Refused
        raise as_error(f"tracking of {what}: {cause}") from None


def connect(uri: str | None, *, create: bool = False) -> tuple["MlflowClient", str]:
    """A client for a store that answers, and the store's address without a password.

    create: whether an SQLite file that is not there is created, with its folders.

    Raises:
        InputError: within seconds when the store cannot be reached, entered or written.
    """
    resolved = tracking_uri.take_credentials(tracking_uri.resolve_uri(uri))
    shown = tracking_uri.redact(resolved)
    path = tracking_uri.sqlite_path(resolved)
    if path is not None and not create and not path.exists():
        raise InputError(f"there is no tracking store {path}: run a study first (locft sweep), or give --tracking-uri")
    # A driver must notice within a minute that the server is away; MLflow's own settings wait for many.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines for every run that ends
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # it would break into the live table
    tracking_uri.check_reachable(resolved)
    if path is not None and create:
        with asking(f"store {shown}", InputError):
            path.parent.mkdir(parents=True, exist_ok=True)
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow"):  # creating the tables is announced line by line
        logging.getLogger(name).setLevel(logging.WARNING)
    with asking(f"store {shown}", InputError):
        return MlflowClient(resolved, registry_uri=resolved), shown


class Store:
    """The runs of one experiment. Its methods raise whatever MLflow raises: call them inside `asking`."""

    def __init__(self, client: "MlflowClient", experiment_id: str):
        self.client = client
        self.experiment_id = experiment_id

    def create(self, name: str, tags: Mapping[str, str], started: int | None = None) -> "Run":
        """A new open run. started: milliseconds, None for now."""
        origin = {"mlflow.source.name": "locft sweep", "mlflow.source.type": "LOCAL", "mlflow.user": runs.user()}
        return self.client.create_run(self.experiment_id, started, runs.clipped({**origin, **tags}), name)

    def search(self, wanted: str) -> Iterator["Run"]:
        """All active runs that match, oldest first, page by page."""
        token, order = None, ["attributes.start_time ASC"]
        while True:
            page = self.client.search_runs(
                [self.experiment_id], wanted, max_results=1000, order_by=order, page_token=token
            )
            yield from page
            if not (token := page.token):
                return

    def find(self, wanted: str) -> list["Run"]:
        """The runs of one study or trial: one, or none, or several after a lost answer; the best first."""
        rank = {"done": 0, "failed": 1, None: 2}
        return sorted(self.search(wanted), key=lambda run: rank[runs.recorded(run)])

    def log(
        self,
        run_id: str,
        *,
        metrics: Mapping[str, float] | None = None,
        losses: Sequence[float] = (),
        when: int = 0,
        parameters: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Everything about a run in one request (a loss curve beyond 900 points takes more).

        when: milliseconds. The store keeps a point once that is sent again with the same time, step and value.
        """
        from mlflow.entities import Metric, Param, RunTag

        finite = {key: float(value) for key, value in (metrics or {}).items() if math.isfinite(value)}
        points = [Metric(runs.metric_name(key), value, when, 0) for key, value in finite.items()]
        points += [Metric("epoch_loss", float(loss), when + step, step) for step, loss in enumerate(losses)]
        self.client.log_batch(
            run_id,
            points[:_MOST_METRICS],
            [Param(key, value) for key, value in (parameters or {}).items()],
            [RunTag(key, value) for key, value in runs.clipped(tags or {}).items()],
        )
        for start in range(_MOST_METRICS, len(points), _MOST_METRICS):
            self.client.log_batch(run_id, points[start : start + _MOST_METRICS])

    def close(self, run_id: str, state: str, status: str) -> None:
        """Ends a run in MLflow's `state` (FINISHED, FAILED, KILLED), the tag `locft.status` saying why."""
        self.log(run_id, tags={"locft.status": status})
        self.client.set_terminated(run_id, state)

    def abandon(self, run_id: str) -> None:
        """Closes a run whose logging broke off, without hiding the reason by a second error."""
        try:
            self.close(run_id, "FAILED", "incomplete")
        except Exception as error:
            _log.warning("run %s stays open until its next delivery: %s", run_id, tracking_uri.redact(str(error)))

    def curve(self, run_id: str) -> list[float]:
        """The losses of a run in the order of their epochs; of several for one epoch the last logged."""
        history = sorted(self.client.get_metric_history(run_id, "epoch_loss"), key=lambda point: point.timestamp)
        latest = {point.step: point.value for point in history}
        return [math.copysign(math.inf, v) if abs(v) >= _LARGEST else v for _, v in sorted(latest.items())]

    def put(self, run_id: str, files: Mapping[str, str]) -> None:
        """Writes text artifacts by name."""
        for name, text in files.items():
            self.client.log_text(run_id, text, name)

    def get(self, run_id: str, name: str) -> bytes | None:
        """The content of an artifact, None when the run has none of that name."""
        if not any(file.path == name for file in self.client.list_artifacts(run_id)):
            return None
        with tempfile.TemporaryDirectory() as folder:
            return Path(self.client.download_artifacts(run_id, name, folder)).read_bytes()

    def model(
        self, name: str, fingerprint: str, source_run: str, tags: Mapping[str, str], facts: Mapping[str, Any]
    ) -> str:
        """The id of the logged model with that fingerprint, created when it is new."""
        for found in self.client.search_logged_models([self.experiment_id], filter_string=f"name = '{name}'"):
            if found.tags.get("locft.fingerprint") == fingerprint:
                return found.model_id
        shown = {key: str(value) for key, value in facts.items()}
        own = {**tags, "locft.fingerprint": fingerprint}
        made = self.client.create_logged_model(self.experiment_id, name, source_run, own, shown, "unedited model")
        self.client.finalize_logged_model(made.model_id, "READY")
        return made.model_id


def open_experiment(
    client: "MlflowClient", shown: str, name: str, tags: Mapping[str, str] | None
) -> str:
    """The id of the experiment of that name.

    shown: the store's address for messages. tags_for: experiment id -> the tags it shall have, creating it when it is
    new; None changes nothing.

    Raises:
        NothingThere: there is none of that name, and none shall be created.
        InputError: the name cannot be used, is that of a deleted experiment, or its artifacts cannot be written.
    """
    if not 0 < len(name) <= 500:
        raise InputError(f"study name has {len(name)} characters, expected 1 to 500 (it names the experiment)")
    with asking(f"experiment {name!r} in {shown}", InputError):
        found = client.get_experiment_by_name(name)
        if found is None and tags is None:
            raise NothingThere(f"study {name!r} has nothing in {shown} yet: run it first (locft sweep)")
        if found is None:
            client.create_experiment(name)
            found = client.get_experiment_by_name(name)
        if found.lifecycle_stage != "active":
            raise InputError(
                f"the experiment {name!r} was deleted in {shown} and still holds its name: restore it"
                f" (mlflow experiments restore --experiment-id {found.experiment_id}), remove it for good"
                " (mlflow gc), or give the study another name"
            )
        for key, value in (tags or {}).items():
            if found.tags.get(key) != value:
                client.set_experiment_tag(found.experiment_id, key, value)
    if tags and shown.startswith("sqlite:"):
        place = found.artifact_location.removeprefix("file://")
        if "://" not in place:
            tracking_uri.check_writable(Path(place), "artifacts")
    return found.experiment_id
