"""Find a trial by its run, or the latest studies of a store, without knowing the experiment."""

from typing import Any

from locft.errors import InputError
from sweeps.tracking import trial_run as runs
from sweeps.tracking import address as tracking_uri
from sweeps.study.trial_types import TrialResult
from sweeps.tracking.study_run import Tracker
from sweeps.tracking.store import Store, asking, connect


def find_run(run_id: str, uri: str | None = None) -> dict[str, Any]:
    """A trial from its run: run_id, experiment_id, status, config (`TrialConfig`), params, tags, metrics, study_yaml.

    params holds the typed fields of the config; study_yaml the study file's text, None when the study's run is gone.

    Raises:
        InputError: no such run, or a run that is no trial of this platform.
    """
    client, shown = connect(uri)
    with asking(f"run {run_id!r} in {shown}", InputError):
        run = client.get_run(run_id)
    kind = run.data.tags.get("locft.kind")
    if kind != "trial":
        what = "the run of a whole study" if kind == "study" else "not a run of locft"
        raise InputError(f"run {run_id!r} is {what}; expected the run of a trial (its tag locft.kind is trial)")
    try:
        config = runs.config_of(run)
    except ValueError as error:
        raise InputError(f"run {run_id!r} is incomplete ({error}): run the study again or take another trial") from None
    store = Store(client, run.info.experiment_id)
    with asking(f"the study of run {run_id!r}"):
        study = store.find(runs.matching("study", run.data.tags["locft.study_id"]))
        text = store.get(study[0].info.run_id, "study.yaml") if study else None
    return {
        "run_id": run.info.run_id,
        "experiment_id": run.info.experiment_id,
        "status": runs.recorded(run) or "incomplete",
        "config": config,
        "params": config.to_dict(),
        "tags": dict(run.data.tags),
        "metrics": runs.metrics_of(run),
        "study_yaml": None if text is None else text.decode("utf-8"),
    }


def list_studies(uri: str | None = None, limit: int = 10, base: str = "") -> list[dict[str, Any]]:
    """The latest studies of a store: name, status, study_id, run_id, experiment_id, links. Creates no store."""
    resolved = tracking_uri.resolve_uri(uri)
    path = tracking_uri.sqlite_path(resolved)
    if path is not None and not path.exists():
        return []
    client, shown = connect(resolved)
    with asking(f"the studies in {shown}"):
        experiments = [found.experiment_id for found in client.search_experiments(max_results=1000)]
        order = ["attributes.start_time DESC"]
        found = client.search_runs(experiments, runs.matching("study", None), max_results=limit, order_by=order)
        return [
            {
                "name": run.info.run_name,
                "status": run.data.tags.get("locft.status"),
                "study_id": (study_id := run.data.tags["locft.study_id"]),
                "run_id": run.info.run_id,
                "experiment_id": run.info.experiment_id,
                "links": Tracker(Store(client, run.info.experiment_id), shown).links(study_id, base=base),
            }
            for run in found
        ]


def earlier_trials(model_fingerprint: str, machine: str, limit: int, uri: str | None = None) -> list[TrialResult]:
    """The latest finished trials of a model on a machine (`locft.machine`), in all studies of a store, without losses and
    outcomes. Creates no store."""
    resolved = tracking_uri.resolve_uri(uri)
    path = tracking_uri.sqlite_path(resolved)
    if path is not None and not path.exists():
        return []
    client, shown = connect(resolved)
    wanted = f"{runs.matching('trial', None)} and attributes.status = 'FINISHED'"
    for tag, value in (("model_fingerprint", model_fingerprint), ("machine", machine)):
        wanted += f" and tags.`locft.{tag}` = '{value}'"
    with asking(f"the trials in {shown}"):
        experiments = [found.experiment_id for found in client.search_experiments(max_results=1000)]
        order = ["attributes.start_time DESC"]
        found = client.search_runs(experiments, wanted, max_results=limit, order_by=order)
    results = []
    for run in found:
        try:
            results.append(runs.result_of(run, runs.config_of(run), "done"))
        except ValueError:  # of another version
            continue
    return results
