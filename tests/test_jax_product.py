"""The product of JAX layers: values and derivatives against dense matrices made by numpy, whatever the layout."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

jax = pytest.importorskip("jax", reason="needs JAX")
pytest.importorskip("flax", reason="needs Flax")

import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402
from jax.test_util import check_grads  # noqa: E402
from test_contract import chains, fewer_examples, integers, reference  # noqa: E402

import structops as so  # noqa: E402
from structops.chain import Chain  # noqa: E402
from structops.contract import products, store, unstore  # noqa: E402
from structops.jax import StructuredLinear  # noqa: E402
from structops.jax import product as module  # noqa: E402
from structops.jax.product import product  # noqa: E402
from structops.merging import Machine  # noqa: E402
from structops.program import copied_moves  # noqa: E402
from structops.spec import ChainPlan, structure  # noqa: E402

pytestmark = [pytest.mark.jax, pytest.mark.filterwarnings("ignore::structops.StructureWarning")]

SIZES = {
    "low_rank(rank=3)": (10, 7),
    "kron": (12, 18),
    "tt(rank=2)": (12, 18),
    "tt(rank=2, num_cores=3)": (16, 24),
    "btt(rank=1)": (16, 16),
    "btt(rank=4, blocks=4)": (8, 12),  # a wide state: tokens last
    "btt(rank=2, num_cores=3)": (16, 24),
    "monarch(blocks=4)": (10, 15),  # padded
    "monarch(blocks=6)": (24, 24),  # a regroup
    "block_diag(blocks=2)": (6, 8),
    "blast(rank=3, blocks=2)": (6, 8),
}
FEW = ("btt(rank=4, blocks=4)", "monarch(blocks=4)", "monarch(blocks=6)", "tt(rank=2)")
EAGER = Machine(move=1e9, side=0.0, call=0.0)  # always multiplies the factors together where that writes less
PATIENT = Machine(move=0.0, side=0.0, call=1e18)  # never does


def plan_of(chain: Chain) -> ChainPlan:
    return ChainPlan.of(chain, lambda chain, factors: None)


def case(chain: Chain, seed: int = 0, lead: tuple[int, ...] = (5,)) -> tuple[list[Any], Any, np.ndarray]:
    """Stored factors and x of small whole numbers, and the dense matrix, which numpy makes of the textbook arrays."""
    rng = np.random.default_rng(seed)
    arrays = [integers(rng, *factor.shape) for factor in chain.factors]
    dense = reference(chain, arrays, np.eye(chain.in_features)).T
    return (
        list(store(chain, [jnp.asarray(a) for a in arrays])),
        jnp.asarray(integers(rng, *lead, chain.in_features)),
        dense,
    )


@pytest.fixture(params=SIZES)
def chain(request):
    return structure(request.param).chain(*SIZES[request.param])


@pytest.fixture(params=[EAGER, PATIENT], ids=["merged", "one_by_one"])
def machine(request, monkeypatch):
    monkeypatch.setattr(module, "XLA_CPU", request.param)
    return request.param


# ------------------------------------------------------------------------------------------------------------- values


@fewer_examples(2)
@given(chains(), st.booleans(), st.sampled_from([(), (1,), (3,), (2, 0), (2, 3)]))
def test_any_chain_in_any_layout(drawn, is_minor, lead):
    chain = drawn[0]
    factors, x, dense = case(chain, lead=lead)
    wanted = np.asarray(x) @ dense.T
    padded = jnp.pad(x, [(0, 0)] * len(lead) + [(0, chain.padded_in - chain.in_features)])
    moves = tuple(copied_moves(chain.terms[0], chain.steps, chain.terms[-1], dict(chain.sizes), is_minor))
    y = products(moves, factors, padded)[:, : chain.out_features]
    np.testing.assert_array_equal(y.reshape(wanted.shape), wanted)
    np.testing.assert_array_equal(product(plan_of(chain), factors, x), wanted)


@fewer_examples(3)
@given(chains(), st.sampled_from([EAGER, PATIENT]))
def test_any_chain_with_factors_multiplied_together(drawn, machine):
    chain = drawn[0]
    factors, x, dense = case(chain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "XLA_CPU", machine)
        np.testing.assert_array_equal(product(plan_of(chain), factors, x), np.asarray(x) @ dense.T)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("spec", FEW)
def test_dtypes(spec, dtype):
    chain = structure(spec).chain(*SIZES[spec])
    factors, x, dense = case(chain)
    factors, x = [f.astype(dtype) / 8 for f in factors], x.astype(dtype)
    if "complex" in dtype:
        factors[0], dense = factors[0] * 1j, dense * 1j
    y = jax.jit(lambda factors, x: product(plan_of(chain), factors, x))(factors, x)
    assert y.dtype == x.dtype
    wanted = np.asarray(x).astype(complex) @ dense.T / 8 ** len(factors)
    tolerance = 4 * float(jnp.finfo(dtype).eps) * np.abs(wanted).max()
    np.testing.assert_allclose(np.asarray(y).astype(complex), wanted, atol=max(tolerance, 1e-12))


def test_dtypes_are_promoted():
    factors, x, _ = case(structure("btt(rank=4, blocks=4)").chain(8, 12))
    plan = plan_of(structure("btt(rank=4, blocks=4)").chain(8, 12))
    assert product(plan, [f.astype("float32") for f in factors], x.astype("bfloat16")).dtype == jnp.float32


# -------------------------------------------------------------------------------------------------------- derivatives


def test_gradients_are_those_of_numpy(chain, machine):
    factors, x, dense = case(chain)
    rng = np.random.default_rng(1)
    weight = integers(rng, len(x), chain.out_features)
    gradient, of_x = jax.jit(
        jax.grad(lambda factors, x: (product(plan_of(chain), factors, x) * weight).sum(), argnums=(0, 1))
    )(factors, x)
    np.testing.assert_array_equal(of_x, weight @ dense)
    # The product is linear in every factor: its derivative is its value with the direction in place of the factor.
    for k, factor in enumerate(factors):
        direction = jnp.asarray(integers(rng, *factor.shape))
        changed = [*factors[:k], direction, *factors[k + 1 :]]
        textbook = unstore(chain, changed)
        moved = reference(chain, [np.asarray(a) for a in textbook], np.asarray(x))
        np.testing.assert_array_equal((gradient[k] * direction).sum(), (moved * weight).sum())


@pytest.mark.parametrize("spec", FEW[:2])
def test_derivatives_of_every_order_in_both_modes(spec, machine):
    chain = structure(spec).chain(*SIZES[spec])
    factors, x, _ = case(chain, lead=(2,))

    @jax.jit
    def apply(factors, x):
        return product(plan_of(chain), [jnp.asarray(f) for f in factors], jnp.asarray(x))

    check_grads(apply, (factors, x / 4), order=2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", FEW)
def test_vmap(spec, machine):
    chain = structure(spec).chain(*SIZES[spec])
    factors, x, dense = case(chain, lead=(2, 3))
    wanted = np.asarray(x) @ dense.T
    apply = lambda factors, x: product(plan_of(chain), factors, x)  # noqa: E731
    np.testing.assert_array_equal(jax.vmap(apply, (None, 0))(factors, x), wanted)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(apply, (None, 0)), (None, 0))(factors, x), wanted)
    stacked = [jnp.stack([f, 2 * f]) for f in factors]
    both = jax.jit(jax.vmap(apply))(stacked, x)
    np.testing.assert_array_equal(both, wanted * np.array([1, 2 ** len(factors)])[:, None, None])


# -------------------------------------------------------------------------------------------------------- which layout


@pytest.mark.parametrize(
    ("spec", "width", "is_minor"),
    [
        ("dense", 64, False),
        ("low_rank(rank=256)", 64, False),
        ("kron", 1024, False),
        ("tt(rank=16)", 1024, False),
        ("btt(rank=1)", 1024, False),
        ("btt(rank=2)", 1024, True),
        ("btt(rank=8, blocks=8)", 1024, False),
        ("btt(rank=2, num_cores=3)", 4096, True),
    ],
)
def test_tokens_are_last_where_the_state_is_wide(spec, width, is_minor):
    chain = structure(spec).chain(width, width)
    factor_moves = [move for move in chain.xla_moves if move.factor]
    assert all(move.tokens_last is is_minor for move in factor_moves)
    assert [move.factor[-2:] for move in factor_moves] == [f.stored_shape[1:] for f in chain.factors]


def test_many_tokens_multiply_the_factors_together():
    """One product with the dense matrix, where the chain has as many multiply-accumulates."""
    plan = plan_of(structure("tt(rank=16)").chain(64, 64))
    factors = [jnp.ones(shape) for shape in plan.stored_shapes]

    def shapes(tokens: int) -> list[tuple[int, ...]]:
        text = jax.make_jaxpr(lambda x: product(plan, factors, x))(jnp.ones((tokens, 64)))
        return [e.outvars[0].aval.shape for e in text.jaxpr.eqns if e.primitive.name == "dot_general"]

    assert len(shapes(1)) == 2
    assert shapes(1 << 16)[-1] == (1 << 16, 64)


# --------------------------------------------------------------------------------------------------------------- layer


def test_the_layer_takes_it_and_what_is_no_chain_is_applied():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 16)))
    for spec in ("btt(rank=4, blocks=4)", "toeplitz", "convolution(spatial_shape=4, kernel_size=3)"):
        layer = StructuredLinear(16, 16, spec, bias=False, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        wanted = x @ layer.operator().to_dense().T
        np.testing.assert_allclose(layer(x), wanted, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spec", ["btt(rank=4, blocks=4)", "toeplitz", "monarch(blocks=5)"])
def test_merge_gives_a_linear_layer(spec, bias):
    layer = StructuredLinear(16, 24, spec, bias=bias, param_dtype=jnp.float64, weight_norm=True, rngs=nnx.Rngs(0))
    layer.factors[0][...] = 10 * layer.factors[0][...]
    if bias:
        layer.bias[...] = jnp.arange(24.0)
    dense = layer.merge()
    assert type(dense) is nnx.Linear
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 16)))
    np.testing.assert_allclose(dense(x), layer(x), atol=1e-12)


def test_errors():
    plan = plan_of(structure("btt(rank=4, blocks=4)").chain(8, 12))
    factors, x, _ = case(plan.chain)
    with pytest.raises(so.ShapeError, match=r"expected x of shape \(\.\.\., 8\)"):
        product(plan, factors, x[:, :7])
    with pytest.raises(so.ShapeError, match="expected 2 factors"):
        product(plan, factors[:1], x)
    with pytest.raises(so.ShapeError, match="is stored as"):
        product(plan, [factors[0].mT, factors[1]], x)
    with pytest.raises(so.BackendError, match=r"jnp\.asarray"):
        product(plan, factors, np.asarray(x))
