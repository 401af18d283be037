"""MLflow's model registry: where a model shall be edited, and the edits themselves, under names with aliases."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.wording import number
from locft.errors import InputError
from sweeps.tracking_store import TrackingError, asking, connect

if TYPE_CHECKING:
    from mlflow import MlflowClient

PREFIX = "models:/"
FOLDER = "edit"
"""Of a run's artifacts, where a registered edit lies."""
ALIAS = "chosen"


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


def register_edit(
    folder: Path, run_id: str, model: str, position: str, metrics: Mapping[str, Any], tracking_uri: str | None
) -> str:
    """Put the folder that `locft edit` wrote with the trial's run, as the chosen edit of the model. Raises InputError."""
    client, _ = connect(tracking_uri)
    name = registered_name("edit", model)
    shown = "\n".join(f"- {key}: {number(value)}" for key, value in metrics.items() if not key.endswith("_seconds"))
    use = f"`locft apply {PREFIX}{name}@{ALIAS} --model {model} --out edited-model`"
    with asking(f"the registered model {name!r}", InputError):
        client.log_artifacts(run_id, str(folder), FOLDER)
        source = f"{client.get_run(run_id).info.artifact_uri}/{FOLDER}"
        return add_version(
            client,
            name,
            f"Edits of {model}, each a safetensors delta that fits only the model it was made on.",
            source,
            run_id,
            ALIAS,
            tags={"locft.position": position},
            description=f"Edited at {position}. {use}\n\n{shown}",
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
            return Path(client.download_artifacts(registered.run_id, FOLDER, str(into)))
    except TrackingError as error:
        raise InputError(str(error)) from None
