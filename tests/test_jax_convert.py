"""structurize and densify on modules of Flax NNX and Equinox, and on plain trees of parameters."""

import re

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="needs JAX")
pytest.importorskip("flax", reason="needs Flax")

import equinox as eqx  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import linen, nnx  # noqa: E402
from flax.core import FrozenDict  # noqa: E402

import structops as so  # noqa: E402
import structops.jax as soj  # noqa: E402
from structops.conversion import Conversion  # noqa: E402
from structops.jax import densify, structurize, survey  # noqa: E402
from structops.jax.equinox import StructuredLinear as EquinoxLinear  # noqa: E402
from structops.projection import Moments  # noqa: E402

pytestmark = pytest.mark.jax

EXACT = "low_rank(rank=16)"  # of 16 inputs: every matrix


class Net(nnx.Module):
    """A table, attention, layers in a list of which one is used twice, an einsum and a head."""

    def __init__(self, width=16, **kwargs):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(8, width, rngs=rngs, param_dtype=jnp.float64)
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs, param_dtype=jnp.float64) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, width, rngs=rngs, decode=False, param_dtype=jnp.float64, **kwargs)
        self.twice = self.layers[0]
        self.einsum = nnx.Einsum("ab,bc->ac", (width, width), rngs=rngs, param_dtype=jnp.float64)
        self.head = nnx.Linear(width, 8, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(x)
        for layer in self.layers:
            x = x + jax.nn.gelu(layer(x))
        return self.head(self.twice(x))


@pytest.fixture(scope="module")
def net():
    model = Net()
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] == "bias":
            parameter[...] = jax.random.normal(jax.random.key(1), parameter.shape)
    return model


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(0), (2, 5), 0, 8)


def test_nnx_there_and_back(net, tokens):
    before = nnx.state(net)
    expected = net(tokens)
    small = structurize(net, EXACT)
    assert isinstance(small.layers[1], soj.StructuredLinear)
    assert small.twice is small.layers[0]
    assert isinstance(small.attention.query, soj.StructuredLinearGeneral)
    assert isinstance(small.head, nnx.Linear)
    assert isinstance(small.einsum, nnx.Einsum)
    np.testing.assert_allclose(nnx.jit(lambda model, x: model(x))(small, tokens), expected, atol=1e-12)
    dense = densify(small)
    assert isinstance(dense.attention.out, nnx.LinearGeneral)
    assert dense.twice is dense.layers[0]
    assert jax.tree.structure(nnx.state(dense)) == jax.tree.structure(before)
    for one, other in zip(jax.tree.leaves(nnx.state(dense)), jax.tree.leaves(before), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, atol=1e-12)
    # The model itself is as it was.
    assert isinstance(net.layers[0], nnx.Linear)
    np.testing.assert_array_equal(net(tokens), expected)


def test_nnx_projection_is_that_of_the_weight(net):
    small = structurize(net, {"layers.1": "btt(rank=2)", "attention.*": "block_diag(blocks=4)"})
    A = small.layers[1].operator()
    assert isinstance(A, so.BTT)
    W = net.layers[1].kernel[...].T
    np.testing.assert_allclose(A.to_dense(), so.project(W, "btt(rank=2)").to_dense(), atol=1e-12)
    W = net.attention.out.kernel[...].reshape(16, 16).T
    np.testing.assert_allclose(
        small.attention.out.operator().to_dense(), so.project(W, "block_diag(blocks=4)").to_dense(), atol=1e-12
    )
    assert isinstance(small.layers[0], nnx.Linear)


def test_the_table_of_a_dry_run(net):
    table = structurize(net, "btt(rank=2)", dry_run=True)
    assert isinstance(table, Conversion)
    assert {row.name: row.reason for row in table if row.reason} == {"head": "output head"}
    assert [(row.name, row.kind) for row in table.converted][:2] == [
        ("attention.key", "LinearGeneral"),
        ("attention.out", "LinearGeneral"),
    ]
    assert {kept.name: kept.reason.partition(":")[0] for kept in table.kept} == {
        "embed.embedding": "table of an embedding",
        "einsum.kernel": "nnx.Einsum 'ab,bc->ac'",
    }
    assert table.params == sum(array.size for array in jax.tree.leaves(nnx.state(net)))
    after = survey(structurize(net, "btt(rank=2)"))
    assert [(row.name, row.structure, row.params) for row in after] == [
        (row.name, row.structure, row.params) for row in table
    ]
    assert after.params == table.params
    assert str(table).splitlines()[0].startswith("layer")


def test_in_place_and_a_single_layer(tokens):
    model = Net()
    assert structurize(model, EXACT, "layers.*", inplace=True) is model
    assert isinstance(model.twice, soj.StructuredLinear)
    assert densify(model, inplace=True) is model
    assert isinstance(model.layers[0], nnx.Linear)
    single = structurize(nnx.Linear(16, 16, param_dtype=jnp.float64, rngs=nnx.Rngs(0)), EXACT)
    assert isinstance(single, soj.StructuredLinear)
    assert isinstance(densify(single), nnx.Linear)


def test_variables_biases_and_dtypes_survive():
    class Frozen(nnx.Param):
        """Not trained."""

    layer = nnx.Linear(16, 16, dtype=jnp.float32, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer.kernel = Frozen(layer.kernel[...])
    model = nnx.Dict(layer=layer, none=nnx.Linear(16, 16, use_bias=False, rngs=nnx.Rngs(0)))
    bias = layer.bias
    structurize(model, "btt", inplace=True)
    assert all(type(factor) is Frozen for factor in model["layer"].factors)
    assert model["layer"].factors[0].dtype == jnp.bfloat16
    assert model["layer"](jnp.ones(16)).dtype == jnp.float32
    assert model["layer"].bias is bias
    assert model["none"].bias is None
    assert type(densify(model)["layer"].kernel) is Frozen


def test_tied_weights_and_subclasses_stay_dense():
    class Mine(nnx.Linear):
        """Computes something else."""

    rngs = nnx.Rngs(0)
    model = nnx.Dict(
        a=nnx.Linear(8, 8, rngs=rngs), b=nnx.Linear(8, 8, rngs=rngs), c=Mine(8, 8, rngs=rngs),
        d=nnx.Linear(8, 8, precision="highest", rngs=rngs),
        e=nnx.LinearGeneral((2, 4), 8, axis=(0, 1), rngs=rngs),
        f=nnx.LinearGeneral((2, 4), 8, axis=(-1, -2), rngs=rngs),
        g=nnx.Linear(8, 8, rngs=rngs, dot_general=lambda *args, **kwargs: jax.lax.dot_general(*args, **kwargs)),
        h=nnx.Linear(8, 8, rngs=rngs), router=nnx.Linear(8, 8, rngs=rngs),
    )  # fmt: skip
    model["b"].kernel = model["a"].kernel
    reasons = {row.name: row.reason for row in structurize(model, "btt", dry_run=True)}
    assert reasons["a"] == "its kernel is tied to b.kernel"
    assert reasons["b"] == "its kernel is tied to a.kernel"
    assert "subclass" in reasons["c"]
    assert "precision" in reasons["d"]
    assert "not the last axes" in reasons["e"]
    assert "another order" in reasons["f"]
    assert "dot_general" in reasons["g"]
    assert reasons["h"] == ""
    assert reasons["router"] == "router of experts"
    with pytest.raises(so.StructureError, match="a was selected, but its kernel is tied"):
        structurize(model, "btt", "a")


def test_drawn_anew(net):
    key = jax.random.key(3)
    small = structurize(net, "btt(rank=2)", init="mup", key=key, zero="attention.out")
    assert not small.attention.out.factors[1][...].any()
    assert small.attention.out.factors[0][...].any()
    assert not small.layers[0].bias[...].any()
    again = structurize(net, "btt(rank=2)", "layers.*", init="mup", key=key)
    np.testing.assert_array_equal(small.layers[1].factors[0][...], again.layers[1].factors[0][...])
    assert (small.layers[0].factors[0][...] != small.layers[1].factors[0][...]).any()
    capped = structurize(net, "btt(rank=2)", weight_norm=True)
    plain = structurize(net, "btt(rank=2)")
    assert (capped.layers[0].gains[...] >= 1).all()
    np.testing.assert_allclose(
        capped.layers[0].operator().to_dense(), plain.layers[0].operator().to_dense(), rtol=1e-5, atol=1e-8
    )


def test_abstract_models_and_stacked_layers_of_nnx():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return nnx.Linear(16, 16, rngs=nnx.Rngs(params=key))

    stack = make(jax.random.split(jax.random.key(0), 3))
    small = structurize(stack, EXACT)
    assert [tuple(factor.shape) for factor in small.factors] == [(3, 1, 16, 16)] * 2
    x = jnp.ones((3, 16))
    run = nnx.vmap(lambda layer, x: layer(x))
    np.testing.assert_allclose(run(small, x), run(stack, x), atol=1e-5)
    with pytest.raises(so.StructureError, match="stack of layers"):
        densify(small)
    shapes = structurize(nnx.eval_shape(Net), "btt(rank=2)", weight_norm=True)
    assert isinstance(shapes.layers[0].factors[0].get_value(), jax.ShapeDtypeStruct)
    assert soj.plan(shapes)["layers.1.factors.0"].lr_scale == 2.0


def test_calibration_minimises_the_error_of_outputs():
    layer = nnx.Linear(16, 16, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    mix = jax.random.normal(jax.random.key(1), (16, 16)) * jnp.logspace(0, -2, 16)
    x = jax.random.normal(jax.random.key(2), (500, 16)) @ mix + 3
    moments = Moments.zeros(16, like=x).add(x)

    def error(small):
        return float(((small(x) - layer(x)) ** 2).sum())

    plain = structurize(layer, "block_diag(blocks=4)")
    weighted = structurize(layer, "block_diag(blocks=4)", calibration={"": moments.covariance})
    centred = structurize(layer, "block_diag(blocks=4)", calibration={"": moments})
    assert error(centred) < error(weighted) < error(plain)
    with pytest.raises(so.StructureError, match="no moments for"):
        structurize(layer, "btt", calibration={"other": moments})


# ------------------------------------------------------------------------------------------------------------- Equinox


def test_equinox_there_and_back():
    model = {
        "mlp": eqx.nn.MLP(16, 16, 16, 2, key=jax.random.key(0)),
        "attention": eqx.nn.MultiheadAttention(2, 16, key=jax.random.key(1)),
        "embed": eqx.nn.Embedding(8, 16, key=jax.random.key(2)),
    }
    small = structurize(model, EXACT, ["mlp.*", "attention.*"]).params
    assert isinstance(small["mlp"].layers[0], EquinoxLinear)
    x = jax.random.normal(jax.random.key(3), (4, 16))
    np.testing.assert_allclose(jax.vmap(small["mlp"])(x), jax.vmap(model["mlp"])(x), atol=1e-12)
    np.testing.assert_allclose(small["attention"](x, x, x), model["attention"](x, x, x), atol=1e-12)
    back = densify(small)
    assert jax.tree.structure(back) == jax.tree.structure(model)
    assert eqx.tree_equal(back, model, rtol=1e-10, atol=1e-12)
    table = structurize(model["mlp"], "btt", dry_run=True)
    assert [row.structure for row in table] == ["btt"] * 3


def test_equinox_stacks_shared_weights_and_scalars():
    stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(16, 16, key=key))(jax.random.split(jax.random.key(0), 3))
    small = structurize(stack, EXACT)
    assert [factor.shape for factor in small.factors] == [(3, 1, 16, 16)] * 2
    back = densify(small)
    np.testing.assert_allclose(back.weight, stack.weight, atol=1e-12)
    np.testing.assert_array_equal(back.bias, stack.bias)
    drawn = structurize(stack, "btt", init="mup", key=jax.random.key(1), weight_norm=True)
    assert drawn.gains.shape == (3, 2)
    assert (drawn.factors[0][0] != drawn.factors[0][1]).any()
    x = jnp.ones((3, 16))
    assert eqx.filter_vmap(lambda layer, x: layer(x))(drawn, x).shape == (3, 16)

    class Tied(eqx.Module):
        pair: eqx.nn.Shared

        def __init__(self):
            layers = [eqx.nn.Linear(8, 8, key=jax.random.key(k)) for k in range(2)]
            self.pair = eqx.nn.Shared(layers, lambda p: p[1].weight, lambda p: p[0].weight)

    tied = structurize(Tied(), "btt", dry_run=True)
    assert "eqx.nn.Shared" in tied[1].reason
    layer = eqx.nn.Linear(8, 8, key=jax.random.key(0))
    assert "same array" in structurize([layer, layer], "btt", dry_run=True)[0].reason
    assert "scalar" in structurize(eqx.nn.Linear("scalar", 8, key=jax.random.key(0)), "btt", dry_run=True)[0].reason


# --------------------------------------------------------------------------------------------------------- plain trees


class Linen(linen.Module):
    """A model whose parameters are a tree of dicts."""

    @linen.compact
    def __call__(self, x):
        x = linen.gelu(linen.Dense(16, name="up", param_dtype=jnp.float64)(x))
        return linen.Dense(8, name="head", param_dtype=jnp.float64)(x)


@pytest.mark.parametrize("kind", [dict, FrozenDict])
def test_parameters_of_linen(kind):
    model, x = Linen(), jax.random.normal(jax.random.key(0), (3, 16))
    params = kind(model.init(jax.random.key(1), x)["params"])
    found = structurize(params, EXACT)
    assert isinstance(found, soj.Structured)
    assert type(found.params) is kind
    assert set(found.params["up"]) == {"factors", "bias"}
    assert set(found.params["head"]) == {"kernel", "bias"}
    assert list(found.specs) == ["up.factors"]
    with linen.intercept_methods(soj.linen_interceptor(found.specs)):
        y = jax.jit(model.apply)({"params": found.params}, x)
    np.testing.assert_allclose(y, model.apply({"params": params}, x), atol=1e-12)
    back = densify(found.params, specs=found.specs)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    np.testing.assert_allclose(back["up"]["kernel"], params["up"]["kernel"], atol=1e-12)
    assert soj.plan(found.params, specs=found.specs)["up.factors.0"].lr_scale > 0
    assert survey(found.params, specs=found.specs)["up"].params == 512
    with (
        linen.intercept_methods(soj.linen_interceptor({})),
        pytest.raises(so.StructureError, match=re.escape("specs has no plan for 'up.factors'")),
    ):
        model.apply({"params": found.params}, x)


def test_stacked_kernels_and_kernels_of_convolutions():
    params = {
        "layers": {"up": {"kernel": jax.random.normal(jax.random.key(0), (3, 16, 16)), "bias": jnp.ones((3, 16))}},
        "conv": {"kernel": jnp.ones((3, 8, 8))},
        "table": {"embedding": jnp.ones((8, 8))},
    }
    with pytest.raises(so.StructureError, match="fits no linear layer"):
        structurize(params, "btt", "conv")
    found = structurize(params, EXACT, specs={"layers.up.kernel": (16, 16)})
    assert [factor.shape for factor in found.params["layers"]["up"]["factors"]] == [(3, 1, 16, 16)] * 2
    assert found.params["conv"] == params["conv"]
    assert list(found.specs) == ["layers.up.factors"]
    back = densify(found.params, specs=found.specs)
    np.testing.assert_allclose(back["layers"]["up"]["kernel"], params["layers"]["up"]["kernel"], atol=1e-12)
    kept = {k.name: k.reason for k in survey(params, specs={"layers.up.kernel": (16, 16)}).kept}
    assert "more than two axes" in kept["conv.kernel"]


def test_errors(net):
    with pytest.raises(so.StructureError, match="init: expected 'project' or 'mup', got 'zeros'"):
        structurize(net, "btt", init="zeros")
    with pytest.raises(so.StructureError, match="give key="):
        structurize(net, "btt", init="mup")
    with pytest.raises(so.StructureError, match="zero: projected weights"):
        structurize(net, "btt", zero=True)
    with pytest.raises(so.StructureError, match="calibration: weights that are drawn anew"):
        structurize(net, "btt", init="mup", calibration={}, key=jax.random.key(0))
    with pytest.raises(so.StructureError, match="inplace: only modules of Flax NNX"):
        structurize(eqx.nn.MLP(4, 4, 4, 1, key=jax.random.key(0)), "btt", inplace=True)
    with pytest.raises(so.StructureError, match="fits no linear layer"):
        structurize(net, "btt", "nothing")
    with pytest.raises(so.StructureError, match="zero: none of the layers"):
        structurize(net, "btt", "layers.*", init="mup", zero=True, key=jax.random.key(0))
    with pytest.raises(so.StructureError, match="fits no linear layer"):
        densify(net, "layers.*")
    with pytest.raises(so.StructureError, match="a plain tree has none"):
        structurize({"up": {"kernel": jnp.ones((4, 4))}}, "btt", weight_norm=True)
    with pytest.raises(so.StructureError, match="out_sharding"):
        structurize(net, "btt").layers[0](jnp.ones(16), out_sharding=object())
    with pytest.raises(so.ShapeError, match=r"\(\.\.\., 4, 4\), got \(3, 16\)"):
        structurize(net, "btt").attention.out(jnp.ones((3, 16)))


def test_the_report_has_the_errors_of_projection():
    params = {"up": {"kernel": jax.random.normal(jax.random.key(0), (16, 32))}, "head": {"kernel": jnp.ones((32, 4))}}
    found, report = structurize(params, "low_rank(rank=3)", report=True)
    W = np.asarray(params["up"]["kernel"]).T
    values = np.linalg.svd(W, compute_uv=False)
    assert report["up"].error == pytest.approx(np.sqrt((values[3:] ** 2).sum() / (values**2).sum()), rel=1e-4)
    assert report["up"].optimality == "exact"
    assert report["head"].error is None
    assert report.params - report.saved == sum(array.size for array in jax.tree.leaves(found.params))
    mlp = eqx.nn.MLP(16, 4, 16, 1, key=jax.random.key(0))
    small, report = structurize(mlp, EXACT, "layers.0", report=True)
    assert [row.error < 1e-6 for row in report.converted] == [True] * len(report.converted)
    assert isinstance(small, eqx.nn.MLP)


def test_warnings_come_once_a_conversion():
    mlp = eqx.nn.MLP(16, 16, 16, 2, key=jax.random.key(0))
    with pytest.warns(so.StructureWarning) as told:
        structurize(mlp, "btt(rank=9)", init="mup", key=jax.random.key(0))
    assert [str(one.message).partition(" is more")[0] for one in told] == ["layers.0 and 2 more: btt(rank=9): rank 9"]
    with pytest.warns(so.StructureWarning, match="no layer was converted .*has a structure already"):
        structurize(structurize(mlp, "btt(rank=4)", "layers.0").layers[0], "kron")


def test_a_bias_that_two_layers_share_takes_no_mean():
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(*[nnx.Linear(8, 8, rngs=rngs) for _ in range(3)])
    net.layers[1].bias = net.layers[0].bias
    x = jax.random.normal(jax.random.key(0), (50, 8)) + 3
    moments = so.projection.Moments.zeros(8, x).add(x)
    small = structurize(net, "low_rank(rank=2)", calibration={f"layers.{k}": moments for k in range(3)})
    assert small.layers[1].bias is small.layers[0].bias
    assert not small.layers[0].bias[...].any()
    assert small.layers[2].bias[...].any()
