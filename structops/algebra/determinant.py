"""Determinants: ``cola.linalg.slogdet`` and ``logdet`` from the structure where there is a rule, else CoLA's."""

from __future__ import annotations

import math
from typing import Any

from structops import _array, _cola
from structops._cola import Algorithm, LinearOperator
from structops._plum import dispatch
from structops.algebra.inverse import check_square, has_square_factors, is_square
from structops.algebra.product import Product
from structops.algebra.scalar import Identity, Zero, like
from structops.chain import Chain
from structops.chain_operator import ChainOperator
from structops.operator import StructuredOperator, check_precision
from structops.pattern import Regroup


@dispatch
def determinant_rule(A: LinearOperator, log_alg: Algorithm, trace_alg: Algorithm) -> tuple | None:
    """``(sign, log|det A|)`` of a square A from its structure, or None; the algorithms are for parts without a rule."""
    return None


@_cola.rules(_cola.slogdet).dispatch(precedence=2)
def slogdet_structured(A: StructuredOperator, log_alg: Algorithm, trace_alg: Algorithm) -> Any:
    """CoLA's ``slogdet`` for our operators.

    Raises:
        ShapeError: A is not square.
        BackendError: A has 16 bits.
    """
    check_square(A, "a determinant")
    check_precision("a determinant", A.dtype)
    result = determinant_rule(A, log_alg, trace_alg)
    if result is None:
        stock = _cola.rules(_cola.slogdet).invoke(LinearOperator, type(log_alg), type(trace_alg))
        return stock(A, log_alg, trace_alg)
    return result


def of_zero(A: LinearOperator) -> tuple[Any, Any]:
    """That of an operator that is singular whatever its numbers are: 0 and minus infinity."""
    zero = like(A)
    return zero, like(A, _array.real_of(A.dtype)) - math.inf


def of_eigenvalues(values: Any) -> tuple[Any, Any]:
    """That of an operator with these eigenvalues; 0 and minus infinity if one of them is 0, as in numpy."""
    xp = _array.namespace(values)
    size, phase = _array.polar(values)
    return xp.prod(xp.where(size == 0, xp.zeros_like(phase), phase)), xp.sum(xp.log(size))


def combined(parts: list[tuple[Any, Any]], powers: list[int]) -> tuple[Any, Any]:
    """The product of determinants, each to a power."""
    (sign, total), *rest = [(s**p, p * log) for (s, log), p in zip(parts, powers, strict=True)]
    for s, log in rest:
        sign, total = sign * s, total + log
    return sign, total


@determinant_rule.dispatch
def determinant_chain(A: ChainOperator, log_alg: Algorithm, trace_alg: Algorithm) -> tuple | None:
    """Of square blocks: their determinants, each as often as its block is used, and the signs of the re-orderings.

    A single dense block by LU, unless another algorithm is asked for.
    """
    chain = A.chain
    if chain.rank_bound < A.shape[0]:
        return of_zero(A)
    alone = len(chain.factors) == 1 and chain.factors[0].blocks == 1
    if not has_square_factors(A) or (alone and isinstance(log_alg, _cola.Lanczos | _cola.Arnoldi)):
        return None
    xp = _array.namespace(A.arrays[0])
    found = _array.decomposed(xp.linalg.slogdet, A.stored_factors())
    parts = [(xp.prod(sign), xp.sum(log)) for sign, log in found]
    sign, total = combined(parts, [factor.sharing for factor in chain.factors])
    return (-sign if is_odd(chain) else sign), total


def is_odd(chain: Chain) -> bool:
    """Whether the re-orderings of the state between input, factors and output are together an odd permutation.

    Exchanging two neighbouring axes of a and b entries moves ``C(a, 2) C(b, 2)`` pairs out of order, in each of the
    outer positions, and with each entry a run of inner ones.
    """
    swaps, state, size = 0, chain.terms[0], dict(chain.sizes)
    for step in chain.steps:
        if isinstance(step, Regroup):
            swaps += _inversions(state, step.before, size)
            state = step.after
        else:
            swaps += _inversions(state, step.batch + step.shared + step.contracted, size)
            state = step.batch + step.shared + step.emitted
    return bool((swaps + _inversions(state, chain.terms[-1], size)) % 2)


def _inversions(state: str, target: str, size: dict[str, int]) -> int:
    """Pairs that change order when the axes ``state`` become ``target`` by exchanges of neighbours; right in parity."""
    axes, count = list(state), 0
    for place, label in enumerate(target):
        for at in range(axes.index(label), place, -1):
            a, b = size[axes[at - 1]], size[axes[at]]
            outer = math.prod(size[axis] for axis in axes[: at - 1])
            inner = math.prod(size[axis] for axis in axes[at + 1 :])
            count += outer * inner**2 * math.comb(a, 2) * math.comb(b, 2)
            axes[at - 1], axes[at] = axes[at], axes[at - 1]
    return count


@determinant_rule.dispatch
def determinant_product(A: Product, log_alg: Algorithm, trace_alg: Algorithm) -> tuple | None:
    """The product of determinants, where all parts are square; a narrow part between makes it zero."""
    if min(M.shape[1] for M in A.Ms) < A.shape[0]:
        return of_zero(A)
    if not all(map(is_square, A.Ms)):
        return None
    return combined([_cola.slogdet(M, log_alg, trace_alg) for M in A.Ms], [1] * len(A.Ms))


@determinant_rule.dispatch
def determinant_scalar(A: _cola.ScalarMul, log_alg: Algorithm, trace_alg: Algorithm) -> tuple | None:
    """``c ** n``."""
    xp = _array.namespace(A.c)
    size = xp.abs(A.c)
    return (A.c / size) ** A.shape[0], A.shape[0] * xp.log(size)


@determinant_rule.dispatch
def determinant_identity(A: Identity, log_alg: Algorithm, trace_alg: Algorithm) -> tuple | None:
    """One."""
    return like(A) + 1, like(A, _array.real_of(A.dtype))


@determinant_rule.dispatch
def determinant_zero(A: Zero, log_alg: Algorithm, trace_alg: Algorithm) -> tuple | None:
    """Zero."""
    return of_zero(A)
