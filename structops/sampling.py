"""Random operators of a structure, initialised as layers are."""

from __future__ import annotations

from typing import Any

from structops import _array
from structops._array import Array, Dtype
from structops.errors import BackendError, ShapeError
from structops.mup import scales
from structops.spec import Plan, Structure, structure

SEEDS = "either generator= (a torch.Generator) or key= (a JAX key)"


def random(
    spec: str | Structure,
    shape: tuple[int, int],
    *,
    generator: Any = None,
    key: Any = None,
    like: Array = None,
    dtype: Dtype = None,
    device: Any = None,
) -> Any:
    """An operator of a structure with Gaussian factors of the paper's standard deviations.

    Args:
        spec: A structure or its string form.
        shape: ``(out_features, in_features)``.
        generator: A ``torch.Generator``; gives a torch operator.
        key: A JAX key; gives a JAX operator.
        like: An array whose dtype and device are taken.
        dtype: Dtype, by default that of ``like`` or the library's default.
        device: Device, by default that of ``like`` or of the generator.

    Raises:
        BackendError: Neither or both of generator and key, or ``like`` of the other library.
        StructureError: The structure cannot have this shape.
        ShapeError: ``shape`` is no pair of sizes.

    Example:
        >>> import torch
        >>> random("btt(rank=2)", (16, 16), generator=torch.Generator().manual_seed(0))
        BTT(16x16; modes 4x4 by 4x4, rank 2; 256 params, 1 of dense; torch.float32)
    """
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        raise ShapeError(f"shape must be (out_features, in_features), got {shape!r}")
    out_features, in_features = shape
    plan = structure(spec).plan(in_features, out_features)
    if like is not None:
        backend = "torch" if generator is not None else "jax"
        if _array.backend_of(like) != backend:
            raise BackendError(f"like is a {_array.backend_of(like)} array, the seed is {backend}'s")
        dtype = like.dtype if dtype is None else dtype
        device = like.device if device is None and _array.is_concrete(like) else device
    return plan.operator(draw(plan, generator=generator, key=key, dtype=dtype, device=device))


def draw(plan: Plan, *, generator: Any = None, key: Any = None, dtype: Dtype = None, device: Any = None) -> list[Array]:
    """Stored factors of a plan, Gaussian with muP's standard deviations.

    Raises:
        BackendError: Neither or both of generator and key, or something else in their place.
    """
    if (generator is None) == (key is None):
        raise BackendError(f"give one explicit seed: {SEEDS}")
    if generator is not None and type(generator).__name__ != "Generator":
        raise BackendError(
            f"expected generator=torch.Generator().manual_seed(0) or the like, got {generator!r}; {SEEDS}"
        )
    if key is not None and not (_array.is_array(key) and _array.backend_of(key) == "jax"):
        raise BackendError(f"expected key=jax.random.key(0) or the like, got {key!r}; {SEEDS}")
    keys: list[Any] = [None] * len(plan.factors) if key is None else list(_array.split_key(key, len(plan.factors)))
    return [
        _array.normal(shape, generator=generator, key=k, dtype=dtype, device=device) * row.init_std
        for shape, row, k in zip(plan.stored_shapes, scales(plan), keys, strict=True)
    ]
