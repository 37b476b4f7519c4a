"""How torch layers compute chains: token chunks, the operator for them, factors multiplied in advance."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

torch = pytest.importorskip("torch", reason="needs PyTorch")

from test_contract import chains, integers, jit_is_deprecated, reference  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import structops as so  # noqa: E402
from structops.bench.memory import saved_bytes  # noqa: E402
from structops.contract import store, unstore  # noqa: E402
from structops.torch import (  # noqa: E402
    StructuredLinear,
    ops,
    tuning,
)
from structops.torch import chunks as chunks_module  # noqa: E402
from structops.torch.chunks import ChunkedChain, chunks  # noqa: E402
from structops.torch.ops import apply, chain_product, from_text, how_text, to_text  # noqa: E402

pytestmark = pytest.mark.torch

SPECS = [
    "btt(rank=2)",
    "btt(rank=3, blocks=4)",
    "btt(rank=2, num_cores=3)",
    "monarch(blocks=4)",
    "monarch(blocks=5)",
    "kron",
    "kron(num_factors=3)",
    "tt(rank=2)",
    "tt(rank=2, num_cores=3)",
    "block_diag(blocks=4)",
    "blast(rank=3, blocks=2)",
    "einsum",
]


class Calls(list):
    """What runs chains in chunks, with a list of its calls."""

    def __call__(self, *args):
        self.append(args)
        return apply(*args)


def text_of(chain):
    return to_text(chain) + how_text(tuning.limits)


@pytest.fixture
def chunked(monkeypatch):
    """Every product that can run in chunks does, in many small ones; gives the calls of the operator."""
    monkeypatch.setattr(tuning, "kernel_numbers", 0)
    monkeypatch.setattr(tuning, "chunk_tokens", 3)
    monkeypatch.setattr(tuning, "least_tokens", 3)
    calls = Calls()
    monkeypatch.setattr(ops, "apply", calls)
    return calls


def layer(spec, n=24, m=36, dtype=torch.float64, **kwargs):
    return StructuredLinear(n, m, spec, dtype=dtype, generator=torch.Generator().manual_seed(0), **kwargs)


def dense_gradients(structured, x, weight):
    """Value and gradients of x and the factors through the dense matrix."""
    y = x @ structured.operator().to_dense().T
    return y, torch.autograd.grad((y * weight).sum(), [x, *structured.factors])


# -------------------------------------------------------------------------------------------------------------- chunks


@given(st.integers(1, 5000), st.integers(1, 2000), st.integers(1, 64))
def test_chunks_cover_the_tokens_and_are_odd_where_it_matters(tokens, most, lines):
    parts = chunks(tokens, most, lines)
    assert parts[0][0] == 0
    assert parts[-1][1] == tokens
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(parts))
    sizes = [end - start for start, end in parts]
    assert 1 <= min(sizes) <= max(sizes) <= most + 2
    assert max(sizes) - min(sizes) <= 2
    needed = -(-tokens // most)
    assert len(sizes) <= needed + (lines > 8)
    if tokens > 8 and (lines > 16 or (lines > 8 and needed > 1)):
        assert all(size % 2 for size in sizes)


@given(chains(), st.integers(1, 30), st.booleans(), st.randoms(use_true_random=False))
def test_random_chains_equal_numpy_and_their_gradients_the_dense_ones(drawn, tokens, keep, random):
    chain = drawn[0]
    chain = so.Chain(chain.pattern, chain.sizes)  # without padding, which is added outside
    if not ChunkedChain.supports(chain):
        return
    rng = np.random.default_rng(random.randrange(2**32))
    arrays = [integers(rng, *factor.shape) for factor in chain.factors]
    x, grad = integers(rng, tokens, chain.in_features), integers(rng, tokens, chain.out_features)
    matrix = reference(chain, arrays, np.eye(chain.in_features)).T
    factors = store(chain, [torch.from_numpy(array) for array in arrays])
    run = ChunkedChain(chain, (tuning.chunk_bytes, random.randrange(1, 40), 1))
    y, kept = run.forward(torch.from_numpy(x), factors, keep)
    np.testing.assert_array_equal(y, x @ matrix.T)
    assert kept.numel() == (tokens * sum(chain.intermediate_widths) if keep else 0)

    needed = [random.random() < 0.8 for _ in range(1 + len(factors))]
    dx, *gradients = run.backward(torch.from_numpy(grad), torch.from_numpy(x), kept, factors, needed)
    if needed[0]:
        np.testing.assert_array_equal(dx, grad @ matrix)
    for k, (array, gradient) in enumerate(zip(arrays, unstored(chain, factors, gradients, needed), strict=True)):
        if gradient is None:
            continue
        # The product is linear in every factor: its gradient along a direction is the product with that direction.
        direction = integers(rng, *array.shape)
        moved = reference(chain, [direction if j == k else a for j, a in enumerate(arrays)], x)
        assert (moved * grad).sum() == (direction * gradient.numpy()).sum()


def unstored(chain, factors, gradients, needed):
    """Gradients of stored factors with textbook axes, None where they are not needed."""
    full = [g if need else torch.zeros_like(f) for g, f, need in zip(gradients, factors, needed[1:], strict=True)]
    for gradient, factor, need in zip(gradients, factors, needed[1:], strict=True):
        assert gradient.shape == (factor.shape if need else (0,))
    return [g if need else None for g, need in zip(unstore(chain, full), needed[1:], strict=True)]


# --------------------------------------------------------------------------------------------------------------- layer


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_values_and_gradients_equal_the_dense_ones(spec, recompute, chunked):
    structured = layer(spec, bias=False, recompute=recompute)
    x = torch.randn(4, 5, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, 36, dtype=torch.float64)
    y = structured(x)
    assert len(chunked) == 1
    gradients = torch.autograd.grad((y * weight).sum(), [x, *structured.factors])
    dense, wanted = dense_gradients(structured, x, weight)
    torch.testing.assert_close(y, dense)
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("frozen", ["x", "first", "last", "factors"])
def test_frozen_inputs_get_no_gradient(frozen, chunked):
    structured = layer("btt(rank=2)", bias=False)
    x = torch.randn(20, 24, dtype=torch.float64, requires_grad=frozen != "x")
    for name, factor in zip(("first", "last"), structured.factors, strict=True):
        factor.requires_grad_(frozen not in (name, "factors"))
    structured(x).square().sum().backward()
    y = x @ structured.operator().to_dense().T
    learning = [tensor for tensor in (x, *structured.factors) if tensor.requires_grad]
    wanted = dict(zip(learning, torch.autograd.grad(y.square().sum(), learning), strict=True))
    for tensor in (x, *structured.factors):
        if tensor in wanted:
            torch.testing.assert_close(tensor.grad, wanted[tensor])
        else:
            assert tensor.grad is None
    assert chunked


def saved_numbers(structured, tokens):
    """Numbers that a forward pass keeps for the backward pass, without the factors."""
    x = torch.randn(tokens, 24, dtype=torch.float64, requires_grad=True)
    return saved_bytes(structured, x, list(structured.parameters())) / 8


@pytest.mark.parametrize("spec", ["btt(rank=2)", "tt(rank=2)", "btt(rank=2, num_cores=3)", "blast(rank=3, blocks=2)"])
def test_saved_activations_are_those_of_the_chain(spec, chunked):
    chain = so.structure(spec).chain(24, 36)
    assert saved_numbers(layer(spec, bias=False), 50) == 50 * chain.saved_activations
    assert saved_numbers(layer(spec, bias=False, recompute=True), 50) == 50 * chain.in_features


@pytest.mark.parametrize("spec", ["btt(rank=2)", "tt(rank=2)", "low_rank(rank=3)"])
def test_small_layers_keep_their_promises_too(spec):
    chain = so.structure(spec).chain(24, 36)
    assert saved_numbers(layer(spec, bias=False), 5) == 5 * chain.saved_activations
    assert saved_numbers(layer(spec, bias=False, recompute=True), 5) == 5 * chain.in_features


def test_nothing_is_kept_where_nothing_learns(chunked):
    structured = layer("btt(rank=2)", bias=False).requires_grad_(False)
    structured(torch.randn(20, 24, dtype=torch.float64))
    with torch.no_grad():
        layer("btt(rank=2)")(torch.randn(20, 24, dtype=torch.float64))
    assert [call[-2] for call in chunked] == [False, False]


def test_strided_and_empty_inputs(chunked):
    structured = layer("btt(rank=2)")
    matrix = structured.operator().to_dense()
    for x in (
        torch.randn(24, 20, dtype=torch.float64).T,
        torch.randn(20, 48, dtype=torch.float64)[:, ::2],
        torch.randn(20, 30, dtype=torch.float64)[:, 3:27],
        torch.randn(3, 24, dtype=torch.float64).expand(5, 3, 24),
        torch.randn(24, dtype=torch.float64),
        torch.randn(0, 24, dtype=torch.float64),
        torch.randn(2, 0, 24, dtype=torch.float64),
    ):
        torch.testing.assert_close(structured(x), x @ matrix.T)
        y = structured(x.detach().requires_grad_())
        (gradient,) = torch.autograd.grad(y.sum(), structured.factors[0])  # a gradient without strides of its own
        assert gradient.shape == structured.factors[0].shape


def test_results_do_not_lie_in_reused_memory(chunked):
    structured, first, second = layer("tt(rank=2)", bias=False), *torch.randn(2, 20, 24, dtype=torch.float64)
    before = structured(first)
    copied = before.detach().clone()
    gradient = torch.autograd.grad(before.sum(), structured.factors[0])[0]
    kept = gradient.clone()
    torch.autograd.grad(structured(second).square().sum(), structured.factors[0])
    assert torch.equal(before, copied)
    assert torch.equal(gradient, kept)


def test_inference_mode_leaves_memory_that_others_can_use(chunked, monkeypatch):
    structured, x = layer("btt(rank=2)", bias=False), torch.randn(20, 24, dtype=torch.float64)
    monkeypatch.setattr(chunks_module._local, "buffers", {}, raising=False)
    with torch.inference_mode():
        inferred = structured(x)
    assert inferred.is_inference()
    y = structured(x.requires_grad_())
    assert torch.equal(y, inferred)
    y.sum().backward()


def test_both_passes_have_the_same_chunks(chunked, monkeypatch):
    structured = layer("btt(rank=2)", bias=False)
    x = torch.randn(20, 24, dtype=torch.float64, requires_grad=True)
    y = structured(x)
    monkeypatch.setattr(tuning, "chunk_tokens", 7)
    ours = torch.autograd.grad(y.square().sum(), [x, *structured.factors])
    dense = x @ structured.operator().to_dense().T
    for one, other in zip(ours, torch.autograd.grad(dense.square().sum(), [x, *structured.factors]), strict=True):
        torch.testing.assert_close(one, other)


def test_threads_do_not_share_memory(chunked):
    structured = layer("btt(rank=2)")
    inputs = torch.randn(4, 300, 24, dtype=torch.float64)
    wanted = [structured(x).detach() for x in inputs]
    wrong = []

    def run(k):
        for _ in range(20):
            with torch.no_grad():
                if not torch.equal(structured(inputs[k]), wanted[k]):
                    wrong.append(k)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_gradients_are_summed_in_thirty_two(dtype, chunked):
    structured = layer("btt(rank=2)", bias=False)
    x = torch.rand(1000, 24, dtype=torch.float64)  # positive, so that a sum in 16 bit would stop growing
    with torch.no_grad():
        for factor in structured.factors:
            factor.abs_()
    weight = torch.full((1000, 36), 1 / 64, dtype=torch.float64)
    wanted = dense_gradients(structured, x.requires_grad_(), weight)[1][1:]
    half = copy.deepcopy(structured).to(dtype)
    (half(x.detach().to(dtype)) * weight.to(dtype)).sum().backward()
    assert len(chunked) == 1
    for factor, gradient in zip(half.factors, wanted, strict=True):
        assert factor.grad.dtype == dtype
        torch.testing.assert_close(factor.grad.double(), gradient, rtol=2e-2, atol=0)


def test_autocast_casts_and_gradients_come_back(chunked):
    structured = layer("btt(rank=2)", dtype=torch.float32, bias=False)
    x = torch.randn(20, 24, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = structured(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad.dtype == structured.factors[0].grad.dtype == torch.float32
    exact = copy.deepcopy(structured).to(torch.bfloat16)
    torch.testing.assert_close(y, exact(x.detach().bfloat16()))
    assert len(chunked) == 2


def test_mixed_dtypes_raise_as_in_torch(chunked):
    with pytest.raises(RuntimeError, match="scalar type"):
        layer("btt(rank=2)")(torch.randn(20, 24))
    assert not chunked


def test_complex_layers_take_the_plain_path(chunked):
    structured = layer("btt(rank=2)", dtype=torch.complex128, bias=False)
    x = torch.randn(20, 24, dtype=torch.complex128)
    torch.testing.assert_close(structured(x), x @ structured.operator().to_dense().T)
    assert not chunked


# ------------------------------------------------------------------------------------------------------------ operator


@pytest.mark.parametrize("keep", [True, False])
def test_the_operator_passes_torchs_own_checks(keep, chunked):
    chain = so.structure("btt(rank=2)").chain(12, 18)
    factors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in chain.stored_shapes]
    x = torch.randn(20, 12, dtype=torch.float64, requires_grad=True)
    assert set(torch.library.opcheck(chain_product, (x, factors, text_of(chain), keep)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("spec", SPECS)
def test_a_chain_survives_its_text(spec):
    chain = so.structure(spec).chain(24, 36)
    assert from_text(text_of(chain)).chain == so.Chain(chain.pattern, chain.sizes)


@pytest.mark.parametrize("spec", ["btt(rank=2)", "kron", "btt(rank=2, num_cores=3)"])
def test_first_and_second_derivatives(spec, chunked):
    structured = layer(spec, n=8, m=12, bias=False)
    inputs = (torch.randn(5, 8, dtype=torch.float64, requires_grad=True), *structured.factors)

    def function(x, *factors):
        return structured.product(factors, x)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    assert chunked


@jit_is_deprecated
def test_function_transforms(chunked):
    structured = layer("btt(rank=2)", bias=False)
    matrix = structured.operator().to_dense()
    x = torch.randn(4, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(structured)(x), x @ matrix.T)
    torch.testing.assert_close(torch.func.jvp(structured, (x,), (x,))[1], x @ matrix.T)
    torch.testing.assert_close(torch.func.jacrev(structured)(x[0, 0]), matrix)
    torch.testing.assert_close(torch.func.jacfwd(structured)(x[0, 0]), matrix)

    def loss(factors, row):
        return torch.func.functional_call(structured, factors, row).square().sum()

    parameters = dict(structured.named_parameters())
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[0])
    for k, row in enumerate(x[0]):
        one = torch.autograd.grad(loss(parameters, row), list(parameters.values()))
        for ours, theirs in zip(grads.values(), one, strict=True):
            torch.testing.assert_close(ours[k], theirs)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (1, 0)])
def test_vmap_of_the_operator(in_dims):
    chain = so.structure("btt(rank=2)").chain(12, 18)
    many = [torch.randn(3, *shape, dtype=torch.float64) for shape in chain.stored_shapes]
    factors = many if in_dims[1] == 0 else [factor[0] for factor in many]
    x = torch.randn({0: (3, 5, 12), 1: (5, 3, 12), None: (5, 12)}[in_dims[0]], dtype=torch.float64)
    ours = torch.vmap(lambda x, factors: chain_product(x, factors, text_of(chain), True)[0], in_dims)(x, factors)
    for k in range(3):
        row = x if in_dims[0] is None else x.select(in_dims[0], k)
        one = [factor if in_dims[1] is None else factor[k] for factor in factors]
        torch.testing.assert_close(ours[k], so.contract(chain, one, row))


def test_the_operator_has_the_gradients_of_the_eager_function():
    chain = so.structure("btt(rank=2)").chain(12, 18)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in ((20, 12), *chain.stored_shapes)]
    for learning in ((0, 1, 2), (0,), (1,), (2,)):
        for k, tensor in enumerate(inputs):
            tensor.requires_grad_(k in learning)
        x, *factors = inputs
        wanted = [inputs[k] for k in learning]
        y = chain_product(x, factors, text_of(chain), True)[0]
        eager = apply(x, factors, text_of(chain), True, True)
        assert torch.equal(y, eager)
        for one, other in zip(
            torch.autograd.grad(y.square().sum(), wanted),
            torch.autograd.grad(eager.square().sum(), wanted),
            strict=True,
        ):
            assert torch.equal(one, other)


@jit_is_deprecated
def test_graphs_of_compilers_have_the_operator(monkeypatch):
    monkeypatch.setattr(tuning, "kernel_numbers", 0)
    structured, seen = layer("btt(rank=2)"), []

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(structured, fullgraph=True, backend=backend)(torch.randn(20, 24, dtype=torch.float64))
    assert torch.ops.structops.chain_product.default in seen


@pytest.mark.slow
@jit_is_deprecated
def test_compiles_to_one_graph(monkeypatch):
    monkeypatch.setattr(tuning, "kernel_numbers", 0)
    structured = layer("btt(rank=2)")
    torch._dynamo.reset()
    compiled = torch.compile(structured, fullgraph=True)
    for tokens in (20, 31, 45):
        x = torch.randn(tokens, 24, dtype=torch.float64, requires_grad=True)
        y, wanted = compiled(x), structured(x)
        torch.testing.assert_close(y, wanted)
        for ours, theirs in zip(
            torch.autograd.grad(y.square().sum(), [x, *structured.factors]),
            torch.autograd.grad(wanted.square().sum(), [x, *structured.factors]),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@jit_is_deprecated
def test_exports_for_any_number_of_tokens_and_without_operators_of_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "kernel_numbers", 0)
    structured = layer("btt(rank=2)")
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    example = torch.randn(20, 24, dtype=torch.float64)
    program = torch.export.export(structured, (example,), dynamic_shapes=({0: tokens},))
    assert not any("structops" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    x = torch.randn(51, 24, dtype=torch.float64)
    torch.testing.assert_close(loaded(x), structured(x))


@jit_is_deprecated
def test_the_operator_exports():
    chain = so.structure("btt(rank=2)").chain(12, 18)

    class Model(nn.Module):
        def forward(self, x, first, last):
            return chain_product(x, [first, last], text_of(chain), False)[0]

    factors = [torch.randn(shape, dtype=torch.float64) for shape in chain.stored_shapes]
    program = torch.export.export(Model(), (torch.randn(20, 12, dtype=torch.float64), *factors))
    assert any(node.target is torch.ops.structops.chain_product.default for node in program.graph.nodes)
    x = torch.randn(20, 12, dtype=torch.float64)
    torch.testing.assert_close(program.module()(x, *factors), so.contract(chain, factors, x))


def test_meta_tensors_and_copies(chunked):
    meta = StructuredLinear(24, 36, "btt(rank=2)", device="meta")
    assert meta(torch.empty(20, 24, device="meta")).shape == (20, 36)
    structured = layer("btt(rank=2)")
    x = torch.randn(20, 24, dtype=torch.float64)
    for other in (copy.deepcopy(structured), pickle.loads(pickle.dumps(structured))):
        assert torch.equal(other(x), structured(x))


def test_saved_tensors_may_be_moved_in_between(chunked):
    structured = layer("btt(rank=2)")
    x = torch.randn(20, 24, dtype=torch.float64, requires_grad=True)
    inputs = [x, *structured.parameters()]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda tensor: tensor):
        y = structured(x)
    ours, wanted = (torch.autograd.grad(product.square().sum(), inputs) for product in (y, structured(x)))
    assert all(torch.equal(one, other) for one, other in zip(ours, wanted, strict=True))


def test_activation_checkpointing(chunked):
    from torch.utils.checkpoint import checkpoint

    structured = layer("btt(rank=2)")
    x = torch.randn(20, 24, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(structured(x).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(checkpoint(structured, x, use_reentrant=False).sum(), x)[0], wanted)


# ----------------------------------------------------------------------------------------------- overhead, and merging


class Counted(TorchDispatchMode):
    """Counts the operations that PyTorch runs."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_a_small_layer_runs_two_products_one_copy_and_views():
    structured = StructuredLinear(64, 64, "btt", bias=False)
    with torch.no_grad(), Counted() as mode:
        structured(torch.randn(8, 64))
    counts = dict(mode.counts)
    assert counts.pop("randn") == 1
    assert counts.pop("bmm") == 2
    assert sum(counts.pop(name, 0) for name in ("clone", "_unsafe_view")) <= 2
    assert set(counts) <= {"view", "permute", "transpose", "detach"}
    assert sum(counts.values()) <= 8


@pytest.mark.parametrize(
    ("spec", "products"),
    [
        ("dense", 1),
        ("low_rank(rank=3)", 2),
        ("kron", 2),
        ("kron(num_factors=3)", 3),
        ("tt(rank=2)", 2),
        ("tt(rank=2, num_cores=3)", 3),
    ],
)
def test_factors_of_one_block_run_without_copies(spec, products):
    structured = StructuredLinear(64, 48, spec, bias=False)
    with torch.no_grad(), Counted() as mode:
        structured(torch.randn(8, 64))
    counts = dict(mode.counts)
    assert counts.pop("mm", 0) + counts.pop("bmm", 0) == products
    assert set(counts) <= {"randn", "view", "expand", "transpose", "select", "detach"}


@pytest.mark.parametrize(("spec", "products"), [("btt(rank=16, blocks=16)", {"mm": 1}), ("kron(num_factors=8)", {})])
def test_many_tokens_are_multiplied_by_merged_factors(spec, products):
    structured = layer(spec, n=256, m=256, bias=False)
    few, many = (torch.randn(tokens, 256, dtype=torch.float64, requires_grad=True) for tokens in (2, 2048))
    for x in (few, many):
        weight = torch.randn(len(x), 256, dtype=torch.float64)
        y, wanted = dense_gradients(structured, x, weight)
        ours = structured(x)
        torch.testing.assert_close(ours, y)
        for one, other in zip(
            torch.autograd.grad((ours * weight).sum(), [x, *structured.factors]), wanted, strict=True
        ):
            torch.testing.assert_close(one, other)
    with torch.no_grad(), Counted() as mode:
        structured(few)
        alone = mode.counts.copy()
        structured(many)
    together = mode.counts - alone
    assert together["chain_product"] + together["mm"] <= 2
    for name, count in products.items():
        assert together[name] == count


# --------------------------------------------------------------------------------------------------------------- merge


@pytest.mark.parametrize("spec", [*SPECS, "dense", "low_rank(rank=3)", "toeplitz", "monarch(blocks=7)"])
@pytest.mark.parametrize("bias", [True, False])
def test_merge_gives_a_linear_layer(spec, bias):
    structured = layer(spec, bias=bias).eval()
    if bias:
        nn.init.normal_(structured.bias)
    dense = structured.merge()
    assert type(dense) is nn.Linear
    assert (dense.in_features, dense.out_features, dense.training) == (24, 36, False)
    assert dense.weight.requires_grad
    x = torch.randn(5, 24, dtype=torch.float64)
    torch.testing.assert_close(dense(x), structured(x))
    before = dense.weight.detach().clone()
    with torch.no_grad():
        structured.factors[0].zero_()
    assert torch.equal(dense.weight, before), "the dense layer shares memory with the structured one"


def test_merge_takes_the_effective_factors():
    structured = layer("btt", weight_norm=True)
    with torch.no_grad():
        structured.factors[0].mul_(10)
        structured.gains.mul_(2)
    x = torch.randn(5, 24, dtype=torch.float64)
    torch.testing.assert_close(structured.merge()(x), structured(x))
