"""Blocks of low rank in the norm of a covariance: sweeps for block tensor-train of two cores and Monarch.

Rows of the matrix that belong to different blocks of outputs do not meet.  Within one, the block of rows ``W`` is to be
near ``[L_1 R_1, ..., L_c R_c]`` in the norm of C, which couples the blocks of columns.  A sweep has two steps:

1. all L together, a least-squares problem with c * rank unknowns a row;
2. for every block j, both L_j and R_j: what the others leave of it, ``Z = W_j + (D C - D_j C_jj) C_jj^+`` with D what
   is left of W, is approximated by the closed form for one block, ``L_j = U`` and ``R_j = U^H Z``, with U the first
   left singular vectors of ``Z C_jj^(1/2)``.

Neither makes the error grow.  With one block of columns, which is low rank, step 2 alone is the optimum.
"""

from __future__ import annotations

from structops import _array
from structops._array import Array
from structops.chain import Chain
from structops.projection import factoring
from structops.projection.alternating import has_converged
from structops.projection.solving import positive_inverse, root_and_inverse
from structops.projection.target import Factors, Target, column_labels, contract, ordered, passing_labels, primed

# Axes here: p labels of both input and output, o blocks of outputs, c blocks of inputs, a rows, d columns, s bond.


def is_blocks(chain: Chain) -> bool:
    """Whether the chain has two factors, one for rows of blocks and one for their columns."""
    names = [step.labels for step in chain.factor_steps]
    if len(names) != 2:
        return False
    _, _, _, cols, rows, _ = _groups(chain)
    inputs, columns = passing_labels(chain), column_labels(chain)
    has_own_sides = set(cols) <= set(columns) and set(rows) <= set(chain.terms[-1])
    return has_own_sides and all(label in name for label in inputs for name in names)


def has_one_column(chain: Chain) -> bool:
    """Whether there is one block of columns, so that step 2 is the optimum."""
    return chain.size(_groups(chain)[2]) == 1


def _groups(chain: Chain) -> tuple[str, str, str, str, str, str]:
    """The labels of every axis: p, o, c, d, a, s."""
    first, last = (step.labels for step in chain.factor_steps)
    labels, passing = chain.terms[-1] + column_labels(chain), passing_labels(chain)
    blocks, cols, rows, bond = factoring.cut(labels, first, last)
    outer = "".join(n for n in blocks if n in chain.terms[-1] and n not in passing)
    inner = "".join(n for n in blocks if n not in chain.terms[-1])
    return passing, outer, inner, cols, rows, bond


def swept(target: Target, factors: Factors, sweeps: int, live: Array | None, blocks: str) -> Factors:
    """Factors after some sweeps, or fewer where a sweep no longer helps.

    Args:
        target: With a covariance, of a chain of blocks.
        factors: A start, in order of application, one axis a label.
        sweeps: The most sweeps.
        live: 1 for the bonds of a block that exist and 0 for others, axes ``blocks`` and the bond; None if all do.
        blocks: The labels of the axes of ``live``.
    """
    state = _Sweep(target, factors, live, blocks)
    if state.count == 1:
        state.one_block(0)
        return state.factors()
    left = target.loss(factors)
    for _ in range(sweeps):
        state.all_left()
        for j in range(state.count):
            state.one_block(j)
        before, left = left, target.loss(state.factors())
        if has_converged(before, left, target.total):
            break
    return state.factors()


class _Sweep:
    """The numbers that the steps pass on.

    Attributes:
        L: One array (p, o, a, s) a block of columns.
        R: One array (p, o, s, d) a block of columns.
        W: The blocks of the matrix, (p, o, a, d) each.
        D: What is left of them.
        Q: ``(W - A) C``, (p, o, a, c, d).
    """

    def __init__(self, target: Target, factors: Factors, live: Array | None, blocks: str) -> None:
        self.target, chain = target, target.chain
        self.groups = p, o, c, d, a, s = _groups(chain)
        self.count, self.rank, self.size = chain.size(c), chain.size(s), chain.size
        self.xp = _array.namespace(target.tensor)
        first, last = target.names
        self.R = self._columns(factors[0], first, (p, o, s, d))
        self.L = self._columns(factors[1], last, (p, o, a, s))
        self.W = self._columns(target.tensor, target.labels, (p, o, a, d))
        self.live = None if live is None else self._columns(live, blocks + s, (o, s))
        self.D = [W - L @ R for W, L, R in zip(self.W, self.L, self.R, strict=True)]
        columns = column_labels(chain)
        spread = ordered(target.covariance, p + columns + primed(columns), p + c + d + primed(c + d))
        self.C = spread.reshape((chain.size(p), *(self.count, chain.size(d)) * 2))
        own = self.xp.stack([self.C[:, j, :, j, :] for j in range(self.count)])  # c, p, d, d
        self.roots, self.inverses = root_and_inverse(own)
        step = ordered(target.descent(factors), target.labels, p + o + a + c + d)
        self.Q = step.reshape(tuple(map(chain.size, (p, o, a, c, d))))

    def _columns(self, array: Array, labels: str, axes: tuple[str, ...]) -> list[Array]:
        """One array for every block of columns."""
        c = self.groups[2]
        moved = ordered(array, labels, c + "".join(axes))
        moved = moved.reshape((self.count, *map(self.size, axes)))
        return [moved[j] for j in range(self.count)]

    def all_left(self) -> None:
        """Step 1."""
        xp, c, s = self.xp, self.count, self.rank
        R = xp.stack(self.R, axis=2)  # p, o, c, s, d
        seen = contract([("pocsd", R), ("pcdCD", self.C)], "pocsCD")
        gram = contract([("pocsCD", seen), ("poCSD", xp.conj(R))], "pocsCS")
        right = contract([("poacd", self.Q), ("pocsd", xp.conj(R))], "poacs")
        lead, rows = tuple(right.shape[:2]), int(right.shape[2])
        inverse = positive_inverse(gram.reshape((*lead, c * s, c * s)))
        change = (right.reshape((*lead, rows, c * s)) @ inverse).reshape(right.shape)
        for j in range(c):
            self.L[j] = self.L[j] + change[:, :, :, j]
            self.D[j] = self.D[j] - change[:, :, :, j] @ self.R[j]
        self.Q = self.Q - contract([("poacs", change), ("pocsCD", seen)], "poaCD")

    def one_block(self, j: int) -> None:
        """Step 2 for one block of columns."""
        own, D = self.C[:, None, j, :, j, :], self.D[j]
        Q = self.Q[:, :, :, j]
        Z = self.W[j] + (Q - D @ own) @ self.inverses[j][:, None]
        U = factoring.left_vectors(Z @ self.roots[j][:, None], self.rank)
        if self.live is not None:
            U = U * self.live[j][:, None, :]
        R = _array.adjoint(U) @ Z
        change = U @ R - self.L[j] @ self.R[j]
        lost = contract([("poad", change), ("pdCD", self.C[:, j])], "poaCD")
        self.L[j], self.R[j], self.D[j], self.Q = U, R, D - change, self.Q - lost

    def factors(self) -> Factors:
        """In order of application, one axis a label."""
        p, o, c, d, a, s = self.groups
        result = []
        for stack, axes, name in ((self.R, p + o + s + d, 0), (self.L, p + o + a + s, 1)):
            labels = c + axes
            array = self.xp.stack(stack).reshape(self.target.chain.shape_of(labels))
            result.append(ordered(array, labels, self.target.names[name]))
        return result
