"""MLflow's model registry: the recommended position of a model, and edits of it, under names with aliases.

Tracking addresses are resolved ones (`sweeps.tracking.address.resolve_uri`). The functions raise InputError when a
request to the store fails, except where they say otherwise.
"""

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.stats.wording import number
from locft.errors import InputError
from sweeps.tracking.address import resolve_uri
from sweeps.tracking.pages import SHOWN_METRICS
from sweeps.tracking.store import connect, now, store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from locft.model.delta import EditDelta

PREFIX = "models:/"
LOGGED = "edited-model"
"""Name and type of the logged models of edits: a run has one for each edit registered from it, since it may be repeated with
other settings. MLflow takes a run's model for its artifacts of the same name, hence not "edit", once a folder's name."""
ALIAS = "chosen"
"""The alias of an edit that a user registered. A study's pick has its own (`study_alias`)."""


def registered_name(kind: str, model: str) -> str:
    """The registered model for positions or edits of a model."""
    return f"locft-{kind}-" + (re.sub(r"[/:.%\"'\\ ]+", "-", model).strip("-") or "model")


def study_alias(study: str) -> str:
    """The alias of a study's pick: the study's name, changed where MLflow would not take it."""
    alias = re.sub(r"[^\w-]", "-", study)
    return f"study-{alias}" if re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE) else alias


def edit_address(model: str, alias: str) -> str:
    """The address of a registered edit, as `locft apply` takes it."""
    return f"{PREFIX}{registered_name('edit', model)}@{alias}"


def add_version(
    client: "MlflowClient",
    name: str,
    about: str,
    source: str,
    run_id: str,
    alias: str,
    **version: Any,
) -> str:
    """Adds a version to a registered model, which is created if missing; returns its address "models:/NAME@ALIAS".

    about: description of the registered model. source: address of the artifacts. alias: will point to the new version. version:
    its tags, description and, if the artifacts belong to a logged model, model_id. Raises what MLflow raises.
    """
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description=about)
    made = client.create_model_version(name, source, run_id, **version)
    client.set_registered_model_alias(name, alias, made.version)
    return f"{PREFIX}{name}@{alias}"


def register_position(client: "MlflowClient", run_id: str, model: str, position: Mapping[str, Any]) -> str:
    """Registers the position that a selection found for a model, with the alias `recommended`; returns its address.

    run_id: of the study's run. position: the content of that run's file position.json. Raises TrackingError.
    """
    name = registered_name("position", model)
    with store_errors(f"the registered model {name!r}"):
        run = client.get_run(run_id)
        source = f"{run.info.artifact_uri}/position.json"
        about = f"Where to edit {model}, as found by `locft select`."
        tags = {"locft.position": position["position"], "locft.study_id": run.data.tags["locft.study_id"]}
        description = json.dumps(position["settings"])
        return add_version(client, name, about, source, run_id, "recommended", tags=tags, description=description)


def register_edit(
    folder: Path,
    run_id: str,
    model: str,
    position: str,
    metrics: Mapping[str, Any],
    tracking_uri: str,
    alias: str = ALIAS,
    edits: str = "",
) -> str:
    """Stores a folder with a delta as a logged model of a trial's run and as a version of the model's registered edit; returns
    its address.

    metrics: of the edit. Those that are also the run's are linked to the logged model and to the data set they were measured
    on. edits: their source, in human-readable form.
    """
    from sweeps.tracking.served_edit import write_description

    name = registered_name("edit", model)
    client = connect(tracking_uri).client
    shown = "\n".join(f"- {key}: {number(value)}" for key, value in metrics.items() if not key.endswith("_seconds"))
    use = f"`locft apply {edit_address(model, alias)} --model {model} --out edited-model`"
    about = f"Edits of {model}, each a safetensors delta that applies only to the model it was made for."
    tags = {"locft.position": position} | ({"locft.edits": edits} if edits else {})
    tags |= {f"locft.{key}": f"{metrics[key]:.4g}" for key in SHOWN_METRICS if key in metrics}
    description = f"Edited at {position}{f' ({edits})' if edits else ''}.\n\nApply it: {use}\n\n{shown}"
    with store_errors(f"the registered model {name!r}", InputError):
        run = client.get_run(run_id)
        parameters = {"position": position, "base": model}
        logged = client.create_logged_model(run.info.experiment_id, LOGGED, run_id, tags, parameters, LOGGED)
        with tempfile.TemporaryDirectory() as described:
            write_description(Path(described), model)
            for place in (str(folder), described):
                client.log_model_artifacts(logged.model_id, place)
        client.finalize_logged_model(logged.model_id, "READY")
        _link_metrics(client, run, logged.model_id, metrics)
        source = logged.artifact_location  # MLflow would look for models:/ID in its default store
        version = {"tags": tags, "description": description, "model_id": logged.model_id}
        return add_version(client, name, about, source, run_id, alias, **version)


def _link_metrics(client: "MlflowClient", run: "Run", model_id: str, metrics: Mapping[str, Any]) -> None:
    """Links the run's metrics to the edit's logged model. The values are the run's own, so the run itself does not change."""
    from mlflow.entities import LoggedModelOutput, Metric

    client.log_outputs(run.info.run_id, [LoggedModelOutput(model_id, 0)])
    by_use = {tag.value: one.dataset for one in run.inputs.dataset_inputs for tag in one.tags}
    points = []
    for key, value in metrics.items():
        data = by_use.get("capability" if key.startswith(("capability", "drift", "perplexity")) else "edits")
        if run.data.metrics.get(key) == value and data:
            points.append(Metric(key, value, now(), 0, model_id, data.name, data.digest, run.info.run_id))
    client.log_batch(run.info.run_id, metrics=points)


def registered_edit(model: str, alias: str, tracking_uri: str) -> str | None:
    """Id of the run that holds the registered edit of a model; None when there is none."""
    from mlflow.exceptions import MlflowException  # takes seconds

    name = registered_name("edit", model)
    client = connect(tracking_uri).client
    with store_errors(f"the registered model {name!r}", InputError):
        try:
            return client.get_model_version_by_alias(name, alias).run_id
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no model, no alias
                return None
            raise


def load_delta(source: str, tracking_uri: str | None) -> "EditDelta":
    """A delta from a file, a folder or the model registry. tracking_uri: as the user gave it. Raises InputError."""
    from locft.model.delta import EditDelta

    if not source.startswith(PREFIX):
        return EditDelta.load(Path(source))
    with tempfile.TemporaryDirectory() as folder:
        return EditDelta.load(fetch_edit(source, resolve_uri(tracking_uri), Path(folder)))


def fetch_edit(address: str, tracking_uri: str, into: Path) -> Path:
    """Downloads the edit at "models:/NAME@ALIAS" or "models:/NAME/VERSION"; returns the folder inside `into`."""
    found = re.fullmatch(rf"{PREFIX}([^/]+?)(?:@([^@/]+)|/(\d+))", address)
    if not found:
        raise InputError(f"{address}: expected {PREFIX}NAME@ALIAS or {PREFIX}NAME/VERSION")
    name, alias, version = found.groups()
    store = connect(tracking_uri)
    from mlflow.artifacts import download_artifacts  # when imported, MLflow reads what `connect` sets

    with store_errors(f"{address} in {store.uri}", InputError):
        if alias:
            registered = store.client.get_model_version_by_alias(name, alias)
        else:
            registered = store.client.get_model_version(name, version)
        source, uri = registered.source, store.client.tracking_uri
        if source.startswith(PREFIX):  # registered by an earlier release
            source = store.client.get_logged_model(source.removeprefix(PREFIX)).artifact_location
        return Path(download_artifacts(source, dst_path=str(into), tracking_uri=uri, registry_uri=uri))
