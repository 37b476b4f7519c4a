"""The fused kernel under a layer: autograd, compile and second derivatives, against the plain products."""

from __future__ import annotations

import pytest
import torch

from structops.torch import StructuredLinear, tuning


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setattr(tuning, "fused", True)
    monkeypatch.setattr(tuning, "kernel_numbers", 0)


@pytest.mark.parametrize("spec", ["btt(rank=2)", "monarch(blocks=2)"])
def test_values_and_gradients_are_those_of_the_dense_layer(spec, fused, device):
    layer = StructuredLinear(24, 36, spec, device=device)
    x = torch.randn(2, 9, 24, device=device, requires_grad=True)
    weight = torch.randn(2, 9, 36, device=device)
    codes = []

    def backend(graph, inputs):
        codes.append(graph.code)
        return graph

    torch._dynamo.reset()
    torch.compile(layer, fullgraph=True, backend=backend)(x)
    assert "; fused" in codes[0]
    dense = x @ layer.operator().to_dense().T + layer.bias
    y = layer(x)
    torch.testing.assert_close(y, dense, rtol=1e-5, atol=1e-5)
    inputs = [x, *layer.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((y * weight).sum(), inputs),
        torch.autograd.grad((dense * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_chains_that_are_no_pair_run_in_chunks(fused, device):
    layer = StructuredLinear(24, 36, "kron", device=device)
    x = torch.randn(9, 24, device=device)
    torch.testing.assert_close(layer(x), x @ layer.operator().to_dense().T + layer.bias, rtol=1e-5, atol=1e-5)
