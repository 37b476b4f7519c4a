"""Operators to test with: every registered structure at sizes that differ in kind, each with its matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from structops._array import Array
from structops.algebra.scalar import Identity, ScalarMul, Zero
from structops.chain_operator import ChainOperator
from structops.operators import OPERATORS
from structops.testing.arrays import dtype_of, normal, to_backend, to_numpy
from structops.testing.references import REFERENCES

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Indices:
    """An argument that is a random permutation of 0 ... n - 1."""

    n: int

    def __str__(self) -> str:
        return f"perm{self.n}"


@dataclass(frozen=True)
class Case:
    """An operator and its matrix, up to the numbers in its arrays.

    Args:
        structure: The class of the operator, or any function that makes one.
        arguments: Positional arguments: the shape of an array to be drawn, a list of shapes for a list of arrays,
            `Indices`, or a case for an argument that is an operator.
        options: Keyword arguments, passed as they are.
        reference: The dense matrix from the same arguments, numpy arrays in place of arrays and of operators; by
            default that of the registered structure.
        labels: What sets the case apart, beside the tags that follow from its shape and structure.

    Example:
        >>> case = Case(OPERATORS["LowRank"], ((4, 2), (2, 3)))
        >>> operator, dense = case.build("torch", "float32")
        >>> operator.shape, dense.shape, sorted(case.tags)
        ((4, 3), (4, 3), ['chain', 'tall'])
    """

    structure: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    reference: Callable[..., np.ndarray] | None = None
    labels: frozenset[str] = frozenset()

    def draw(self, rng: np.random.Generator, backend: str, dtype: str = "float64") -> tuple[Any, ...]:
        """The arguments with Gaussian arrays of a library: a tree of tuples, lists and arrays."""

        def drawn(argument: Any) -> Any:
            if isinstance(argument, Case):
                return argument.draw(rng, backend, dtype)
            if isinstance(argument, list):
                return [drawn(part) for part in argument]
            if isinstance(argument, Indices):
                return to_backend(rng.permutation(argument.n), backend)
            return to_backend(normal(rng, argument, dtype), backend, dtype)

        return tuple(map(drawn, self.arguments))

    def operator(self, arguments: Sequence[Any]) -> Any:
        """The operator of drawn arguments; a function that can be traced."""
        pairs = zip(self.arguments, arguments, strict=True)
        return self.structure(*(a.operator(x) if isinstance(a, Case) else x for a, x in pairs), **self.options)

    def dense(self, arguments: Sequence[Any]) -> np.ndarray:
        """The matrix of drawn arguments, in double precision, without the operator's code."""
        pairs = zip(self.arguments, arguments, strict=True)
        reference = self.reference or REFERENCES[self.structure.__name__]
        return reference(*(a.dense(x) if isinstance(a, Case) else _numpy(x) for a, x in pairs), **self.options)

    def cancellation(self, arguments: Sequence[Any]) -> float:
        """How many times the summands exceed the matrix; rounding errors are relative to the summands."""
        summands = self.dense(_absolute(tuple(arguments)))
        return float(np.linalg.norm(summands) / np.linalg.norm(self.dense(arguments)))

    def build(self, backend: str, dtype: str = "float64", seed: int = 0) -> tuple[Any, np.ndarray]:
        """The operator on a library, and its matrix."""
        arguments = self.draw(np.random.default_rng(seed), backend, dtype)
        operator = self.operator(arguments)
        wanted = dtype_of(backend, dtype)
        # A structure without parameters has the library's default dtype.
        return operator if operator.dtype == wanted else operator.to(dtype=wanted), self.dense(arguments)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        rows, cols = self.dense(_zeros(self)).shape
        return rows, cols

    @property
    def tags(self) -> frozenset[str]:
        """The labels; ``chain``; ``nested``; and ``square``, ``wide`` or ``tall``."""
        rows, cols = self.shape
        found = {"square" if rows == cols else "wide" if rows < cols else "tall"}
        if any(isinstance(argument, Case) for argument in self.arguments):
            found.add("nested")
        elif isinstance(self.structure, type) and issubclass(self.structure, ChainOperator):
            found.add("chain")
        return self.labels | found

    def __str__(self) -> str:
        """Such as ``LowRank(4x2,2x4)``, for the name of a test."""
        options = (f"{name}={value!r}".replace(" ", "") for name, value in self.options.items())
        return f"{self.structure.__name__}({','.join([*map(_text, self.arguments), *options])})"


def _numpy(argument: Any) -> Any:
    return [to_numpy(x) for x in argument] if isinstance(argument, list) else to_numpy(argument)


def _absolute(arguments: Any) -> Any:
    if isinstance(arguments, tuple | list):
        return type(arguments)(map(_absolute, arguments))
    return np.abs(to_numpy(arguments))


def _zeros(argument: Any) -> Any:
    if isinstance(argument, Case):
        return tuple(map(_zeros, argument.arguments))
    if isinstance(argument, list):
        return list(map(_zeros, argument))
    return np.arange(argument.n) if isinstance(argument, Indices) else np.zeros(argument)


def _text(argument: Any) -> str:
    if isinstance(argument, list):
        return "+".join(map(_text, argument))
    return "x".join(map(str, argument)) if isinstance(argument, tuple) else str(argument)


# ----------------------------------------------------------------------------------------------- the sizes to test with


def _case(name: str, *arguments: Any, labels: Iterable[str] = (), **options: Any) -> Case:
    return Case(OPERATORS[name], arguments, options, labels=frozenset(labels))


def tt_cores(out_modes: Shape, in_modes: Shape, *ranks: int) -> list[Shape]:
    """Shapes of tensor-train cores, (r, m, n, r')."""
    bonds = (1, *ranks, 1)
    return [(bonds[t], m, n, bonds[t + 1]) for t, (m, n) in enumerate(zip(out_modes, in_modes, strict=True))]


def btt_cores(out_modes: Shape, in_modes: Shape, *ranks: int) -> list[Shape]:
    """Shapes of block tensor-train cores, (r, m_t ... m_c, n_1 ... n_t, r')."""
    bonds = (1, *ranks, 1)
    return [(bonds[t], *out_modes[t:], *in_modes[: t + 1], bonds[t + 1]) for t in range(len(out_modes))]


# Output modes, input modes, inner ranks; for both kinds of train.
_TRAINS: list[tuple[Any, ...]] = [
    ((2, 2), (2, 2), 2),
    ((3, 2), (2, 4), 1),
    ((2, 4), (3, 1), 3),  # a mode of size 1, a rank beyond the useful
    ((7, 1), (1, 5), 2),  # primes
    ((3,), (4,)),  # one core
    ((2, 3, 2), (3, 1, 2), 2, 3),  # unequal ranks
    ((2, 2, 3), (2, 2, 2), 3, 1),
    ((2, 1, 2, 2), (2, 2, 1, 3), 2, 3, 2),  # four cores
]

# The first case of every structure is 4 x 4, so that any two can be multiplied and added.
CASES: dict[str, list[Case]] = {
    "Dense": [_case("Dense", shape) for shape in ((4, 4), (3, 5), (6, 2), (1, 1))],
    "LowRank": [
        _case("LowRank", (m, r), (r, n))
        for m, r, n in ((4, 2, 4), (3, 2, 5), (6, 1, 4), (1, 3, 2))  # the last of more rank than it can have
    ],
    "Kron": [
        _case("Kron", (2, 2), (2, 2)),
        _case("Kron", (2, 3), (4, 2)),
        _case("Kron", (3, 1), (1, 4)),
        _case("Kron", (3, 2)),
        _case("Kron", (2, 1), (3, 2), (1, 3)),
        _case("Kron", (2, 3), _case("LowRank", (3, 1), (1, 2))),
        _case("Kron", _case("Toeplitz", (3,), (2,)), _case("Permutation", Indices(3))),
        _case("Kron", _case("Permutation", Indices(2)), _case("Permutation", Indices(3))),
        _case("Kron", _case("TT", tt_cores((2, 2), (1, 2), 2)), (2, 1), _case("Kron", (1, 2), (2, 1))),
    ],
    "TT": [_case("TT", tt_cores(*train)) for train in _TRAINS],
    "BTT": [_case("BTT", btt_cores(*train)) for train in _TRAINS],
    "Monarch": [
        # (blocks, s, q), (blocks, q, p): blocks equal q, divide q, are divided by q, neither
        _case("Monarch", (2, 2, 2), (2, 2, 2)),
        _case("Monarch", (2, 3, 4), (2, 4, 2)),
        _case("Monarch", (4, 1, 2), (4, 2, 3)),
        _case("Monarch", (2, 5, 3), (2, 3, 3)),
        _case("Monarch", (3, 2, 4), (3, 4, 4)),
        _case("Monarch", (1, 3, 2), (1, 2, 4)),
        _case("Monarch", (2, 4, 4), (2, 4, 4), in_features=7, out_features=7, labels={"padded"}),
        _case("Monarch", (3, 2, 2), (3, 2, 3), in_features=8, out_features=5, labels={"padded"}),
        _case("Monarch", (3, 4, 3), (3, 3, 2), in_features=5, labels={"padded"}),
    ],
    "BlockDiag": [
        _case("BlockDiag", (2, 2), (2, 2)),
        _case("BlockDiag", (1, 3), (1, 3), (1, 3)),
        _case("BlockDiag", (2, 3), (4, 1)),
        _case("BlockDiag", (3, 2), (1, 2), multiplicities=(2, 3)),
        _case("BlockDiag", _case("LowRank", (3, 1), (1, 2)), (2, 2), multiplicities=(1, 2)),
        _case("BlockDiag", _case("BlockDiag", (2, 1), (1, 2)), _case("Permutation", Indices(3))),
        _case("BlockDiag", _case("Permutation", Indices(2)), _case("Permutation", Indices(3)), multiplicities=(2, 1)),
    ],
    "BLAST": [
        _case("BLAST", (i, m, r), (i, j, r), (j, n, r))
        for i, m, j, n, r in ((2, 2, 2, 2, 3), (2, 3, 3, 1, 2), (3, 1, 1, 4, 2), (1, 4, 2, 2, 1))
    ],
    "Circulant": [_case("Circulant", (n,), labels={"fft"}) for n in (4, 1, 5, 6)],
    "Toeplitz": [
        _case("Toeplitz", (m,), (n,), labels={"fft"}) for m, n in ((4, 4), (3, 5), (7, 2), (1, 4), (4, 1), (1, 1))
    ],
    "Convolution": [
        _case("Convolution", (1, 1, 3), spatial_shape=(4,), padding="same"),
        _case("Convolution", (2, 3, 3), spatial_shape=(5,)),
        _case("Convolution", (3, 2, 2), spatial_shape=5, padding="same"),
        _case("Convolution", (2, 1, 4), spatial_shape=(4,), padding="circular"),
        _case("Convolution", (1, 2, 5), spatial_shape=(3,), padding="same"),  # a window beyond the input
        _case("Convolution", (2, 2, 1), spatial_shape=(3,)),
        _case("Convolution", (2, 2, 2, 3), spatial_shape=(3, 4)),
        _case("Convolution", (1, 2, 3, 2), spatial_shape=(3, 2), padding="same"),
        _case("Convolution", (2, 1, 2, 3), spatial_shape=(2, 3), padding="circular"),
    ],
    "Permutation": [_case("Permutation", Indices(n), labels={"exact"}) for n in (4, 1, 7)],
    "Einsum": [
        _case("Einsum", [(2, 2, 2), (2, 2, 2)], pattern="cd, bcd, abc -> ab"),
        _case("Einsum", [(2, 3, 2), (3, 2, 3), (4, 3, 2)], pattern="xyz, kyz, jky, ijx -> ijk"),  # skips a mode
        _case("Einsum", [(2,) * 4] * 3, pattern="xyz, kxyz, jkxy, ijkx -> ijk"),  # butterfly of size 8
        _case("Einsum", [(2, 3, 2, 2, 1), (2, 2, 2, 3, 2)], pattern="gba, fdrga, ferbg -> fed"),
        _case("Einsum", [(2, 2, 2, 3, 2), (2, 3, 2, 2, 1)], pattern="gba, ferbg, fdrga -> fed"),
        _case("Einsum", [(5,)], pattern="j, j -> j"),  # diagonal
        _case("Einsum", [(3, 2)], pattern="ct, dc -> dt", sizes={"t": 3}),  # a mode that only passes through
        _case("Einsum", [(2, 3, 2), (3, 2, 2)], pattern="kp, kqp, kq=rl, lsr -> sl", sizes={"r": 2, "l": 3}),
        _case("Einsum", [(2, 3), (2, 2)], pattern="ab, cb, ac=de, fe -> fd", sizes={"a": 2, "d": 2}),
    ],
    "Diagonal": [_case("Diagonal", (n,), labels={"elementwise"}) for n in (4, 1, 5)],
}


def identity(like: Array, size: int) -> Identity:
    """The identity of the library and dtype of a number."""
    return Identity(size, like=like)


def zero(like: Array, rows: int, cols: int) -> Zero:
    """The zero matrix of the library and dtype of a number."""
    return Zero(rows, cols, like=like)


def identity_case(size: int) -> Case:
    """The identity; the argument tells library and dtype alone."""
    return Case(identity, ((),), {"size": size}, lambda like, size: np.eye(size))


def zero_case(rows: int, cols: int) -> Case:
    """The zero matrix; the argument tells library and dtype alone."""
    return Case(zero, ((),), {"rows": rows, "cols": cols}, lambda like, rows, cols: np.zeros((rows, cols)))


def multiple_case(size: int) -> Case:
    """A number times the identity."""
    return Case(ScalarMul, ((),), {"size": size}, lambda c, size: c * np.eye(size))


def scalar_cases() -> list[Case]:
    """Identities, zeros and multiples of the identity, first those of 4 x 4."""
    square = [case(n) for n in (4, 1, 3) for case in (identity_case, multiple_case, lambda n: zero_case(n, n))]
    return [*square, zero_case(2, 3), zero_case(3, 1)]


def operator_cases(*tags: str) -> list[Case]:
    """The cases of all registered structures that have all these tags."""
    cases = [case for name in OPERATORS for case in CASES.get(name, [])]
    return [case for case in cases if case.tags.issuperset(tags)]


def representatives() -> list[Case]:
    """One 4 x 4 case of every registered structure, so that any two can be multiplied and added."""
    return [CASES[name][0] for name in OPERATORS if name in CASES]


def leaves(arguments: Any) -> list[Array]:
    """The arrays in a tree of drawn arguments, in order."""
    if isinstance(arguments, tuple | list):
        return [leaf for part in arguments for leaf in leaves(part)]
    return [arguments]


def with_leaf(arguments: Any, index: int, array: Array) -> Any:
    """The tree of drawn arguments with another array in one place."""
    count = iter(range(len(leaves(arguments))))

    def put(part: Any) -> Any:
        if isinstance(part, tuple | list):
            return type(part)(map(put, part))
        return array if next(count) == index else part

    return put(arguments)
