"""Bonds: the labels of a chain that join its factors and are neither input nor output, such as the ranks of a train.

Two chains of one pattern add up to a chain whose bonds are as long as theirs together, and a bond can be shortened by
singular value decompositions.  Low rank, tensor-train, block tensor-train, Monarch and BLAST need nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from structops import _array
from structops._array import Array
from structops._cola import LinearOperator
from structops.algebra.product import transposed
from structops.algebra.sum import sum_rule
from structops.chain import Chain
from structops.chain_operator import ChainOperator


def bonds(chain: Chain) -> str:
    """The labels that are neither in the input nor in the output, in order of first use."""
    seen = dict.fromkeys("".join(chain.terms[1:-1]))
    return "".join(label for label in seen if label not in chain.terms[0] + chain.terms[-1] + "=")


def has_direct_sum(chain: Chain) -> bool:
    """Whether longer bonds give the sum: there is one factor, or bonds join all, and the state is never re-read."""
    names = [step.labels for step in chain.factor_steps]
    if len(names) < len(chain.steps):
        return False
    joined, rest = set(names[0]) & set(bonds(chain)), names[1:]
    while rest:
        touching = [name for name in rest if joined & set(name)]
        if not touching:
            return False
        joined |= {label for name in touching for label in name if label in bonds(chain)}
        rest = [name for name in rest if name not in touching]
    return True


def direct_sum(A: ChainOperator, B: ChainOperator) -> LinearOperator | None:
    """``A + B`` for two chains of one class that differ in the length of their bonds alone, else None.

    Every factor holds that of A at the first places of its bonds and that of B at the last.
    """
    chain, other = A.chain, B.chain
    inner = bonds(chain)
    outer, same_outer = ({label: n for label, n in dict(c.sizes).items() if label not in inner} for c in (chain, other))
    if chain.pattern != other.pattern or outer != same_outer or chain.shape != other.shape or not has_direct_sum(chain):
        return None
    sizes = outer | {label: chain.size(label) + other.size(label) for label in inner}
    arrays = [
        _placed(step.labels, inner, first, last)
        for step, first, last in zip(chain.factor_steps, A.label_arrays, B.label_arrays, strict=True)
    ]
    return type(A).from_arrays(Chain(chain.pattern, sizes, chain.in_features, chain.out_features), arrays)


def _placed(labels: str, inner: str, first: Array, last: Array) -> Array:
    """Two factors in one: side by side along one bond, in opposite corners along several, added where there is none."""
    axes = [axis for axis, label in enumerate(labels) if label in inner]
    if not axes:
        return first + last
    dtype = _array.promote(first.dtype, last.dtype)
    before = [(0, int(last.shape[axis])) if axis in axes[1:] else (0, 0) for axis in range(first.ndim)]
    after = [(int(first.shape[axis]), 0) if axis in axes[1:] else (0, 0) for axis in range(first.ndim)]
    parts = [_array.cast(_array.pad(array, widths), dtype) for array, widths in ((first, before), (last, after))]
    return _array.namespace(first).concat(parts, axis=axes[0])


@sum_rule.dispatch
def sum_chains(A: ChainOperator, B: ChainOperator) -> LinearOperator | None:
    """Chains of one structure, both or neither transposed."""
    if type(A) is not type(B):
        return None
    A, B = A.untransposed(), B.untransposed()
    if A.is_transposed != B.is_transposed:
        return None
    if not A.is_transposed:
        return direct_sum(A, B)
    return transposed(direct_sum(A.T, B.T))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- rounding


def train_of(chain: Chain) -> str | None:
    """The bonds between consecutive factors if every two neighbours share exactly one and no others do, else None.

    All other labels must lie in consecutive factors, too, so that what is orthogonal block by block stays so.
    """
    names = [step.labels for step in chain.factor_steps]
    inner = bonds(chain)
    found = ""
    for left, right in pairwise(names):
        common = [label for label in inner if label in left and label in right]
        if len(common) != 1:
            return None
        found += common[0]
    path = len(set(found)) == len(found) == len(inner) and len(names) == len(chain.steps)
    return found if path and all(_is_run([label in name for name in names]) for label in set("".join(names))) else None


def _is_run(present: list[bool]) -> bool:
    """Whether all that is true is in one piece."""
    return "".join("x" if here else " " for here in present).strip().count(" ") == 0


def rounded(chain: Chain, arrays: Sequence[Array], ranks: Sequence[int]) -> tuple[Chain, list[Array], Array]:
    """The train with shorter bonds, and the relative error: the root of the sum of squares of what was dropped.

    Factors are orthogonalised from the last applied to the first, then every bond is cut by a singular value
    decomposition, from the first applied to the last.  The labels that two neighbours share beside the bond make blocks
    that are decomposed one by one.

    Args:
        chain: A train; see `train_of`.
        arrays: Its factors in order of application, one axis a label.
        ranks: The length to cut every bond to, in order of application.
    """
    names = [step.labels for step in chain.factor_steps]
    cut, factors = train_of(chain) or "", list(arrays)
    xp = _array.namespace(factors[0])
    size = dict(chain.sizes)
    for k in range(len(names) - 1, 0, -1):  # orthogonal columns towards the input
        batch, rest = _split(names[k], names[k - 1], cut[k - 1])
        Q, R = xp.linalg.qr(_matrix(factors[k], names[k], batch, rest, cut[k - 1], size))
        size_before, size[cut[k - 1]] = size[cut[k - 1]], int(Q.shape[-1])
        factors[k] = _tensor(Q, names[k], batch, rest, cut[k - 1], size)
        factors[k - 1] = _absorbed(R, factors[k - 1], names[k - 1], batch, cut[k - 1], size | {cut[k - 1]: size_before})
    total = (xp.abs(factors[0]) ** 2).sum()  # all other factors have orthogonal columns now
    dropped = 0 * total
    for k, rank in enumerate(ranks):  # the bond between factors k and k + 1
        batch, rest = _split(names[k], names[k + 1], cut[k])
        U, S, Vh = xp.linalg.svd(_matrix(factors[k], names[k], batch, rest, cut[k], size), full_matrices=False)
        rank = min(int(rank), int(S.shape[-1]))
        dropped = dropped + (S[..., rank:] ** 2).sum()
        size_before, size[cut[k]] = size[cut[k]], rank
        factors[k] = _tensor(U[..., :rank], names[k], batch, rest, cut[k], size)
        push = S[..., :rank, None] * Vh[..., :rank, :]
        factors[k + 1] = _absorbed(push, factors[k + 1], names[k + 1], batch, cut[k], size | {cut[k]: size_before})
    result = Chain(chain.pattern, size, chain.in_features, chain.out_features)
    return result, factors, xp.sqrt(dropped / total)


def _split(name: str, neighbour: str, bond: str) -> tuple[str, str]:
    """The labels of a factor that its neighbour has too, and those that it has alone; without the bond."""
    batch = "".join(label for label in name if label in neighbour and label != bond)
    return batch, "".join(label for label in name if label not in neighbour)


def _matrix(array: Array, name: str, batch: str, rest: str, bond: str, size: dict[str, int]) -> Array:
    """A factor as (blocks, its own labels, bond)."""
    order = tuple(name.index(label) for label in batch + rest + bond)
    shape = [_size(labels, size) for labels in (batch, rest, bond)]
    return _array.permute(array, order).reshape(shape)


def _tensor(matrix: Array, name: str, batch: str, rest: str, bond: str, size: dict[str, int]) -> Array:
    """The inverse of `_matrix`."""
    order = batch + rest + bond
    array = matrix.reshape(tuple(size[label] for label in order))
    return _array.permute(array, tuple(order.index(label) for label in name))


def _absorbed(R: Array, array: Array, name: str, batch: str, bond: str, size: dict[str, int]) -> Array:
    """A factor times R (blocks, new bond, bond) along the bond; ``size`` is that before."""
    rest = "".join(label for label in name if label not in batch + bond)
    matrix = _matrix(array, name, batch, rest, bond, size) @ R.mT
    return _tensor(matrix, name, batch, rest, bond, size | {bond: int(R.shape[1])})


def _size(labels: str, size: dict[str, int]) -> int:
    total = 1
    for label in labels:
        total *= size[label]
    return total
