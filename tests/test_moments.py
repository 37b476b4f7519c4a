"""Moments of inputs: what numpy gives at once, batch by batch; weights, merging, hooks, and the shift of a bias."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import structops as so
from structops.projection import Moments, bias_shift, fit
from structops.testing import to_backend, to_numpy
from structops.testing.arrays import normal


def inputs(shape: tuple[int, ...], seed: int = 0, dtype: str = "float64", mean: float = 3.0) -> np.ndarray:
    """Correlated, of unequal variance, about a mean that is not zero."""
    rng = np.random.default_rng(seed)
    n = shape[-1]
    mixing = normal(rng, (n, n), dtype) / np.sqrt(n)
    return normal(rng, shape, dtype) * np.geomspace(0.3, 3, n) @ mixing + mean * normal(rng, (n,), dtype)


def expected(x: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Count, mean, second moments and centred ones in double precision."""
    rows = x.reshape(-1, x.shape[-1]).astype(np.complex128 if np.iscomplexobj(x) else np.float64)
    w = np.ones(len(rows)) if weights is None else weights.reshape(-1).astype(np.float64)
    mean = w @ rows / w.sum()
    second, centred = ((w[:, None] * r).T @ r.conj() / w.sum() for r in (rows, rows - mean))
    return w.sum(), mean, second, centred


def check(moments: Moments, x: np.ndarray, weights: np.ndarray | None = None, tolerance: float = 1e-12) -> None:
    count, mean, second, centred = expected(x, weights)
    assert float(moments.count) == pytest.approx(count)
    scale = np.abs(second).max()
    np.testing.assert_allclose(to_numpy(moments.mean), mean, atol=tolerance * np.sqrt(scale))
    np.testing.assert_allclose(to_numpy(moments.covariance), second, atol=tolerance * scale)
    np.testing.assert_allclose(to_numpy(moments.centred), centred, atol=tolerance * scale)


def zeros(features: int, backend: str, dtype: str = "float64") -> Moments:
    return Moments.zeros(features, to_backend(np.zeros(1), backend, dtype))


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5), (5,), (2, 1, 3, 5)], ids=str)
def test_one_batch_is_what_numpy_gives(backend, shape, dtype):
    x = inputs(shape, dtype=dtype)
    moments = zeros(5, backend, dtype).add(to_backend(x, backend, dtype))
    assert moments.covariance.dtype == to_backend(x, backend, dtype).dtype
    check(moments, x)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.torch
def test_batches_and_weights_add_up(data):
    """In any parts, with any weights, some of them zero, merged at any place."""
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    x = inputs((sum(lengths) + 1, 4), data.draw(st.integers(0, 99)))
    drawn = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=len(x), max_size=len(x)))
    weights = np.array(drawn)
    weights[-1] = 1.0
    split = data.draw(st.integers(0, len(lengths)))
    parts, start = [zeros(4, "torch"), zeros(4, "torch")], 0
    for k, length in enumerate([*lengths[:-1], lengths[-1] + 1]):
        part = slice(start, start + length)
        parts[k >= split].add(to_backend(x[part], "torch"), to_backend(weights[part], "torch"))
        start += length
    check(parts[0] + parts[1], x, weights, 1e-11)
    check(parts[1] + parts[0], x, weights, 1e-11)


def test_a_mask_hides_what_is_no_number(backend):
    x, mask = inputs((4, 6, 5)), np.arange(24).reshape(4, 6) % 3 > 0
    broken = np.where(mask[..., None], x, np.nan)
    moments = zeros(5, backend).add(to_backend(broken, backend), to_backend(mask, backend))
    check(moments, x, mask)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sums_have_32_bits(backend, dtype):
    x = to_backend(inputs((50, 5)), backend, dtype)
    moments = Moments.zeros(5, x).add(x)
    assert "float32" in str(moments.covariance.dtype)
    check(moments, to_numpy(to_backend(to_numpy(x), backend, "float64")), tolerance=2e-6)


def test_a_large_mean_costs_no_digits(backend):
    """Variances of 1 about a mean of 3000 in float32: a difference of sums would have lost every digit."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((40, 50, 4)) + 3000).astype(np.float32)
    moments, naive = zeros(4, backend, "float32"), np.zeros((4, 4), np.float32)
    for batch in x:
        moments.add(to_backend(batch, backend, "float32"))
        naive += batch.T @ batch
    *_, centred = expected(x)
    np.testing.assert_allclose(to_numpy(moments.centred), centred, atol=2e-3)
    mean = x.reshape(-1, 4).mean(0)
    assert np.abs(naive / 2000 - np.outer(mean, mean) - centred).max() > 0.1


@pytest.mark.torch
def test_a_hook_keeps_no_graph_and_updates_in_place():
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(5, 3)
    moments = Moments.zeros(5, layer.weight)
    pointer = moments.arrays()["spread"].data_ptr()
    layer.register_forward_pre_hook(lambda module, args: moments.add(args[0]) and None)
    x = torch.from_numpy(inputs((6, 5))).float().requires_grad_()
    layer(x).sum().backward()
    with torch.inference_mode():
        layer(x)
    assert moments.arrays()["spread"].data_ptr() == pointer
    assert not any(array.requires_grad for array in moments.arrays().values())
    check(moments, np.concatenate([x.detach().numpy()] * 2), tolerance=1e-6)


def test_many_tokens_come_in_chunks(backend, monkeypatch):
    monkeypatch.setattr("structops.projection.solving.PIECE", 20)
    x = inputs((23, 5))
    check(zeros(5, backend).add(to_backend(x, backend)), x)
    weights = np.linspace(0, 1, 23)
    check(zeros(5, backend).add(to_backend(x, backend), to_backend(weights, backend)), x, weights)


def test_arrays_and_back(backend):
    x = inputs((9, 5))
    moments = zeros(5, backend).add(to_backend(x, backend))
    arrays = moments.arrays()
    assert {name: tuple(array.shape) for name, array in arrays.items()} == {"count": (), "mean": (5,), "spread": (5, 5)}
    again = Moments.from_arrays({name: to_backend(to_numpy(array), backend) for name, array in arrays.items()})
    check(again, x)
    assert repr(again).startswith("Moments(5 features, 9 vectors; ")


def test_a_sum_leaves_its_parts_alone(backend):
    x, y = inputs((4, 3)), inputs((6, 3), 1)
    first, second = (zeros(3, backend).add(to_backend(z, backend)) for z in (x, y))
    check(first + second, np.concatenate([x, y]))
    check(first, x)
    check(second, y)


def test_fit_takes_moments(backend):
    W, x = normal(np.random.default_rng(5), (8, 12), "float64"), inputs((60, 12))
    moments = zeros(12, backend).add(to_backend(x, backend))
    for text in ("low_rank(rank=3)", "btt(rank=2)") if backend == "torch" else ("low_rank(rank=3)",):
        results = [fit(to_backend(W, backend), text, covariance=c) for c in (moments, moments.covariance)]
        assert float(results[0].error) == float(results[1].error)
        assert np.array_equal(*(to_numpy(result.operator.to_dense()) for result in results))


SHIFTED = [
    *(
        pytest.param("torch", text, marks=pytest.mark.torch)
        for text in ("btt(rank=2, blocks=2)", "block_diag", "toeplitz")
    ),
    *(pytest.param(backend, "low_rank(rank=3)", marks=getattr(pytest.mark, backend)) for backend in ("torch", "jax")),
]


@pytest.mark.parametrize(("backend", "text"), SHIFTED)
def test_a_shifted_bias_takes_the_mean_out_of_the_error(backend, text):
    """Of correlated inputs about a large mean: the error is that of the centred inputs, below that of any without."""
    W, x = normal(np.random.default_rng(6), (8, 12), "float64"), inputs((400, 12), 2, mean=20.0)
    moments = zeros(12, backend).add(to_backend(x, backend))

    def error(A: Any, shift: Any = None) -> float:
        D = W - to_numpy(A.to_dense())
        lost = x @ D.T - (0 if shift is None else to_numpy(shift))
        return float((lost**2).sum(1).mean())

    plain = fit(to_backend(W, backend), text).operator
    seen = fit(to_backend(W, backend), text, covariance=moments).operator
    centred = fit(to_backend(W, backend), text, covariance=moments.centred).operator
    shift = bias_shift(to_backend(W, backend), centred, moments.mean)
    D = W - to_numpy(centred.to_dense())
    assert error(centred, shift) == pytest.approx(np.trace(D @ expected(x)[3] @ D.T), rel=1e-6)
    assert error(centred, shift) < 0.9 * min(error(seen), error(plain))
    assert error(centred, shift) < error(plain, bias_shift(to_backend(W, backend), plain, moments.mean))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_shift_has_the_dtype_of_the_matrix(backend, dtype):
    W = to_backend(normal(np.random.default_rng(6), (8, 12), "float64"), backend, dtype)
    A = so.project(W, "low_rank(rank=3)")
    mean = to_backend(np.linspace(0, 100, 12), backend, "float32")
    shift = bias_shift(W, A, mean)
    assert shift.dtype == W.dtype
    wanted = (to_numpy(W).astype(float) - to_numpy(A.to_dense()).astype(float)) @ np.linspace(0, 100, 12)
    np.testing.assert_allclose(to_numpy(shift).astype(float), wanted, rtol=0.1, atol=0.02 * np.abs(wanted).max())


def bad_inputs(backend: str) -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    x = to_backend(inputs((6, 4)), backend)
    other = to_backend(inputs((6, 4)), "jax" if backend == "torch" else "torch") if BOTH else inputs((6, 4))
    W = to_backend(inputs((3, 4)), backend)
    A = so.project(W, "low_rank(rank=1)")
    few = zeros(3, backend).arrays()
    return {
        "no features": (lambda: zeros(0, backend), so.ShapeError, "got 0"),
        "numpy": (lambda: Moments.zeros(4, np.zeros(1)), so.BackendError, "torch.from_numpy"),
        "integers": (
            lambda: Moments.zeros(4, to_backend(np.ones(1, dtype=int), backend)),
            so.BackendError,
            "floating-point numbers, got .*int64",
        ),
        "width": (lambda: zeros(5, backend).add(x), so.ShapeError, r"\(\.\.\., 5\), got \(6, 4\)"),
        "library": (lambda: zeros(4, backend).add(other), so.BackendError, "got "),
        "complex": (
            lambda: zeros(4, backend).add(to_backend(inputs((6, 4), dtype="complex128"), backend, "complex128")),
            so.BackendError,
            "sums are of .*float64, got x of .*complex128",
        ),
        "weights": (lambda: zeros(4, backend).add(x, x), so.ShapeError, r"weights of shape \(6,\).*got \(6, 4\)"),
        "nothing": (lambda: zeros(4, backend).covariance, so.EntryError, "no vector yet"),
        "nothing to fit": (lambda: fit(W, "low_rank", covariance=zeros(4, backend)), so.EntryError, "no vector yet"),
        "features": (lambda: zeros(4, backend) + zeros(3, backend), so.ShapeError, "of 4 and of 3 features"),
        "dtypes": (lambda: zeros(4, backend) + zeros(4, backend, "float32"), so.BackendError, "do not add up"),
        "names": (
            lambda: Moments.from_arrays({"count": few["count"]}),
            so.ShapeError,
            "count, mean, spread, got count",
        ),
        "shapes": (
            lambda: Moments.from_arrays({**few, "mean": zeros(4, backend).arrays()["mean"]}),
            so.ShapeError,
            r"got \(\), \(4,\) and \(3, 3\)",
        ),
        "width of fit": (
            lambda: fit(W, "low_rank", covariance=zeros(3, backend).add(x[:, :3])),
            so.ShapeError,
            r"shape \(4, 4\)",
        ),
        "shape of a shift": (lambda: bias_shift(W.mT, A, W[0]), so.ShapeError, r"got \(4, 3\), \(3, 4\) and \(4,\)"),
        "library of a shift": (lambda: bias_shift(W, A, other[0]), so.BackendError, "expected"),
    }


BOTH = all(importlib.util.find_spec(name) for name in ("torch", "jax"))
BAD = sorted(bad_inputs("torch")) if importlib.util.find_spec("torch") else sorted(bad_inputs("jax"))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(backend, name):
    call, error, message = bad_inputs(backend)[name]
    with pytest.raises(error, match=message):
        call()
