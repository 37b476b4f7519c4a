"""How a batch of any kind is given to a model, and which of its vectors count."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from structops.errors import StructureError

Forward = Callable[[nn.Module, Any], Any]


def call(model: nn.Module, batch: Any) -> Any:
    """The output of a model for a batch.

    A mapping is given as keyword arguments, a pair of a tuple and a mapping as ``model(*args, **kwargs)``; of any other
    tuple or list the first element is the input and the others are labels; a tensor is the input.

    Raises:
        StructureError: The batch is of another kind.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    if _is_call(batch):
        return model(*batch[0], **batch[1])
    if isinstance(batch, tuple | list) and batch:
        return call(model, batch[0])
    if isinstance(batch, Tensor):
        return model(batch)
    raise StructureError(
        f"a batch is a tensor, a tuple (x, labels), a mapping of keyword arguments, or (args, kwargs), got "
        f"{type(batch).__name__}; give forward=lambda model, batch: ... for anything else"
    )


def _is_call(batch: Any) -> bool:
    """Whether a batch is a pair (args, kwargs)."""
    is_pair = isinstance(batch, tuple | list) and len(batch) == 2
    return is_pair and isinstance(batch[0], tuple | list) and isinstance(batch[1], Mapping)


def mask_of(batch: Any) -> Tensor | None:
    """The ``attention_mask`` of a batch of tokens, shape (sequences, length), if it has one."""
    if _is_call(batch):
        batch = batch[1]
    elif isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def token_weights(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask in the shape of the vectors of ``x``, whose leading axes are those of the mask, alone or flattened.

    None if there is no mask or if it does not fit: all vectors count.
    """
    if mask is None or x.shape[:-1] not in (mask.shape, (mask.numel(),)):
        return None
    return mask.reshape(x.shape[:-1]).to(x.device)


def moved(batch: Any, device: torch.device | None) -> Any:
    """A batch with all its tensors on a device."""
    if device is None:
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(moved(value, device) for value in batch)
    return batch


def device_of(model: nn.Module) -> torch.device | None:
    """Where the first parameter is, and where batches go; None without parameters, or if they are elsewhere yet."""
    parameter = next(model.parameters(), None)
    return None if parameter is None or parameter.is_meta else parameter.device


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a linear layer, as its hook gets it."""
    return args[0] if args else next(iter(kwargs.values()))


def checked(batches: Iterable[Any]) -> Iterable[Any]:
    """What was given as the batches, if it is several.

    Raises:
        StructureError: It is one batch, or nothing that can be gone through.
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise StructureError(
            f"expected an iterable of batches, such as a list or a DataLoader, got a {type(batches).__name__}; "
            f"give [batch] for a single one"
        )
    return batches


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, and no compiled code, which would not call hooks; modes are restored."""
    with ExitStack() as stack:
        stack.callback(restore, [(module, module.training) for module in model.modules()])
        model.eval()
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        yield


@contextmanager
def hooked(layer: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    """A hook before the forward of a layer, after those of others."""
    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def restore(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    """Put every module into the mode that it had."""
    for module, mode in modes:
        module.training = mode
