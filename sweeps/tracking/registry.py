"""MLflow's model registry: the recommended position of a model, and edits of it, under names with aliases.

Tracking addresses are resolved ones (`sweeps.tracking.address.resolve_uri`). The functions raise InputError when the
store does not take or return something, except where they say otherwise.
"""

import hashlib
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
from sweeps.tracking.store import connect, store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from locft.model.delta import EditDelta

PREFIX = "models:/"
FOLDER = "edit"
"""Artifact folder of a run with a folder for each registered edit: a run may be repeated with other settings."""
ALIAS = "chosen"
"""Of an edit that somebody registered. A study's pick has an alias of its own (`study_alias`)."""


def registered_name(kind: str, model: str) -> str:
    """The registered model for positions or edits of a model."""
    return f"locft-{kind}-" + (re.sub(r"[/:.%\"'\\ ]+", "-", model).strip("-") or "model")


def study_alias(study: str) -> str:
    """The alias of a study's pick: the study's name, as far as MLflow takes it."""
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
    *,
    tags: Mapping[str, str],
    description: str,
) -> str:
    """Adds a version to a registered model, which is created when it is new; returns its address "models:/NAME@ALIAS".

    about, description: of the registered model and of the version. source: the artifacts' address. alias: points to the
    new version from now on. Raises what MLflow raises.
    """
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description=about)
    made = client.create_model_version(name, source, run_id, tags=dict(tags), description=description)
    client.set_registered_model_alias(name, alias, made.version)
    return f"{PREFIX}{name}@{alias}"


def register_position(client: "MlflowClient", run_id: str, model: str, position: Mapping[str, Any]) -> str:
    """Registers the position that a selection found for a model, with the alias `recommended`; returns its address.

    run_id: the study's. position: the content of that run's file position.json. Raises TrackingError.
    """
    name = registered_name("position", model)
    with store_errors(f"the registered model {name!r}"):
        run = client.get_run(run_id)
        source = f"{run.info.artifact_uri}/position.json"
        about = f"Where to edit {model}, as selections found it."
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
    """Puts a folder with a delta into a trial's run, as a version of the model's registered edit; returns its address.

    edits: their source, for people.
    """
    from locft.model.delta import FILE_NAME  # with PyTorch

    name = registered_name("edit", model)
    client = connect(tracking_uri).client
    shown = "\n".join(f"- {key}: {number(value)}" for key, value in metrics.items() if not key.endswith("_seconds"))
    use = f"`locft apply {edit_address(model, alias)} --model {model} --out edited-model`"
    about = f"Edits of {model}, each a safetensors delta that fits only the model it was made on."
    tags = {"locft.position": position} | ({"locft.edits": edits} if edits else {})
    tags |= {f"locft.{key}": f"{metrics[key]:.4g}" for key in SHOWN_METRICS if key in metrics}
    description = f"Edited at {position}{f' ({edits})' if edits else ''}.\n\nApply it: {use}\n\n{shown}"
    digest = hashlib.sha256((folder / FILE_NAME).read_bytes()).hexdigest()[:16]
    with store_errors(f"the registered model {name!r}", InputError):
        client.log_artifacts(run_id, str(folder), f"{FOLDER}/{digest}")
        source = f"{client.get_run(run_id).info.artifact_uri}/{FOLDER}/{digest}"
        return add_version(client, name, about, source, run_id, alias, tags=tags, description=description)


def registered_edit(model: str, alias: str, tracking_uri: str) -> str | None:
    """The run that holds the registered edit of a model; None when there is none."""
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
    found = re.fullmatch(rf"{PREFIX}([^@/]+)(?:@([^@/]+)|/(\d+))", address)
    if not found:
        raise InputError(f"{address}: expected {PREFIX}NAME@ALIAS or {PREFIX}NAME/VERSION")
    name, alias, version = found.groups()
    store = connect(tracking_uri)
    with store_errors(f"{address} in {store.uri}", InputError):
        if alias:
            registered = store.client.get_model_version_by_alias(name, alias)
        else:
            registered = store.client.get_model_version(name, version)
        artifacts = store.client.get_run(registered.run_id).info.artifact_uri
        place = registered.source.removeprefix(f"{artifacts}/")
        return Path(store.client.download_artifacts(registered.run_id, place, str(into)))
