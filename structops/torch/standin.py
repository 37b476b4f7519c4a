"""What stands where code looks for the weight of a linear layer: its sizes and dtype, and no numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from structops.errors import EntryError

# What may be asked of it, by the names of the functions that PyTorch dispatches.
_SIZES = {
    "size",
    "dim",
    "numel",
    "nelement",
    "element_size",
    "is_floating_point",
    "is_complex",
    "ndimension",
    "__len__",
}
_ARRAYS = {"T", "mT", "H", "mH", "real", "imag"}  # attributes that are arrays


class WeightStandIn(Tensor):
    """The dtype, device and shape of a structured weight, for code such as T5's that reads ``layer.weight.dtype``.

    Raises:
        EntryError: On every numeric use; the message names ``layer.operator()`` and its ``to_dense()``.
    """

    @staticmethod
    def __new__(cls, out_features: int, in_features: int, like: Tensor) -> WeightStandIn:
        """A tensor without memory; ``like`` gives dtype, device and whether it learns."""
        make = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        learns = like.requires_grad
        return make(cls, (out_features, in_features), dtype=like.dtype, device=like.device, requires_grad=learns)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Attributes and sizes are answered, nothing else.

        Raises:
            EntryError: Anything else.
        """
        name = getattr(func, "__name__", str(func))
        is_attribute = name == "__get__"
        if is_attribute:
            name = func.__self__.__name__
            if name == "data":
                return args[0]
        if name in _ARRAYS or not (is_attribute or name in _SIZES):
            raise _no_numbers(name)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Operations on numbers that went around ``__torch_function__``.

        Raises:
            EntryError: Always.
        """
        raise _no_numbers(str(func))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Sizes and what to call instead."""
        return (
            f"WeightStandIn(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}'; "
            f"layer.operator().to_dense() has the numbers)"
        )


def _no_numbers(use: str) -> EntryError:
    return EntryError(
        f"{use} of the weight of a StructuredLinear, which is no dense array: layer.operator().to_dense() builds one, "
        f"layer.merge() a dense layer, and layer.factors are its parameters"
    )


def stand_in(out_features: int, in_features: int, like: Tensor) -> Tensor:
    """The stand-in of a weight; inside a compiled function a tensor of one repeated NaN, which compilers know."""
    if torch.compiler.is_compiling():
        return like.detach().new_full((), math.nan).expand(out_features, in_features)
    return WeightStandIn(out_features, in_features, like)
