"""What Kron and BlockDiag share: parts that are matrices or operators, and a chain where matrices make one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

from structops import _array, _cola
from structops._array import Array
from structops._cola import Algorithm
from structops.algebra.counting import merged_counts
from structops.algebra.properties import common
from structops.chain import Chain
from structops.chain_operator import flip, multiply
from structops.operator import StructuredOperator, check_arrays, check_precision, kind_of
from structops.operators.dense import Dense


class CompositeOperator(StructuredOperator):
    """Base of the arrangements of other operators.

    A subclass writes ``shape``, ``chain_arrays`` and ``_apply_parts``, and sets ``patterns`` where it is a chain.

    Attributes:
        Ms: The parts; matrices become `Dense`.
        patterns: The chain and that of the transpose, None where the parts make no chain.
        is_transposed: Whether the parts are transposes of those that the chain names.
    """

    leaves = ("Ms",)
    static: ClassVar[tuple[str, ...]] = ("patterns", "is_transposed")
    Ms: tuple[_cola.LinearOperator, ...]
    patterns: tuple[Chain, Chain] | None
    is_transposed: bool

    def _set(self, Ms: Sequence[Any]) -> None:
        """Fill the fields but for the patterns; the one check of libraries."""
        self.Ms = tuple(M if isinstance(M, _cola.LinearOperator) else Dense(M) for M in Ms)
        self.patterns, self.is_transposed = None, False
        check_arrays(type(self).__name__, self.arrays_flat())

    def _set_chain(self, chain: Chain) -> None:
        self.patterns = chain, flip(chain)

    def chain_arrays(self, matrices: list[Array]) -> list[Array]:
        """The arrays of the chain in order of application, from the matrices of all parts."""
        raise NotImplementedError

    def _apply_parts(self, x: Array) -> Array:
        """The product on the last axis of x, part by part."""
        raise NotImplementedError

    @property
    def is_chain(self) -> bool:
        """Whether the parts are matrices that make a chain."""
        return self.patterns is not None

    @property
    def chain(self) -> Chain:
        """The pattern, where there is one.

        Raises:
            TypeError: The parts are operators with a structure of their own, or do not make a chain.
        """
        if self.patterns is None:
            raise TypeError(f"{self!r} has parts that make no single chain")
        return self.patterns[0]

    def _matmat(self, X: Array) -> Array:
        return self._apply(X.mT).mT

    def _rmatmat(self, X: Array) -> Array:
        return self.transposed()._apply(X)

    def _apply(self, x: Array) -> Array:
        if self.patterns is None:
            return self._apply_parts(x)
        dtype = _array.promote(self.dtype, x.dtype)
        matrices = [_array.cast(M.A.mT if self.is_transposed else M.A, dtype) for M in self.Ms]
        return multiply(self.patterns[0], self.chain_arrays(matrices), x)

    def transposed(self) -> Self:
        """The same arrangement of the transposed parts."""
        result = self._map(lambda M: M.T)
        result.patterns = self.patterns and self.patterns[::-1]
        result.is_transposed = not self.is_transposed
        return result

    @property
    def inferred(self) -> set[type]:
        """What all parts are, the whole is."""
        return common(self.Ms)

    def parameter_counts(self) -> dict[int, int]:
        """Those of all parts; an array that occurs twice once."""
        return merged_counts(self.Ms)

    def describe_part(self, M: _cola.LinearOperator) -> str:
        """The shape and, where it has one, the structure of a part."""
        kind = "" if isinstance(M, Dense) else kind_of(M) + " "
        return f"{kind}{M.shape[0]}x{M.shape[1]}"


def fused(A: _cola.LinearOperator, B: _cola.LinearOperator) -> _cola.LinearOperator:
    """``A @ B`` for parts: two matrices are multiplied, unless their product is larger than both together."""
    if isinstance(A, Dense) and isinstance(B, Dense):
        (m, k), n = A.shape, B.shape[1]
        if m * n <= k * (m + n):
            dtype = _array.promote(A.dtype, B.dtype)
            return Dense(_array.cast(A.A, dtype) @ _array.cast(B.A, dtype))
    return A @ B


def part_inverse(M: _cola.LinearOperator, alg: Algorithm) -> _cola.LinearOperator:
    """The inverse of a part: of a matrix as a matrix, so that the whole stays a chain, else what CoLA's verb gives."""
    if isinstance(M, Dense):
        check_precision("an inverse", M.dtype)
        return _keeping(M, Dense(_array.namespace(M.A).linalg.inv(M.A)))
    return _cola.inv(M, alg)


def part_pinv(M: _cola.LinearOperator, alg: Algorithm) -> _cola.LinearOperator:
    """The pseudo-inverse of a part, as `part_inverse`."""
    if isinstance(M, Dense):
        check_precision("a pseudo-inverse", M.dtype)
        return _keeping(M, Dense(_array.namespace(M.A).linalg.pinv(M.A)))
    return _cola.pinv(M, alg)


def like_part(M: _cola.LinearOperator, result: _cola.LinearOperator) -> _cola.LinearOperator:
    """A function of a part: of a matrix as a matrix, so that the whole stays a chain."""
    return Dense(result.to_dense()) if isinstance(M, Dense) and not isinstance(result, Dense) else as_part(result)


def _keeping(M: Dense, result: Dense) -> Dense:
    result.annotations = common([M], _cola.SelfAdjoint)
    return result


def as_part(A: _cola.LinearOperator) -> _cola.LinearOperator:
    """A matrix of CoLA as ours, so that the whole can be a chain."""
    return Dense(A.A) if isinstance(A, _cola.Dense) and not isinstance(A, Dense) else A
