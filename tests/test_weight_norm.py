"""Weight normalisation: the cap on the RMS of factors, in both libraries, and what it does to a residual stream."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest

import structops as so
from structops.mup import init_stds
from structops.normalise import rms_cap, rms_caps

BTT = so.structure("btt(rank=2)").plan(16, 32)


def array(backend, values, dtype="float64"):
    """An array of a library."""
    if backend == "torch":
        import torch

        return torch.from_numpy(np.array(values, np.float64)).to(getattr(torch, dtype))
    import jax.numpy as jnp

    return jnp.asarray(np.array(values, np.float64), dtype)


def numbers(x):
    return np.asarray(x.detach().double() if hasattr(x, "detach") else x, np.float64)


def rms(x):
    return math.sqrt(np.mean(numbers(x) ** 2))


def expected(factors, caps, gains):
    """The formula in numpy, written once more."""
    return [
        g * M if (size := np.sqrt(np.sum(M * M) / M.size + 1e-8)) <= cap else g * cap / size * M
        for M, cap, g in zip(factors, caps, gains, strict=True)
    ]


def draw(seed=0, scale=(2.0, 0.5)):
    """Factors of BTT, one above its cap and one below, weights for a scalar, and gains."""
    rng = np.random.default_rng(seed)
    shapes = BTT.stored_shapes
    factors = [
        c * std * rng.standard_normal(shape) for c, std, shape in zip(scale, init_stds(BTT), shapes, strict=True)
    ]
    return factors, [rng.standard_normal(shape) for shape in shapes], np.array([1.5, -0.7])


# --------------------------------------------------------------------------------------------------------- the function


def test_numbers_of_the_paper(backend):
    """Fan-in 32 and fan-out 128: entries of 0.5 are scaled by .353553, to an RMS of .176777 gain; 0.1 stays."""
    cap = math.sqrt(32) / 32
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (4, 128, 32))
    large, small, zero = (array(backend, size * signs) for size in (0.5, 0.1, 0.0))
    capped = rms_cap([large, small, zero], [cap] * 3)
    np.testing.assert_allclose(numbers(capped[0]) / numbers(large), 0.353553, rtol=1e-5)
    assert rms(capped[0]) == pytest.approx(0.176777, rel=1e-5)
    assert (numbers(capped[1]) == numbers(small)).all()
    assert not numbers(capped[2]).any()
    gained = rms_cap([large, small, zero], [cap] * 3, array(backend, [-3.0, 0.5, 2.0]))
    assert rms(gained[0]) == pytest.approx(3 * 0.176777, rel=1e-5)
    assert rms(gained[1]) == pytest.approx(0.05)


def test_equals_the_formula_over_the_whole_factor(backend):
    factors, _, gains = draw()
    factors[0][0] *= 10  # blocks of unequal size: the mean is over all of them
    ours = rms_cap([array(backend, M) for M in factors], rms_caps(BTT), array(backend, gains))
    for one, other in zip(ours, expected(factors, rms_caps(BTT), gains), strict=True):
        np.testing.assert_allclose(numbers(one), other, rtol=1e-12)


def gradients(backend, factors, weights, gains, cap=rms_cap):
    """Of the weighted sum of the capped factors, with respect to factors and gains."""
    caps = rms_caps(BTT)
    inputs = [array(backend, M) for M in (*factors, gains)]
    weights = [array(backend, w) for w in weights]

    def loss(*inputs):
        *factors, gains = inputs
        return sum((w * M).sum() for w, M in zip(weights, cap(factors, caps, gains), strict=True))

    if backend == "torch":
        import torch

        inputs = [x.requires_grad_() for x in inputs]
        return [numbers(g) for g in torch.autograd.grad(loss(*inputs), inputs)]
    import jax

    return [numbers(g) for g in jax.jit(jax.grad(loss, argnums=tuple(range(len(inputs)))))(*inputs)]


def test_gradient_equals_finite_differences(backend):
    factors, weights, gains = draw()
    slopes = gradients(backend, factors, weights, gains)

    def loss(inputs):
        *factors, gains = inputs
        return sum(np.sum(w * M) for w, M in zip(weights, expected(factors, rms_caps(BTT), gains), strict=True))

    rng = np.random.default_rng(3)
    for k, slope in enumerate(slopes):
        direction, step = rng.standard_normal(slope.shape), 1e-6
        ends = []
        for sign in (1, -1):
            inputs = [*factors, gains]
            inputs[k] = inputs[k] + sign * step * direction
            ends.append(loss(inputs))
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(np.sum(slope * direction), rel=1e-6)


def test_gradient_equals_that_of_the_formula_and_has_no_part_along_a_capped_factor(backend):
    """The derivative by hand: with RMS r above the cap, ``gain cap / r (w - M mean(w M) / r^2)``; below, ``gain w``."""
    factors, weights, gains = draw()
    above, below, by_gain = gradients(backend, factors, weights, gains)
    (M, small), (w, v), (cap, _) = factors, weights, rms_caps(BTT)
    r = np.sqrt(np.mean(M * M) + 1e-8)
    np.testing.assert_allclose(above, gains[0] * cap / r * (w - M * np.mean(w * M) / r**2), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(below, gains[1] * v, rtol=1e-12)
    np.testing.assert_allclose(by_gain, [cap / r * np.sum(w * M), np.sum(v * small)], rtol=1e-9)
    assert abs(np.sum(above * M)) < 1e-5 * np.linalg.norm(above) * np.linalg.norm(M)


def test_a_zero_factor_has_the_gradient_without_the_cap(backend):
    factors, weights, gains = draw(scale=(0.0, 0.0))
    *slopes, by_gain = gradients(backend, factors, weights, gains)
    for slope, w, gain in zip(slopes, weights, gains, strict=True):
        np.testing.assert_allclose(slope, gain * w)
    assert not by_gain.any()


@pytest.mark.torch
@pytest.mark.jax
def test_libraries_agree():
    factors, weights, gains = draw()
    for ours, theirs in zip(*(gradients(name, factors, weights, gains) for name in ("torch", "jax")), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_computes_the_rms_in_float32(backend, dtype):
    large = array(backend, np.full((2, 8, 8), 3e4), dtype)  # its square is no float16
    (capped,) = rms_cap([large], [0.25], array(backend, [1.0], dtype))
    assert capped.dtype == large.dtype
    assert rms(capped) == pytest.approx(0.25, rel=2**-8)
    tiny = array(backend, np.full((2, 8, 8), 1e-4), dtype)  # the square is lost in float16, and so is the epsilon
    (capped,) = rms_cap([tiny], [1e-3])
    assert (numbers(capped) == numbers(tiny)).all()


def test_complex_factors_are_capped_by_their_modulus(backend):
    factor = array(backend, np.ones((1, 4, 4))) * (0.6 + 0.8j)
    (capped,) = rms_cap([factor], [0.5])
    values = np.asarray(capped.detach() if hasattr(capped, "detach") else capped)
    np.testing.assert_allclose(values, 0.5 * (0.6 + 0.8j), rtol=1e-7)


def test_caps_are_those_of_the_rule_also_where_a_factor_starts_at_zero():
    for spec in ("dense", "btt(rank=4)", "monarch(blocks=4)", "kron", "tt(rank=16)", "toeplitz"):
        plan = so.structure(spec).plan(64, 256)
        assert rms_caps(plan) == rms_caps(plan, zero_init=True) == init_stds(plan)
    low_rank = so.structure("low_rank(rank=32)").plan(1024, 1024)
    assert rms_caps(low_rank, zero_init=True) == (1 / math.sqrt(1024), init_stds(low_rank)[1])


def test_errors(backend):
    factor = array(backend, np.ones((1, 2, 2)))
    with pytest.raises(so.ShapeError, match="cap for each of 2 factors, got 1"):
        rms_cap([factor, factor], [1.0])
    with pytest.raises(so.ShapeError, match=r"gains of shape \(1,\).*got \(2,\)"):
        rms_cap([factor], [1.0], array(backend, [1.0, 1.0]))
    with pytest.raises(so.BackendError, match="numpy"):
        rms_cap([np.ones((1, 2, 2))], [1.0])


# -------------------------------------------------------------------------------------------------------------- layers


def layer(backend, n=16, m=32, spec="btt(rank=2)", seed=0, dtype="float64", **kwargs):
    if backend == "torch":
        import torch

        from structops.torch import StructuredLinear

        generator = torch.Generator().manual_seed(seed)
        return StructuredLinear(n, m, spec, generator=generator, dtype=getattr(torch, dtype), **kwargs)
    pytest.importorskip("flax", reason="needs Flax")
    from flax import nnx

    from structops.jax import StructuredLinear

    return StructuredLinear(n, m, spec, rngs=nnx.Rngs(seed), param_dtype=dtype, **kwargs)


def scaled(backend, structured, scale):
    """The layer with its factors multiplied."""
    if backend == "torch":
        import torch

        with torch.no_grad():
            for factor in structured.factors:
                factor.mul_(scale)
    else:
        for factor in structured.factors:
            factor[...] = factor[...] * scale
    return structured


def values(parameter):
    return numbers(parameter if hasattr(parameter, "detach") else parameter[...])


@pytest.mark.parametrize("spec", ["dense", "low_rank(rank=3)", "kron", "btt(rank=2)", "monarch(blocks=5)", "toeplitz"])
@pytest.mark.parametrize("weight_norm", [True, "cap"])
def test_a_layer_uses_and_shows_the_capped_factors(backend, spec, weight_norm):
    structured = scaled(backend, layer(backend, spec=spec, weight_norm=weight_norm), 5.0)
    x = array(backend, np.random.default_rng(1).standard_normal((3, 16)))
    weight = structured.operator().to_dense()
    np.testing.assert_allclose(numbers(structured(x)), numbers(x) @ numbers(weight).T, atol=1e-12)
    for factor, cap in zip(structured.effective_factors(), init_stds(structured.plan), strict=True):
        assert rms(factor) == pytest.approx(cap, rel=1e-6)


def test_gains_are_one_scalar_per_factor_that_scale_the_layer(backend):
    structured = layer(backend, spec="btt(num_cores=3)", bias=False, weight_norm=True)
    assert values(structured.gains).tolist() == [1.0, 1.0, 1.0]
    assert layer(backend, weight_norm="cap").gains is layer(backend).gains is None
    x = array(backend, np.ones((2, 16)))
    before = numbers(structured(x))
    gains = array(backend, [2.0, -1.0, 0.5])
    if backend == "torch":
        structured.load_state_dict({**structured.state_dict(), "gains": gains})
    else:
        structured.gains[...] = gains
    np.testing.assert_allclose(numbers(structured(x)), -before, rtol=1e-12)


def test_at_init_the_layer_is_the_plain_one_within_the_error_of_the_draw(backend):
    """The RMS of N draws is off by 1/sqrt(2 N) (one sigma), to both sides; the cap shortens those above."""
    plain, normed = (layer(backend, 256, 256, weight_norm=norm) for norm in (False, True))
    for before, after in zip(plain.effective_factors(), normed.effective_factors(), strict=True):
        ratio = numbers(after) / numbers(before)
        assert ratio.min() == pytest.approx(ratio.max())
        assert 1 - 4 / math.sqrt(2 * ratio.size) < ratio.min() <= 1
    zero = layer(backend, weight_norm=True, zero_init=True)
    assert not numbers(zero(array(backend, np.ones((2, 16))))).any()


def test_wrong_choices_say_what_works(backend):
    for wrong in ("yes", 1, None):
        with pytest.raises(so.StructureError, match="weight_norm is False, True or 'cap'"):
            layer(backend, weight_norm=wrong)


@pytest.mark.torch
def test_torch_layer_compiles_copies_saves_and_exports():
    import torch

    structured = scaled("torch", layer("torch", weight_norm=True), 3.0)
    x = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y = structured(x)
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(structured, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        torch.testing.assert_close(compiled(x), y)
        ours = torch.autograd.grad(compiled(x).square().sum(), list(structured.parameters()))
        plain = torch.autograd.grad(structured(x).square().sum(), list(structured.parameters()))
        torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.export.export(structured, (x,)).module()(x), y)
    torch.testing.assert_close(copy.deepcopy(structured)(x), y)
    assert list(structured.state_dict()) == ["gains", "bias", "factors.0", "factors.1"]
    other = layer("torch", seed=1, weight_norm=True)
    other.load_state_dict(structured.state_dict())
    assert torch.equal(other(x), y)
    torch.testing.assert_close(torch.func.vmap(structured)(x), y)
    assert "weight_norm=True" in repr(structured)
    assert "weight_norm='cap'" in repr(layer("torch", weight_norm="cap"))
    assert "weight_norm" not in repr(layer("torch"))


@pytest.mark.torch
def test_torch_layer_on_meta_in_half_precision_and_under_autocast():
    import torch

    from structops.torch import StructuredLinear

    meta = StructuredLinear(64, 64, "btt", weight_norm=True, device="meta")
    assert meta(torch.empty(2, 64, device="meta")).shape == (2, 64)
    filled = meta.to_empty(device="cpu")
    filled.reset_parameters(torch.Generator().manual_seed(3))
    twin = StructuredLinear(64, 64, "btt", weight_norm=True, generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(filled.parameters(), twin.parameters(), strict=True))

    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(4))
    y = scaled("torch", twin, 3.0)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = twin(x)
        assert all(factor.dtype == torch.float32 for factor in twin.effective_factors())
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), y, atol=0.05, rtol=0.05)
    half = copy.deepcopy(twin).to(torch.bfloat16)
    assert half.gains.dtype == half(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).float(), y, atol=0.05, rtol=0.05)
    assert StructuredLinear(16, 16, "btt", weight_norm=True, dtype=torch.complex64).gains.dtype == torch.float32


@pytest.mark.torch
def test_torch_groups_give_gains_the_plain_rate_and_no_decay():
    from structops.torch import param_groups

    structured = layer("torch", 1024, 1024, "btt", weight_norm=True)
    for optimizer in ("adam", "sgd"):
        groups = param_groups(structured, lr=1e-3, weight_decay=0.1, optimizer=optimizer)
        (group,) = [g for g in groups if any(p is structured.gains for p in g["params"])]
        assert (group["lr_scale"], group["weight_decay"]) == (1, 0)


@pytest.mark.jax
def test_jax_layer_under_jit_grad_and_split():
    pytest.importorskip("flax", reason="needs Flax")
    import jax
    from flax import nnx

    structured = scaled("jax", layer("jax", weight_norm=True), 3.0)
    x = array("jax", np.random.default_rng(0).standard_normal((4, 16)))
    y = numbers(structured(x))
    np.testing.assert_allclose(nnx.jit(lambda model, x: model(x))(structured, x), y, rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(structured)(x), y, rtol=1e-12)
    graph, params = nnx.split(structured)
    slopes = jax.jit(jax.grad(lambda params: (nnx.merge(graph, params)(x) ** 2).sum()))(params)
    assert slopes["gains"][...].shape == (2,)
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(slopes))


@pytest.mark.torch
@pytest.mark.jax
def test_layers_agree():
    twin = scaled("torch", layer("torch", weight_norm=True), 2.0)
    structured = layer("jax", weight_norm=True)
    for ours, theirs in zip(structured.factors, twin.factors, strict=True):
        ours[...] = array("jax", numbers(theirs))
    x = np.random.default_rng(0).standard_normal((3, 16))
    ours, theirs = (numbers(model(array(name, x))) for name, model in (("jax", structured), ("torch", twin)))
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------------------------------------------------ training


def within_caps(structured):
    """RMS of the effective factors stays below cap times gain."""
    gains = values(structured.gains)
    for factor, cap, gain in zip(structured.effective_factors(), init_stds(structured.plan), gains, strict=True):
        assert rms(factor) <= cap * abs(gain) * (1 + 1e-6)


@pytest.mark.torch
def test_torch_factors_stay_capped_at_a_large_learning_rate():
    import torch

    structured = layer("torch", 16, 16, "btt", dtype="float32", weight_norm=True)
    optimizer = torch.optim.Adam(structured.parameters(), lr=0.3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(150):
        x = torch.randn(32, 16, generator=generator)
        optimizer.zero_grad()
        (structured(x) - 10 * x.flip(-1)).square().mean().backward()
        optimizer.step()
        within_caps(structured)
    assert min(rms(M) / cap for M, cap in zip(structured.factors, structured.caps, strict=True)) > 2, "they outgrew it"


@pytest.mark.jax
def test_jax_factors_stay_capped_at_a_large_learning_rate():
    pytest.importorskip("flax", reason="needs Flax")
    import jax
    import optax
    from flax import nnx

    structured = layer("jax", 16, 16, "btt", dtype="float32", weight_norm=True)
    graph, params = nnx.split(structured)
    rule = optax.adam(0.3)

    @jax.jit
    def step(params, state, x):
        slopes = jax.grad(lambda params: ((nnx.merge(graph, params)(x) - 10 * x[:, ::-1]) ** 2).mean())(params)
        updates, state = rule.update(slopes, state)
        return optax.apply_updates(params, updates), state

    state = rule.init(params)
    for key in jax.random.split(jax.random.key(1), 150):
        params, state = step(params, state, jax.random.normal(key, (32, 16), "float32"))
        within_caps(nnx.merge(graph, params))
    structured = nnx.merge(graph, params)
    assert min(rms(values(M)) / cap for M, cap in zip(structured.factors, structured.caps, strict=True)) > 2


STEPS = 160


def stream(weight_norm, seed, width=64, depth=3, lr=0.02):
    """RMS of the residual stream, halfway and at the end of training at a large rate on labels that mean nothing.

    ``h + down(gelu(up(norm(h))))`` with BTT layers, each factor at the rate of the rule.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    from structops.torch import StructuredLinear

    generator = torch.Generator().manual_seed(seed)

    def structured(n, m, zero_init=False):
        return StructuredLinear(n, m, "btt", weight_norm=weight_norm, zero_init=zero_init, generator=generator)

    embed, norm, head = nn.Linear(64, width), nn.LayerNorm(width), nn.Linear(width, 10)
    blocks = [
        nn.ModuleList([nn.LayerNorm(width), structured(width, 2 * width), structured(2 * width, width, True)])
        for _ in range(depth)
    ]
    with torch.no_grad():
        embed.weight.normal_(std=1 / 8, generator=generator)
        for parameter in (embed.bias, *head.parameters()):
            parameter.zero_()

    def residual(x):
        h = embed(x)
        for norm, up, down in blocks:
            h = h + down(functional.gelu(up(norm(h))))
        return h

    model = nn.ModuleList([embed, norm, head, *blocks])
    layers = [module for module in model.modules() if isinstance(module, StructuredLinear)]
    groups, rated = [], set()
    for module in layers:
        for factor, row in zip(module.factors, so.mup.scales(module.plan), strict=True):
            groups.append({"params": [factor], "lr": lr * row.lr_scale})
            rated.add(factor)
    groups.append({"params": [parameter for parameter in model.parameters() if parameter not in rated], "lr": lr})
    optimizer = torch.optim.Adam(groups)
    images = torch.randn(2048, 64, generator=generator)
    labels = torch.randint(10, (2048,), generator=generator)
    sizes = []
    for step in range(1, STEPS + 1):
        batch = torch.randint(2048, (128,), generator=generator)
        loss = functional.cross_entropy(head(norm(residual(images[batch]))), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (STEPS // 2, STEPS):
            sizes.append(rms(residual(images[:256])))
            if weight_norm is True:
                for module in layers:
                    within_caps(module)
    return sizes


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_residual_stream_stays_bounded_where_it_grows_without_the_cap(seed):
    """docs/concepts/weight_norm.md has the numbers."""
    free, gained, capped = (stream(norm, seed) for norm in (False, True, "cap"))
    print("RMS of the residual stream without, with gains, with the cap alone:", free, gained, capped)
    assert free[1] > 1.5 * free[0]
    assert free[1] > 100
    for bounded in (gained, capped):
        assert bounded[1] < 10
        assert all(math.isfinite(size) for size in itertools.chain(free, bounded))
