"""The few places where torch and JAX arrays differ.  Nothing here imports either: an array brings its library along."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from structops.errors import BackendError

Array = Any
Dtype = Any


def backend_of(x: Array) -> str:
    """``"torch"`` or ``"jax"``.

    Raises:
        BackendError: For anything else; numpy arrays are pointed to the two conversions.
    """
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")  # whoever has an array has imported its library
    if torch is not None and isinstance(x, torch.Tensor):
        return "torch"
    if jax is not None and isinstance(x, jax.Array):
        return "jax"
    raise foreign(x)


def foreign(x: object) -> BackendError:
    """The error for what is no torch or JAX array; for a numpy array it names the two conversions."""
    if type(x).__module__.partition(".")[0] == "numpy":
        return BackendError(
            "expected a torch or JAX array, got a numpy array; convert it with torch.from_numpy(x) or jnp.asarray(x)"
        )
    return BackendError(f"expected a torch or JAX array, got {type(x).__module__}.{type(x).__qualname__}")


def is_array(x: object) -> bool:
    """Whether ``x`` is a torch or JAX array (tracers included)."""
    try:
        backend_of(x)
    except BackendError:
        return False
    return hasattr(x, "shape")


def namespace(x: Array) -> ModuleType:
    """The array-API namespace of ``x``: ``array_api_compat.torch`` or ``jax.numpy``."""
    if backend_of(x) == "torch":
        import array_api_compat.torch as xp

        return xp
    return sys.modules["jax"].numpy


def permute(x: Array, axes: tuple[int, ...]) -> Array:
    """Permute the axes; a view in torch."""
    return x.permute(axes) if hasattr(x, "permute") else x.transpose(axes)


def matmul(left: Array, right: Array) -> Array:
    """``left @ right``, both with two axes or both with three."""
    if not hasattr(left, "bmm"):
        return left @ right
    # torch's own @ does the same, for more overhead than the product of a small layer
    return left.bmm(right) if left.ndim == 3 else left.mm(right)


def repeat(x: Array, count: int) -> Array:
    """One matrix (1, m, n) as ``count`` equal ones; a view in torch, and left to ``@`` in JAX."""
    return x.expand(count, -1, -1) if hasattr(x, "expand") else x


def adjoint(x: Array) -> Array:
    """The conjugate transpose of the last two axes; a view of a real array."""
    return namespace(x).conj(x.mT) if is_complex(x.dtype) else x.mT


def counted(like: Array) -> Array:
    """0, 1, 2, ... for every entry of a vector of integers, on its device."""
    return (0 * like + 1).cumsum(0) - 1


def parity(perm: Array) -> Array:
    """0 for an even permutation and 1 for an odd one: n minus the number of cycles, modulo 2.

    The cycles are found by pointer jumping in log2 n steps, so that it runs under ``jit``.
    """
    xp, n = namespace(perm), int(perm.shape[0])
    places = counted(perm)
    least, jump = xp.minimum(places, perm), perm
    for _ in range(max(n - 1, 1).bit_length()):
        least, jump = xp.minimum(least, least[jump]), jump[jump]
    return (n - (least == places).sum()) % 2


def polar(values: Array) -> tuple[Array, Array]:
    """Moduli and phases, ``values = moduli * phases``; the phase of 0 is 1."""
    xp = namespace(values)
    size = xp.abs(values)
    # The safe value inside keeps the gradient at 0 from being no number.
    return size, xp.where(size == 0, xp.ones_like(values), values / xp.where(size == 0, xp.ones_like(size), size))


def contiguous(x: Array) -> Array:
    """``x`` laid out row by row; JAX knows no other layout."""
    # Contiguous alone leaves odd strides along axes of size 1, at which torch.kron takes offence.
    return x.contiguous().reshape((-1,)).reshape(x.shape) if backend_of(x) == "torch" else x


def pad(x: Array, widths: Sequence[tuple[int, int]]) -> Array:
    """Append zeros (before, after) along the last ``len(widths)`` axes."""
    if backend_of(x) == "torch":
        return sys.modules["torch"].nn.functional.pad(x, [width for pair in reversed(widths) for width in pair])
    return namespace(x).pad(x, [(0, 0)] * (x.ndim - len(widths)) + list(widths))


def is_complex(dtype: Dtype) -> bool:
    """Whether ``dtype`` is complex."""
    return "complex" in str(dtype)


def complex_of(dtype: Dtype) -> Dtype:
    """The complex dtype that a complex number gives numbers of this dtype."""
    if is_complex(dtype):
        return dtype
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dtype, torch.dtype):
        return torch.promote_types(dtype, torch.complex64)
    jnp = sys.modules["jax"].numpy
    return jnp.promote_types(dtype, jnp.complex64)


def real_of(dtype: Dtype) -> Dtype:
    """The dtype of the modulus of numbers of this dtype."""
    if not is_complex(dtype):
        return dtype
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dtype, torch.dtype):
        return dtype.to_real()
    return np.zeros((), dtype).real.dtype


def wide(like: Array) -> Dtype:
    """Double precision, real or complex as the array is, where the library and the device have it."""
    if backend_of(like) == "torch":
        torch = sys.modules["torch"]
        has, names = like.device.type != "mps", torch
    else:
        jax = sys.modules["jax"]
        has, names = jax.config.jax_enable_x64, jax.numpy
    if not has:
        return like.dtype
    return names.complex128 if is_complex(like.dtype) else names.float64


def real_part(x: Array) -> Array:
    """The real part; a real array itself."""
    return x.real if is_complex(x.dtype) else x


def is_floating(dtype: Dtype) -> bool:
    """Whether ``dtype`` is real or complex floating point: what parameters may be."""
    return "float" in str(dtype) or is_complex(dtype)


def is_half(dtype: Dtype) -> bool:
    """Whether ``dtype`` has 16 bits: FFTs then compute in float32."""
    return str(dtype).endswith(("float16",))


def promote(*dtypes: Dtype) -> Dtype:
    """The dtype that the library gives a product of arrays of these dtypes."""
    first, *rest = dtypes
    for dtype in rest:
        if dtype != first:
            torch = sys.modules.get("torch")
            if torch is not None and isinstance(first, torch.dtype):
                first = torch.promote_types(first, dtype)
            else:
                first = sys.modules["jax"].numpy.promote_types(first, dtype)
    return first


def cast(x: Array, dtype: Dtype) -> Array:
    """``x`` in ``dtype``; ``x`` itself if it has it already."""
    if x.dtype == dtype:
        return x
    return x.to(dtype) if backend_of(x) == "torch" else x.astype(dtype)


def move(x: Array, device: Any) -> Array:
    """``x`` on ``device``."""
    return x.to(device) if backend_of(x) == "torch" else sys.modules["jax"].device_put(x, device)


def is_concrete(x: Array) -> bool:
    """Whether the values of ``x`` can be read: no tracer, no fake or meta tensor, none under vmap or compilation."""
    if backend_of(x) == "torch":
        torch = sys.modules["torch"]
        traced = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x)
        return type(x).__name__ in ("Tensor", "Parameter") and x.device.type != "meta" and not traced
    return not isinstance(x, sys.modules["jax"].core.Tracer)


def convolve(x: Array, kernel: Array) -> Array:
    """Cross-correlation without padding: x (batch, C_in, *spatial), kernel (C_out, C_in, *taps)."""
    dims = kernel.ndim - 2
    if backend_of(x) == "torch":
        functional = sys.modules["torch"].nn.functional
        return (functional.conv1d if dims == 1 else functional.conv2d)(x, kernel)
    return sys.modules["jax"].lax.conv_general_dilated(x, kernel, (1,) * dims, "VALID")


def normal(
    shape: tuple[int, ...], *, generator: Any = None, key: Any = None, dtype: Dtype = None, device: Any = None
) -> Array:
    """Standard normal numbers from a torch ``generator`` or a JAX ``key``."""
    if generator is not None:
        torch = sys.modules["torch"]
        sample = torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)
        return sample if device is None else sample.to(device)
    jax = sys.modules["jax"]
    sample = jax.random.normal(key, shape, dtype=jax.numpy.float32 if dtype is None else dtype)
    return sample if device is None else jax.device_put(sample, device)


def split_key(key: Any, count: int) -> Any:
    """``count`` independent JAX keys."""
    return sys.modules["jax"].random.split(key, count)


def zeros(shape: tuple[int, ...], like: Array, dtype: Dtype = None) -> Array:
    """Zeros on the device of ``like``, in its dtype unless another is given."""
    return like.new_zeros(shape, dtype=dtype) if backend_of(like) == "torch" else _full(shape, 0, like, dtype)


def ones(shape: tuple[int, ...], like: Array, dtype: Dtype = None) -> Array:
    """Ones on the device of ``like``, in its dtype unless another is given."""
    return like.new_ones(shape, dtype=dtype) if backend_of(like) == "torch" else _full(shape, 1, like, dtype)


def _full(shape: tuple[int, ...], value: int, like: Array, dtype: Dtype) -> Array:
    filled = sys.modules["jax"].numpy.full(shape, value, dtype=like.dtype if dtype is None else dtype)
    return move(filled, next(iter(like.devices()))) if is_concrete(like) else filled


def eye(size: int, like: Array, dtype: Dtype = None) -> Array:
    """The identity on the device of ``like``, in its dtype unless another is given."""
    dtype = like.dtype if dtype is None else dtype
    if backend_of(like) == "torch":
        return sys.modules["torch"].eye(size, dtype=dtype, device=like.device)
    return sys.modules["jax"].numpy.eye(size, dtype=dtype)


def decomposed(function: Callable[[Array], Any], stacks: Sequence[Array]) -> list[Any]:
    """A decomposition of every stack of matrices (blocks, n, n), in one call for all stacks of one n.

    One call is faster than several; and two that XLA runs side by side on a CPU can wait for each other forever (seen
    with two ``jnp.linalg.inv`` of (64, 64, 64) in one compiled program, JAX 0.10.2, two cores).
    """
    results: list[Any] = [None] * len(stacks)
    for kind in dict.fromkeys((stack.shape[-1], stack.dtype) for stack in stacks):
        members = [k for k, stack in enumerate(stacks) if (stack.shape[-1], stack.dtype) == kind]
        together = function(namespace(stacks[0]).concat([stacks[k] for k in members], axis=0))
        start = 0
        for k in members:
            part = slice(start, start + stacks[k].shape[0])
            results[k] = tuple(x[part] for x in together) if isinstance(together, tuple) else together[part]
            start = part.stop
    return results
