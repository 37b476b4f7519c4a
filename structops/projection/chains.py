"""Chains: which of the methods applies, and what is known about the result."""

from __future__ import annotations

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
    if is_weighted and blocks.is_blocks(flat.chain):
        factors = blocks.fitted(flat, W, options.covariance, sweeps, options.seed)
    else:
        factors = _alternating(flat, W, options, sweeps, found is SWEPT)
    names = [step.labels for step in flat.chain.factor_steps]
    return found.having(store(plan.chain, flat.restored(balanced(names, factors))))


def _alternating(flat: Plain, W: Array, options: Options, sweeps: int, is_swept: bool) -> Factors:
    """Decompositions one after another, then sweeps over all factors."""
    if sweeps:  # normal equations square the condition
        W = _array.cast(W, _array.wide(W))
    target = Target.of(flat.chain, W, options.covariance)
    factors = flat.trimmed(factoring.sequence(target))
    if sweeps and len(factors) == 1:
        return [alternating.improved(target, factors, 0)]
    if sweeps:
        factors = alternating.refined(target, factors, sweeps)
        if options.seed is not None and is_swept:
            other = alternating.refined(target, flat.trimmed(alternating.random(target, options.seed)), sweeps)
            factors = min(factors, other, key=target.loss)
    return factors


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
