"""MLflow's model registry: where a model shall be edited, and the edits themselves, under names with aliases."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.stats.wording import number
from locft.errors import InputError
from sweeps.tracking.store import TrackingError, asking, connect

if TYPE_CHECKING:
    from mlflow import MlflowClient

PREFIX = "models:/"
FOLDER = "edit"
"""Of a run's artifacts, where registered edits lie, each in a folder of its own: a run is repeated with other settings, too."""
ALIAS = "chosen"
"""Of the edit that somebody registered; those of studies have the study's (`study_alias`), so that none moves another's."""
SHOWN = ("reliability", "generalization", "locality", "capability", "capability_change", "drift_kl")
"""Metrics that a version carries as tags."""


def registered_name(kind: str, model: str) -> str:
    """The registered model for positions or edits of a model."""
    return f"locft-{kind}-" + (re.sub(r"[/:.%\"'\\ ]+", "-", model).strip("-") or "model")


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
    """A new version of a registered model, made when it is new, that the alias points to; returns "models:/NAME@ALIAS".

    Raises whatever MLflow raises: call it inside `asking`.
    """
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description=about)
    made = client.create_model_version(name, source, run_id, tags=dict(tags), description=description)
    client.set_registered_model_alias(name, alias, made.version)
    return f"{PREFIX}{name}@{alias}"


def study_alias(study: str) -> str:
    """The alias of a study's edit: its name, as far as MLflow takes it."""
    alias = re.sub(r"[^\w-]", "-", study)
    return f"study-{alias}" if re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE) else alias


def edit_address(model: str, alias: str) -> str:
    """Of a registered edit, as `locft apply` takes it."""
    return f"{PREFIX}{registered_name('edit', model)}@{alias}"


def registered_edit(model: str, alias: str, tracking_uri: str | None) -> str | None:
    """The run that holds the registered edit of a model; None where there is none. Raises InputError."""
    from mlflow.exceptions import MlflowException

    client, _ = connect(tracking_uri)
    name = registered_name("edit", model)
    with asking(f"the registered model {name!r}", InputError):
        try:
            return client.get_model_version_by_alias(name, alias).run_id
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no model, no alias
                return None
            raise


def register_edit(
    folder: Path,
    run_id: str,
    model: str,
    position: str,
    metrics: Mapping[str, Any],
    tracking_uri: str | None,
    alias: str = ALIAS,
    edits: str = "",
) -> str:
    """Put a folder with a delta with the trial's run, as a version of the model's registered edit; returns its address.

    edits: where they are from, for people. Raises InputError.
    """
    client, _ = connect(tracking_uri)
    name = registered_name("edit", model)
    shown = "\n".join(f"- {key}: {number(value)}" for key, value in metrics.items() if not key.endswith("_seconds"))
    use = f"`locft apply {edit_address(model, alias)} --model {model} --out edited-model`"
    with asking(f"the registered model {name!r}", InputError):
        place = f"{FOLDER}/{_digest(folder)}"
        client.log_artifacts(run_id, str(folder), place)
        source = f"{client.get_run(run_id).info.artifact_uri}/{place}"
        return add_version(
            client,
            name,
            f"Edits of {model}, each a safetensors delta that fits only the model it was made on.",
            source,
            run_id,
            alias,
            tags={
                "locft.position": position,
                **({"locft.edits": edits} if edits else {}),
                **{f"locft.{key}": f"{metrics[key]:.4g}" for key in SHOWN if key in metrics},
            },
            description=f"Edited at {position}{f' ({edits})' if edits else ''}.\n\nApply it: {use}\n\n{shown}",
        )


def fetch_edit(address: str, tracking_uri: str | None, into: Path) -> Path:
    """Download the edit at "models:/NAME@ALIAS" or "models:/NAME/VERSION"; the folder it is in then. Raises InputError."""
    found = re.fullmatch(rf"{PREFIX}([^@/]+)(?:@([^@/]+)|/(\d+))", address)
    if not found:
        raise InputError(f"{address}: expected {PREFIX}NAME@ALIAS or {PREFIX}NAME/VERSION")
    name, alias, version = found.groups()
    client, shown = connect(tracking_uri)
    try:
        with asking(f"{address} in {shown}"):
            if alias:
                registered = client.get_model_version_by_alias(name, alias)
            else:
                registered = client.get_model_version(name, version)
            place = registered.source.removeprefix(f"{client.get_run(registered.run_id).info.artifact_uri}/")
            return Path(client.download_artifacts(registered.run_id, place, str(into)))
    except TrackingError as error:
        raise InputError(str(error)) from None


def _digest(folder: Path) -> str:
    """Of the delta in a folder, 16 hexadecimal digits."""
    from locft.model.delta import FILE_NAME

    return hashlib.sha256((folder / FILE_NAME).read_bytes()).hexdigest()[:16]
