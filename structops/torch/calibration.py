"""Moments of the inputs of the linear layers of a model, from batches of data: what a weighted projection needs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sized
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from structops._progress import track
from structops.conversion import choose
from structops.conversion.calibration import Calibration, bytes_text, finished
from structops.conversion.selection import Select
from structops.errors import StructureError
from structops.projection import Moments
from structops.torch.batches import (
    Forward,
    call,
    checked,
    device_of,
    given,
    hooked,
    mask_of,
    moved,
    running,
    token_weights,
)
from structops.torch.linears import linear_layers

Weights = Callable[[str, Tensor, Any], Tensor | None]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    select: Select = None,
    *,
    max_batches: int | None = None,
    weights: Weights | None = None,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Calibration:
    r"""Moments of the inputs of linear layers over data, for ``structurize(model, ..., calibration=...)``.

    The model runs in evaluation mode without gradients, as it is (not compiled); afterwards every module is in its
    own mode again.

    Args:
        model: Any module, also a single linear layer.
        batches: Any iterable.  A batch is a tensor; a tuple or list, of which the first element is the input; a mapping
            of keyword arguments; or ``(args, kwargs)``.  Tensors are moved to the device of the first parameter.
        select: The layers, as for `structops.torch.structurize`, of which rules may be taken as they are.  By default
            those that it converts by default.
        max_batches: Where to stop.
        weights: How much every vector counts, a function of the layer's name, its input and the batch, of shape
            ``input.shape[:-1]``; None for all alike.  By default a batch's two-dimensional ``attention_mask`` leaves
            out padding, for inputs whose axes before the last are those of the mask, also flattened; inputs of other
            shapes (of the experts of a mixture, of a decoder that has another length than its encoder) count whole.
            Layers that share an input are asked once.
        forward: ``forward(model, batch)`` runs the model on what is not a batch of these kinds.
        device: Where the moments are, such as ``"cpu"``; by default with the inputs.
        progress: Whether to show a bar; by default in terminals and notebooks.

    Returns:
        A `Calibration`: a mapping from names to `structops.projection.Moments`, with ``save`` and ``load``.

    Raises:
        StructureError: No layer is selected, there is no batch, a batch is of another kind, or as in
            `structops.conversion.choose`.
        EntryError: Inputs of a layer are not finite.

    **Warnings.** `StructureWarning` names layers that no vector reached, such as experts that were not chosen; they are
    left out, and `structurize` refuses them.

    **Cost.** The forward passes, and ``inputs^2`` MACs and numbers of memory a vector and a layer; layers that get the
    same tensor share both.  With ``device="cpu"`` and a model elsewhere, inputs are copied and the sums are the CPU's.

    **Numerics.** Sums in float32 also for inputs of 16 bits; see `structops.projection.Moments`.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4))
        >>> found = calibrate(model, torch.randn(10, 32, 8).unbind(), select=["0", "2"])
        >>> {name: moments.features for name, moments in found.items()}
        {'0': 8, '2': 16}
        >>> from structops.torch import structurize
        >>> small = structurize(model, "low_rank(rank=2)", select=["0", "2"], calibration=found)
    """
    chosen = [choice.layer for choice in choose(linear_layers(model), "dense", select) if choice.structure is not None]
    if not chosen:
        raise StructureError("calibrate: no layer is selected; structurize(..., dry_run=True) lists them and says why")
    record = _Record(weights, device)
    run, place = forward or call, device_of(model)
    most = 4 * sum(layer.in_features**2 for layer in chosen)
    with ExitStack() as stack:
        stack.enter_context(running(model))
        for layer in chosen:
            stack.enter_context(hooked(layer.module, partial(record.before, layer.name)))
        length = len(batches) if isinstance(batches, Sized) else None
        total = max_batches if length is None else min(length, max_batches or length)
        title = f"calibrating, at most {bytes_text(most)}"
        for batch in track(islice(checked(batches), max_batches), title, total, progress):
            record.batch = moved(batch, place)
            run(model, record.batch)
            record.end()
    moments = {name: shared.moments for name, shared in record.shared.items()}
    return finished(moments, [layer.name for layer in chosen], record.batches)


# ------------------------------------------------------------------------------------- layers that share their inputs


class _Seen:
    """A tensor that was given to a layer, without keeping it alive."""

    def __init__(self, x: Tensor) -> None:
        self.ref, self.version = weakref.ref(x), _version(x)

    def is_(self, x: Tensor) -> bool:
        """Whether it is this tensor, unchanged."""
        return self.ref() is x and self.version is not None and self.version == _version(x)


def _version(x: Tensor) -> int | None:
    """Counts changes in place; None where they are not counted."""
    return None if x.is_inference() else x._version


@dataclass(eq=False)
class _Shared:
    """Layers that got the same tensors so far, and their moments.

    Attributes:
        moments: Of all earlier batches, and of the first ``done`` inputs of this one.
        calls: How often every layer was called in this batch.
        seen: The inputs of this batch.
        waiting: Copies of those, with their weights, that not every layer has got yet.
        done: The number of those that every layer has got.
    """

    moments: Moments
    calls: dict[str, int] = field(default_factory=dict)
    seen: list[_Seen] = field(default_factory=list)
    waiting: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    done: int = 0

    def settle(self) -> None:
        """Count what every layer has got."""
        while self.waiting and self.done < min(self.calls.values()):
            self.moments.add(*self.waiting.pop(0))
            self.done += 1

    def without(self, name: str) -> _Shared:
        """A layer that got something else from now on, taken out."""
        arrays = {key: array.clone() for key, array in self.moments.arrays().items()}
        count = self.calls.pop(name)
        alone = _Shared(Moments.from_arrays(arrays), {name: count}, self.seen[:count], done=self.done)
        alone.waiting = self.waiting[: count - self.done]
        alone.settle()
        self.settle()
        return alone


class _Record:
    """What the hooks of all layers write down."""

    def __init__(self, weights: Weights | None, device: torch.device | str | None) -> None:
        self.weights, self.device, self.batch, self.batches = weights, device, None, 0
        self.shared: dict[str, _Shared] = {}
        self.born: list[_Shared] = []  # in this batch: layers that are called for the first time may join them

    def before(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook that a layer calls with its input."""
        x = given(args, kwargs)
        shared = self.shared.get(name) or self._join(name, x)
        k = shared.calls[name]
        if k < len(shared.seen) and not shared.seen[k].is_(x):
            shared = self.shared[name] = shared.without(name)
        if k == len(shared.seen):
            shared.seen.append(_Seen(x))
            # What waits for the other layers may be changed in place before they come.
            shared.waiting.append((x.clone() if len(shared.calls) > 1 else x, self._weights(name, x)))
        shared.calls[name] = k + 1
        shared.settle()

    def _join(self, name: str, x: Tensor) -> _Shared:
        """The layers that got this as their first input, too, or a new one.

        Raises:
            StructureError: The model has no numbers.
        """
        if x.is_meta:
            raise StructureError("calibrate: the model is on the meta device; load its weights first")
        for shared in self.born:
            if len(shared.seen) == 1 and shared.seen[0].is_(x):
                break
        else:
            like = torch.empty(0, dtype=x.dtype, device=self.device or x.device)
            shared = _Shared(Moments.zeros(int(x.shape[-1]), like))
            self.born.append(shared)
        shared.calls[name] = 0
        self.shared[name] = shared
        return shared

    def _weights(self, name: str, x: Tensor) -> Tensor | None:
        return token_weights(mask_of(self.batch), x) if self.weights is None else self.weights(name, x, self.batch)

    def end(self) -> None:
        """A batch is over: layers that were not called as often as the others do not share their inputs."""
        for name, shared in list(self.shared.items()):
            if shared.calls[name] < len(shared.seen):
                self.shared[name] = shared.without(name)
        for shared in self.shared.values():
            shared.calls = dict.fromkeys(shared.calls, 0)
            shared.seen, shared.waiting, shared.done = [], [], 0
        self.born = []
        self.batches += 1
