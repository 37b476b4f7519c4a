"""Numbers that numpy draws, as arrays of either library, and back; and how close two of them must be.

Nothing here imports torch or JAX before an array of that library is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np

from structops._array import Array, Dtype, backend_of, is_complex

BACKENDS = ("torch", "jax")
DTYPES = ("float64", "float32", "float16", "bfloat16", "complex128", "complex64")

# Relative to the norms of what is multiplied: some hundred times the rounding unit, for sizes below a hundred.
TOLERANCES = {
    "float64": 1e-13,
    "complex128": 1e-13,
    "float32": 1e-5,
    "complex64": 1e-5,
    "float16": 1e-2,
    "bfloat16": 5e-2,
}
UNDERFLOW = {"float16": 1e-6}  # some times the smallest number, which small products fall below


def installed_backends() -> tuple[str, ...]:
    """The libraries that can be imported."""
    return tuple(name for name in BACKENDS if importlib.util.find_spec(name) is not None)


def dtype_of(backend: str, name: str) -> Dtype:
    """The library's dtype of a name such as ``"float32"``."""
    if backend == "torch":
        return getattr(importlib.import_module("torch"), name)
    return importlib.import_module("jax.numpy").dtype(name)


def name_of(dtype: Dtype) -> str:
    """The name of a dtype of either library or of numpy: ``"float32"``."""
    return str(dtype).rpartition(".")[2]


def tolerance(dtype: Dtype) -> float:
    """The relative error that arithmetic in this dtype may make.

    Raises:
        KeyError: It is no floating dtype; see ``TOLERANCES``.
    """
    return TOLERANCES[name_of(dtype)]


def to_backend(array: np.ndarray, backend: str, dtype: str | None = None) -> Array:
    """A numpy array as one of the library; integers keep their dtype."""
    array = np.array(array)
    keep = dtype is None or array.dtype.kind in "iub"
    if backend == "torch":
        tensor = importlib.import_module("torch").from_numpy(array)
        return tensor if keep else tensor.to(dtype_of(backend, str(dtype)))
    return importlib.import_module("jax.numpy").asarray(array, dtype=None if keep else dtype_of(backend, str(dtype)))


def to_numpy(array: Array) -> np.ndarray:
    """An array of any library as numpy's, floating numbers in double precision."""
    if not isinstance(array, np.ndarray | np.generic):
        if backend_of(array) == "torch":
            torch = importlib.import_module("torch")
            array = array.detach().resolve_conj().cpu()
            array = array.to(torch.float64) if array.is_floating_point() else array
        array = np.asarray(array)
    if array.dtype.kind in "iub":
        return array
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Dtype = "float64") -> np.ndarray:
    """Standard normal numbers in double precision; complex where ``dtype`` is."""
    real = rng.standard_normal(shape)
    return real + 1j * rng.standard_normal(shape) if is_complex(dtype) else real


def assert_close(actual: Array, expected: Any, *, scale: float = 1.0, dtype: Dtype = None, what: str = "") -> None:
    """``|actual - expected| <= tolerance(dtype) * scale`` in the Euclidean norm, but for underflow; shapes are equal.

    Args:
        actual: An array of any library.
        expected: What it should be.
        scale: Product of the norms that error bounds are relative to, such as ``|A| |x|``.
        dtype: In which the numbers were computed; that of ``actual`` by default.
        what: Named in the message.

    Raises:
        AssertionError: They differ; the message says by how much.
    """
    received, wanted = to_numpy(actual), to_numpy(np.asarray(expected))
    if received.shape != wanted.shape:
        raise AssertionError(f"{what}: expected shape {wanted.shape}, got {received.shape}")
    dtype = dtype or actual.dtype
    error = float(np.linalg.norm((received - wanted).ravel()))
    limit = tolerance(dtype) * scale + UNDERFLOW.get(name_of(dtype), 0.0)
    if not error <= limit:  # also where it is no number
        raise AssertionError(
            f"{what}: expected\n{wanted}\ngot\n{received}\nwhich is off by {error:.3g}, where {limit:.3g} is allowed"
        )
