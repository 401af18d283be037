"""A registered edit as an MLflow model: prompts in, the edited model's answers out.

    mlflow.pyfunc.load_model("models:/locft-edit-MODEL@STUDY").predict(["The capital of Portugal is"])

The version holds the delta and names the base model, which is loaded as everywhere else; nothing is pickled. MLflow finds this
module by its name, so locft-sweeps must be installed where the model is loaded or served.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from locft.train.formats import RAW

if TYPE_CHECKING:
    from locft.model.models import LoadedModel

CONFIG = {"format": RAW, "tokens": 64, "device": "auto", "dtype": "float32"}
"""Defaults that `model_config` of `load_model` may change, in addition to `model`, the base: the format of prompts (raw or
chat), the length limit of an answer in tokens, and how the base is loaded."""


def write_description(folder: Path, model: str) -> None:
    """Write the file `MLmodel` that turns a folder with a delta into an MLflow model. model: the base's name."""
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import add_to_model
    from mlflow.types import ColSpec, Schema

    texts = Schema([ColSpec("string")])
    described = Model(signature=ModelSignature(inputs=texts, outputs=texts))
    add_to_model(described, __name__, model_config={"model": model, **CONFIG})
    described.save(str(folder / "MLmodel"))


class EditedModel:
    """The object whose `predict` MLflow calls."""

    def __init__(self, loaded: "LoadedModel", form: str, tokens: int):
        self.loaded, self.form, self.tokens = loaded, form, tokens

    def predict(self, prompts: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """The answer to each prompt, decoded greedily up to the end of its line. prompts: texts, as a list, an array or the only
        column of a table. Raises InputError for prompts that are too long."""
        from locft.measure.generation import line_answers

        return line_answers(self.loaded, list(map(str, np.ravel(prompts))), self.tokens, self.form)


def _load_pyfunc(path: str, model_config: Mapping[str, Any]) -> EditedModel:
    """Called by MLflow with the version's folder. Raises InputError for a base that the edit was not made on."""
    from locft.model.delta import EditDelta, apply_delta
    from locft.model.models import load_model

    config = {**CONFIG, **model_config}
    loaded = load_model(config["model"], dtype=config["dtype"], device=config["device"])
    apply_delta(loaded, EditDelta.load(Path(path)))
    return EditedModel(loaded, config["format"], int(config["tokens"]))
