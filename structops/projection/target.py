"""What a chain is to approximate: a dense matrix read as a tensor over the labels of the chain's input and output.

A label of both input and output makes the matrix block-diagonal: entries off that diagonal are zero in every member and
play no part.  Padded rows and columns are zeros here; ``weight`` tells them from true entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import opt_einsum

from structops import _array
from structops._array import Array
from structops.chain import Chain

Factors = list[Array]


@dataclass(frozen=True)
class Target:
    """The tensor that the factors of a chain without regroups should multiply to, and the metric.

    Attributes:
        chain: The pattern.
        tensor: The matrix, one axis a label of ``labels``.
        weight: 1 at true entries and 0 at padded ones; None if nothing is padded.
        covariance: Second moments of the input, the axes ``passing + columns + columns``; None for the Frobenius norm.
        moments: ``W C``, read as the tensor is; the tensor itself without a covariance.
        whole: The matrix and the second moments, where entries beside the tensor count.
    """

    chain: Chain
    tensor: Array
    weight: Array | None
    covariance: Array | None
    moments: Array
    whole: tuple[Array, Array] | None = None

    @classmethod
    def of(cls, chain: Chain, W: Array, covariance: Array | None = None) -> Target:
        """The target of a chain from a matrix of its true shape, in the dtype of the covariance if there is one."""
        weight = None
        if chain.shape != (chain.padded_out, chain.padded_in):
            weight = _read(chain, _array.ones(W.shape, W))
        tensor = _read(chain, W)
        if covariance is None:
            return cls(chain, tensor, weight, None, tensor)
        moments = _moments(chain, W, covariance)
        whole = (W, covariance) if passing_labels(chain) else None
        return cls(chain, tensor, weight, spread(chain, covariance), moments, whole)

    @cached_property
    def total(self) -> Array:
        """The squared norm of the matrix in the metric."""
        W, moments = self.tensor, self.moments
        if self.whole is not None:
            W, moments = self.whole[0], self.whole[0] @ self.whole[1]
        return inner(W, moments)

    @property
    def labels(self) -> str:
        """The labels of the tensor: those of the output, and those of the input that are not in the output."""
        return self.chain.terms[-1] + column_labels(self.chain)

    @property
    def names(self) -> list[str]:
        """The labels of every factor in order of application."""
        return [step.labels for step in self.chain.factor_steps]

    def product(self, factors: Sequence[Array]) -> Array:
        """The tensor that factors multiply to; a label that only passes through is repeated."""
        passing = "".join(label for label in self.labels if all(label not in name for name in self.names))
        units = [_array.ones(self.chain.shape_of(label), factors[0]) for label in passing]
        return contract([*zip(self.names, factors, strict=True), *zip(passing, units, strict=True)], self.labels)

    def descent(self, factors: Sequence[Array]) -> Array:
        """``(W - A) C`` at the entries of the tensor: where to go from here; padded entries have nothing to say."""
        product = self.product(factors)
        if self.covariance is not None:
            product = self.times_covariance(product)
        step = self.moments - product
        return step if self.weight is None else step * self.weight

    def times_covariance(self, tensor: Array) -> Array:
        """``A C`` for a member A, at the entries of the tensor."""
        passing, columns = passing_labels(self.chain), column_labels(self.chain)
        spread = (passing + columns + primed(columns), self.covariance)
        return contract([(self.labels, tensor), spread], self.chain.terms[-1] + primed(columns))

    def loss(self, factors: Sequence[Array]) -> Array:
        """The squared norm of what is left in the metric; in the Frobenius norm without what no member can have."""
        product = self.product(factors)
        if self.weight is not None:
            product = product * self.weight
        left = self.tensor - product
        if self.covariance is None:
            return inner(left, left)
        if self.whole is None:
            return inner(left, self.times_covariance(left))
        after = self.times_covariance(product)  # entries beside the tensor count, too
        return self.total + inner(product, after - 2 * self.moments)


def inner(M: Array, N: Array) -> Array:
    """The real part of ``<M, N>``."""
    # A sum of products: the dot product of long vectors in 32 bits is right to three digits alone.
    return _array.real_part((_array.namespace(M).conj(M) * N).sum())


def spread(chain: Chain, covariance: Array) -> Array:
    """Second moments of the input with the axes ``passing + columns + columns``."""
    missing, inputs = chain.padded_in - chain.in_features, chain.terms[0]
    padded = _array.pad(covariance, [(0, missing)] * 2) if missing else covariance
    passing, columns = passing_labels(chain), column_labels(chain)
    names = inputs + _primed_columns(chain, inputs)
    return _diagonal(padded.reshape(chain.shape_of(inputs) * 2), names, passing + columns + primed(columns))


def _moments(chain: Chain, W: Array, covariance: Array) -> Array:
    """``W C`` at the entries of the tensor: for every value of the labels that pass, the columns that have it."""
    passing, columns, inputs, outputs = passing_labels(chain), column_labels(chain), chain.terms[0], chain.terms[-1]
    if not passing:
        return _read(chain, W @ covariance)
    rest = "".join(label for label in outputs if label not in passing)
    rows = _array.pad(W, [(0, chain.padded_out - chain.out_features), (0, 0)])
    rows = ordered(rows.reshape((*chain.shape_of(outputs), -1)), outputs + "\n", passing + rest + "\n")
    cols = _array.pad(covariance, [(0, 0), (0, chain.padded_in - chain.in_features)])
    cols = ordered(cols.reshape((-1, *chain.shape_of(inputs))), "\n" + inputs, passing + "\n" + columns)
    count = chain.size(passing)
    product = rows.reshape((count, -1, chain.in_features)) @ cols.reshape((count, chain.in_features, -1))
    return ordered(
        product.reshape(chain.shape_of(passing + rest + columns)), passing + rest + columns, outputs + columns
    )


def passing_labels(chain: Chain) -> str:
    """Labels of both input and output."""
    return "".join(label for label in chain.terms[0] if label in chain.terms[-1])


def column_labels(chain: Chain) -> str:
    """Labels of the input that are not in the output."""
    return "".join(label for label in chain.terms[0] if label not in chain.terms[-1])


def primed(labels: Iterable[str]) -> str:
    """Labels for a second copy of the same axes."""
    return "".join(chr(ord(label) + 0x10000) for label in labels)


def contract(operands: Sequence[tuple[str, Array]], output: str) -> Array:
    """An einsum in the cheapest order."""
    names, arrays = zip(*operands, strict=True)
    return opt_einsum.contract(",".join(names) + "->" + output, *arrays)


def ordered(array: Array, labels: str, order: str) -> Array:
    """An array whose axes are ``labels`` with the axes in another order."""
    return array if labels == order else _array.permute(array, tuple(labels.index(label) for label in order))


def _primed_columns(chain: Chain, labels: str) -> str:
    return "".join(label if label in chain.terms[-1] else primed(label) for label in labels)


def _read(chain: Chain, M: Array) -> Array:
    """A matrix of the true shape as a tensor over output and column labels."""
    rows, cols = chain.padded_out - chain.out_features, chain.padded_in - chain.in_features
    inputs, outputs = chain.terms[0], chain.terms[-1]
    padded = _array.pad(M, [(0, rows), (0, cols)]) if rows or cols else M
    tensor = padded.reshape(chain.shape_of(outputs + inputs))
    return _diagonal(tensor, outputs + inputs, outputs + column_labels(chain))


def _diagonal(tensor: Array, names: str, output: str) -> Array:
    """The entries at which labels that occur twice agree."""
    if names == output:
        return tensor
    letters = {label: opt_einsum.get_symbol(k) for k, label in enumerate(dict.fromkeys(names))}
    pattern = "->".join("".join(letters[label] for label in side) for side in (names, output))
    return _array.namespace(tensor).einsum(pattern, tensor)
