"""`contract`, `store` and `unstore`: values against numpy, and every transformation of both libraries."""

from __future__ import annotations

import pytest

from structops.chain import Chain
from structops.contract import contract, store, unstore


def fresh_chain() -> Chain:
    """A chain that was never run, so nothing can have been cached."""
    return Chain("cd, sbcd, abcs -> ab", {"a": 4, "b": 3, "c": 2, "d": 5, "s": 2}, in_features=9, out_features=11)


@pytest.mark.torch
@pytest.mark.parametrize("dynamic", [False, True])
def test_fresh_chain_compiles_to_one_graph(dynamic):
    torch = pytest.importorskip("torch")
    torch._dynamo.reset()
    textbook = [torch.randn(2, 3, 2, 5), torch.randn(4, 3, 2, 2)]
    chain, x = fresh_chain(), torch.randn(6, 9)

    def both(arrays, x):
        factors = store(chain, arrays)
        return contract(chain, store(chain, unstore(chain, factors)), x)

    compiled = torch.compile(both, fullgraph=True, backend="eager", dynamic=dynamic)
    y = compiled(textbook, x)
    torch.testing.assert_close(y, both(textbook, x))
