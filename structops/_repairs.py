"""Repairs of what is broken in CoLA's last release.

CoLA 0.0.7 and its fork of plum are frozen, so they are repaired at import, idempotently.  Each repair states the fact
it answers; ``tests/test_cola_repairs.py`` shows each fault in a fresh process and fails when upstream has mended it.
"""

from __future__ import annotations

import logging
import sys
import types
import warnings
from typing import Any

from structops import _array, _implicit
from structops import _plum as _guard  # noqa: F401  first, because the wrong plum makes the import of CoLA fail obscurely
from structops.errors import ShapeError

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # beartype complains about typing.Callable in CoLA's signatures
    warnings.filterwarnings("ignore", "IProgress not found")  # its tqdm wants widgets in a notebook
    import beartype.door
    import cola
    import cola.backends
    import plum
    from cola import SelfAdjoint, kron, lazify
    from cola.fns import dot, transpose
    from cola.linalg import (
        CG,
        GMRES,
        Algorithm,
        Arnoldi,
        Lanczos,
        log,
        slogdet,
        trace,
    )
    from cola.linalg.decompositions.decompositions import plu
    from cola.ops import (
        Adjoint,
        BlockDiag,
        Concatenated,
        Dense,
        Diagonal,
        Householder,
        I_like,
        Identity,
        Kronecker,
        KronSum,
        LinearOperator,
        Permutation,
        Product,
        ScalarMul,
        Sliced,
        Sum,
        Transpose,
        Triangular,
        Tridiagonal,
    )


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
    """``slogdet`` takes every permutation for even, so that half of all signs are wrong, and log|c| for that of c I.

    Its iterative form returns ``|log det|``, whatever the sign of the logarithm.
    """
    slogdet_rules: Any = slogdet.__wrapped__

    @slogdet_rules.dispatch(precedence=1)
    def slogdet_permutation(A: Permutation, log_alg: Algorithm, trace_alg: Algorithm) -> Any:
        zero = A.xnp.array(0.0, dtype=A.dtype, device=A.device)
        return 1 - 2 * _array.parity(A.perm) + zero, zero

    @slogdet_rules.dispatch(precedence=1)
    def slogdet_scalar(A: ScalarMul, log_alg: Algorithm, trace_alg: Algorithm) -> Any:
        size = A.xnp.abs(A.c)
        return (A.c / size) ** A.shape[0], A.shape[0] * A.xnp.log(size)

    @slogdet_rules.dispatch
    def slogdet_iterative(A: LinearOperator, log_alg: Lanczos | Arnoldi, trace_alg: Algorithm) -> Any:
        # The trace is log|det| + i times the argument, which is 0 or pi where the operator is real.
        logarithm = trace(log(A, log_alg), trace_alg)
        if not _array.is_complex(logarithm.dtype):
            return 1 + 0 * logarithm, logarithm
        sign = A.xnp.exp(1j * logarithm.imag)
        return (sign if _array.is_complex(A.dtype) else A.xnp.sign(sign.real)), logarithm.real


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


def _gradients_of_solves() -> None:
    """CG has no gradient of the right-hand side, GMRES none at all, and both leak tracers of JAX into ``info``."""
    base: Any = sys.modules["cola.linalg.algorithm_base"]
    stock = base.IterativeOperatorWInfo._matmat

    def matmat(self: Any, X: Any) -> Any:
        if not isinstance(self.alg, (CG, GMRES)) or not _array.is_array(X):
            return stock(self, X)

        def solver(A: LinearOperator, b: Any) -> Any:
            y, info = self.alg(A, b)
            if all(map(_array.is_concrete, A.flatten()[0])):
                self.info = info
            return y

        arrays, unflatten = self.A.flatten()
        return _implicit.solve(solver, lambda parts: unflatten(list(parts)), arrays, X)

    base.IterativeOperatorWInfo._matmat = matmat


def _gradients_of_krylov_methods() -> None:
    """Lanczos, Arnoldi, LOBPCG and JAX's power iteration have no gradient, and fail in ways that do not say so."""
    # The functions of CoLA hide its modules of the same names.
    eigs: Any = sys.modules["cola.linalg.eig.eigs"]
    power: Any = sys.modules["cola.linalg.eig.power_iteration"]
    unary: Any = sys.modules["cola.linalg.unary.unary"]

    def opaque_function(cls: Any, name: str) -> None:
        stock = cls._matmat

        def matmat(self: Any, V: Any) -> Any:
            arrays, unflatten = self.A.flatten()

            def apply(V: Any, *parts: Any) -> Any:
                twin = object.__new__(cls)
                twin.__dict__.update(self.__dict__, A=unflatten(list(parts)), info={}, kwargs=dict(self.kwargs))
                return (stock(twin, V),)

            (result,) = _implicit.without_gradient(apply, f"a function of a matrix by {name}", V, *arrays)
            return result

        cls._matmat = matmat

    def opaque_eigenvalues(stock: Any, name: str) -> Any:
        def eigenvalues(A: LinearOperator, *args: Any, **kwargs: Any) -> Any:
            arrays, unflatten = A.flatten()
            if "max_iters" in kwargs:  # more steps than rows add zeros to the eigenvalues
                kwargs["max_iters"] = min(kwargs["max_iters"], A.shape[0])

            def apply(*parts: Any) -> Any:
                values, vectors, *_ = stock(unflatten(list(parts)), *args, **kwargs)
                order = A.xnp.argsort(A.xnp.abs(values))
                return values[order], vectors.to_dense()[:, order]

            values, vectors = _implicit.without_gradient(apply, f"an eigenvalue by {name}", *arrays)
            return (values, lazify(vectors), {}) if name != "LOBPCG" else (values, lazify(vectors))

        return eigenvalues

    opaque_function(unary.LanczosUnary, "Lanczos")
    opaque_function(unary.ArnoldiUnary, "Arnoldi")
    eigs.lanczos_eigs = opaque_eigenvalues(eigs.lanczos_eigs, "Lanczos")
    eigs.arnoldi_eigs = opaque_eigenvalues(eigs.arnoldi_eigs, "Arnoldi")
    eigs.lobpcg = opaque_eigenvalues(eigs.lobpcg, "LOBPCG")
    stock_power = power.power_iteration

    def power_iteration(A: LinearOperator, **kwargs: Any) -> Any:
        if A.xnp is not _functions("jax"):
            return stock_power(A, **kwargs)
        arrays, unflatten = A.flatten()

        def apply(*parts: Any) -> Any:
            return stock_power(unflatten(list(parts)), **kwargs)[:2]

        v, value = _implicit.without_gradient(apply, "an eigenvalue by PowerIteration in JAX", *arrays)
        return v, value, {}

    power.power_iteration = power_iteration


def _diagonal_lu() -> None:
    """The LU decomposition of a diagonal takes its square root, which is not a number for negative entries."""

    @plu.dispatch(precedence=1)
    def plu_diagonal(A: Diagonal | ScalarMul) -> Any:
        one = I_like(A)
        return one, one, A


def _transposes() -> None:
    """The transpose of a complex self-adjoint operator is its conjugate, not itself."""

    @transpose.dispatch(
        cond=lambda A: A.isa(SelfAdjoint) and _array.is_complex(A.dtype) and not isinstance(A, (Transpose, Dense)),
        precedence=1,
    )
    def transpose_hermitian(A: LinearOperator) -> LinearOperator:
        return Transpose(A)


def _slices() -> None:
    """A slice of a real operator drops the imaginary part of what it is multiplied with."""

    def matmat(self: Any, X: Any) -> Any:
        rows, cols = self.slices
        dtype = self.xnp.promote_types(self.dtype, X.dtype)
        Y = self.xnp.zeros((self.A.shape[1], X.shape[-1]), dtype=dtype, device=self.xnp.get_device(X))
        return (self.A @ self.xnp.update_array(Y, _array.cast(X, dtype), cols))[rows]

    def rmatmat(self: Any, X: Any) -> Any:
        rows, cols = self.slices
        dtype = self.xnp.promote_types(self.dtype, X.dtype)
        Y = self.xnp.zeros((X.shape[0], self.A.shape[0]), dtype=dtype, device=self.xnp.get_device(X))
        return (self.xnp.update_array(Y, _array.cast(X, dtype), ..., rows) @ self.A)[..., cols]

    Sliced._matmat, Sliced._rmatmat = matmat, rmatmat  # type: ignore[method-assign]


def _sizes() -> None:
    """A product of operators whose sizes do not fit fails with an ``assert`` that names no operator."""
    stock = LinearOperator.__matmul__

    def matmul(self: Any, X: Any) -> Any:
        if isinstance(X, LinearOperator) and X.shape[0] != self.shape[1]:
            raise ShapeError(f"cannot multiply {self!r} by {X!r}: {self.shape[1]} columns against {X.shape[0]} rows")
        return stock(self, X)

    LinearOperator.__matmul__ = matmul  # type: ignore[method-assign]


def _torch_functions() -> None:
    """``torch.kron`` refuses matrices that are not contiguous, such as those of transposes."""
    if (fns := _functions("torch")) is not None:
        kron = fns.torch.kron
        fns.kron = lambda A, B: kron(_array.contiguous(A), _array.contiguous(B))


def _least_squares() -> None:
    """``torch.linalg.lstsq`` is, by default, often wrong for deficient ranks, and for wide blocks of full rank."""
    if (fns := _functions("torch")) is not None:
        fns.lstsq = lambda A, b: fns.torch.linalg.pinv(A) @ b


def _complex_lu() -> None:
    """The LU decomposition of a complex torch matrix casts its permutation to integers, which warns."""
    if (fns := _functions("torch")) is not None:

        def lu(A: Any) -> Any:
            P, L, U = fns.torch.linalg.lu(A)
            return P.abs().argmax(-1), L, U

        fns.lu = lu


def _functions(backend: str) -> Any:
    """CoLA's function module of a backend, None where its library is not installed."""
    try:
        return backend_functions(backend)
    except ImportError:
        return None


def _jax_functions() -> None:
    """JAX renamed ``clip``'s bounds; and CoLA asserts that JAX has exactly one device."""
    if (fns := _functions("jax")) is not None:
        fns.clip = lambda x, a_min=None, a_max=None: fns.jnp.clip(x, min=a_min, max=a_max)
        fns.get_default_device = lambda: fns.jax.local_devices()[0]


REPAIRS = (
    _order_of_any,
    _faithful_types,
    _quiet_log,
    _identity_and_kronecker_rules,
    _dtype_lookup,
    _declared_leaves,
    _determinants,
    _scalar_products,
    _gradients_of_solves,
    _gradients_of_krylov_methods,
    _diagonal_lu,
    _transposes,
    _slices,
    _sizes,
    _torch_functions,
    _least_squares,
    _complex_lu,
    _jax_functions,
)


def repair() -> None:
    """Apply all repairs once per process, also when this module is reloaded."""
    if getattr(cola, "_structops_repairs", False):
        return
    for mend in REPAIRS:
        mend()
    plum.clear_all_cache()
    cola._structops_repairs = True
