"""What a chain is to approximate: a dense matrix read as a tensor over the labels of the chain's input and output.

A label of both input and output makes the matrix block-diagonal: entries off that diagonal are zero in every member and
play no part.  Padded rows and columns are zeros here; ``weight`` tells them from true entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

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
        total: The squared norm of the matrix in the metric.
        moments: ``W C``, read as the tensor is; the tensor itself without a covariance.
    """

    chain: Chain
    tensor: Array
    weight: Array | None
    covariance: Array | None
    total: Array
    moments: Array

    @classmethod
    def of(cls, chain: Chain, W: Array, covariance: Array | None = None) -> Target:
        """The target of a chain from a matrix of its true shape."""
        weight = None
        if chain.shape != (chain.padded_out, chain.padded_in):
            weight = _read(chain, _array.ones(W.shape, W))
        tensor = _read(chain, W)
        if covariance is None:
            total = (_array.namespace(W).abs(W) ** 2).sum()
            return cls(chain, tensor, weight, None, total, tensor)
        moments = W @ covariance
        total = _array.real_part((_array.namespace(W).conj(W) * moments).sum())
        spread = _array.pad(covariance, [(0, chain.padded_in - chain.in_features)] * 2)
        inputs = chain.terms[0]
        names = inputs + _primed_columns(chain, inputs)
        passing, columns = passing_labels(chain), column_labels(chain)
        spread = _diagonal(spread.reshape(chain.shape_of(inputs) * 2), names, passing + columns + primed(columns))
        return cls(chain, tensor, weight, spread, total, _read(chain, moments))

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
        product, xp = self.product(factors), _array.namespace(self.tensor)
        if self.weight is not None:
            product = product * self.weight
        left = self.tensor - product
        if self.covariance is None:
            return (xp.abs(left) ** 2).sum()
        if not passing_labels(self.chain):
            return _array.real_part((xp.conj(left) * self.times_covariance(left)).sum())
        after = self.times_covariance(product)  # entries beside the tensor count, too
        return self.total + _array.real_part((xp.conj(product) * (after - 2 * self.moments)).sum())

    def cast(self, dtype: _array.Dtype) -> Target:
        """The same target in another dtype."""
        names = ("tensor", "weight", "covariance", "total", "moments")
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self, **{name: _array.cast(value, dtype) for name, value in values.items()})


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
