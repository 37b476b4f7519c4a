"""The base of operators that are chains: arrays, and the pattern that says what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Self

from structops import _array
from structops._array import Array
from structops.chain import Chain
from structops.contract import contract, store, unstore
from structops.operator import StructuredOperator, check_arrays


class ChainOperator(StructuredOperator):
    """An operator that is a chain: its arrays, in order of application, and the pattern that says what they mean.

    The transpose keeps the very same arrays and reverses the chain, so no structure needs a rule of its own.

    Attributes:
        arrays: The arrays as they were given, in order of application.
        chain: The pattern.
        flipped: The pattern of the transpose.
        is_transposed: Whether this is the transpose of an operator with the textbook axes.
    """

    leaves = ("arrays",)
    static = ("chain", "flipped", "is_transposed")
    arrays: tuple[Array, ...]
    chain: Chain
    flipped: Chain  # kept, because deriving a pattern inside a compiled function breaks its graph
    is_transposed: bool

    def _set(self, chain: Chain, arrays: Sequence[Array]) -> None:
        """Fill the fields from arrays in order of application; the one check of libraries and sizes."""
        check_arrays(type(self).__name__, arrays)
        self.chain, self.flipped, self.arrays, self.is_transposed = chain, flip(chain), tuple(arrays), False

    @classmethod
    def from_factors(cls, chain: Chain, factors: Sequence[Array]) -> Self:
        """The operator of a chain of this structure from stored factors ``(blocks, fan_out, fan_in)``, as views."""
        return cls.from_arrays(chain, unstore(chain, factors))

    @classmethod
    def from_arrays(cls, chain: Chain, arrays: Sequence[Array]) -> Self:
        """The operator of a chain of this structure from arrays in order of application, one axis a label, as views."""
        operator = object.__new__(cls)
        operator._set(chain, [a.reshape(s) for a, s in zip(arrays, cls.textbook_shapes(chain), strict=True)])
        return operator

    @classmethod
    def textbook_shapes(cls, chain: Chain) -> tuple[tuple[int, ...], ...]:
        """Shapes that the constructor takes, in order of application: by default one axis a label."""
        return tuple(factor.shape for factor in chain.factors)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return self.chain.shape

    @property
    def textbook(self) -> tuple[Array, ...]:
        """The arrays in textbook order (the last applied first); those of the original if this is a transpose."""
        return self.arrays if self.is_transposed else self.arrays[::-1]

    @property
    def label_arrays(self) -> tuple[Array, ...]:
        """The arrays in order of application, one axis a label."""
        return tuple(a.reshape(factor.shape) for a, factor in zip(self.arrays, self.chain.factors, strict=True))

    def untransposed(self) -> Self:
        """The same matrix with the textbook axes, where its transpose has them too; else the operator itself."""
        return self

    def stored_factors(self) -> tuple[Array, ...]:
        """The factors in order of application as ``(blocks, fan_out, fan_in)``, what layers keep."""
        return store(self.chain, self.arrays)

    def _matmat(self, X: Array) -> Array:
        return multiply(self.chain, self.arrays, X.mT).mT

    def _rmatmat(self, X: Array) -> Array:
        return multiply(self.flipped, self.arrays[::-1], X)

    def transposed(self) -> Self:
        """The transpose: the same arrays in reverse order under the reversed chain."""
        aux: tuple[Any, ...] = ((self.flipped, self.chain, not self.is_transposed), frozenset())
        return self.tree_unflatten(aux, (self.arrays[::-1],))

    def describe(self) -> str:
        """The shape of every factor in order of application."""
        return "factors " + ", ".join("x".join(map(str, factor.shape)) for factor in self.chain.factors)


@cache
def flip(chain: Chain) -> Chain:
    """``chain.T``, derived once for all operators of a pattern."""
    return chain.T


def multiply(chain: Chain, arrays: Sequence[Array], x: Array) -> Array:
    """The product of a chain and the last axis of x, in the dtype to which all promote.

    Args:
        chain: The pattern.
        arrays: One array a factor in order of application, with the axes of its labels.
        x: Shape ``(..., in_features)``.
    """
    dtype = _array.promote(x.dtype, *(array.dtype for array in arrays))
    return contract(chain, store(chain, [_array.cast(array, dtype) for array in arrays]), _array.cast(x, dtype))
