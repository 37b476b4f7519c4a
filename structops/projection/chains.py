"""Chains: which of the methods applies, and what is known about the result."""

from __future__ import annotations

import math

import numpy as np

from structops import _array
from structops._array import Array
from structops.chain import Chain
from structops.contract import store
from structops.projection import alternating, blocks, factoring
from structops.projection.gauge import balanced
from structops.projection.method import Found, Options
from structops.projection.regroup import Plain, plain
from structops.projection.target import Factors, Target
from structops.spec import ChainPlan

SWEEPS = 100  # where sweeps are the method

MEANS = Found("exact", "one factor, each of whose entries is the mean of the entries of the matrix that it fills")
VECTORS = Found("exact", "one bond, and blocks that share no number: a truncated singular value decomposition of each")
BONDS = Found("quasi", "one bond after another: the error is at most sqrt(number of bonds) times the least")
SWEPT = Found("local", "alternating least squares: from sweep to sweep the error never grew, and no more is known")
REGRESSED = Found("exact", "one factor, and so one least-squares problem")
WHITENED = Found("exact", "low rank in the norm of the covariance: the singular vectors of W C^(1/2)")


def fit_chain(plan: ChainPlan, W: Array, options: Options) -> Found:
    """Closed forms where there are any, else decompositions one after another, and sweeps."""
    flat = plain(plan.chain)
    is_weighted = options.covariance is not None
    found = judged_weighted(flat.chain) if is_weighted else judged(flat.chain)
    needs_sweeps = is_weighted or found.optimality == "local"
    sweeps = (SWEEPS if needs_sweeps else 0) if options.refine is None else options.refine
    if found.optimality == "exact":
        sweeps = 1 if is_weighted else 0
    if sweeps:  # normal equations square the condition
        W = _array.cast(W, _array.wide(W))
    target = Target.of(flat.chain, W, options.covariance)
    factors = flat.trimmed(factoring.sequence(target))
    if sweeps:
        factors = _swept(flat, target, factors, sweeps)
        if options.seed is not None and found is SWEPT:
            other = _swept(flat, target, flat.trimmed(_random(target, options.seed)), sweeps)
            factors = min(factors, other, key=target.loss)
    return found.having(store(plan.chain, flat.restored(balanced(target.names, factors))))


def _random(target: Target, seed: int) -> Factors:
    """Gaussian factors, the same in every library, that map unit vectors to vectors of about unit norm."""
    rng, xp, like = np.random.default_rng(seed), _array.namespace(target.tensor), target.tensor
    drawn = [rng.standard_normal(f.shape) / math.sqrt(f.fan_in) for f in target.chain.factors]
    return [xp.asarray(values, dtype=like.dtype, device=like.device) for values in drawn]


def judged(chain: Chain) -> Found:
    """What is known in the Frobenius norm."""
    splits, count = factoring.splits_padding(chain), len(chain.factors)
    if splits and count <= 2:
        return MEANS if count == 1 else VECTORS
    return BONDS if splits and factoring.is_train(chain) else SWEPT


def judged_weighted(chain: Chain) -> Found:
    """What is known in the norm of a covariance."""
    if len(chain.factors) == 1:
        return REGRESSED
    return WHITENED if blocks.is_blocks(chain) and blocks.has_one_column(chain) else SWEPT


def _swept(flat: Plain, target: Target, factors: Factors, sweeps: int) -> Factors:
    """By the method that knows most of the chain."""
    if target.covariance is not None and blocks.is_blocks(flat.chain):
        return blocks.swept(target, factors, sweeps, flat.live(target.tensor), flat.blocks)
    return alternating.refined(target, factors, sweeps)
