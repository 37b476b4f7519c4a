"""The one place that imports CoLA: its names, and repairs of what is broken in its last release.

CoLA 0.0.7 and its fork of plum are frozen, so they are repaired at import, idempotently.  Each repair states the fact
it answers; ``tests/test_cola_repairs.py`` shows each fault in a fresh process and fails when upstream has mended it.
"""

from __future__ import annotations

import logging
import sys
import types
import warnings
from typing import Any

from structops import _array
from structops import _plum as _guard  # noqa: F401  first, because the wrong plum makes the import of CoLA fail obscurely

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # beartype complains about typing.Callable in CoLA's signatures
    warnings.filterwarnings("ignore", "IProgress not found")  # its tqdm wants widgets in a notebook
    import beartype.door
    import cola
    import cola.backends
    import plum
    from cola import PSD, SelfAdjoint, Stiefel, Unitary, kron, lazify
    from cola.fns import add, adjoint, dot, mul, transpose
    from cola.linalg import Algorithm
    from cola.ops import (
        FFT,
        Adjoint,
        BlockDiag,
        Concatenated,
        Dense,
        Diagonal,
        Householder,
        Identity,
        Kronecker,
        KronSum,
        LinearOperator,
        Permutation,
        Product,
        ScalarMul,
        Sliced,
        Sparse,
        Sum,
        Transpose,
        Triangular,
        Tridiagonal,
    )

__all__ = [
    "FFT",
    "PSD",
    "Adjoint",
    "BlockDiag",
    "Concatenated",
    "Dense",
    "Diagonal",
    "Householder",
    "Identity",
    "KronSum",
    "Kronecker",
    "LinearOperator",
    "Permutation",
    "Product",
    "ScalarMul",
    "SelfAdjoint",
    "Sliced",
    "Sparse",
    "Stiefel",
    "Sum",
    "Transpose",
    "Triangular",
    "Tridiagonal",
    "Unitary",
    "add",
    "adjoint",
    "backend_functions",
    "dot",
    "kron",
    "lazify",
    "mul",
    "transpose",
]


def backend_functions(backend: str) -> types.ModuleType:
    """CoLA's function module of a backend, without asking JAX whether it knows the dtype."""
    if backend == "torch":
        from cola.backends import torch_fns

        return torch_fns
    from cola.backends import jax_fns

    return jax_fns


def _order_of_any() -> None:
    """Beartype 0.23 orders ``Any`` below every type; then all of ``A + B``, ``kron`` are ambiguous."""

    def le_hint(x: Any, y: Any) -> bool:
        if y is Any:
            return True
        return x is not Any and beartype.door.TypeHint(x) <= beartype.door.TypeHint(y)

    def le_signature(self: Any, other: Any) -> bool:
        if self.has_varargs and (not other.has_varargs or not le_hint(self.varargs, other.varargs)):
            return False
        mine, theirs = len(self.types), len(other.types)
        if not (mine == theirs or (mine > theirs and other.has_varargs) or (mine < theirs and self.has_varargs)):
            return False
        return all(le_hint(x, y) for x, y in zip(self.expand_varargs(theirs), other.expand_varargs(mine), strict=False))

    plum.signature.Signature.__le__ = le_signature  # type: ignore[method-assign]


def _faithful_types() -> None:
    """Plum never caches ``dot``, ``add``, ``kron``, ... because parametric classes override ``isinstance``.

    For CoLA's classes ``isinstance(a, C)`` is ``issubclass(type(a), C)``, which is what plum calls faithful.
    """
    LinearOperator.__faithful__ = True


def _quiet_log() -> None:
    """Plum logs every uncached resolution to the root logger at level INFO."""
    plum.function.logging = types.SimpleNamespace(  # type: ignore[assignment]
        info=logging.getLogger("plum").debug
    )


def _identity_and_kronecker_rules() -> None:
    """``A @ I``, ``I @ A``, ``I @ I``, ``(A @ B) @ I`` and ``kron(kron(A, B), kron(C, D))`` are ambiguous."""

    @dot.dispatch(precedence=20)
    def dot_right_identity(A: LinearOperator, B: Identity) -> LinearOperator:
        return A

    @dot.dispatch(precedence=19)
    def dot_left_identity(A: Identity, B: LinearOperator) -> LinearOperator:
        return B

    @kron.dispatch
    def kron_kronecker_kronecker(A: Kronecker, B: Kronecker) -> LinearOperator:
        return Kronecker(*A.Ms, *B.Ms)


def _dtype_lookup() -> None:
    """``get_library_fns`` probes JAX first, which initialises it (and its GPU memory) for users of torch alone."""
    stock = cola.backends.get_library_fns

    def get_library_fns(dtype: Any) -> types.ModuleType:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(dtype, torch.dtype):
            return backend_functions("torch")
        return stock(dtype)

    for name, module in list(sys.modules.items()):
        if name.startswith("cola") and getattr(module, "get_library_fns", None) is stock:
            module.get_library_fns = get_library_fns  # type: ignore[attr-defined]


def _declared_leaves() -> None:
    """The first instance of a class decides which of its attributes are leaves, for all that follow.

    One operator of a numpy array, of constants alone, or of an identity would hide the arrays of all later ones of its
    class from gradients, ``jit`` and ``to``.
    """
    leaves = {
        "A": (Dense, Triangular, Transpose, Adjoint, Sliced),
        "Ms": (Product, Sum, Kronecker, KronSum, BlockDiag, Concatenated),
        "c": (ScalarMul,),
        "diag": (Diagonal,),
        "perm": (Permutation,),
        "vec": (Householder,),
        "alpha": (Tridiagonal,),
        "beta": (Tridiagonal, Householder),
        "gamma": (Tridiagonal,),
    }
    for name, classes in leaves.items():
        for cls in classes:
            cls._dynamic[name] = True


def _determinants() -> None:
    """``slogdet`` takes every permutation for even, so that half of all signs are wrong, and log|c| for that of c I."""
    slogdet = cola.linalg.slogdet.__wrapped__

    @slogdet.dispatch(precedence=1)
    def slogdet_permutation(A: Permutation, log_alg: Algorithm, trace_alg: Algorithm) -> Any:
        position = A.xnp.sort(A.perm)
        before = (position[:, None] < position[None, :]) & (A.perm[:, None] > A.perm[None, :])
        zero = A.xnp.array(0.0, dtype=A.dtype, device=A.device)
        return 1 - 2 * (before.sum() % 2) + zero, zero

    @slogdet.dispatch(precedence=1)
    def slogdet_scalar(A: ScalarMul, log_alg: Algorithm, trace_alg: Algorithm) -> Any:
        size = A.xnp.abs(A.c)
        return (A.c / size) ** A.shape[0], A.shape[0] * A.xnp.log(size)


def _scalar_products() -> None:
    """``c * A`` copies a tensor c, so that no gradient reaches it, and fails where c is complex and A real."""
    stock = ScalarMul.__init__

    def init(self: Any, c: Any, shape: tuple[int, int], dtype: Any = None, device: Any = None) -> None:
        is_array = _array.is_array(c)
        if dtype is not None and (_array.is_complex(c.dtype) if is_array else isinstance(c, complex)):
            xnp = cola.backends.get_library_fns(dtype)
            dtype = xnp.promote_types(dtype, xnp.complex64)
        if is_array:
            LinearOperator.__init__(self, dtype or c.dtype, shape)
            self.c, self.device = _array.cast(c, self.dtype), device
        else:
            stock(self, c, shape, dtype, device)

    ScalarMul.__init__ = init  # type: ignore[method-assign]


def _torch_functions() -> None:
    """``torch.kron`` refuses matrices that are not contiguous, such as those of transposes."""
    try:
        import cola.backends.torch_fns as torch_fns
    except ImportError:
        return
    kron = torch_fns.torch.kron
    torch_fns.kron = lambda A, B: kron(_array.contiguous(A), _array.contiguous(B))


def _jax_functions() -> None:
    """JAX renamed ``clip``'s bounds; and CoLA asserts that JAX has exactly one device."""
    try:
        import cola.backends.jax_fns as jax_fns
    except ImportError:
        return

    def clip(x: Any, a_min: Any = None, a_max: Any = None) -> Any:
        return jax_fns.jnp.clip(x, min=a_min, max=a_max)

    jax_fns.clip = clip
    jax_fns.get_default_device = lambda: jax_fns.jax.local_devices()[0]


REPAIRS = (
    _order_of_any,
    _faithful_types,
    _quiet_log,
    _identity_and_kronecker_rules,
    _dtype_lookup,
    _declared_leaves,
    _determinants,
    _scalar_products,
    _torch_functions,
    _jax_functions,
)


def _repair() -> None:
    """Apply all repairs once per process, also when this module is reloaded."""
    if getattr(cola, "_structops_repairs", False):
        return
    for repair in REPAIRS:
        repair()
    plum.clear_all_cache()
    cola._structops_repairs = True


_repair()
