"""The fused pair against einsum in float64: values, gradients, strides, chains, tiles and errors."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import structops as so
from structops.contract import unstore
from structops.errors import BackendError, ShapeError
from structops.torch import triton_pair
from structops.torch.pair import Sizes, pair_of
from structops.torch.triton_pair import Tiles, cache_bytes, fused_pair, fused_pair_backward, tiles_for

# Two roundings of 16-bit numbers; the interpreter rounds bfloat16 towards zero.
ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1.5e-2}

SIZES = [  # tokens, a, b, c, d, s
    (5, 3, 4, 2, 5, 1),
    (1, 1, 1, 1, 1, 1),
    (3, 17, 1, 1, 9, 4),
    (70, 20, 3, 4, 70, 1),
    (33, 17, 2, 3, 20, 20),
    (18, 6, 20, 18, 6, 1),
    (20, 7, 5, 3, 9, 2),
    (20, 9, 5, 6, 7, 3),
    (17, 33, 6, 5, 16, 5),
    (19, 5, 3, 2, 3, 65),
    (2, 260, 1, 2, 3, 2),
]


def numbers(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def operands(size, dtype, device):
    t, a, b, c, d, s = size
    shapes = (t, c, d), (c, s, b, d), (b, a, c, s), (t, a, b)
    x, first, second, grad = (numbers(shape, dtype, device, seed) for seed, shape in enumerate(shapes))
    return x, first / d**0.5, second / (c * s) ** 0.5, grad


def wanted(x, first, second, grad):
    """The product and the three gradients, by autograd of an einsum in float64."""
    exact = [tensor.double().requires_grad_() for tensor in (x, first, second)]
    y = torch.einsum("tcd, csbd, bacs -> tab", *exact)
    return y.detach(), *torch.autograd.grad(y, exact, grad.double())


def check(got, want):
    assert got.shape == want.shape
    scale = want.norm() or 1
    assert (got.double() - want).norm() / scale < ERROR[got.dtype]


def check_all(x, first, second, grad, **tiles):
    y, *gradients = wanted(x, first, second, grad)
    check(fused_pair(x, first, second, **{name: both[0] for name, both in tiles.items()}), y)
    for got, want in zip(fused_pair_backward(grad, x, first, second, **tiles), gradients, strict=True):
        check(got, want)


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_product_and_gradients(size, dtype, device):
    check_all(*operands(size, dtype, device))


@settings(max_examples=15, deadline=None)
@given(size=st.tuples(*[st.integers(1, most) for most in (40, 40, 7, 7, 40, 5)]))
def test_any_sizes(size):
    where = torch.device("cpu" if triton_pair._interprets() else "cuda")
    check_all(*operands(size, torch.float32, where))


@pytest.mark.parametrize("axes", [(2, 1, 0), (1, 2, 0), (0, 2, 1)])
@pytest.mark.parametrize("order", [(3, 2, 1, 0), (1, 3, 0, 2)])
def test_any_strides(axes, order, device):
    def strided(tensor, axes):
        """The same numbers, in memory in the order of ``axes``, with gaps between them."""
        wide = torch.full((*(tensor.shape[axis] for axis in axes), 2), math.nan, device=device)
        view = wide[..., 0].permute(*(axes.index(axis) for axis in range(tensor.ndim)))
        return view.copy_(tensor)

    x, first, second, grad = operands((21, 6, 3, 4, 5, 2), torch.float32, device)
    strided_operands = strided(x, axes), strided(first, order), strided(second, order), strided(grad, axes)
    check_all(*strided_operands)
    out = strided(torch.zeros_like(grad), axes)
    assert fused_pair(*strided_operands[:3], out=out) is out
    check(out, wanted(x, first, second, grad)[0])


def test_gradients_have_the_strides_of_their_tensors(device):
    x, first, second, grad = operands((9, 6, 3, 4, 5, 2), torch.float32, device)
    x = x.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    first = first.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    gradients = fused_pair_backward(grad, x, first, second)
    assert [g.stride() for g in gradients] == [x.stride(), first.stride(), second.stride()]


def test_a_broadcast_gradient(device):
    x, first, second, grad = operands((9, 6, 3, 4, 5, 2), torch.float32, device)
    check_all(x, first, second, torch.ones((), device=device).expand(grad.shape))


def test_only_the_gradients_that_are_needed(device):
    x, first, second, grad = operands((9, 6, 3, 4, 5, 2), torch.float32, device)
    for needs in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        gradients = fused_pair_backward(grad, x, first, second, needs=needs)
        assert [g is not None for g in gradients] == list(needs)


def test_no_tokens(device):
    x, first, second, grad = operands((0, 6, 3, 4, 5, 2), torch.float32, device)
    assert fused_pair(x, first, second).shape == (0, 6, 3)
    dx, dfirst, dsecond = fused_pair_backward(grad, x, first, second)
    assert dx.shape == x.shape
    assert not dfirst.any()
    assert not dsecond.any()


def test_sums_over_tokens_in_parts_are_the_same_every_time(device):
    x, first, second, grad = operands((130, 3, 2, 2, 3, 1), torch.float32, device)
    one, two = (fused_pair_backward(grad, x, first, second) for _ in range(2))
    assert all(torch.equal(g, h) for g, h in zip(one, two, strict=True))


def test_nothing_is_read_or_written_outside(device):
    """Neighbours of every tensor are NaN, and stay so."""

    def embedded(tensor):
        wide = torch.full([n + 2 for n in tensor.shape], math.nan, device=device)
        inner = wide[(slice(1, -1),) * tensor.ndim]
        inner.copy_(tensor)
        return wide, inner

    x, first, second, grad = operands((21, 18, 3, 3, 17, 2), torch.float32, device)
    (_, ex), (_, ef), (_, es), (_, eg) = map(embedded, (x, first, second, grad))
    wide, out = embedded(torch.zeros_like(grad))
    outside = int(wide.isnan().sum())
    fused_pair(ex, ef, es, out=out)
    assert int(wide.isnan().sum()) == outside
    check_all(ex, ef, es, eg)


# --------------------------------------------------------------------------------------------------------------- chains


CHAINS = [
    *((f"btt(rank={rank})", 30, 36) for rank in (1, 2, 4, 5)),
    ("btt(rank=4, blocks=3)", 24, 36),
    ("btt(rank=3, modes=((4, 7), (5, 3)))", 15, 28),
    ("monarch(blocks=4)", 32, 48),
    ("low_rank(rank=5)", 12, 20),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("spec", "inputs", "outputs"), CHAINS)
def test_chains(spec, inputs, outputs, transposed, device):
    chain = so.structure(spec).chain(inputs, outputs)
    chain = chain.T if transposed else chain
    pair = pair_of(chain)
    shapes = (19, chain.in_features), *chain.stored_shapes, (19, chain.out_features)
    x, first, second, grad = (numbers(shape, torch.float32, device, seed) for seed, shape in enumerate(shapes))
    if transposed:  # as operators hold them: the factors of the original, transposed
        first, second = first.mT.contiguous().mT, second.mT.contiguous().mT
    views = pair.x.of(x), pair.first.of(first), pair.second.of(second)
    assert [view.data_ptr() for view in views] == [x.data_ptr(), first.data_ptr(), second.data_ptr()]

    y = torch.empty(19, chain.out_features, device=device)
    fused_pair(*views, out=pair.y.of(y))
    exact = [tensor.double().requires_grad_() for tensor in (x, first, second)]
    terms = chain.pattern.replace(" ", "").split("->")
    left, right = terms[0].split(",")[0], terms[1]
    textbook = unstore(chain, exact[1:])
    modes = exact[0].reshape(19, *chain.shape_of(left))
    labels = ",".join(["T" + left, *(step.labels for step in chain.factor_steps)]) + "->T" + right
    want = torch.einsum(labels, modes, *textbook).reshape(19, -1)
    check(y, want.detach())

    gradients = fused_pair_backward(pair.y.of(grad), *views)
    for tensor, view, got, exactly in zip(
        (x, first, second),
        (pair.x, pair.first, pair.second),
        gradients,
        torch.autograd.grad(want, exact, grad.double()),
        strict=True,
    ):
        check(got, view.of(exactly.reshape(tensor.shape)))


@pytest.mark.parametrize("spec", ["dense", "kron", "tt(rank=2)", "blast(rank=2, blocks=2)", "btt(num_cores=3)"])
def test_other_chains_are_no_pairs(spec):
    assert pair_of(so.structure(spec).chain(64, 64)) is None


def test_padding_and_regroups_are_no_pairs():
    assert pair_of(so.structure("monarch(blocks=4)").chain(31, 48)) is None
    assert pair_of(so.structure("monarch(blocks=4)").chain(24, 24)) is None  # 4 and 6: neither divides the other


def test_orders_of_labels():
    sizes = dict.fromkeys("abcdefs", 2)
    assert pair_of(so.Chain("cd, sbcd, abcs -> ab", sizes)).y.axes == (0, 1, 2)
    assert pair_of(so.Chain("dc, bscd, abcs -> ba", sizes)).first.axes == (0, 2, 1, 3)
    assert pair_of(so.Chain("dc, bscd, abcs -> ba", sizes)).y.axes == (0, 2, 1)
    assert pair_of(so.Chain("cde, sbcde, abcs -> ab", sizes)).sizes == (2, 2, 2, 4, 2)
    assert pair_of(so.Chain("dce, sbcde, abcs -> ab", sizes)) is None  # d and e are no neighbours
    assert pair_of(so.Chain("ced, sbcde, abcs -> ab", sizes)) is None  # d and e in two orders
    assert pair_of(so.Chain("dce, sbcde, abcs -> ab", {**sizes, "c": 1})) is not None


# ---------------------------------------------------------------------------------------------------------------- tiles


@given(
    st.builds(Sizes, *[st.integers(1, 5000)] * 2, *[st.integers(1, 300)], *[st.integers(1, 5000)] * 2),
    st.integers(1, 100_000),
    st.sampled_from([2, 4]),
)
def test_the_rule_gives_tiles_that_exist_and_fit(sizes, tokens, itemsize):
    tiles = tiles_for(sizes, tokens, itemsize)  # Tiles checks itself
    assert tiles.shared(itemsize) <= triton_pair.SHARED_BYTES
    assert tiles.accumulators <= triton_pair.ACCUMULATORS
    once = sizes.c * sizes.d + sizes.b * sizes.c * sizes.s * (sizes.a + sizes.d) / max(tokens, tiles.tokens)
    assert cache_bytes(sizes, tiles, itemsize) >= itemsize * once * (1 - 1e-9)


@pytest.mark.parametrize(
    ("sizes", "nanoseconds"),
    [
        (Sizes(32, 32, 32, 32, 1), 1.5),
        (Sizes(32, 32, 32, 32, 4), 3.0),
        (Sizes(32, 32, 32, 32, 16), 7.5),
        (Sizes(64, 32, 32, 64, 4), 8.9),
        (Sizes(256, 4, 4, 256, 64), 4.5),
    ],
)
def test_the_traffic_that_the_docstring_tells(sizes, nanoseconds):
    """With 5.5 TB/s of cache, at many tokens in 16 bit."""
    assert cache_bytes(sizes, tiles_for(sizes, 16384, 2), 2) / 5500 == pytest.approx(nanoseconds, abs=0.06)


OTHER_TILES = [
    Tiles(tokens=16, a=16, b=16, c=16, d=16, s=1),
    Tiles(tokens=32, a=16, b=1, c=1, d=32, s=16),
    Tiles(tokens=16, a=32, b=2, c=1, d=16, s=16),
    Tiles(tokens=16, a=16, b=1, c=2, d=16, s=16),
    Tiles(tokens=16, a=16, b=8, c=4, d=16, s=4),
]


@pytest.mark.parametrize("tiles", OTHER_TILES, ids=str)
def test_other_tiles_give_the_same(tiles, device):
    check_all(*operands((20, 20, 5, 3, 18, 3), torch.float32, device), tiles=(tiles, tiles))


# --------------------------------------------------------------------------------------------------------------- errors


def test_errors_of_sizes(device):
    x, first, second, grad = operands((9, 6, 3, 4, 5, 2), torch.float32, device)
    with pytest.raises(ShapeError, match=r"expected x of shape \(9, 4, 5\), got \(9, 5, 4\)"):
        fused_pair(x.mT, first, second)
    with pytest.raises(ShapeError, match=r"expected second of shape \(3, 6, 4, 2\), got \(3, 6, 4, 1\)"):
        fused_pair(x, first, second[..., :1])
    with pytest.raises(ShapeError, match=r"expected x \(t, c, d\), first \(c, s, b, d\)"):
        fused_pair(x[0], first, second)
    with pytest.raises(ShapeError, match=r"expected out of shape \(9, 6, 3\)"):
        fused_pair(x, first, second, out=x)
    with pytest.raises(ShapeError, match=r"expected grad of shape \(9, 6, 3\)"):
        fused_pair_backward(grad[:1], x, first, second)
    with pytest.raises(ShapeError, match="size 1 or more"):
        fused_pair(x, first[:, :0], second[..., :0])


def test_errors_of_dtypes_and_devices(device):
    x, first, second, _ = operands((9, 6, 3, 4, 5, 2), torch.float32, device)
    with pytest.raises(BackendError, match=r"bfloat16, float16 or float32, not in torch\.float64"):
        fused_pair(x.double(), first.double(), second.double())
    with pytest.raises(BackendError, match=r"of one dtype and on one device, got x as torch\.float16"):
        fused_pair(x.half(), first, second)
    with pytest.raises(BackendError, match="on meta beside"):
        fused_pair(x, first, second.to("meta"))


def test_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, first, second, _ = operands((9, 6, 3, 4, 5, 2), torch.float32, torch.device("cpu"))
    with pytest.raises(BackendError, match="runs on a GPU, got tensors on cpu; on a CPU only with TRITON_INTERPRET=1"):
        fused_pair(x, first, second)


def test_errors_of_tiles():
    for wrong in ({"tokens": 8}, {"a": 24}, {"s": 1}, {"warps": 3}):
        with pytest.raises(ShapeError, match="expected powers of two"):
            Tiles(**{"tokens": 16, "a": 16, "b": 1, "c": 1, "d": 16, "s": 16, **wrong})
