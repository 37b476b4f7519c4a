"""Parameters, MACs, FLOPs and factors of any expression, by multiple dispatch.

Conventions: counts are per input vector; a MAC is one multiply-accumulate and two FLOPs; additions between operators
are not MACs.  An elementwise operator (Diagonal, ScalarMul) counts one MAC a product.  Operators that are no chain give
their own rules in their own files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from structops import _cola
from structops._cola import LinearOperator
from structops._plum import dispatch
from structops.chain import Chain, Factor
from structops.chain_operator import ChainOperator
from structops.operator import StructuredOperator
from structops.spec import Plan

Factors = tuple[Factor, ...]
Counts = dict[int, int]


@dispatch
def num_params(A: LinearOperator) -> int:
    """Number of parameters of an operator, a chain or a plan.

    An array that occurs several times in an expression, such as in ``A.T @ A``, is counted once.  The number that
    scales an operator in ``2 * A`` is a constant, not a parameter.

    Raises:
        TypeError: For an operator that stores a function in place of numbers (Jacobian, Kernel).
    """
    return sum(parameter_counts(A).values())


@num_params.dispatch
def num_params_pattern(A: Chain | Plan) -> int:
    """Read off the pattern."""
    return A.num_params


@num_params.dispatch
def num_params_other(A: object) -> int:
    """Refuse what has no size."""
    raise TypeError(_no_size(A))


@dispatch
def flops(A: object) -> int:
    """Floating-point operations per input vector: ``2 * macs(A)``."""
    return 2 * macs(A)


@dispatch
def macs(A: LinearOperator) -> int:
    """Multiply-accumulates of ``A @ x`` per vector; the paper calls them FLOPs.

    Chains count exactly what they multiply.  Elementwise operators count one a product, permutations and sums none, and
    FFT-based operators ``2 n log2 n + 2 n`` for a cyclic convolution of length n.

    Raises:
        TypeError: For an operator that stores a function in place of numbers (Jacobian, Kernel).
    """
    return sum(factor.macs for factor in factors(A))


@dispatch
def factors(A: LinearOperator) -> tuple:
    """The dense components in order of application, as `Factor` (sizes only).

    Elementwise operators are blocks of 1 x 1, wrappers without parameters have no factors.  For a chain
    ``factors(A.T)`` is ``factors(A)`` in reverse order with fan-in and fan-out exchanged.

    Raises:
        TypeError: For an operator that stores a function in place of numbers (Jacobian, Kernel).
    """
    raise TypeError(_unknown("factors", A))


@dispatch
def parameter_counts(A: LinearOperator) -> dict:
    """Parameters of every distinct array, by its identity; what `num_params` sums.

    Raises:
        TypeError: For an operator that stores a function in place of numbers (Jacobian, Kernel).
    """
    raise TypeError(_unknown("parameters", A))


def _unknown(what: str, A: LinearOperator) -> str:
    return (
        f"the {what} of {type(A).__name__} cannot be counted; register a rule with "
        f"@structops.{'factors' if what == 'factors' else 'algebra.counting.parameter_counts'}.dispatch"
    )


def _no_size(A: object) -> str:
    return (
        f"expected an operator, a chain or a plan, got {type(A).__name__}; "
        f"the plan of a layer is layer.plan, that of a structure structure.plan(in_features, out_features)"
    )


@macs.dispatch
def macs_other(A: object) -> int:
    """Refuse what has no size."""
    raise TypeError(_no_size(A))


@factors.dispatch
def factors_other(A: object) -> tuple:
    """Refuse what has no size."""
    raise TypeError(_no_size(A))


# -------------------------------------------------------------------------------------------------- patterns and chains


@macs.dispatch
def macs_pattern(A: Chain | Plan) -> int:
    """Read off the pattern."""
    return A.macs


@factors.dispatch
def factors_pattern(A: Chain | Plan) -> tuple:
    """Read off the pattern."""
    return A.factors


@factors.dispatch(precedence=1)
def factors_chain(A: ChainOperator) -> tuple:
    """Read off the pattern."""
    return A.chain.factors


@parameter_counts.dispatch(precedence=1)
def parameter_counts_structured(A: StructuredOperator) -> dict:
    """Every array of the operator."""
    return A.parameter_counts()


# -------------------------------------------------------------------------------------------- compositions of operators


@parameter_counts.dispatch
def parameter_counts_composite(
    A: _cola.Product | _cola.Sum | _cola.Kronecker | _cola.KronSum | _cola.BlockDiag | _cola.Concatenated,
) -> dict:
    """Those of all parts; a shared array once."""
    return merged_counts(A.Ms)


def merged_counts(Ms: Iterable[LinearOperator]) -> Counts:
    """The parameters of several operators; those of an array that they share once."""
    merged: Counts = {}
    for M in Ms:
        merged.update(parameter_counts(M))
    return merged


@factors.dispatch
def factors_product(A: _cola.Product) -> tuple:
    """The last operator is applied first."""
    return tuple(factor for M in reversed(A.Ms) for factor in factors(M))


@macs.dispatch
def macs_product(A: _cola.Product) -> int:
    """MACs add up."""
    return sum(macs(M) for M in A.Ms)


@factors.dispatch
def factors_sum(A: _cola.Sum | _cola.Concatenated) -> tuple:
    """The parts side by side."""
    return tuple(factor for M in A.Ms for factor in factors(M))


@macs.dispatch
def macs_sum(A: _cola.Sum | _cola.Concatenated) -> int:
    """MACs add up; the additions are not counted."""
    return sum(macs(M) for M in A.Ms)


@factors.dispatch
def factors_kronecker(A: _cola.Kronecker) -> tuple:
    """CoLA applies the first part first, to every position of the other axes."""
    return kronecker_factors(A.Ms)


@macs.dispatch
def macs_kronecker(A: _cola.Kronecker) -> int:
    """Each part once per position of the other axes."""
    return sum(macs(M) * count for M, count in zip(A.Ms, positions(A.Ms), strict=True))


@factors.dispatch
def factors_kronsum(A: _cola.KronSum) -> tuple:
    """Each part along its own axis."""
    width = A.shape[1]
    return tuple(f for M in A.Ms for f in shared(factors(M), width // M.shape[1]))


@macs.dispatch
def macs_kronsum(A: _cola.KronSum) -> int:
    """Each part along its own axis; the additions are not counted."""
    width = A.shape[1]
    return sum(macs(M) * (width // M.shape[1]) for M in A.Ms)


@factors.dispatch
def factors_block_diag(A: _cola.BlockDiag) -> tuple:
    """The blocks side by side, each shared by its repeats."""
    return tuple(f for M, c in zip(A.Ms, A.multiplicities, strict=True) for f in shared(factors(M), c))


@macs.dispatch
def macs_block_diag(A: _cola.BlockDiag) -> int:
    """Those of every block, times its multiplicity."""
    return sum(macs(M) * c for M, c in zip(A.Ms, A.multiplicities, strict=True))


def shared(parts: Iterable[Factor], times: int) -> Factors:
    """The same factors, each used ``times`` as often per vector."""
    return tuple(replace(factor, sharing=factor.sharing * times) for factor in parts)


def positions(applied: Iterable[LinearOperator]) -> list[int]:
    """For operators on the axes of a Kronecker product, in order of application: positions of the other axes."""
    Ms = list(applied)
    return [math.prod(M.shape[0] for M in Ms[:t]) * math.prod(M.shape[1] for M in Ms[t + 1 :]) for t in range(len(Ms))]


def kronecker_factors(applied: Iterable[LinearOperator]) -> Factors:
    """The factors of operators on the axes of a Kronecker product, in order of application."""
    Ms = list(applied)
    return tuple(f for M, count in zip(Ms, positions(Ms), strict=True) for f in shared(factors(M), count))


# ----------------------------------------------------------------------------------------------------- views of another


@parameter_counts.dispatch
def parameter_counts_view(A: _cola.Transpose | _cola.Adjoint | _cola.Sliced) -> dict:
    """Those of the operator that is viewed."""
    return parameter_counts(A.A)


@factors.dispatch
def factors_transpose(A: _cola.Transpose | _cola.Adjoint) -> tuple:
    """In reverse order, fan-in and fan-out exchanged; those of our own transpose where it has one."""
    if isinstance(A.A, StructuredOperator):
        return factors(A.A.T)
    return tuple(factor.T for factor in reversed(factors(A.A)))


@factors.dispatch
def factors_sliced(A: _cola.Sliced) -> tuple:
    """A slice applies the whole operator."""
    return factors(A.A)


@macs.dispatch
def macs_transpose(A: _cola.Transpose | _cola.Adjoint) -> int:
    """Those of our own transpose where there is one: that of a convolution also multiplies by its padding."""
    return macs(A.A.T) if isinstance(A.A, StructuredOperator) else macs(A.A)


@macs.dispatch
def macs_sliced(A: _cola.Sliced) -> int:
    """A slice applies the whole operator."""
    return macs(A.A)


# ------------------------------------------------------------------------------------------------- CoLA's own operators


@parameter_counts.dispatch
def parameter_counts_constant(
    A: _cola.Identity | _cola.Permutation | _cola.FFT | _cola.ScalarMul,
) -> dict:
    """Constants."""
    return {}


@factors.dispatch
def factors_constant(A: _cola.Identity | _cola.Permutation | _cola.FFT | _cola.ScalarMul) -> tuple:
    """Constants."""
    return ()


@macs.dispatch
def macs_scalar(A: _cola.ScalarMul) -> int:
    """One product an entry."""
    return A.shape[0]


@macs.dispatch
def macs_fft(A: _cola.FFT) -> int:
    """One complex FFT."""
    return complex_fft_macs(A.shape[0])


def complex_fft_macs(n: int) -> int:
    """A complex FFT by our convention: 2 n log2 n real MACs."""
    return math.ceil(2 * n * math.log2(n)) if n > 1 else 1


@parameter_counts.dispatch
def parameter_counts_dense(A: _cola.Dense) -> dict:
    """All entries."""
    return _sizes(A.A)


@factors.dispatch
def factors_dense(A: _cola.Dense) -> tuple:
    """One block."""
    return (Factor("A", tuple(A.shape), fan_in=A.shape[1], fan_out=A.shape[0]),)


@parameter_counts.dispatch
def parameter_counts_triangular(A: _cola.Triangular) -> dict:
    """The triangle; the product is that of a dense matrix."""
    return {id(A.A): A.shape[0] * (A.shape[0] + 1) // 2}


@parameter_counts.dispatch
def parameter_counts_sparse(A: _cola.Sparse) -> dict:
    """The entries that are stored."""
    return _sizes(A.data)


@factors.dispatch
def factors_sparse(A: _cola.Sparse) -> tuple:
    """One 1 x 1 block an entry."""
    return (_elementwise("data", int(A.data.shape[0])),)


@parameter_counts.dispatch
def parameter_counts_diagonal(A: _cola.Diagonal) -> dict:
    """The diagonal."""
    return _sizes(A.diag)


@factors.dispatch
def factors_diagonal(A: _cola.Diagonal) -> tuple:
    """One 1 x 1 block an entry."""
    return (_elementwise("diag", A.shape[0]),)


@parameter_counts.dispatch
def parameter_counts_tridiagonal(A: _cola.Tridiagonal) -> dict:
    """The three diagonals."""
    return _sizes(A.alpha, A.beta, A.gamma)


@factors.dispatch
def factors_tridiagonal(A: _cola.Tridiagonal) -> tuple:
    """The three diagonals, entry by entry."""
    return tuple(_elementwise(name, int(getattr(A, name).shape[0])) for name in ("alpha", "beta", "gamma"))


@parameter_counts.dispatch
def parameter_counts_householder(A: _cola.Householder) -> dict:
    """The vector."""
    return _sizes(A.vec)


@factors.dispatch
def factors_householder(A: _cola.Householder) -> tuple:
    """An inner product and a scaled vector."""
    n = A.shape[0]
    return (Factor("vec", (n,), fan_in=n, fan_out=1), Factor("vec", (n,), fan_in=1, fan_out=n))


def _elementwise(name: str, count: int) -> Factor:
    return Factor(name, (count,), fan_in=1, fan_out=1, blocks=count)


def _sizes(*arrays: Any) -> Counts:
    return {id(array): math.prod(array.shape) for array in arrays}
