"""The layer for Equinox, and what both JAX layers share: dtypes, recomputing, redrawing, representation."""

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="needs JAX")
pytest.importorskip("flax", reason="needs Flax")

import equinox as eqx  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

import structops as so  # noqa: E402
import structops.jax as soj  # noqa: E402
from structops.jax.equinox import StructuredLinear  # noqa: E402

pytestmark = pytest.mark.jax


def layer(spec="btt(rank=2)", n=16, m=24, **kwargs):
    return StructuredLinear(n, m, spec, key=jax.random.key(0), **kwargs)


@pytest.mark.parametrize("spec", ["btt(rank=2)", "low_rank(rank=3)", "monarch(blocks=5)", "toeplitz"])
@pytest.mark.parametrize("weight_norm", [False, True])
def test_equals_the_dense_matrix(spec, weight_norm):
    structured = layer(spec, weight_norm=weight_norm)
    if weight_norm:
        structured = eqx.tree_at(lambda s: s.gains, structured, structured.gains * 1.5)
    structured = eqx.tree_at(lambda s: s.bias, structured, jax.random.normal(jax.random.key(2), (24,)))
    x = jax.random.normal(jax.random.key(1), (2, 3, 16))
    y = eqx.filter_jit(structured)(x)
    dense = structured.merge()
    assert isinstance(dense, eqx.nn.Linear)
    assert isinstance(structured.operator(), type(so.random(spec, (24, 16), key=jax.random.key(0))))
    np.testing.assert_allclose(dense.weight, structured.operator().to_dense(), atol=1e-12)
    np.testing.assert_allclose(jax.vmap(jax.vmap(dense))(x), y, atol=1e-12)
    np.testing.assert_allclose(jax.vmap(structured)(x[0]), y[0], atol=1e-12)
    np.testing.assert_allclose(structured(x[0, 0], key=jax.random.key(0)), y[0, 0], atol=1e-12)


def test_gradients_are_those_of_the_nnx_layer():
    ours, twin = layer(), soj.StructuredLinear(16, 24, "btt(rank=2)", param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    for parameter, factor in zip(twin.factors, ours.factors, strict=True):
        parameter[...] = factor
    x = jax.random.normal(jax.random.key(1), (5, 16))
    found = eqx.filter_grad(lambda s: (s(x) ** 2).sum())(ours)
    expected = nnx.grad(lambda s: (s(x) ** 2).sum())(twin)
    assert isinstance(found, StructuredLinear)
    for k in range(2):
        np.testing.assert_allclose(found.factors[k], expected["factors"][k][...], rtol=1e-12)
    np.testing.assert_allclose(found.bias, expected["bias"][...], rtol=1e-12)


def test_many_layers_under_vmap():
    keys = jax.random.split(jax.random.key(0), 3)
    stack = eqx.filter_vmap(lambda key: StructuredLinear(16, 16, "btt", key=key))(keys)
    assert [factor.shape for factor in stack.factors] == [(3, 4, 4, 4)] * 2
    x = jnp.ones((3, 16))
    y = eqx.filter_vmap(lambda one, x: one(x))(stack, x)
    np.testing.assert_allclose(y[1], StructuredLinear(16, 16, "btt", key=keys[1])(x[1]), atol=1e-12)


def test_saving_and_loading(tmp_path):
    structured = layer(weight_norm=True)
    eqx.tree_serialise_leaves(tmp_path / "layer.eqx", structured)
    shell = eqx.filter_eval_shape(lambda: layer(weight_norm=True))
    loaded = eqx.tree_deserialise_leaves(tmp_path / "layer.eqx", shell)
    assert eqx.tree_equal(loaded, structured)


def test_is_known_to_the_plan_and_scaled_by_it():
    model = eqx.nn.Sequential([StructuredLinear(64, 64, "btt", key=jax.random.key(0), weight_norm=True)])
    table = soj.lr_scales(eqx.filter(model, eqx.is_array))
    assert table == {
        ("layers", "0", "factors", "0"): 4.0,
        ("layers", "0", "factors", "1"): 4.0,
        ("layers", "0", "gains"): 1.0,
        ("layers", "0", "bias"): 1.0,
    }
    rule = optax.chain(optax.sgd(1.0), soj.scale_by_mup(model))
    params = eqx.filter(model, eqx.is_array)
    updates, _ = rule.update(jax.tree.map(jnp.ones_like, params), rule.init(params))
    assert updates.layers[0].factors[1][0, 0, 0] == -4.0
    assert updates.layers[0].gains[0] == -1.0


def test_plan_says_how_it_is_drawn():
    structured = layer("btt(rank=4)", 256, 256)
    for factor, row in zip(structured.factors, so.mup.scales(structured.plan), strict=True):
        assert float(jnp.std(factor)) == pytest.approx(row.init_std, rel=0.05)
    zero = layer(zero_init=True)
    assert not zero(jnp.ones(16)).any()
    again = zero.reset_parameters(jax.random.key(1))
    assert not again.factors[1].any()
    assert (again.factors[0] != zero.factors[0]).all()
    assert jax.tree.structure(again) == jax.tree.structure(zero)


def test_a_new_draw_in_place():
    structured = soj.StructuredLinear(16, 16, "btt", weight_norm=True, rngs=nnx.Rngs(0))
    first = structured.factors[0][...]
    for parameter in (structured.bias, structured.gains):
        parameter[...] = parameter[...] + 3
    structured.reset_parameters(nnx.Rngs(0))
    np.testing.assert_array_equal(structured.factors[0][...], first)
    assert (structured.gains[...] == 1).all()
    assert not structured.bias[...].any()
    structured.reset_parameters(nnx.Rngs(1))
    assert (structured.factors[0][...] != first).any()


def test_dtypes_of_parameters_and_of_the_computation():
    half = soj.StructuredLinear(16, 16, "btt", dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert half.factors[0].dtype == half.bias.dtype == jnp.float32
    assert half(jnp.ones(16)).dtype == jnp.bfloat16
    dense = nnx.Linear(16, 16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert dense(jnp.ones(16)).dtype == half.merge()(jnp.ones(16)).dtype == jnp.bfloat16
    plain = soj.StructuredLinear(16, 16, "btt", rngs=nnx.Rngs(0))
    for dtype in (jnp.bfloat16, jnp.float64, jnp.int32):
        x = jnp.ones(16, dtype)
        assert plain(x).dtype == nnx.Linear(16, 16, rngs=nnx.Rngs(0))(x).dtype
    assert layer(dtype=jnp.bfloat16)(jnp.ones(16, jnp.float32)).dtype == jnp.float32
    assert layer(dtype=jnp.float32).merge().weight.dtype == jnp.float32


def test_recomputing_keeps_no_state_between_factors():
    x, saved, gradients = jnp.ones((7, 16)), {}, {}
    for recompute in (False, True):
        structured = layer(recompute=recompute)
        _, pull = jax.vjp(lambda structured, x: structured(x), structured, x)
        saved[recompute] = sum(array.size for array in jax.tree.leaves(pull))
        gradients[recompute] = jax.tree.leaves(pull(jnp.ones((7, 24))))
    z = 7 * structured.plan.chain.intermediate_widths[0]
    assert saved[False] - saved[True] >= z
    for one, other in zip(gradients[True], gradients[False], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    twins = [soj.StructuredLinear(16, 24, "btt", recompute=r, rngs=nnx.Rngs(0)) for r in (False, True)]
    np.testing.assert_allclose(*(nnx.grad(lambda m: (m(x) ** 2).sum())(m)["factors"][0][...] for m in twins), rtol=1e-5)
    assert "remat" in str(jax.make_jaxpr(twins[1])(x))
    assert "remat" not in str(jax.make_jaxpr(twins[0])(x))


def test_representations():
    assert repr(layer()) == "StructuredLinear(16, 24, 'btt(rank=2)', bias=True; 320 params, 0.833 of dense)"
    text = repr(nnx.Sequential(soj.StructuredLinear(16, 24, "btt(rank=2)", weight_norm="cap", rngs=nnx.Rngs(0))))
    assert "structure=btt(rank=2)" in text
    assert "weight_norm='cap'" in text
    assert "0.833 of dense" in text
    assert len(text) < 500
    assert "ChainPlan" not in str(eqx.nn.Sequential([layer()]))


def test_errors():
    with pytest.raises(so.ShapeError, match=r"16.*\(3, 15\)"):
        layer()(jnp.zeros((3, 15)))
    with pytest.raises(so.StructureError, match="weight_norm"):
        layer(weight_norm="rms")
    with pytest.raises(so.BackendError):
        layer()(np.zeros(16))
