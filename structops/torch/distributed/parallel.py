"""Tensor parallelism of structured layers: styles for ``parallelize_module``, and plans by glob."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from structops.conversion.selection import Pattern, named
from structops.errors import StructureError
from structops.normalise import rms_cap
from structops.shards import ChainShard, Side, shard_chain
from structops.spec import ChainPlan
from structops.torch.layer import StructuredLinear
from structops.torch.product import Product


class ParallelStructuredLinear(StructuredLinear):
    """A `StructuredLinear` of which every process of a mesh holds its part.

    The styles below turn layers into this class in place.  Parameters keep names and global shapes, as DTensors, and
    ``plan`` stays that of the whole layer, so that learning rates, initial values and checkpoints are those of one
    process.  ``operator()`` gathers the factors: every process of the mesh has to call it.

    Raises:
        ShapeError: In ``forward``, the last axis of x is not ``in_features``, or not the share of a process of it
            where the input is sharded on features.
    """

    mesh: DeviceMesh
    shard: ChainShard
    layouts: tuple[Placement, Placement]
    use_local_output: bool
    local: Product

    def forward(self, x: Tensor) -> Tensor:
        """``A x + bias``, x and the result in the layouts of the style."""
        mesh, shard = self.mesh, self.shard
        entering, leaving = self.layouts
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [entering], run_check=False)
        x = x.redistribute(placements=[Shard(-1) if shard.cuts_input else Replicate()])
        # Every process knows a summand of the gradient of what it has whole, and all of that of its own slice.
        rows = x.to_local(grad_placements=[Shard(x.ndim - 1) if shard.cuts_input else Partial()])
        factors = [_local(factor) for factor in self.effective_factors()]
        y = self.local(factors, rows)
        if shard.cuts_output and self.bias is not None:
            y = y + _as_stored(self.bias).to_local().to(y.dtype)
        whole = DTensor.from_local(y, mesh, [Shard(y.ndim - 1) if shard.cuts_output else Partial()], run_check=False)
        whole = whole.redistribute(placements=[leaving])
        if not shard.cuts_output and self.bias is not None:
            stored = _as_stored(self.bias)
            # Added to some of the tokens, it gets a summand of its gradient; added to all, the whole.
            (placement,) = [Partial()] if _is_token_shard(leaving) else stored.placements
            bias = stored.to_local(grad_placements=[placement])
            y = whole.to_local() + bias.to(whole.dtype)
            whole = DTensor.from_local(y, mesh, [leaving], run_check=False)
        return whole.to_local() if self.use_local_output else whole

    def effective_factors(self) -> list[Tensor]:
        """The factors that the product takes, as DTensors."""
        factors: list[Tensor] = [_as_stored(factor) for factor in self.factors]
        gains = self.gains if self.gains is None else _as_stored(self.gains)
        return rms_cap(factors, self.caps, gains) if self.weight_norm else factors

    def operator(self) -> Any:
        """The weight as an operator, from factors that are gathered now."""
        return self.plan.operator([cast(DTensor, factor).full_tensor() for factor in self.effective_factors()])

    def merge(self) -> nn.Linear:
        """Not for a layer that is shared out.

        Raises:
            StructureError: Always.
        """
        raise StructureError(
            "a tensor-parallel layer has no dense form; load its checkpoint into the plain model first"
        )


def _as_stored(parameter: Tensor) -> DTensor:
    """A parameter whose gradient comes in its own layout: what is a summand in every process is summed."""
    parameter = cast(DTensor, parameter)
    return parameter.redistribute(placements=parameter.placements)


def _local(factor: Tensor) -> Tensor:
    """What a product takes of a factor here; of the gradient of a whole one, every process knows a summand."""
    factor = cast(DTensor, factor)
    (placement,) = factor.placements
    return factor.to_local(grad_placements=[placement if placement.is_shard() else Partial()])


class _Style(ParallelStyle):
    """What the two styles share; they differ in the side of the layer that is cut, and in the usual layouts."""

    side: Side
    usual: tuple[Placement, Placement]
    for_dense: type[ParallelStyle]

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.layouts = input_layouts or self.usual[0], output_layouts or self.usual[1]
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, StructuredLinear):
            raise StructureError(
                f"{type(self).__name__} is for StructuredLinear, got {type(module).__name__}; other layers take "
                f"torch's {self.for_dense.__name__}, which tensor_parallel_plan chooses"
            )
        shard = shard_layer(module, device_mesh.size(), self.side)
        leaving = self.layouts[1]
        scatters = leaving == Shard(-1)
        if not shard.cuts_output and not (leaving.is_replicate() or scatters or _is_token_shard(leaving)):
            raise StructureError(
                f"{type(self).__name__}: output_layouts is Replicate(), Shard(-1), or Shard of an axis of tokens "
                f"counted from the front, got {leaving}"
            )
        if scatters and module.out_features % device_mesh.size():
            raise StructureError(
                f"{type(self).__name__}: {device_mesh.size()} processes do not divide out_features="
                f"{module.out_features} for output_layouts=Shard(-1)"
            )
        for k, (parameter, dim) in enumerate(zip(list(module.factors), shard.dims, strict=True)):
            module.factors[k] = self._distribute(parameter, device_mesh, dim)
        if module.bias is not None:
            module.bias = self._distribute(module.bias, device_mesh, 0 if shard.cuts_output or scatters else None)
        if module.gains is not None:
            module.gains = self._distribute(module.gains, device_mesh, None)
        plan = cast(ChainPlan, module.plan)
        module.__class__ = ParallelStructuredLinear
        module = cast(ParallelStructuredLinear, module)
        module.mesh, module.shard, module.layouts = device_mesh, shard, self.layouts
        module.use_local_output = self.use_local_output
        module.local = Product(ChainPlan.of(shard.chain, plan.build), module.product.recompute)
        return module

    def _distribute(self, parameter: nn.Parameter, mesh: DeviceMesh, dim: int | None) -> nn.Parameter:
        placement = Replicate() if dim is None else Shard(dim)
        value = distribute_tensor(parameter, mesh, [placement], src_data_rank=self.src_data_rank)
        return nn.Parameter(value, requires_grad=parameter.requires_grad)


class ColwiseStructured(_Style):
    """Column-parallel `StructuredLinear`: every process computes its contiguous slice of the output features.

    The chain is cut along the most significant label of the output; see `shard_chain` for which factors that cuts.
    Forward nothing is communicated; backward the gradients of x and of the factors that are not cut are summed.  A
    block-diagonal layer needs only a slice of x.

    Args:
        input_layouts: Layout of a plain tensor x, ``Replicate()`` by default; a DTensor knows its own.
        output_layouts: Layout of the result, ``Shard(-1)`` by default.
        use_local_output: Whether the result is the local tensor instead of a DTensor.

    Raises:
        StructureError: In ``parallelize_module``: another kind of layer, or a structure or size that cannot be cut.

    Example:
        >>> from structops import structure
        >>> from structops.torch.distributed import shard_chain
        >>> shard_chain(structure("btt(rank=2)").chain(64, 64), 4, "output").dims  # the last factor is cut
        (None, 1)
    """

    side = "output"
    usual = Replicate(), Shard(-1)
    for_dense = ColwiseParallel


class RowwiseStructured(_Style):
    """Row-parallel `StructuredLinear`: every process takes its contiguous slice of the input features.

    The chain is cut along the most significant label of the input; see `shard_chain`.  Every process computes a
    summand of the output, and one all-reduce adds them up, or a reduce-scatter if the output is to be sharded; the bias
    is added once, after it.

    With ``input_layouts=Replicate(), output_layouts=Shard(-1)`` it stands where a column-parallel layer would, whole
    x in and slices of y out: at the price of that reduce-scatter, all factors are cut of the structures of which
    `ColwiseStructured` cuts the last one only.

    Args:
        input_layouts: Layout of a plain tensor x, ``Shard(-1)`` by default; a DTensor knows its own.
        output_layouts: Layout of the result, ``Replicate()`` by default, ``Shard(k)`` of an axis of tokens counted from
            the front, or ``Shard(-1)``.
        use_local_output: Whether the result is the local tensor instead of a DTensor.

    Raises:
        StructureError: In ``parallelize_module``: another kind of layer, or a structure, size or layout that cannot be.

    Example:
        >>> from structops import structure
        >>> from structops.torch.distributed import shard_chain
        >>> shard_chain(structure("btt(rank=2)").chain(64, 64), 4, "input").dims  # both factors are cut
        (0, 2)
    """

    side = "input"
    usual = Shard(-1), Replicate()
    for_dense = RowwiseParallel


def shard_layer(layer: StructuredLinear, parts: int, side: Side) -> ChainShard:
    """`shard_chain` of a layer.

    Raises:
        StructureError: The structure is no chain, or cannot be cut.
    """
    if not isinstance(layer.plan, ChainPlan):
        raise StructureError(f"{layer.structure} is no chain of factors; only chains can be cut for tensor parallelism")
    try:
        return shard_chain(layer.plan.chain, parts, side)
    except StructureError as error:
        raise StructureError(f"{layer.structure}: {error}") from error


def tensor_parallel_plan(
    model: nn.Module,
    *,
    colwise: Pattern | Sequence[Pattern] = (),
    rowwise: Pattern | Sequence[Pattern] = (),
    parts: int | None = None,
) -> dict[str, ParallelStyle]:
    """The plan for ``parallelize_module`` by globs, with the style that suits each layer.

    `StructuredLinear` gets the styles of this module, other layers torch's.

    Args:
        model: The model, before it is parallelised; it may be on the meta device.
        colwise: Globs of full names of layers, such as ``"*.up"``, or compiled regular expressions, that are
            column-parallel.
        rowwise: The same for row-parallel ones.
        parts: Number of processes, to find out now whether all structured layers can be cut.

    Returns:
        A style for every layer that a pattern fits, by its full name.

    Raises:
        StructureError: A pattern fits no layer, a layer is to be both, or, with ``parts``, a layer cannot be cut.

    Example:
        >>> model = nn.ModuleDict({"up": StructuredLinear(16, 64, "btt"), "down": nn.Linear(64, 16)})
        >>> plan = tensor_parallel_plan(model, colwise="up", rowwise="down", parts=2)
        >>> {name: type(style).__name__ for name, style in plan.items()}
        {'up': 'ColwiseStructured', 'down': 'RowwiseParallel'}
    """
    styles: dict[str, ParallelStyle] = {}
    leaves = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, StructuredLinear | nn.Linear | nn.Embedding)
    }
    for what, kind, globs in (("colwise", ColwiseStructured, colwise), ("rowwise", RowwiseStructured, rowwise)):
        for name in named(what, globs, leaves) if globs else ():
            layer = leaves[name]
            structured = isinstance(layer, StructuredLinear)
            style = kind() if structured else kind.for_dense()
            if type(styles.setdefault(name, style)) is not type(style):
                raise StructureError(f"{name} is in colwise and in rowwise; a layer is one of them")
            if parts is not None and isinstance(layer, StructuredLinear):
                _named(name, layer, parts, kind.side)
    return styles


def _named(name: str, layer: StructuredLinear, parts: int, side: Side) -> None:
    try:
        shard_layer(layer, parts, side)
    except StructureError as error:
        raise StructureError(f"{name}: {error}") from error


def _is_token_shard(placement: Placement) -> bool:
    return isinstance(placement, Shard) and placement.dim >= 0
