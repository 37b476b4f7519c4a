"""Diagonals and traces: ``cola.linalg.diag`` and ``trace`` from the structure where there is a rule, else CoLA's."""

from __future__ import annotations

from typing import Any

import opt_einsum

from structops import _array, _cola
from structops._array import Array
from structops._cola import Algorithm, LinearOperator
from structops._plum import dispatch
from structops.algebra.inverse import check_square
from structops.algebra.scalar import ScalarOperator
from structops.algebra.sum import Sum
from structops.chain import Chain
from structops.chain_operator import ChainOperator
from structops.operator import StructuredOperator
from structops.pattern import Regroup


@dispatch
def diagonal_rule(A: LinearOperator, k: int, alg: Algorithm) -> Any:
    """``A[i, i + k]`` for all i as an array, from the structure, or None; ``alg`` is for parts without a rule."""
    return None


@dispatch
def trace_rule(A: LinearOperator, alg: Algorithm) -> Any:
    """The trace of a square A without its diagonal, or None."""
    return None


@_cola.rules(_cola.diag).dispatch(precedence=2)
def diag_structured(A: StructuredOperator, k: int, alg: Algorithm) -> Any:
    """CoLA's ``diag`` for our operators."""
    result = diagonal_rule(A, k, alg)
    if result is None:
        return _cola.rules(_cola.diag).invoke(LinearOperator, int, type(alg))(A, k, alg)
    return result


@_cola.rules(_cola.trace).dispatch(precedence=2)
def trace_structured(A: StructuredOperator, alg: Algorithm) -> Any:
    """CoLA's ``trace`` for our operators.

    Raises:
        ShapeError: A is not square.
    """
    check_square(A, "a trace")
    result = trace_rule(A, alg)
    return _cola.diag(A, 0, alg).sum() if result is None else result


def has_equal_modes(chain: Chain) -> bool:
    """Whether input and output are split alike, and the state is never re-read: then labels can be identified.

    A label of both sides must have the same place in both.
    """
    first, last = chain.terms[0], chain.terms[-1]
    alike = chain.shape_of(first) == chain.shape_of(last) and all(
        i == j for i, j in zip(first, last, strict=False) if i in last or j in first
    )
    return alike and not any(isinstance(step, Regroup) for step in chain.steps)


def on_diagonal(A: ChainOperator, output: str) -> Array:
    """The factors, contracted with every output label identified with the input label in its place.

    In the cheapest order that opt_einsum finds.
    """
    chain = A.chain
    renamed = dict(zip(chain.terms[-1], chain.terms[0], strict=True))
    names = ["".join(renamed.get(label, label) for label in step.labels) for step in chain.factor_steps]
    passing = [label for label in output if label not in "".join(names)]  # modes that no factor touches
    units = [_array.ones(chain.shape_of(label), A.arrays[0]) for label in passing]
    return opt_einsum.contract(",".join([*names, *passing]) + "->" + output, *A.label_arrays, *units)


@diagonal_rule.dispatch
def diagonal_chain(A: ChainOperator, k: int, alg: Algorithm) -> Any:
    """By contraction, where the modes of input and output agree."""
    chain = A.chain
    if k != 0 or A.shape[0] != A.shape[1] or not has_equal_modes(chain):
        return None
    return on_diagonal(A, chain.terms[0]).reshape((-1,))[: A.shape[0]]


@trace_rule.dispatch
def trace_chain(A: ChainOperator, alg: Algorithm) -> Any:
    """By contraction, where the modes of input and output agree."""
    chain = A.chain
    padded = A.shape != (chain.padded_out, chain.padded_in)
    passing = set(chain.terms[0]) & set(chain.terms[-1]) - set("".join(step.labels for step in chain.factor_steps))
    if padded or passing or not has_equal_modes(chain):
        return None
    return on_diagonal(A, "")


@diagonal_rule.dispatch
def diagonal_sum(A: Sum, k: int, alg: Algorithm) -> Any:
    """Diagonals add up."""
    first, *others = (_cola.diag(M, k, alg) for M in A.Ms)
    return sum(others, first)


@trace_rule.dispatch
def trace_sum(A: Sum, alg: Algorithm) -> Any:
    """Traces add up."""
    first, *others = (_cola.trace(M, alg) for M in A.Ms)
    return sum(others, first)


def diagonal_length(A: LinearOperator, k: int) -> int:
    """The number of entries ``A[i, i + k]``."""
    rows, cols = A.shape
    return max(min(rows + min(k, 0), cols - max(k, 0)), 0)


@diagonal_rule.dispatch
def diagonal_scalar(A: ScalarOperator, k: int, alg: Algorithm) -> Any:
    """The number, or zeros."""
    return _array.zeros((diagonal_length(A, k),), A.c) + (A.c if k == 0 else 0)
