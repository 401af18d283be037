"""Requests to an MLflow tracking store; `store_errors` turns whatever goes wrong into an error that is safe to show."""

# MLflow takes seconds to import; commands that never reach the store start without it.

import getpass
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit
from urllib.request import url2pathname

from locft.errors import InputError
from sweeps.tracking.address import (
    check_reachable,
    check_writable,
    mlflow_address,
    redact,
    sqlite_path,
    take_credentials,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

_MAX_BATCH = 900
"""Metrics in one request; servers refuse more than 1,000 entries."""
_MAX_TAG = 5000
"""Characters of a tag's value; older servers refuse more."""
_PAGE = 1000
_INFINITY = 1.7976931348623157e308
"""MLflow stores infinities as the largest float."""
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
"""MLflow's codes for bad input. A missing permission has another code: it may be granted later."""
_REFUSED_STATUS = (400, 413)
"""The same as HTTP status codes; 413 is that of a server or proxy that takes no content of this size."""


_log = logging.getLogger(__name__)
_addresses: dict[str, str] = {}
"""Address given to MLflow in this process -> resolved address: a relative path means another file in another folder."""


class TrackingError(RuntimeError):
    """A request to the store failed. The results are unharmed: deliver them again later."""


class Refused(TrackingError):
    """The store answers but rejects this particular request: repeating it is of little use."""


class NoStore(InputError):
    """The SQLite file of the store does not exist."""


@contextmanager
def store_errors(what: str, as_error: type[Exception] = TrackingError) -> Iterator[None]:
    """Turns every error of MLflow, of its database or of the connection into `as_error`, without passwords.

    what: the subject of the message, such as "trial 0a1b".
    """
    try:
        yield
    except (InputError, TrackingError):
        raise
    except Exception as error:
        said = str(error).partition("\n[SQL:")[0]  # SQLAlchemy adds the whole statement
        cause = redact(said or type(error).__name__)[:1000]
        if as_error is TrackingError and _is_refusal(error):
            as_error = Refused
        raise as_error(f"tracking store, {what}: {cause}") from None


def _is_refusal(error: Exception) -> bool:
    """Whether the store, or a proxy before it, answered that it does not take what was sent."""
    status = getattr(getattr(error, "response", None), "status_code", None)  # of an upload
    # MLflow's words where the answer is not its own
    if found := re.search(r"failed with error code (\d+)", str(error)):
        status = int(found[1])
    return getattr(error, "error_code", None) in _REFUSALS or status in _REFUSED_STATUS


@contextmanager
def refusable(what: str) -> Iterator[None]:
    """For a file that nothing else depends on: if the store refuses it, a warning says so, and the caller goes on.

    what: as for `store_errors`, whose other errors are raised.
    """
    try:
        with store_errors(what):
            yield
    except Refused as error:
        _log.warning("not recorded: %s", error)


def connect(uri: str, *, create: bool = False) -> "Store":
    """The store at a resolved address, which has been checked to answer.

    create: whether to create a missing SQLite file, with its folders. Raises InputError within seconds when the store
    cannot be reached, accessed or written; NoStore when it does not exist.
    """
    uri = take_credentials(uri)
    # A driver must notice within a minute that the server is away; MLflow's defaults wait for many minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # else two lines for every run that ends
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # it would break into the live table
    check_reachable(uri)
    path = sqlite_path(uri)
    if path is not None and not create and not path.exists():
        raise NoStore(f"there is no tracking store {path}: run a study first (locft sweep), or give --tracking-uri")
    with store_errors(redact(uri), InputError):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        from mlflow import MlflowClient

        for name in ("alembic", "mlflow"):  # they log the creation of tables line by line
            logging.getLogger(name).setLevel(logging.WARNING)
        address = mlflow_address(uri, Path.cwd())
        if _addresses.setdefault(address, uri) != uri:  # MLflow keeps the stores that it opened, by address
            raise InputError(
                f"tracking store {path}: this process already uses another store of that name; start a new process"
            )
        new = path is not None and not path.exists()
        try:
            return Store(MlflowClient(address, registry_uri=address), uri)
        except Exception as error:
            if path is not None and new and "disk" in str(error):
                path.unlink(missing_ok=True)  # disk full: half of the tables would pass for another version's
            raise


class Store:
    """A tracking store that answers (`connect`).

    Its methods raise what MLflow raises, except where they say otherwise: call them inside `store_errors`.
    """

    def __init__(self, client: "MlflowClient", uri: str):
        """uri: the address, resolved."""
        self.client = client
        self.uri = redact(uri)
        """The address, without a password."""

    def find_experiment(self, name: str) -> "Experiment | None":
        """The experiment of that name; None when there is none. Raises InputError when it was deleted."""
        with store_errors(f"experiment {name!r} in {self.uri}", InputError):
            found = self.client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage != "active":
            raise InputError(
                f"the experiment {name!r} was deleted in {self.uri} and still holds its name: restore it"
                f" (mlflow experiments restore --experiment-id {found.experiment_id}), remove it for good"
                " (mlflow gc), or give the study another name"
            )
        return found

    def open_experiment(self, name: str, tags: Mapping[str, str]) -> str:
        """The id of the experiment of that name, created when it is new, with these tags.

        Raises InputError like `find_experiment`, and when artifacts cannot be written.
        """
        found = self.find_experiment(name)
        with store_errors(f"experiment {name!r} in {self.uri}", InputError):
            experiment = found or self.client.get_experiment(self._create_experiment(name))
            for key, value in tags.items():
                if experiment.tags.get(key) != value:
                    self.client.set_experiment_tag(experiment.experiment_id, key, value)
        place = experiment.artifact_location
        folder = Path(url2pathname(urlsplit(place).path) if place.startswith("file:") else place)
        if folder.is_absolute():
            try:
                check_writable(folder, "artifacts")
            except InputError as error:
                raise InputError(
                    f"experiment {name!r} in {self.uri} keeps its artifacts in a folder of this machine: {error}; make it "
                    "writable, start the server with --artifacts-destination, or give the study another name"
                ) from None
        return experiment.experiment_id

    def _create_experiment(self, name: str) -> str:
        """The id of a new experiment. Where MLflow would misread the path of its artifacts, it gets a URL instead."""
        store = sqlite_path(self.uri)
        if store is None or not {"?", "#", "%"} & set(str(Path.cwd())):
            return self.client.create_experiment(name)
        place = Path.cwd() / "mlruns" / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', name)[:40]}-{time.time_ns():x}"
        return self.client.create_experiment(name, place.as_uri())

    def find_runs(
        self,
        experiment: str | None,
        tags: Mapping[str, str],
        *,
        status: str | None = None,
        order: str = "attributes.start_time ASC",
        limit: int | None = None,
    ) -> list["Run"]:
        """The runs with these tags.

        experiment: id; None searches the whole store. tags: key (under `locft.`) -> value, which must not contain a quote: a
        search has no way to escape it. status: MLflow's, such as FINISHED. limit: at most 1000.
        """
        conditions = [f"tags.`locft.{key}` = '{value}'" for key, value in tags.items()]
        conditions += [f"attributes.status = '{status}'"] if status else []
        experiments = [experiment]
        if experiment is None:
            experiments = [found.experiment_id for found in self.client.search_experiments(max_results=_PAGE)]
        runs, token = [], None
        while True:
            page = self.client.search_runs(
                experiments, " and ".join(conditions), max_results=limit or _PAGE, order_by=[order], page_token=token
            )
            runs, token = [*runs, *page], page.token
            if limit or not token:
                return runs

    def create_run(self, experiment: str, name: str, tags: Mapping[str, str], started: int | None = None) -> "Run":
        """A new open run. started: milliseconds since 1970; None for now."""
        origin = {"mlflow.source.name": "locft sweep", "mlflow.source.type": "LOCAL", "mlflow.user": getpass.getuser()}
        return self.client.create_run(experiment, started, _clipped({**origin, **tags}), name)

    def log(
        self,
        run_id: str,
        *,
        metrics: Mapping[str, float] | None = None,
        curves: Mapping[str, Sequence[tuple[int, float]]] = MappingProxyType({}),
        when: int = 0,
        parameters: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Logs everything about a run in one request; more than 900 points of metrics and curves take several.

        curves: (step, value) by name. when: ms since 1970. A point sent again with the same time, step and value is kept once.
        """
        from mlflow.entities import Metric, Param, RunTag

        finite = {key: float(value) for key, value in (metrics or {}).items() if math.isfinite(value)}
        # Names of tasks come from the user: replace what MLflow does not accept.
        points = [Metric(re.sub(r"[^\w.\-:/ ]", "_", key), value, when, 0) for key, value in finite.items()]
        points += [
            Metric(name, float(value), when + step, step) for name, curve in curves.items() for step, value in curve
        ]
        self.client.log_batch(
            run_id,
            points[:_MAX_BATCH],
            [Param(key, value) for key, value in (parameters or {}).items()],
            [RunTag(key, value) for key, value in _clipped(tags or {}).items()],
        )
        for start in range(_MAX_BATCH, len(points), _MAX_BATCH):
            self.client.log_batch(run_id, points[start : start + _MAX_BATCH])

    def close_run(self, run_id: str, state: str, status: str) -> None:
        """Ends a run. state: MLflow's (FINISHED, FAILED, KILLED). status: why, for the tag `locft.status`."""
        self.log(run_id, tags={"locft.status": status})
        self.client.set_terminated(run_id, state)

    def loss_curve(self, run_id: str) -> list[float]:
        """The losses of a run in the order of its epochs; where an epoch was logged twice, the later one."""
        history = sorted(self.client.get_metric_history(run_id, "epoch_loss"), key=lambda point: point.timestamp)
        latest = {point.step: point.value for point in history}
        return [math.copysign(math.inf, v) if abs(v) >= _INFINITY else v for _, v in sorted(latest.items())]

    def read_artifact(self, run_id: str, name: str) -> bytes | None:
        """The content of a file at the top of a run's artifacts; None when there is none of that name."""
        if not any(file.path == name for file in self.client.list_artifacts(run_id)):
            return None
        with tempfile.TemporaryDirectory() as folder:
            return Path(self.client.download_artifacts(run_id, name, folder)).read_bytes()


def outcome_of(run: "Run") -> Literal["done", "failed"] | None:
    """How the trial or the study of a run ended; None until all of it is logged."""
    state = (run.info.status, run.data.tags.get("locft.status"))
    return {("FINISHED", "done"): "done", ("FAILED", "failed"): "failed"}.get(state)  # type: ignore[return-value]


def best_first(runs: Sequence["Run"]) -> list["Run"]:
    """Runs of one study or trial (several after a lost response, or from two drivers) in the order done, failed, incomplete."""
    return sorted(runs, key=lambda run: ("done", "failed", None).index(outcome_of(run)))


def now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def _clipped(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: text if len(text) <= _MAX_TAG else text[: _MAX_TAG - 1] + "…" for key, text in tags.items()}
