"""Methods for training a position, one file each: how the change of its weights is parametrised, held back and updated."""

from collections.abc import Mapping

from locft.train.methods.adalora import AdaLoRA
from locft.train.methods.curvature import Curvature
from locft.train.methods.full import FullFineTuning
from locft.train.methods.lora import LoRA
from locft.train.methods.low_curvature import LowCurvature
from locft.train.methods.method import HELD_BACK, Loss, Method, MethodName, MethodSettings, Parameter
from locft.train.methods.natural_gradient import NaturalGradient
from locft.train.methods.norm_bounded import NormBounded

__all__ = ["HELD_BACK", "Loss", "Method", "MethodName", "MethodSettings", "Parameter", "make_method"]


def make_method(
    parameters: Mapping[str, Parameter], settings: MethodSettings, curvature: Mapping[str, Curvature], steps: int
) -> Method:
    """The method named in the settings, in its initial state.

    curvature: by parameter name; needed by the methods of `HELD_BACK`. steps: the maximum number that the training will take
    (adalora spreads its rank over them).
    """
    if settings.method == "low_curvature":
        return LowCurvature(parameters, settings, curvature)
    if settings.method == "natural_gradient":
        return NaturalGradient(parameters, settings, curvature)
    if settings.method == "lora":
        return LoRA(parameters, settings)
    if settings.method == "adalora":
        return AdaLoRA(parameters, settings, steps)
    if settings.method == "norm_bounded":
        return NormBounded(parameters, settings)
    return FullFineTuning(parameters, settings)
