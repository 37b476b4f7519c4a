"""The Flax NNX layer and the optax transformation."""

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="needs JAX")
pytest.importorskip("flax", reason="needs Flax")

import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

import structops as so  # noqa: E402
from structops.jax import StructuredLinear, lr_scales, scale_by_mup  # noqa: E402

pytestmark = pytest.mark.jax

SPECS = [
    "dense",
    "low_rank(rank=3)",
    "kron",
    "tt(rank=2)",
    "btt(rank=2)",
    "monarch(blocks=5)",
    "blast(rank=3, blocks=2)",
]
SPECS += ["toeplitz", "convolution(spatial_shape=4, kernel_size=3)"]


def layer(spec, n=16, m=32, **kwargs):
    kwargs.setdefault("param_dtype", jnp.float64)
    return StructuredLinear(n, m, spec, rngs=nnx.Rngs(0), **kwargs)


@pytest.fixture(params=SPECS)
def spec(request):
    return request.param


def test_equals_the_dense_matrix_under_jit(spec):
    structured = layer(spec)
    x = jax.random.normal(jax.random.key(1), (2, 3, 16), jnp.float64)
    y = nnx.jit(lambda model, x: model(x))(structured, x)
    np.testing.assert_allclose(y, x @ structured.operator().to_dense().T, atol=1e-12)
    np.testing.assert_allclose(jax.vmap(structured)(x[0]), y[0], atol=1e-12)


def test_gradients_equal_those_through_the_dense_matrix(spec):
    structured = layer(spec, bias=False)
    x = jax.random.normal(jax.random.key(1), (5, 16), jnp.float64)
    weight = jax.random.normal(jax.random.key(2), (5, 32), jnp.float64)
    graph, params = nnx.split(structured)

    def fast(params):
        return (nnx.merge(graph, params)(x) * weight).sum()

    def slow(params):
        return (x @ nnx.merge(graph, params).operator().to_dense().T * weight).sum()

    for ours, dense in zip(
        jax.tree.leaves(jax.grad(fast)(params)), jax.tree.leaves(jax.grad(slow)(params)), strict=True
    ):
        np.testing.assert_allclose(ours, dense, atol=1e-10)


def test_factors_are_stored_as_blocks_of_matrices(spec):
    structured = layer(spec)
    assert tuple(f.shape for f in structured.factors) == structured.plan.stored_shapes
    assert structured.plan.num_params == so.num_params(structured.operator())


def test_init_has_the_standard_deviation_of_the_rule_and_depends_on_the_seed():
    structured = StructuredLinear(1024, 1024, "btt(rank=4)", rngs=nnx.Rngs(0))
    for factor, row in zip(structured.factors, so.mup.scales(structured.plan), strict=True):
        assert float(jnp.std(factor[...])) == pytest.approx(row.init_std, rel=0.02)
    again, other = (StructuredLinear(16, 16, "btt", rngs=nnx.Rngs(seed)) for seed in (0, 1))
    same = StructuredLinear(16, 16, "btt", rngs=nnx.Rngs(0))
    assert (again.factors[0][...] == same.factors[0][...]).all()
    assert (other.factors[0][...] != same.factors[0][...]).any()


def test_zero_init_is_zero():
    structured = layer("btt(rank=2)", zero_init=True)
    assert not structured(jnp.ones((3, 16))).any()
    assert structured.factors[0][...].any()


def test_agrees_with_torch():
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    from structops.torch import StructuredLinear as TorchLinear

    twin = TorchLinear(16, 32, "btt(rank=2)", bias=False, dtype=torch.float64)
    structured = layer("btt(rank=2)", bias=False)
    for ours, theirs in zip(structured.factors, twin.factors, strict=True):
        ours[...] = jnp.asarray(theirs.detach().numpy())
    x = np.random.default_rng(0).standard_normal((3, 16))
    np.testing.assert_allclose(structured(jnp.asarray(x)), twin(torch.from_numpy(x)).detach().numpy(), atol=1e-12)


def test_wrong_input_says_what_was_expected():
    with pytest.raises(so.ShapeError, match=r"16.*\(3, 15\)"):
        layer("btt")(jnp.zeros((3, 15)))


# ------------------------------------------------------------------------------------------------------------ optimiser


class Net(nnx.Module):
    """Two structured layers in a list, and a dense head."""

    def __init__(self, width, structure="btt"):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List(
            [
                StructuredLinear(width, 4 * width, structure, rngs=rngs),
                StructuredLinear(4 * width, width, structure, rngs=rngs),
            ]
        )
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        for hidden in self.layers:
            x = hidden(x)
        return self.head(x)


def test_scales_by_path():
    assert lr_scales(Net(64)) == {
        ("head", "bias"): 1.0,
        ("head", "kernel"): 1.0,
        ("layers", "0", "bias"): 1.0,
        ("layers", "0", "factors", "0"): 4.0,
        ("layers", "0", "factors", "1"): 4.0,
        ("layers", "1", "bias"): 1.0,
        ("layers", "1", "factors", "0"): 8.0,
        ("layers", "1", "factors", "1"): 8.0,
    }
    with_base = lr_scales(Net(64), base=Net(16, "dense"))
    assert with_base["layers", "0", "factors", "0"] == 1.0
    assert with_base["head", "kernel"] == 0.25
    assert set(lr_scales(Net(64), structure_aware=False).values()) == {1.0}


def test_scales_equal_those_of_torch():
    pytest.importorskip("torch", reason="compares with PyTorch")
    from structops.torch import StructuredLinear as TorchLinear
    from structops.torch import param_groups

    for spec, optimizer in (("btt(rank=4)", "adam"), ("monarch(blocks=4)", "sgd")):
        ours = lr_scales(StructuredLinear(64, 256, spec, rngs=nnx.Rngs(0)), optimizer=optimizer, base=16)
        assert ours.pop(("bias",)) == 1.0
        twin = TorchLinear(64, 256, spec)
        theirs = {id(p): g["lr_scale"] for g in param_groups(twin, optimizer=optimizer, base=16) for p in g["params"]}
        assert ours == {("factors", str(k)): theirs[id(factor)] for k, factor in enumerate(twin.factors)}


def test_the_transformation_scales_each_update():
    model = Net(16)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(1.0), scale_by_mup(model)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        gradient = nnx.grad(lambda m: (m(x) ** 2).mean())(model)
        optimizer.update(model, gradient)
        return gradient

    gradient = step(model, optimizer, jnp.ones((3, 16)))
    moved = jax.tree.map(lambda new, old, g: (old - new) / g, nnx.state(model, nnx.Param), before, nnx.state(gradient))
    table = lr_scales(model)
    for path, ratio in nnx.to_flat_state(moved):
        scale = table.get(tuple(map(str, path)), 1.0)
        np.testing.assert_allclose(np.nanmedian(np.asarray(ratio[...])), scale, rtol=1e-3)


def test_errors():
    with pytest.raises(so.StructureError, match="no rule for optimizer"):
        scale_by_mup(Net(16), optimizer="magic")
    with pytest.raises(so.StructureError, match="no layer 'head'"):
        lr_scales(Net(16), base=nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
