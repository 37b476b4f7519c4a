"""Initialisation of a torch model by its plan."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from structops.chain import Factor
from structops.errors import StructureError
from structops.mup import MupPlan, PlanRow
from structops.torch.weights import as_blocks, from_blocks, rows_of


@torch.no_grad()
def init_(model: nn.Module, plan: MupPlan, generator: torch.Generator | None = None) -> None:
    """Initialise every matrix of a model in place, as its plan says; vectors and scalars stay as they are.

    - ``"paper"`` and ``"kaiming"``: Gaussian of the plan's ``init_std``.
    - ``"orthogonal"``: every block semi-orthogonal times sqrt(fan_out / fan_in), so that its singular values are equal;
      a kernel of a convolution is the matrix (out, in * kernel).  Factors without blocks (Toeplitz) are Gaussian.
    - ``"zero"``: weights that start at zero; see ``zero=`` of `structops.torch.plan`.
    - ``"gaussian"``: tables of embeddings, of std 1; their padding row is zero.

    The numbers depend on the generator, the plan and the order of the model's parameters only: they are the same on a
    compiled or wrapped model.  A model that FSDP2 sharded is drawn whole on every rank, parameter by parameter, and
    takes the numbers of rank 0.

    Args:
        model: The module, with memory of its own: after ``to_empty``, not on the meta device.
        plan: Its plan.
        generator: Source of the random numbers, on any device; torch's global one by default.

    Raises:
        StructureError: The plan is that of another model, or a parameter is on the meta device or is a shard whose
            whole is not known (FSDP1).

    Example:
        >>> from structops.mup import Rule
        >>> from structops.torch import StructuredLinear, plan
        >>> layer = StructuredLinear(64, 64, "btt")
        >>> init_(layer, plan(layer, Rule(init="orthogonal")), torch.Generator().manual_seed(0))
        >>> block = layer.factors[0][0].detach()
        >>> torch.allclose(block @ block.T, torch.eye(8), atol=1e-5)
        True
    """
    rows = rows_of(model, plan)
    for row, parameter in rows:  # before the first number is written
        _check(row, parameter)
    padding = {
        id(layer.weight): layer.padding_idx
        for layer in model.modules()
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.padding_idx is not None
    }
    for row, parameter in rows:
        if row.init == "constant":
            continue
        value = _value(row, parameter, generator)
        if id(parameter) in padding:
            value[padding[id(parameter)]] = 0
        _write(parameter, value)


def _check(row: PlanRow, parameter: nn.Parameter) -> None:
    if parameter.is_meta:
        raise StructureError(f"{row.name} is on the meta device; call model.to_empty(device=...) first")
    if row.weight.is_matrix and parameter.numel() != row.weight.factor.num_params:
        raise StructureError(
            f"{row.name} has {parameter.numel()} numbers here and {row.weight.factor.num_params} in the plan; "
            f"initialise a model before FSDP1 flattens it, or use fully_shard"
        )


def _value(row: PlanRow, parameter: nn.Parameter, generator: torch.Generator | None) -> Tensor:
    """The whole new value of a parameter, in single precision at least, where the random numbers come from."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    device = parameter.device if generator is None else generator.device
    value = torch.empty(parameter.shape, dtype=dtype, device=device)
    if row.init == "zero":
        return value.zero_()
    value.normal_(std=row.init_std, generator=generator)
    return _orthogonal(value, row.weight.factor, row.init_std) if row.init == "orthogonal" else value


def _orthogonal(value: Tensor, factor: Factor, std: float) -> Tensor:
    """Semi-orthogonal blocks, whose entries have this RMS, from Gaussian ones."""
    blocks = as_blocks(value, factor)
    if blocks is None:
        return value
    wide = factor.fan_out < factor.fan_in
    q, r = torch.linalg.qr(blocks.mT if wide else blocks)
    # With the signs of R's diagonal the distribution is uniform (Haar); the QR alone has signs of its own.
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    q = q * signs.unsqueeze(-2) * (std * math.sqrt(max(factor.fan_out, factor.fan_in)))
    return from_blocks(q.mT if wide else q, value.shape, factor)


def _write(parameter: Any, value: Tensor) -> None:
    value = value.to(parameter.device, parameter.dtype)
    if hasattr(parameter, "placements"):  # a DTensor; its class is imported only where there is one
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)
