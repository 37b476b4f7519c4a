"""``so.project`` and ``so.projection.fit``: from a dense matrix to the nearest member of a structure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from structops import _array
from structops._array import Array, Dtype
from structops.errors import BackendError, EntryError, ShapeError, StructureError
from structops.operators.circulant import CirculantPlan
from structops.operators.convolution import ConvolutionPlan
from structops.operators.toeplitz import ToeplitzPlan
from structops.projection.averages import fit_circulant, fit_convolution, fit_toeplitz
from structops.projection.chains import fit_chain
from structops.projection.method import Found, Method, Optimality, Options
from structops.projection.moments import Moments
from structops.projection.solving import working
from structops.spec import ChainPlan, Plan, Structure, registry, structure

# From the plan of a structure to its method.  A new structure that is a chain needs no line.
METHODS: dict[type[Plan], Method] = {
    ChainPlan: fit_chain,
    CirculantPlan: fit_circulant,
    ToeplitzPlan: fit_toeplitz,
    ConvolutionPlan: fit_convolution,
}

ROWS = 512  # of the matrix that are compared at a time


class Fit(NamedTuple):
    """What `fit` returns.

    Attributes:
        operator: The operator nearest to the matrix that was found.
        error: ``|W - operator| / |W|`` in the Frobenius norm or that of the covariance; with the rounding of the
            operator to its dtype.
        optimality: ``"exact"`` if no member is nearer, ``"quasi"`` if the error is at most sqrt(number of bonds) times
            the least, ``"local"`` if no more is known than that the sweeps never raised it.
        reason: Why, in one sentence.
    """

    operator: Any
    error: Array
    optimality: Optimality
    reason: str


def project(
    W: Array,
    spec: str | Structure,
    *,
    covariance: Array | Moments | None = None,
    refine: int | None = None,
    seed: int | None = None,
) -> Any:
    """The operator of a structure nearest to a dense matrix: ``fit(W, spec, ...).operator``.

    Args:
        W: Shape (out_features, in_features).
        spec: A structure or its string form.
        covariance: Second moments of the input, shape (in_features, in_features), or `Moments`; see `fit`.
        refine: Sweeps at most; see `fit`.
        seed: Of a random start; see `fit`.

    Raises:
        ShapeError: ``W`` is not a matrix, or ``covariance`` not of its width.
        BackendError: No torch or JAX arrays, a mixture, or no floating-point numbers.
        StructureError: The structure cannot have this shape, or has no projection; or ``refine`` or ``seed`` is none.
        EntryError: Entries that are not finite, or a covariance that is not symmetric with a nonnegative diagonal.

    **Cost.** That of `fit`.

    Example:
        >>> import torch
        >>> W = torch.outer(torch.arange(1., 5), torch.ones(4))
        >>> A = project(W, "btt(rank=1)")
        >>> A
        BTT(4x4; modes 2x2 by 2x2, rank 1; 16 params, 1 of dense; torch.float32)
        >>> bool(torch.allclose(A.to_dense(), W))
        True
    """
    return fit(W, spec, covariance=covariance, refine=refine, seed=seed).operator


def fit(
    W: Array,
    spec: str | Structure,
    *,
    covariance: Array | Moments | None = None,
    refine: int | None = None,
    seed: int | None = None,
) -> Fit:
    r"""The operator of a structure nearest to a dense matrix, its error, and what is known about the optimum.

    **Definition.** \(\arg\min_A \|(W - A)\,C^{1/2}\|_F\) over the members A of the structure, with C the identity or
    \(C = E[x x^T]\), for which that is the error of the layer's output, \(E\|(W - A)x\|^2\).

    | structure | C = identity | C given |
    |---|---|---|
    | low_rank | exact: Eckart and Young | exact: singular vectors of W C^(1/2) |
    | btt of two cores, monarch | exact: every block its own singular value decomposition | local: sweeps over blocks |
    | kron, tt of two factors; einsum of two | exact: the same after a rearrangement | local: least squares |
    | kron, tt, btt of more | quasi: one bond after another | local: least squares |
    | blast, einsum of more | local: least squares | local: least squares |
    | block_diag, dense | exact: copies | exact: regression on the inputs of every block |
    | circulant, toeplitz, convolution | exact: means | exact: normal equations |

    Entries that pad a matrix to the sizes of blocks are zero in W and do not count in the error.  For Monarch they are
    whole rows and columns of blocks, so the optimum is exact; only for chains of two factors where they are not (some
    points of ``einsum``) sweeps leave them free.

    Args:
        W: Shape (out_features, in_features).  No gradients are kept.
        spec: A structure or its string form.
        covariance: C, symmetric and positive semidefinite, singular or not, shape (in_features, in_features); its scale
            does not matter.  Or `Moments` of the inputs, of which it takes the second moments; a layer with a bias
            does better with ``moments.centred`` and `bias_shift`.
        refine: Sweeps of alternating least squares at most.  By default none where the result is exact or quasi, else
            100 or as many as help; a quasi result only gets better.
        seed: Adds a random start where sweeps are the method; the better result is kept.  The same numbers in torch and
            JAX.  By default singular value decompositions are the only start.

    Returns:
        The operator, in the dtype of W, its relative error, ``exact``, ``quasi`` or ``local``, and why.

    Raises:
        ShapeError: ``W`` is not a matrix, or ``covariance`` not of its width.
        BackendError: No torch or JAX arrays, a mixture, or no floating-point numbers.
        StructureError: The structure cannot have this shape, or has no projection; the message names those that have.
        EntryError: Entries that are not finite, or a covariance that is not symmetric with a nonnegative diagonal.

    **Shapes.** Factors are scaled so that both sides of a bond have equal norms, index by index, and the largest entry
    of the side that is applied first is positive.

    **Cost.** One singular value decomposition of every block: out * in * min(side of a block) for two-core BTT and
    Monarch, out * in * min(out, in) for low rank.  A sweep: out * in * rank for every factor, with a covariance
    out * in^2 and a decomposition of every block.

    **Numerics.** Closed forms in the dtype of W, 16 bits in float32: the one place where linear algebra takes 16 bits,
    for trained weights have them; the result is rounded back.  Sweeps and covariances in float64 (in JAX if enabled).

    **References.** Eckart and Young (1936); Van Loan and Pitsianis, "Approximation with Kronecker products" (1993);
    Oseledets, "Tensor-Train Decomposition" (2011); Dao et al., "Monarch" (arXiv 2204.00595); Le et al., "Butterfly
    factorization with error guarantees" (arXiv 2411.04506); Lee et al., "BLAST" (arXiv 2410.21262).

    Example:
        >>> import torch
        >>> W = torch.diag(torch.tensor([4., 3., 0., 0.]))
        >>> A, error, optimality, reason = fit(W, "low_rank(rank=1)")
        >>> round(float(error), 4), optimality
        (0.6, 'exact')
        >>> A, error, *_ = fit(W, "low_rank(rank=1)", covariance=torch.diag(torch.tensor([0., 1., 1., 1.])))
        >>> round(float(error), 4)  # the first input is always zero
        0.0
    """
    plan, found, error = fit_factors(W, spec, covariance=covariance, refine=refine, seed=seed)
    return Fit(plan.operator(found.factors), error, found.optimality, found.reason)


def fit_factors(
    W: Array,
    spec: str | Structure,
    *,
    covariance: Array | Moments | None = None,
    refine: int | None = None,
    seed: int | None = None,
) -> tuple[Plan, Found, Array]:
    """`fit` for layers: the plan, what was found with its stored factors, and the relative error."""
    covariance = covariance.covariance if isinstance(covariance, Moments) else covariance
    options = Options(covariance, refine, seed)
    _check(W, options)
    W = W.detach() if hasattr(W, "detach") else W
    given = W.dtype
    s = structure(spec)
    plan = s.plan(int(W.shape[1]), int(W.shape[0]))
    method = _method(s, plan)
    W = _array.cast(W, working(W))
    moments = None
    if covariance is not None:
        moments = _moments(covariance, W)
        options = Options(_positive(moments, working(covariance)), refine, seed)
    found = method(plan, W, options)
    factors = [_array.cast(factor, given) for factor in found.factors]
    return plan, found.having(factors), _error(plan, factors, W, moments)


def _method(spec: Structure, plan: Plan) -> Method:
    """The method for a plan or for a class above it.

    Raises:
        StructureError: There is none.
    """
    for kind in type(plan).__mro__:
        if kind in METHODS:
            return METHODS[kind]
    raise StructureError(
        f"{spec.name} has no projection; those that have: {', '.join(registry())}, and every structure that is a chain"
    )


def _check(W: Array, options: Options) -> None:
    """See `fit`.

    Raises:
        ShapeError: Wrong axes.
        BackendError: Wrong libraries or dtypes.
        StructureError: Wrong arguments.
        EntryError: Wrong numbers.
    """
    covariance, refine, seed = options.covariance, options.refine, options.seed
    backend = _array.backend_of(W)
    if W.ndim != 2 or 0 in W.shape:
        raise ShapeError(f"expected W of shape (out_features, in_features), sizes from 1 on, got {tuple(W.shape)}")
    if not _array.is_floating(W.dtype):
        raise BackendError(f"expected W of floating-point numbers, got {W.dtype}")
    for name, value in (("refine", refine), ("seed", seed)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise StructureError(f"{name} must be a whole number of at least 0, or None, got {value!r}")
    _check_finite("W", W)
    if covariance is None:
        return
    if _array.backend_of(covariance) != backend:
        raise BackendError(f"W is a {backend} array, the covariance is {_array.backend_of(covariance)}'s")
    if tuple(covariance.shape) != (W.shape[1], W.shape[1]):
        raise ShapeError(
            f"expected a covariance of the inputs, shape ({W.shape[1]}, {W.shape[1]}) for W {tuple(W.shape)}, "
            f"got {tuple(covariance.shape)}"
        )
    if not _array.is_floating(covariance.dtype):
        raise BackendError(f"expected a covariance of floating-point numbers, got {covariance.dtype}")
    _check_finite("the covariance", covariance)
    if _array.is_concrete(covariance):
        xp = _array.namespace(covariance)
        C = _array.cast(covariance, working(covariance))
        largest, diagonal = float(xp.max(xp.abs(C))), xp.linalg.diagonal(C)
        off = float(xp.max(xp.abs(C - _array.adjoint(C))))
        if off > (2e-2 if C.dtype != covariance.dtype else 1e-4) * largest:
            raise EntryError(f"expected a symmetric covariance, got one that differs from its transpose by {off:.3g}")
        least = float(xp.min(_array.real_part(diagonal)))
        if least < 0:
            raise EntryError(f"expected a covariance without negative entries on its diagonal, got {least:.3g}")


def _check_finite(what: str, M: Array) -> None:
    """Infinities and NaN would spread to all factors.

    Raises:
        EntryError: There are some.
    """
    xp = _array.namespace(M)
    if _array.is_concrete(M) and not bool(xp.all(xp.isfinite(M))):
        count = int((~xp.isfinite(M)).sum())
        raise EntryError(f"expected finite entries, got {count} in {what} that are infinite or no number")


def _moments(covariance: Array, W: Array) -> Array:
    """The covariance symmetrised, in double precision and on the device of W, its largest variance 1."""
    if hasattr(covariance, "detach"):
        covariance = covariance.detach().to(W.device)
    xp = _array.namespace(covariance)
    C = _array.cast(covariance, working(covariance))
    largest = xp.max(xp.abs(xp.linalg.diagonal(C)))
    C = C / (2 * xp.where(largest > 0, largest, xp.ones_like(largest)))
    return _array.cast(C + _array.adjoint(C), _array.wide(W))


def _positive(C: Array, given: Dtype) -> Array:
    """Moments that came in a dtype of fewer digits, positive again.

    Rounding to that dtype moves eigenvalues by at most eps times the Frobenius norm.  Those of few vectors are zero,
    become negative, and a sweep in double precision takes them for what they are: no metric, along which it diverges.
    Of 16 bits that of float32 is added; their own would change the projection.
    """
    xp = _array.namespace(C)
    step = float(xp.finfo(given).eps) * xp.sqrt(xp.sum(xp.abs(C) ** 2))
    return C + step * _array.eye(int(C.shape[0]), C, C.dtype)


def _error(plan: Plan, factors: list[Array], W: Array, covariance: Array | None) -> Array:
    """The relative error of the operator of these factors."""
    xp = _array.namespace(W)
    dtype = W.dtype if covariance is None else covariance.dtype
    A = plan.operator([_array.cast(factor, dtype) for factor in factors])
    if int(W.shape[1]) < int(W.shape[0]):  # a tall matrix has fewer columns to compute
        if covariance is None:
            W, A = W.mT, A.T
        else:
            A = xp.concat([part for _, part in _rows(A.T, W, dtype)], axis=0).mT
    sums = []
    for here, rows in _rows(A, W, dtype):
        part = _array.cast(W[here], dtype)
        sums.append([_square(M, covariance) for M in (part - rows, part)])
    lost, total = (xp.sqrt(xp.sum(xp.stack(side))) for side in zip(*sums, strict=True))
    return xp.where(total > 0, lost / xp.where(total > 0, total, xp.ones_like(total)), xp.zeros_like(total))


def _rows(A: Any, like: Array, dtype: Dtype) -> Iterator[tuple[slice, Array]]:
    """The rows of an operator or of a matrix, some at a time, and which they are."""
    count = int(A.shape[0])
    unit = _array.eye(min(count, ROWS), like, dtype)
    for start in range(0, count, ROWS):
        here = slice(start, min(start + ROWS, count))
        rows = here.stop - start
        if hasattr(A, "to_dense"):
            yield here, _array.pad(unit[:rows, :rows], [(start, count - here.stop)]) @ A
        else:
            yield here, A[here]


def _square(M: Array, covariance: Array | None) -> Array:
    """``<M, M C>``, which rounding could make negative; in double precision."""
    xp = _array.namespace(M)
    value = _array.real_part((xp.conj(M) * M).sum()) if covariance is None else _weighted(M, covariance)
    value = _array.cast(value, _array.wide(value))
    return xp.where(value > 0, value, xp.zeros_like(value))


def _weighted(M: Array, covariance: Array) -> Array:
    """``<M, M C>``: C is Hermitian, and what two blocks of columns say of each other is computed once."""
    xp, count, values = _array.namespace(M), int(M.shape[1]), []
    for start in range(0, count, ROWS):
        here = slice(start, min(start + ROWS, count))
        seen = M[:, here] @ covariance[here, here]
        if start:
            seen = seen + 2 * (M[:, :start] @ covariance[:start, here])
        values.append(_array.real_part((xp.conj(M[:, here]) * seen).sum()))
    return xp.sum(xp.stack(values))
