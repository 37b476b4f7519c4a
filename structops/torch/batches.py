"""How a batch of any kind is given to a model, and which of its vectors count."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from structops.conversion.batches import Batches

Forward = Callable[[nn.Module, Any], Any]
BATCHES = Batches((Tensor,), "a tensor", "a list or a DataLoader")
call, mask_of, checked, again = BATCHES.call, BATCHES.mask_of, BATCHES.checked, BATCHES.again


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
