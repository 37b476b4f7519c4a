"""Eigenvalues and functions of operators: from those of the parts where there is a rule, else CoLA's.

``cola.linalg.eig`` asks `eigen_rule`; ``apply_unary``, and with it ``log``, ``pow``, ``sqrt`` and ``isqrt``, asks
`function_rule`; ``exp`` asks `exp_rule` first, since the exponential of a real matrix is real.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Number
from typing import Any, NamedTuple

import numpy as np

from structops import _array, _cola
from structops._array import Array
from structops._cola import Algorithm, LinearOperator
from structops._plum import dispatch
from structops.algebra.inverse import check_square
from structops.algebra.scalar import Identity, ScalarMul, ScalarOperator
from structops.errors import ShapeError
from structops.operator import StructuredOperator, check_precision

DIRECT = (_cola.Auto, _cola.Eig, _cola.Eigh)  # algorithms for which the structure may answer


class Spectrum(NamedTuple):
    """``A V = V diag(values)``.

    Attributes:
        values: Shape (n,); those of a rule by modulus, ascending.
        vectors: An operator whose columns are eigenvectors.
    """

    values: Array
    vectors: LinearOperator


@dispatch
def eigen_rule(A: LinearOperator, alg: Algorithm) -> Spectrum | None:
    """All eigenvalues by modulus, ascending, and vectors of a square A from its structure, or None."""
    return None


@dispatch
def function_rule(f: Callable, A: LinearOperator, alg: Algorithm) -> LinearOperator | None:
    """``f(A)`` of a square A from its structure, or None.  ``f`` acts on arrays of eigenvalues, entry by entry."""
    return None


@dispatch
def power_rule(A: LinearOperator, alpha: float, alg: Algorithm) -> LinearOperator | None:
    """``A ** alpha`` of a square A from its structure, or None."""
    return None


@dispatch
def exp_rule(A: LinearOperator, alg: Algorithm) -> LinearOperator | None:
    """``exp(A)`` of a square A in its dtype from its structure, or None."""
    return None


def eigen(A: LinearOperator, alg: Algorithm) -> Spectrum:
    """All eigenvalues and eigenvectors, in any order: by the rule, else by CoLA's dense algorithms."""
    result = eigen_rule(A, alg) if isinstance(alg, DIRECT) else None
    return Spectrum(*_cola.eig(A, A.shape[0], "SM", alg)) if result is None else result


@_cola.rules(_cola.eig).dispatch(precedence=2)
def eig_structured(A: StructuredOperator, k: int, which: str, alg: Algorithm) -> Any:
    """CoLA's ``eig`` for our operators: k values by modulus, ascending, and their vectors.

    Raises:
        ShapeError: A is not square.
        BackendError: A has 16 bits.
    """
    check_square(A, "an eigenvalue", "so.svd takes any shape")
    check_precision("an eigenvalue", A.dtype)
    result = eigen_rule(A, alg) if isinstance(alg, DIRECT) else None
    if result is None:
        return _cola.rules(_cola.eig).invoke(LinearOperator, int, str, type(alg))(A, k, which, alg)
    if which not in ("LM", "SM") or not 1 <= k <= A.shape[0]:
        raise ShapeError(
            f"eig takes 1 to {A.shape[0]} eigenvalues that are 'LM' or 'SM', got k={k} and which={which!r}"
        )
    part = slice(k) if which == "SM" else slice(A.shape[0] - k, None)
    values, vectors = result
    return values[part], vectors if k == A.shape[0] else vectors[:, part]


@_cola.rules(_cola.apply_unary).dispatch(precedence=2)
def apply_structured(f: Callable, A: StructuredOperator, alg: Algorithm) -> LinearOperator:
    """CoLA's ``apply_unary`` for our operators.

    Raises:
        ShapeError: A is not square.
        BackendError: A has 16 bits.
    """
    check_square(A, "a function of a matrix")
    check_precision("a function of a matrix", A.dtype)
    result = function_rule(f, A, alg) if isinstance(alg, DIRECT) else None
    if result is None:
        return _cola.rules(_cola.apply_unary).invoke(Callable, LinearOperator, type(alg))(f, A, alg)
    return result


@_cola.pow.dispatch(precedence=1)
def pow_structured(A: StructuredOperator, alpha: Number, alg: Algorithm = _cola.Auto()) -> LinearOperator:  # noqa: B008
    """CoLA's ``pow``, and with it ``sqrt`` and ``isqrt``, for our operators."""
    check_square(A, "a power")
    exponent: Any = alpha
    if isinstance(alg, DIRECT):
        result = power_rule(A, float(exponent), alg)
        if result is not None:
            return _positive_like(A, result)
    if np.isclose(exponent, 1):
        return A
    return _positive_like(A, _cola.pow.invoke(LinearOperator, type(alpha), type(alg))(A, alpha, alg))


def _positive_like(A: LinearOperator, result: LinearOperator) -> LinearOperator:
    """A real power of a positive semidefinite operator is one."""
    if A.isa(_cola.PSD):
        result.annotations = result.annotations | {_cola.PSD}
    return result


@_cola.exp.dispatch(precedence=1)
def exp_structured(A: StructuredOperator, alg: Algorithm = _cola.Auto()) -> LinearOperator:  # noqa: B008
    """CoLA's ``exp`` for our operators."""
    check_square(A, "an exponential")
    check_precision("an exponential", A.dtype)
    result = exp_rule(A, alg) if isinstance(alg, DIRECT) else None
    return _cola.apply_unary(A.xnp.exp, A, alg) if result is None else result


@eigen_rule.dispatch
def eigen_scalar(A: ScalarOperator, alg: Algorithm) -> Spectrum | None:
    """The number, n times."""
    return Spectrum(_array.zeros((A.shape[0],), A.c) + A.c, Identity(A.shape[0], like=A.c))


@function_rule.dispatch
def function_of_scalar(f: Callable, A: ScalarOperator, alg: Algorithm) -> LinearOperator | None:
    """The function of the number."""
    return ScalarMul(f(A.c), A.shape[0])
