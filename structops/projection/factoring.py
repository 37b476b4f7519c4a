"""Factors from singular value decompositions, one bond after another: the closed form of every two-factor chain.

Cut a chain after its first factor.  A label of input or output on both sides of the cut makes *blocks*; the others are
rows or columns of a block, and the bond, the labels that are neither input nor output, is its rank::

    cd, sbcd, abcs -> ab        blocks b, c;  each is a matrix (a, d) of rank s

Every member has blocks of that rank.  With one cut every such set of blocks is a member, and no two blocks share a
number: truncated singular value decompositions, one a block, give the nearest member.  Low rank (no blocks), block
tensor-train and Monarch, tensor-train of two cores and Kronecker products (no blocks, rows and columns from both input
and output: the rearrangement of Van Loan and Pitsianis) are the same few lines.

Singular vectors of 32-bit matrices come from the eigenvectors of the Gram matrix of the shorter side of a block, in
double precision.  The sum of the squares of what is dropped is then right to the rounding of doubles, as exact as 32
bits can say.  Blocks, and the columns of large blocks, are worked on in pieces.

With more factors, the right singular vectors are the first factor, and what is left (left vectors times values) is the
target of the rest of the chain, the bond one more label of its input.  For trains that is within sqrt(cuts) of the
best: what the cuts drop is orthogonal, so its squares add up, and every cut drops at most what the best member must.
"""

from __future__ import annotations

from structops import _array
from structops._array import Array
from structops.chain import Chain
from structops.pattern import Regroup
from structops.projection.solving import gram, has_double, leading_vectors, pieces
from structops.projection.target import Factors, Target, ordered


def sequence(target: Target) -> Factors:
    """Factors in order of application, one axis a label, all but the last with orthonormal rows in every block."""
    names, size = target.names, target.chain.size
    tensor, labels = target.tensor, target.labels
    unused = [label for label in labels if all(label not in name for name in names)]
    for label in unused:  # a mode that passes through sees one matrix for all its values: their mean is nearest
        tensor, labels = tensor.mean(labels.index(label)), labels.replace(label, "")
    factors = []
    for k, name in enumerate(names[:-1]):
        later = "".join(names[k + 1 :])
        blocks, cols, rows, bond = cut(labels, name, later)
        moved = ordered(tensor, labels, blocks + rows + cols)
        found = []
        for part in pieces(moved.shape, len(blocks)):
            matrix = moved[part].reshape((-1, size(rows), size(cols)))
            found.append(truncated(matrix, size(bond), is_last=k == len(names) - 2))
        left, right = (_joined([pair[side] for pair in found]) for side in (0, 1))
        factors.append(_tensor(target, right, blocks + bond + cols, name))
        tensor, labels = left.reshape(target.chain.shape_of(blocks + rows + bond)), blocks + rows + bond
    return [*factors, _tensor(target, tensor, labels, names[-1])]


def cut(labels: str, name: str, later: str) -> tuple[str, str, str, str]:
    """Blocks, columns, rows and bond of the cut between a factor and those after it."""
    blocks = "".join(label for label in labels if label in name and label in later)
    cols = "".join(label for label in labels if label in name and label not in later)
    rows = "".join(label for label in labels if label not in name)
    return blocks, cols, rows, "".join(label for label in name if label not in labels)


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else _array.namespace(parts[0]).concat(parts, axis=0)


def truncated(matrix: Array, rank: int, is_last: bool = True) -> tuple[Array, Array]:
    """Left (blocks, m, rank) and right (blocks, rank, n) of the nearest matrices of a rank; zeros beyond useful ranks.

    Either the left or the right vectors are orthonormal, and the right ones unless this is the last cut.
    """
    left, right = _by_gram(matrix, rank, is_last) if _is_single(matrix) else _by_values(matrix, rank)
    missing = rank - int(left.shape[-1])
    if missing > 0:
        left = _array.pad(left, [(0, 0), (0, missing)])
        right = _array.pad(right, [(0, missing), (0, 0)])
    return left, right


def _is_single(matrix: Array) -> bool:
    """Whether double precision has the squares of all its numbers."""
    return has_double(matrix) and _array.wide(matrix) != matrix.dtype


def _by_values(matrix: Array, rank: int) -> tuple[Array, Array]:
    U, S, Vh = _array.namespace(matrix).linalg.svd(matrix, full_matrices=False)
    return U[..., :rank] * S[..., None, :rank], Vh[..., :rank, :]


def _by_gram(matrix: Array, rank: int, is_last: bool) -> tuple[Array, Array]:
    rows, cols = matrix.shape[1:]
    if cols < rows:
        V = _array.cast(leading_vectors(gram(matrix.mT), rank), matrix.dtype)  # of M^T (M^T)^H: conjugate
        return matrix @ _array.namespace(V).conj(V), V.mT
    U = _array.cast(leading_vectors(gram(matrix), rank), matrix.dtype)
    right = _array.adjoint(U) @ matrix
    if is_last:
        return U, right
    Q, R = _array.namespace(right).linalg.qr(_array.adjoint(right))
    return U @ _array.adjoint(R), _array.adjoint(Q)


def seen_vectors(matrix: Array, covariance: Array, root: Array | None, rank: int) -> Array:
    """The first left singular vectors of ``matrix C^(1/2)``, (..., m, rank); zeros beyond their number.

    Args:
        matrix: Shape (..., m, n), of the dtype of the covariance.
        covariance: C, shape (..., n, n).
        root: ``C^(1/2)``; what `needs_root` says may be None.
        rank: How many.
    """
    xp = _array.namespace(matrix)
    if root is None:
        U = leading_vectors((matrix @ covariance) @ _array.adjoint(matrix), rank)
    elif has_double(matrix):
        seen = matrix @ root
        U = xp.linalg.qr(seen @ leading_vectors(_array.adjoint(seen) @ seen, rank))[0]
    else:
        U = xp.linalg.svd(matrix @ root, full_matrices=False)[0][..., :rank]
    missing = rank - int(U.shape[-1])
    return _array.pad(U, [(0, 0), (0, missing)]) if missing > 0 else U


def needs_root(matrix: Array) -> bool:
    """Whether `seen_vectors` is cheaper or more exact with the root of the covariance."""
    return matrix.shape[-1] < matrix.shape[-2] or not has_double(matrix)


def _tensor(target: Target, array: Array, labels: str, name: str) -> Array:
    """An array whose axes are ``labels`` in the order of a factor."""
    return ordered(array.reshape(target.chain.shape_of(labels)), labels, name)


def is_train(chain: Chain) -> bool:
    """Whether every bond joins two neighbours and every other label lies in neighbouring factors.

    Then orthonormal rows of one factor stay so in all later cuts, and the errors of the cuts add in squares.
    """
    names = [step.labels for step in chain.factor_steps]
    for label in set("".join(names)):
        places = [k for k, name in enumerate(names) if label in name]
        is_bond = label not in chain.terms[0] + chain.terms[-1]
        if places[-1] - places[0] + 1 != len(places) or (is_bond and len(places) != 2):
            return False
    return not any(isinstance(step, Regroup) for step in chain.steps)


def splits_padding(chain: Chain) -> bool:
    """Whether the true entries of every block of a two-factor chain are some of its rows times some of its columns.

    Then zeros in place of the padded entries do not move the singular vectors of the true ones.
    """
    names = [step.labels for step in chain.factor_steps]
    if chain.shape == (chain.padded_out, chain.padded_in) or len(names) != 2:
        return chain.shape == (chain.padded_out, chain.padded_in)
    for side, true, padded in (
        (chain.terms[-1], chain.out_features, chain.padded_out),
        (chain.terms[0], chain.in_features, chain.padded_in),
    ):
        inner = [label for label in side if chain.size(label) > 1 and not all(label in name for name in names)]
        if true != padded and len({label in names[0] for label in inner}) > 1:
            return False
    return True
