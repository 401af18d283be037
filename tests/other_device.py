"""A device of its own that is really the CPU: what lies there is marked, and whoever mixes it with what does not fails.

A machine without a GPU cannot run what is written for one, but most of what goes wrong there can be seen: a tensor made on the
wrong device, a product of one here and one there, an array of what is there. Numbers are computed as ever, so the tests of a GPU
hold here, too. The device is called cpu:0, which PyTorch takes for the CPU. What runs inside PyTorch's own functions, such as a
backward pass, is not seen.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from locft import process
from locft.engine import boundary_states
from locft.train import pipelines

HERE, THERE = torch.device("cpu"), torch.device("cpu:0")
_ARRAYS = (torch.Tensor.numpy, torch.Tensor.__array__)
_ABOUT = (torch._has_compatible_shallow_copy_type,)
"""Asked of two tensors, whatever they hold."""
_BETWEEN = (torch.Tensor.copy_, torch.Tensor.__getitem__, torch.Tensor.__setitem__)
"""What is there is copied from here, and indexed by what is here."""


class OtherDevice(TorchFunctionMode):
    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = any(map(_lies_there, tensors))
        if func == torch.Tensor.device.__get__:
            return THERE if there else func(*args, **kwargs)
        if func == torch.Tensor.data.__set__:
            _mark(args[0], _lies_there(args[1]))
            return func(*args, **kwargs)
        if func in _ARRAYS and there:
            raise TypeError(f"{resolve_name(func)}: of a tensor on {THERE}")
        if func == torch.Tensor.__deepcopy__:  # its memo holds other tensors
            tensors = [args[0]]
            there = _lies_there(args[0])
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            return _moved(func, args, kwargs)
        mixed = there and any(tensor.dim() and not _lies_there(tensor) for tensor in tensors)
        if mixed and func not in _ABOUT and not (func in _BETWEEN and _lies_there(args[0])):
            raise RuntimeError(f"{resolve_name(func)}: tensors both on {THERE} and on {HERE}")
        result, goes = func(*args, **kwargs), there or THERE in _devices(args, kwargs)
        for leaf in tree_leaves(result):
            _mark(leaf, goes)
        return result


@contextmanager
def other_device() -> Iterator[torch.device]:
    """In here `cpu:0` is a device of its own on which work is queued, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch, OtherDevice():
        for module in (process, pipelines, boundary_states):
            patch.setattr(module, "runs_ahead", lambda device: device == THERE)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        patch.setattr(torch.nn.Parameter, "__new__", staticmethod(partial(_parameter, torch.nn.Parameter.__new__)))
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
        yield THERE


def _lies_there(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "lies_there", False)


def _mark(leaf: Any, goes: bool) -> None:
    if isinstance(leaf, torch.Tensor):
        leaf.lies_there = goes


def _parameter(make: Callable, kind: type, data: torch.Tensor, requires_grad: bool = True) -> torch.nn.Parameter:
    """A parameter is made without the mode being asked."""
    parameter = make(kind, data, requires_grad)
    _mark(parameter, _lies_there(data))
    return parameter


def _devices(args: Any, kwargs: Any) -> list[torch.device]:
    named = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device | str))
    return [torch.device(name) for name in named if str(name) in ("cpu", "cpu:0")]


def _moved(func: Callable, args: tuple, kwargs: dict) -> torch.Tensor:
    """What `to` or `cpu` gives: another tensor where it comes from the other side."""
    tensor, *rest = args
    likes = [other for other in rest if isinstance(other, torch.Tensor)]
    named = (
        [HERE]
        if func is torch.Tensor.cpu
        else [THERE if _lies_there(o) else HERE for o in likes] or _devices(rest, kwargs)
    )
    goes = named[0] == THERE if named else _lies_there(tensor)
    result = func(*args, **kwargs)
    if goes != _lies_there(tensor) and result is tensor:
        result = tensor.clone()
    _mark(result, goes)
    return result
