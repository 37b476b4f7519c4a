"""Blocks of low rank in the norm of a covariance: sweeps for block tensor-train of two cores and Monarch.

Rows of the matrix that belong to different blocks of outputs do not meet.  Within one, the block of rows ``W`` is to be
near ``[L_1 R_1, ..., L_c R_c]`` in the norm of C, which couples the blocks of columns.  A sweep has two steps:

1. all L together, a least-squares problem with c * rank unknowns a row;
2. for every block j, both L_j and R_j: what the others leave of it, ``Z = W_j + (D C - D_j C_jj) C_jj^+`` with D what
   is left of W, is approximated by the closed form for one block, ``L_j = U`` and ``R_j = U^H Z``, with U the first
   left singular vectors of ``Z C_jj^(1/2)``.

Neither makes the error grow.  With one block of columns, which is low rank, step 2 alone is the optimum.  Blocks of
outputs are worked on in slices, so that only one slice is in double precision at a time.
"""

from __future__ import annotations

from structops import _array
from structops._array import Array
from structops.chain import Chain
from structops.projection import alternating, factoring
from structops.projection.regroup import Plain
from structops.projection.solving import pieces, positive_inverse, root_and_inverse
from structops.projection.target import (
    Factors,
    Target,
    column_labels,
    inner,
    ordered,
    passing_labels,
    primed,
    spread,
)

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


def fitted(flat: Plain, W: Array, covariance: Array, sweeps: int, seed: int | None = None) -> Factors:
    """Factors in order of application, one axis a label, after some sweeps, or fewer where one no longer helps.

    Args:
        flat: A chain of blocks.
        W: Of its true shape, in any dtype.
        covariance: Second moments of the input; its dtype is that of the sweeps.
        sweeps: The most sweeps.
        seed: Of a random start beside the decompositions, whichever ends nearer.
    """
    chain = flat.chain
    groups = _groups(chain)
    outer, names = groups[1], [step.labels for step in chain.factor_steps]
    seen = _Seen(chain, groups, covariance)
    live = flat.live(covariance)
    rows = (
        W
        if chain.padded_out == chain.out_features
        else _array.pad(W, [(0, chain.padded_out - chain.out_features), (0, 0)])
    )
    outputs = chain.terms[-1]
    order = outer + "".join(label for label in outputs if label not in outer)
    view = ordered(rows.reshape((*chain.shape_of(outputs), chain.in_features)), outputs + "\n", order + "\n")
    found: list[Factors] = []
    for part in pieces(view.shape, len(outer)):
        own = view[part]
        sizes = dict(chain.sizes) | dict(zip(order, own.shape[:-1], strict=True))
        own = ordered(own, order + "\n", outputs + "\n").reshape((-1, chain.in_features))
        piece = Chain(chain.pattern, sizes, chain.in_features)
        alive = None
        if live is not None:
            mask = ordered(live, flat.blocks + groups[5], outer + groups[2] + groups[5])[part]
            alive = ordered(mask, outer + groups[2] + groups[5], flat.blocks + groups[5])
        found.append(_piece(piece, own, seen, sweeps, alive, flat.blocks, seed))
    result = []
    for k, name in enumerate(names):
        there = outer + "".join(label for label in name if label not in outer)
        rest = chain.shape_of(there[len(outer) :])
        stacks = [ordered(factors[k], name, there).reshape((-1, *rest)) for factors in found]
        joined = stacks[0] if len(stacks) == 1 else _array.namespace(covariance).concat(stacks, axis=0)
        result.append(ordered(joined.reshape(chain.shape_of(there)), there, name))
    return result


def _piece(
    chain: Chain, W: Array, seen: _Seen, sweeps: int, live: Array | None, blocks: str, seed: int | None
) -> Factors:
    """The factors of a chain with fewer blocks of outputs."""
    if seen.count == 1:
        return _one_column(chain, W, seen)
    first = factoring.sequence(Target.of(chain, W))
    target = Target.of(chain, _array.cast(W, seen.C.dtype), seen.whole)
    starts = [[_array.cast(factor, seen.C.dtype) for factor in first]]
    if seed is not None:
        starts.append(alternating.random(target, seed))
    ends = [_swept(_Sweep(target, start, seen, live, blocks), sweeps) for start in starts]
    return min(ends, key=lambda end: end[0])[1] if len(ends) > 1 else ends[0][1]


def _swept(state: _Sweep, sweeps: int) -> tuple[Array, Factors]:
    """The squared error that is left, and the factors."""
    left = state.loss()
    for _ in range(sweeps):
        state.all_left()
        for j in range(state.seen.count):
            state.one_block(j)
        before, left = left, state.loss()
        if alternating.has_converged(before, left, state.target.total):
            break
    return left, state.factors()


def _one_column(chain: Chain, W: Array, seen: _Seen) -> Factors:
    """One block of columns: the closed form."""
    groups = p, o, _, d, a, s = _groups(chain)
    W = _array.cast(W, seen.C.dtype)
    Z = _columns(chain, groups, Target.of(chain, W).tensor, _labels(chain), (p, o, a, d))[0]
    own = seen.C[:, 0, :, 0, :]
    if p:  # what entries beside the tensor say of those in it
        Q = _columns(chain, groups, Target.of(chain, W, seen.whole).moments, _labels(chain), (p, o, a, d))[0]
        Z = Z + (Q - Z @ own[:, None]) @ seen.inverses(0)[:, None]
    root = seen.root(0)[:, None] if factoring.needs_root(Z) else None
    U = factoring.seen_vectors(Z, own[:, None], root, chain.size(s))
    return _restored(chain, groups, [_array.adjoint(U) @ Z], [U])


class _Seen:
    """What the sweeps need of the covariance, once for all slices.

    Attributes:
        whole: As it was given.
        count: How many blocks of columns.
        C: The axes p, c, d, c, d.
    """

    def __init__(self, chain: Chain, groups: tuple[str, ...], covariance: Array) -> None:
        p, _, c, d, _, _ = groups
        columns = column_labels(chain)
        self.whole, self.count = covariance, chain.size(c)
        C = ordered(spread(chain, covariance), p + columns + primed(columns), p + c + d + primed(c + d))
        self.C = C.reshape((chain.size(p), *(self.count, chain.size(d)) * 2))
        self._found: dict[int, tuple[Array, Array]] = {}

    def root(self, j: int) -> Array:
        """The root of the covariance of a block of columns, (p, d, d)."""
        return self._decomposed(j)[0]

    def inverses(self, j: int) -> Array:
        """Its pseudo-inverse."""
        return self._decomposed(j)[1]

    def _decomposed(self, j: int) -> tuple[Array, Array]:
        if j not in self._found:
            self._found[j] = root_and_inverse(self.C[:, j, :, j, :])
        return self._found[j]


def _labels(chain: Chain) -> str:
    return chain.terms[-1] + column_labels(chain)


def _columns(chain: Chain, groups: tuple[str, ...], array: Array, labels: str, axes: tuple[str, ...]) -> list[Array]:
    """One array for every block of columns."""
    c = groups[2]
    moved = ordered(array, labels, c + "".join(axes))
    moved = moved.reshape((chain.size(c), *map(chain.size, axes)))
    return [moved[j] for j in range(chain.size(c))]


def _restored(chain: Chain, groups: tuple[str, ...], right: Factors, left: Factors) -> Factors:
    """The factors from their blocks of columns."""
    p, o, c, d, a, s = groups
    result = []
    for stack, axes, name in ((right, p + o + s + d, 0), (left, p + o + a + s, 1)):
        labels = c + axes
        array = _array.namespace(stack[0]).stack(stack).reshape(chain.shape_of(labels))
        result.append(ordered(array, labels, chain.factor_steps[name].labels))
    return result


class _Sweep:
    """The numbers that the steps pass on.

    Attributes:
        L: One array (p, o, a, s) a block of columns.
        R: One array (p, o, s, d) a block of columns.
        RC: ``R_j C_j``, (p, o, s, c * d) each.
        W: The blocks of the matrix, (p, o, a, d) each.
        D: What is left of them.
        Q: ``(W - A) C``, (p, o, a, c * d).
    """

    def __init__(self, target: Target, factors: Factors, seen: _Seen, live: Array | None, blocks: str) -> None:
        self.target, self.seen, self.chain = target, seen, target.chain
        chain = self.chain
        self.groups = p, o, c, d, a, s = _groups(chain)
        self.rank, self.width = chain.size(s), chain.size(d)
        first, last = target.names
        self.R = _columns(chain, self.groups, factors[0], first, (p, o, s, d))
        self.L = _columns(chain, self.groups, factors[1], last, (p, o, a, s))
        self.W = _columns(chain, self.groups, target.tensor, target.labels, (p, o, a, d))
        self.live = None if live is None else _columns(chain, self.groups, live, blocks + s, (o, s))
        if self.live is not None:  # the start may use bonds that do not exist
            self.R = [R * mask[..., None] for R, mask in zip(self.R, self.live, strict=True)]
            self.L = [L * mask[..., None, :] for L, mask in zip(self.L, self.live, strict=True)]
        self.D = [W - L @ R for W, L, R in zip(self.W, self.L, self.R, strict=True)]
        self.RC = [self._times_rows(R, j) for j, R in enumerate(self.R)]
        moments = ordered(target.moments, target.labels, p + o + a + c + d)
        self.Q = moments.reshape((*map(chain.size, (p, o, a)), -1))
        for L, RC in zip(self.L, self.RC, strict=True):
            self.Q = self.Q - L @ RC

    def _times_rows(self, R: Array, j: int) -> Array:
        """``R_j C_j``: all that a block of columns says of every block."""
        C = self.seen.C[:, j].reshape((self.chain.size(self.groups[0]), 1, self.width, -1))
        return R @ C

    def loss(self) -> Array:
        """The squared norm of what is left in the metric."""
        p, o, _, _, a, _ = map(self.chain.size, self.groups)
        D = _array.namespace(self.Q).stack(self.D, axis=3).reshape((p, o, a, -1))
        if self.target.whole is None:
            return inner(D, self.Q)
        W = _array.namespace(self.Q).stack(self.W, axis=3).reshape((p, o, a, -1))
        moments = ordered(self.target.moments, self.target.labels, "".join(self.groups[i] for i in (0, 1, 4, 2, 3)))
        return self.target.total - inner(W - D, moments.reshape(self.Q.shape) + self.Q)

    def all_left(self) -> None:
        """Step 1."""
        xp, count, rank = _array.namespace(self.Q), self.seen.count, self.rank
        back = [_array.adjoint(R) for R in self.R]
        parts = [slice(j * self.width, (j + 1) * self.width) for j in range(count)]
        gram = xp.concat(
            [xp.concat([RC[..., part] @ B for part, B in zip(parts, back, strict=True)], axis=-1) for RC in self.RC],
            axis=-2,
        )
        right = xp.concat([self.Q[..., part] @ B for part, B in zip(parts, back, strict=True)], axis=-1)
        change = right @ positive_inverse(gram)
        for j in range(count):
            step = change[..., j * rank : (j + 1) * rank]
            self.L[j] = self.L[j] + step
            self.D[j] = self.D[j] - step @ self.R[j]
            self.Q = self.Q - step @ self.RC[j]

    def one_block(self, j: int) -> None:
        """Step 2 for one block of columns."""
        own, D = self.seen.C[:, None, j, :, j, :], self.D[j]
        Q = self.Q[..., j * self.width : (j + 1) * self.width]
        Z = self.W[j] + (Q - D @ own) @ self.seen.inverses(j)[:, None]
        root = self.seen.root(j)[:, None] if factoring.needs_root(Z) else None
        U = factoring.seen_vectors(Z, own, root, self.rank)
        if self.live is not None:
            U = U * self.live[j][:, None, :]
        R = _array.adjoint(U) @ Z
        RC = self._times_rows(R, j)
        self.D[j] = D - (U @ R - self.L[j] @ self.R[j])
        self.Q = self.Q - (U @ RC - self.L[j] @ self.RC[j])
        self.L[j], self.R[j], self.RC[j] = U, R, RC

    def factors(self) -> Factors:
        """In order of application, one axis a label."""
        return _restored(self.chain, self.groups, self.R, self.L)
