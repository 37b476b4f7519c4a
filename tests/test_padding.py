"""Sizes that suit no modes: what ``pad=True`` means for draws, scales, counts and layers of both libraries."""

import numpy as np
import pytest

import structops as so
from structops.testing.arrays import assert_close, to_backend, to_numpy

SPECS = ["btt(rank=2, pad=True)", "btt(rank=2, blocks=4, pad=True)", "tt(rank=2, pad=True)", "kron(pad=True)"]
SHAPES = [(13, 17), (23, 8), (7, 29)]  # output x input


def embedded(spec, shape, factors, backend):
    """The matrix of the padded sizes, by the same pattern without any padding, cut by numpy."""
    chain = so.structure(spec).chain(shape[1], shape[0])
    whole = so.Chain(chain.pattern, dict(chain.sizes))
    assert whole.shape == (chain.padded_out, chain.padded_in)
    eye = to_backend(np.eye(whole.in_features), backend)
    return to_numpy(so.contract(whole, factors, eye)).T[: shape[0], : shape[1]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", SPECS)
def test_padded_parameters_count_and_scales_take_the_true_width(spec, shape):
    chain = so.structure(spec).chain(shape[1], shape[0])
    assert chain.shape == shape
    assert chain.padded_out >= shape[0]
    assert chain.padded_in >= shape[1]
    assert chain.num_params == sum(np.prod(factor.shape) for factor in chain.factors)
    count = len(chain.factors)
    for row, factor in zip(so.mup.scales(chain), chain.factors, strict=True):
        assert row.init_std == pytest.approx(min(factor.fan_in, factor.fan_out) ** 0.5 / factor.fan_in)
        assert row.lr_scale == pytest.approx(shape[1] / factor.fan_in / count)  # not the padded width


@pytest.mark.parametrize("spec", SPECS)
def test_layers(backend, spec):
    """Random draws and layers, against the cut matrix."""
    shape = m, n = SHAPES[0]
    x = np.random.default_rng(0).standard_normal((2, 3, shape[1]))
    if backend == "torch":
        torch = pytest.importorskip("torch")
        from structops.torch import StructuredLinear

        layer = StructuredLinear(n, m, spec, dtype=torch.float64)
        factors = [factor.detach() for factor in layer.factors]
        y = layer(torch.from_numpy(x)).detach()
        merged = layer.merge().weight.detach()
        like = torch.empty(0, dtype=torch.float64)
        drawn = so.random(spec, shape, like=like, generator=torch.Generator().manual_seed(0))
    else:
        jax = pytest.importorskip("jax")
        from flax import nnx

        from structops.jax import StructuredLinear

        layer = StructuredLinear(n, m, spec, param_dtype="float64", rngs=nnx.Rngs(0))
        factors = [factor[...] for factor in layer.factors]
        y = layer(jax.numpy.asarray(x))
        merged = layer.merge().kernel[...].T
        drawn = so.random(spec, shape, like=jax.numpy.zeros(0), key=jax.random.key(0))
    dense = embedded(spec, shape, factors, backend)
    assert_close(y, x @ dense.T)
    assert_close(merged, dense)
    assert_close(layer.operator().to_dense(), dense)
    assert drawn.shape == shape
    product = to_numpy(drawn @ to_backend(x[0].T.copy(), backend))
    np.testing.assert_allclose(product, to_numpy(drawn.to_dense()) @ x[0].T, atol=1e-12)
