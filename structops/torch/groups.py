"""Parameter groups with the learning rate of every factor, for any torch optimiser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from structops.errors import StructureError
from structops.mup import scales, width_ratio
from structops.torch.layer import StructuredLinear


def param_groups(
    model: nn.Module,
    plan: None = None,
    *,
    lr: float = 3e-3,
    optimizer: str = "adam",
    base: int | nn.Module | None = None,
    weight_decay: float = 0.0,
    structure_aware: bool = True,
) -> list[dict[str, Any]]:
    """Groups for ``torch.optim``: every parameter once, with the learning rate that its factor's shape asks for.

    A factor of a `StructuredLinear` gets ``lr`` times the multiplier of `structops.mup.scales`; weights of
    ``nn.Linear`` and everything else get ``lr``.  That is relative to the dense layers replaced, so a rate tuned for
    the dense model carries over.  With ``base``, weights are also scaled with their input size (muP transfer over
    width).

    Args:
        model: Any module, also a single layer, also compiled or wrapped.
        plan: Reserved; the numbers are derived from the model's layers.
        lr: Learning rate of a dense layer (of the base width, with ``base``).
        optimizer: Name of the optimiser's family; see `structops.mup.FAMILY`.
        base: None; or the fan-in at which ``lr`` was tuned, so that every weight gets ``base / in_features``; or the
            base model, whose layers of the same name give the base fan-in of each.
        weight_decay: Decay of a dense weight.  A factor's is divided by its learning-rate scale and by the number of
            factors, so that the layer decays as fast as the dense one; biases, gains and scalars do not decay.
        structure_aware: If false, factors get the learning rate of the dense layer: the naive baseline of the paper.

    Returns:
        Groups with ``params``, ``lr``, ``lr_scale`` and ``weight_decay``, sorted and merged by the last two.

    Raises:
        StructureError: No rule for the optimiser, or the base model lacks a layer, or ``model`` is no module.

    Example:
        >>> import torch
        >>> layer = StructuredLinear(1024, 1024, "btt")
        >>> [(group["lr_scale"], len(group["params"])) for group in param_groups(layer, lr=1e-3)]
        [(1.0, 1), (16.0, 2)]
    """
    if plan is not None:
        raise StructureError("param_groups derives its numbers from the model; leave plan=None")
    if not isinstance(model, nn.Module):
        raise StructureError(
            f"expected the module, whose layers say what each parameter is; got {type(model).__name__}"
        )
    merged: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for parameter, lr_scale, decay in _rows(model, optimizer, base, weight_decay, structure_aware):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            merged.setdefault((lr_scale, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": lr * lr_scale, "lr_scale": lr_scale, "weight_decay": decay}
        for (lr_scale, decay), parameters in sorted(merged.items(), key=lambda item: item[0])
    ]


def _rows(
    model: nn.Module, optimizer: str, base: int | nn.Module | None, weight_decay: float, structure_aware: bool
) -> Iterator[tuple[Any, float, float]]:
    """(parameter, lr scale, weight decay), the rows of structured layers first, so that those win where shared."""
    bases = dict(_clean(base.named_modules())) if isinstance(base, nn.Module) else {}

    def ratio(name: str, layer: Any) -> float:
        if base is None:
            return 1.0
        if isinstance(base, int):
            return width_ratio(base, layer, optimizer)
        if not isinstance(base, nn.Module):
            raise StructureError(f"base is None, a fan-in or the base model, got {base!r}")
        if name not in bases:
            raise StructureError(f"the base model has no layer {name!r}; it needs the same layers at another width")
        return width_ratio(bases[name].in_features, layer, optimizer, bases[name].out_features)

    layers = list(_clean(model.named_modules()))
    for name, layer in layers:
        if isinstance(layer, StructuredLinear):
            width, rows = ratio(name, layer), scales(layer.plan, optimizer)
            for parameter, row in zip(layer.factors, rows, strict=True):
                lr_scale = width * (row.lr_scale if structure_aware else 1.0)
                yield parameter, lr_scale, weight_decay / (lr_scale * len(rows))
    for name, layer in layers:
        if isinstance(layer, nn.Linear):
            width = ratio(name, layer)
            yield layer.weight, width, weight_decay / width
    for parameter in model.parameters():
        yield parameter, 1.0, weight_decay if parameter.ndim >= 2 else 0.0


def _clean(named: Any) -> Any:
    """Names without the prefixes of ``torch.compile``, DDP and FSDP."""
    for name, layer in named:
        parts = (part for part in name.split(".") if part not in ("_orig_mod", "module", "_fsdp_wrapped_module"))
        yield ".".join(parts), layer
