"""Chains that re-read their state between two factors, written without: what is left of Monarch where nothing divides.

In ``kp, kqp, kq=rl, lsr -> sl`` the state has one place for every (k, q), which is also one (r, l).  The block (k, l)
of the matrix, (s, p), is a sum over the places that lie in both k and l, and no place lies in two blocks.  So the chain
is ``kp, klup, klus -> sl`` with a bond u that counts the places of a block; blocks differ in how many they have.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import chain as joined

import numpy as np

from structops import _array
from structops._array import Array
from structops.chain import Chain
from structops.errors import StructureError
from structops.pattern import Regroup
from structops.projection.target import Factors, ordered


@dataclass(frozen=True)
class Plain:
    """A chain without regroups, and the way back.

    Attributes:
        chain: The pattern.
        ranks: How many places every block has, the axes those of ``blocks``; None where all have the full bond.
        blocks: The labels of the blocks.
        places: The block and the index in it of every place, as one number; the same for both factors.
        original: The pattern that is replaced.
    """

    chain: Chain
    original: Chain
    ranks: np.ndarray | None = None
    blocks: str = ""
    places: np.ndarray | None = None

    def restored(self, factors: Factors) -> Factors:
        """The factors of the original chain, one axis a label, from those of the plain one."""
        if self.ranks is None:
            return factors
        regroup = next(step for step in self.original.steps if isinstance(step, Regroup))
        result = []
        for array, step, labels in zip(
            factors, self.original.factor_steps, (regroup.before, regroup.after), strict=True
        ):
            own = "".join(label for label in step.labels if label not in labels)
            flat = array.reshape((self.ranks.size * self._bond, *self.original.shape_of(own)))
            index = _array.namespace(array).asarray(self.places, device=array.device)
            picked = flat[index].reshape(self.original.shape_of(labels + own))
            result.append(ordered(picked, labels + own, step.labels))
        return result

    def trimmed(self, factors: Factors) -> Factors:
        """The plain factors with zeros at the places that do not exist, which `restored` leaves out."""
        live = self.live(factors[0])
        if live is None:
            return factors
        return [array * live.reshape((*live.shape, *(1,) * (array.ndim - live.ndim))) for array in factors]

    @property
    def _bond(self) -> int:
        return self.chain.size(_unused(self.original))

    def live(self, like: Array) -> Array | None:
        """1 for the places that exist and 0 for others, the axes ``blocks`` and the bond; None where all exist."""
        if self.ranks is None:
            return None
        mask = np.arange(self._bond) < self.ranks[..., None]
        return _array.namespace(like).asarray(mask.astype(np.float64), dtype=like.dtype, device=like.device)


@cache
def plain(chain: Chain) -> Plain:
    """The chain without its regroup.

    Raises:
        StructureError: It regroups in another way than between two factors that each have the whole state.
    """
    regroups = [step for step in chain.steps if isinstance(step, Regroup)]
    if not regroups:
        return Plain(chain, chain)
    names = [step.labels for step in chain.factor_steps]
    before, after, inputs, outputs = regroups[0].before, regroups[0].after, chain.terms[0], chain.terms[-1]
    is_free = (
        len(names) == 2
        and len(regroups) == 1
        and set(before) <= set(names[0])
        and set(after) <= set(names[1])
        and not set(inputs + names[0]) & set(names[1] + outputs)
    )
    if not is_free:
        raise StructureError(
            f"{chain} regroups its state in a way that has no projection; one that has regroups once, between two "
            f"factors, each with all labels of the state on its side: 'kp, kqp, kq=rl, lsr -> sl'"
        )
    first, last = "".join(n for n in before if n in inputs), "".join(n for n in after if n in outputs)
    blocks = _index(chain, before, first) * chain.size(last) + _index(chain, after, last)
    counts = np.bincount(blocks, minlength=chain.size(first + last))
    bond, label = int(counts.max()), _unused(chain)
    order = np.argsort(blocks, kind="stable")
    slot = np.empty_like(order)
    slot[order] = np.concatenate([np.arange(count) for count in counts])
    own = ["".join(n for n in name if n not in side) for name, side in zip(names, (before, after), strict=True)]
    terms = [inputs, *(first + last + label + rest for rest in own)]
    sizes = {n: size for n, size in dict(chain.sizes).items() if n in set(joined(*terms, outputs))} | {label: bond}
    pattern = ", ".join(terms) + " -> " + outputs
    flat = Chain(pattern, sizes, chain.in_features, chain.out_features)
    ranks = counts.reshape(chain.shape_of(first + last))
    return Plain(flat, chain, ranks, first + last, blocks * bond + slot)


def _index(chain: Chain, state: str, labels: str) -> np.ndarray:
    """For every place of a state, the flat index of some of its labels."""
    places = np.unravel_index(np.arange(chain.size(state)), chain.shape_of(state))
    chosen = [places[state.index(label)] for label in labels]
    if not labels:
        return np.zeros(chain.size(state), dtype=np.int64)
    return np.ravel_multi_index(chosen, chain.shape_of(labels)).astype(np.int64)


def _unused(chain: Chain) -> str:
    """A label that the chain does not have."""
    used = set("".join(chain.terms))
    return next(label for label in map(chr, range(ord("a"), 0x10000)) if label.isalnum() and label not in used)
