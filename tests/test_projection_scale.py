"""Projection at the sizes of real models: peak memory, what slices change, and sizes that nothing divides.

Run as a program it measures one projection of a Gaussian matrix in a process of its own, as the tables of
docs/concepts/projection.md were::

    python tests/test_projection_scale.py 4096x11008 float32 "btt(blocks=8, params=0.25)" [covariance] [refine]
"""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import structops as so
from structops.algebra.product import Product
from structops.modes import modes
from structops.operators.train import padded_size
from structops.projection import Fit, fit
from structops.testing import to_backend, to_numpy
from structops.testing.arrays import normal


def measured(shape: tuple[int, int], dtype: str, text: str, weighted: bool, refine: int | None) -> dict[str, object]:
    """Seconds, the peak of memory beyond W and C in units of W (and C) in float32, and the error."""
    import torch

    warnings.simplefilter("ignore")
    generator = torch.Generator().manual_seed(0)
    W = torch.empty(shape, dtype=getattr(torch, dtype)).normal_(generator=generator)
    options, unit = {}, 4 * shape[0] * shape[1]
    if weighted:
        n = shape[1]
        X = torch.randn(n, n // 8, generator=generator) * torch.linspace(1, 30, n // 8)
        C = (X @ X.T).div_(n)
        C.diagonal().add_(1)
        del X
        options, unit = {"covariance": C}, unit + 4 * n * n
    so.projection.fit(torch.eye(4), "low_rank(rank=1)", covariance=torch.eye(4))  # what is loaded only once
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on; ru_maxrss has that of the parent, too
    before = resident("VmRSS")
    start = time.perf_counter()
    result = so.projection.fit(W, text, refine=refine, **options)
    seconds = time.perf_counter() - start
    peak = resident("VmHWM") - before
    return {
        "spec": text,
        "shape": "x".join(map(str, shape)),
        "dtype": dtype,
        "covariance": weighted,
        "refine": refine,
        "seconds": round(seconds, 1),
        "peak": round(peak / unit, 2),
        "error": round(float(result.error), 5),
        "optimality": result.optimality,
    }


def resident(what: str) -> int:
    """Bytes of this process that are in memory: now, or at their peak."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
@pytest.mark.parametrize(
    ("shape", "text", "options", "most"),
    [
        ("1024x2816", "btt(blocks=8, params=0.25)", [], 8),
        ("1024x2816", "low_rank(params=0.25)", ["covariance"], 10),
    ],
)
def test_memory_stays_near_that_of_the_matrix(shape, text, options, most):
    """Limits for a small matrix, next to which the pieces are not small; docs/concepts/projection.md has large ones."""
    command = [sys.executable, __file__, shape, "float32", text, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert json.loads(done.stdout)["peak"] <= most


# --------------------------------------------------------------------------------------------------------------- pieces


def fitted(W: Any, text: str, **options: Any) -> Fit:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", so.StructureWarning)
        return fit(W, text, **options)


def drawn(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return normal(np.random.default_rng(seed), shape, "float64")


def covariance_of(size: int) -> np.ndarray:
    X = drawn((3 * size, size), 8) * np.geomspace(0.3, 3, size) + drawn((3 * size, 1), 9)
    return X.T @ X / len(X)


def error_of(A: Any, W: np.ndarray, C: np.ndarray | None = None) -> float:
    D = W - to_numpy(A.to_dense()).astype(np.float64)
    left, total = (np.sum(M * (M if C is None else M @ C)) for M in (D, W))
    return math.sqrt(max(left, 0) / total)


CUT = [
    ("low_rank(rank=5)", (24, 36)),
    ("low_rank(rank=5)", (36, 24)),
    ("btt(rank=2)", (24, 36)),
    ("btt(rank=3, blocks=4)", (24, 36)),
    ("btt(rank=3, blocks=2)", (36, 24)),
    ("btt(rank=2, num_cores=3)", (24, 36)),
    ("tt(rank=3)", (36, 24)),
    ("tt(rank=2, num_cores=3)", (24, 36)),
    ("kron(num_factors=3)", (24, 36)),
    ("monarch(blocks=5)", (24, 36)),  # the chain regroups, and pads
    ("monarch(blocks=8)", (16, 16)),  # labels of both input and output
    ("block_diag(blocks=4)", (24, 36)),
]


@pytest.mark.torch
@pytest.mark.parametrize("piece", [1, 300])
@pytest.mark.parametrize(("text", "shape"), CUT, ids=str)
def test_pieces_change_nothing(text, shape, piece, monkeypatch):
    W, C = drawn(shape), covariance_of(shape[1])
    for dtype, tolerance in (("float32", 3e-6), ("float64", 1e-9)):
        for options in ({}, {"covariance": to_backend(C, "torch", dtype), "refine": 4}):
            whole = fitted(to_backend(W, "torch", dtype), text, **options)
            with monkeypatch.context() as patch:
                patch.setattr("structops.projection.solving.PIECE", piece)
                patch.setattr(importlib.import_module("structops.projection.fit"), "ROWS", 1 + piece % 7)
                cut = fitted(to_backend(W, "torch", dtype), text, **options)
            assert float(cut.error) == pytest.approx(float(whole.error), rel=tolerance)
            if "refine" not in options or dtype == "float64":
                np.testing.assert_allclose(
                    to_numpy(cut.operator.to_dense()), to_numpy(whole.operator.to_dense()), atol=300 * tolerance
                )


@pytest.mark.parametrize(("text", "shape"), CUT[:8], ids=str)
@pytest.mark.torch
def test_32_bits_find_what_64_bits_find(text, shape):
    """Gram matrices in double precision against singular value decompositions of doubles; and members of 32 bits."""
    W = drawn(shape)
    single, double = (fitted(to_backend(W, "torch", dtype), text) for dtype in ("float32", "float64"))
    assert float(single.error) == pytest.approx(float(double.error), rel=1e-6)
    member = to_numpy(double.operator.to_dense())
    assert error_of(fitted(to_backend(member, "torch", "float32"), text).operator, member) < 1e-6


@pytest.mark.torch
def test_a_small_singular_value_is_kept_and_a_tiny_one_does_no_harm():
    """Squares of 1e-5 are far below the rounding of floats, not of doubles."""
    rng = np.random.default_rng(3)
    U, V = (np.linalg.qr(rng.standard_normal((n, 8)))[0] for n in (30, 40))
    W = (U * np.geomspace(1, 1e-5, 8)) @ V.T
    A = fitted(to_backend(W, "torch", "float32"), "low_rank(rank=8)").operator
    assert error_of(A, W) < 3e-7
    B = fitted(to_backend(W, "torch", "float32"), "low_rank(rank=6)").operator
    assert error_of(B, W) == pytest.approx(np.linalg.norm(np.geomspace(1, 1e-5, 8)[6:]) / np.linalg.norm(W), rel=1e-2)


# -------------------------------------------------------------------------------------------------------------- padding

PADDED = [
    *("kron(pad=True)", "kron(num_factors=3, pad=True)", "tt(rank=2, pad=True)", "tt(rank=2, num_cores=3, pad=True)"),
    *("btt(rank=1, pad=True)", "btt(rank=2, pad=True, modes='greedy')", "btt(rank=2, num_cores=3, pad=True)"),
    *("btt(rank=2, blocks=4, pad=True)", "btt(params=0.8, blocks=3, pad=True)"),
]
PRIMES = [(13, 11), (7, 23), (17, 12), (12, 19)]


def plan_of(text: str, shape: tuple[int, int]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", so.StructureWarning)
        return so.structure(text).plan(shape[1], shape[0])


def member(text: str, shape: tuple[int, int], backend: str, seed: int = 0) -> Any:
    plan = plan_of(text, shape)
    return plan.operator([to_backend(drawn(s, seed + k), backend) for k, s in enumerate(plan.stored_shapes)])


def padded_dense(A: Any) -> np.ndarray:
    """The matrix of the chain without its padding cut off, by numpy's einsum; then cut."""
    labels = {label: "abcdefghijklmnopqrstuvwxyz"[k] for k, label in enumerate(dict(A.chain.sizes))}
    terms = [step.labels for step in A.chain.factor_steps]
    pattern = ",".join(terms) + "->" + A.chain.terms[-1] + A.chain.terms[0]
    units, passing = [], [n for n in A.chain.terms[-1] if n in A.chain.terms[0]]
    assert not passing
    full = np.einsum("".join(labels.get(n, n) for n in pattern), *map(to_numpy, A.label_arrays), *units)
    return full.reshape(A.chain.padded_out, A.chain.padded_in)[: A.shape[0], : A.shape[1]]


@pytest.mark.torch
@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), count=st.integers(1, 4), rule=st.sampled_from(["balanced", "greedy"]))
def test_padded_sizes(size, count, rule):
    """The first of all sizes from the true one on whose modes are within a factor of two."""
    found = padded_size(size, count, rule)
    assert found >= size
    for n in range(size, found + 1):
        sides = modes(n, count, rule)
        assert (max(sides) <= 2 * min(sides)) == (n == found)


def test_sizes_of_a_vocabulary():
    assert (padded_size(50257, 2, "balanced"), padded_size(151936, 2, "balanced")) == (50264, 151938)
    assert plan_of("btt(blocks=8, pad=True)", (50257, 4096)).chain.padded_out == 50264


@pytest.mark.torch
@pytest.mark.parametrize("shape", PRIMES, ids=str)
@pytest.mark.parametrize("text", PADDED)
def test_padded_operators(text, shape):
    """The upper left part of the padded matrix: products, transpose, counts, sums, products and repr."""
    A = member(text, shape, "torch")
    chain, (m, n) = A.chain, shape
    dense = padded_dense(A)
    is_padded = (chain.padded_out, chain.padded_in) != shape
    np.testing.assert_allclose(to_numpy(A.to_dense()), dense, atol=1e-12)
    np.testing.assert_allclose(to_numpy(A.T.to_dense()), dense.T, atol=1e-12)
    x, y = to_backend(drawn((n,), 5), "torch"), to_backend(drawn((3, m), 6), "torch")
    np.testing.assert_allclose(to_numpy(A @ x), dense @ to_numpy(x), atol=1e-12)
    np.testing.assert_allclose(to_numpy(y @ A), to_numpy(y) @ dense, atol=1e-12)
    assert so.num_params(A) == plan_of(text, shape).num_params == sum(a.numel() for a in A.arrays_flat())
    assert ("padded to" in repr(A)) == is_padded
    assert type(A) is (so.TT if text.startswith("tt") or (is_padded and text.startswith("kron")) else type(A))
    B = member(text, shape, "torch", 9)
    total = A + B
    np.testing.assert_allclose(to_numpy(total.to_dense()), dense + padded_dense(B), atol=1e-12)
    if is_padded:
        assert type(total) is type(A)
        assert total.shape == shape
        assert type(total.T.T) is type(A)
        again = type(A)(A.textbook, in_features=n, out_features=m)
        np.testing.assert_allclose(to_numpy(again.to_dense()), dense, atol=1e-12)
        np.testing.assert_allclose(to_numpy(A.T.untransposed().to_dense()), dense.T, atol=1e-12)
        square = member(text, (n, n), "torch", 4)
        np.testing.assert_allclose(to_numpy((A @ square).to_dense()), dense @ to_numpy(square.to_dense()), atol=1e-11)
        if chain.padded_in != n:  # what pads the state between them must not pass
            assert isinstance(A @ square, Product)
        np.testing.assert_allclose(
            to_numpy(so.kron(A, square).to_dense()), np.kron(dense, to_numpy(square.to_dense())), atol=1e-11
        )


def test_a_product_over_whole_modes_is_a_padded_train(backend):
    A, B = (member("tt(rank=2, pad=True)", shape, backend) for shape in ((13, 12), (12, 11)))
    assert (A.is_padded, B.is_padded) == (True, True)
    C = A @ B
    assert type(C) is so.TT
    assert C.shape == (13, 11)
    np.testing.assert_allclose(to_numpy(C.to_dense()), padded_dense(A) @ padded_dense(B), atol=1e-11)


@pytest.mark.torch
@pytest.mark.parametrize("shape", PRIMES[1:2], ids=str)
@pytest.mark.parametrize("text", PADDED)
def test_padded_members_come_back(text, shape):
    A = member(text, shape, "torch")
    result = fitted(A.to_dense(), text, refine=400, seed=0)
    assert type(result.operator) is type(A)
    assert error_of(result.operator, to_numpy(A.to_dense())) < 1e-4


CUT_PADDED = [
    pytest.param("torch", "btt(rank=1, pad=True)", (13, 11), marks=pytest.mark.torch),
    pytest.param("torch", "btt(rank=2, blocks=4, pad=True)", (50, 7), marks=pytest.mark.torch),
    pytest.param("jax", "btt(rank=1, pad=True)", (13, 11), marks=pytest.mark.jax),
]


@pytest.mark.parametrize(("backend", "text", "shape"), CUT_PADDED)
def test_padded_blocks_are_cut_as_numpy_cuts_the_padded_matrix(backend, text, shape):
    """Whole rows and columns of blocks are padded: zeros there do not move the optimum."""
    W = drawn(shape)
    result = fitted(to_backend(W, backend), text)
    chain, rank = result.operator.chain, result.operator.ranks[0]
    (a, b), (c, d) = (chain.shape_of(side) for side in (chain.terms[-1], chain.terms[0]))
    full = np.pad(W, [(0, a * b - shape[0]), (0, c * d - shape[1])]).reshape(a, b, c, d)
    dropped = sum(
        (np.linalg.svd(full[:, j, k], compute_uv=False)[rank:] ** 2).sum() for j in range(b) for k in range(c)
    )
    assert result.optimality == "exact"
    assert float(result.error) == pytest.approx(math.sqrt(dropped) / np.linalg.norm(W), abs=1e-12)
    if backend == "jax":  # compiling sweeps takes long, and they are the same code
        return
    C = covariance_of(shape[1])
    aware = fitted(to_backend(W, backend), text, covariance=to_backend(C, backend))
    assert float(aware.error) == pytest.approx(error_of(aware.operator, W, C), abs=1e-9)
    assert float(aware.error) <= error_of(result.operator, W, C) + 1e-12


@pytest.mark.torch
@pytest.mark.parametrize("shape", PRIMES[:2], ids=str)
def test_padding_of_shared_factors_is_left_free(shape):
    """For kron and tt the padded entries are not whole rows: the result is local, and beats zeros in their place."""
    W = drawn(shape)
    for text, rank in (("kron(pad=True)", 1), ("tt(rank=3, pad=True)", 3)):
        result = fitted(to_backend(W, "torch"), text)
        chain = result.operator.chain
        (a, b), (c, d) = (chain.shape_of(side) for side in (chain.terms[-1], chain.terms[0]))
        full = np.pad(W, [(0, a * b - shape[0]), (0, c * d - shape[1])]).reshape(a, b, c, d)
        U, S, Vh = np.linalg.svd(full.transpose(0, 2, 1, 3).reshape(a * c, b * d))
        near = ((U[:, :rank] * S[:rank]) @ Vh[:rank]).reshape(a, c, b, d).transpose(0, 2, 1, 3).reshape(a * b, c * d)
        with_zeros = np.linalg.norm(W - near[: shape[0], : shape[1]]) / np.linalg.norm(W)
        assert result.optimality == "local"
        assert float(result.error) < with_zeros


@pytest.mark.parametrize("text", [PADDED[0], PADDED[7]])
def test_padded_layers(backend, text):
    """A layer computes what the operator of its factors does, gradients included."""
    shape = (13, 11)
    A = member(text, shape, backend)
    x = to_backend(drawn((4, 11), 7), backend)
    wanted = to_numpy(x) @ padded_dense(A).T
    plan = plan_of(text, shape)
    np.testing.assert_allclose(to_numpy(plan.apply(plan_factors(A, plan), x)), wanted, atol=1e-12)
    if backend == "torch":
        import torch

        from structops.torch import StructuredLinear

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", so.StructureWarning)
            layer = StructuredLinear(11, 13, text, bias=False, dtype=torch.float64)
        with torch.no_grad():
            for parameter, factor in zip(layer.factors, plan_factors(A, plan), strict=True):
                parameter.copy_(factor.reshape(parameter.shape))
        np.testing.assert_allclose(to_numpy(layer(x)), wanted, atol=1e-12)
        layer(x).square().sum().backward()
        assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in layer.factors)
        assert sum(p.numel() for p in layer.parameters()) == plan.num_params


def plan_factors(A: Any, plan: Any) -> list[Any]:
    """The stored factors of an operator in the shapes of a plan."""
    return [factor.reshape(shape) for factor, shape in zip(A.stored_factors(), plan.stored_shapes, strict=True)]


@pytest.mark.torch
def test_bad_padding_is_named():
    with pytest.raises(so.StructureError, match=r"pad must be True or False, got 1"):
        so.structure("btt(pad=1)")
    with pytest.raises(so.StructureError, match=r"multiply to 12, but out_features=11.*pad=True"):
        so.structure("tt", modes=((4, 3), (4, 3))).chain(12, 11)
    with pytest.raises(so.StructureError, match=r"multiply to 12, but out_features=13; \(13, 1\) would work"):
        so.structure("tt", modes=((4, 3), (4, 3)), pad=True).chain(12, 13)
    cores = member("tt(rank=2)", (12, 12), "torch").cores
    with pytest.raises(so.ShapeError, match=r"in_features must lie between 1 and the 12 of the modes \(4, 3\), got 13"):
        so.TT(cores, in_features=13)


if __name__ == "__main__":
    size, dtype_name, spec, *rest = sys.argv[1:]
    rows, cols = map(int, size.split("x"))
    sweeps = next((int(word) for word in rest if word.isdigit()), None)
    print(json.dumps(measured((rows, cols), dtype_name, spec, "covariance" in rest, sweeps)), flush=True)
