"""`contract`, `store` and `unstore`: values against numpy, and the transformations of both libraries."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from structops import structure
from structops.chain import Chain
from structops.contract import contract, store, unstore
from structops.errors import BackendError, ShapeError

BACKENDS = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("torch", "jax")]
# torch's own forward-mode derivatives and Inductor still use torch.jit.
jit_is_deprecated = pytest.mark.filterwarnings(r"ignore:.torch\.jit\.:DeprecationWarning")
both_backends = pytest.mark.parametrize("backend", BACKENDS)


def to(backend: str, array: np.ndarray) -> Any:
    if backend == "torch":
        return importlib.import_module("torch").from_numpy(np.array(array))
    return importlib.import_module("jax.numpy").asarray(array)


# --------------------------------------------------------------------------------------------------- reference in numpy


def reference(chain: Chain, arrays: list[np.ndarray], x: np.ndarray) -> np.ndarray:
    """``contract`` as a single ``numpy.einsum`` over all labels between two regroups, factors with textbook axes."""
    size = dict(chain.sizes)
    state = np.zeros((len(x), math.prod(size[label] for label in chain.terms[0])))
    state[:, : x.shape[1]] = x
    remaining, start, names = iter(arrays), chain.terms[0], []
    for term in [*chain.terms[1:-1], f"{chain.terms[-1]}="]:
        if "=" not in term:
            names.append(term)
            continue
        stop, after = term.split("=")
        state = state.reshape(-1, *(size[label] for label in start))
        pattern = ",".join(["Z" + start, *names]) + "->Z" + stop
        state = np.einsum(pattern, state, *(next(remaining) for _ in names), optimize="greedy").reshape(len(x), -1)
        start, names = after, []
    return state[:, : chain.out_features]


def integers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Small whole numbers, for which every order of summation gives the same floats."""
    return rng.integers(-3, 4, size=shape).astype(np.float64)


@st.composite
def chains(draw: st.DrawFn) -> tuple[Chain, list[tuple[set[str], ...]]]:
    """A random chain, and the labels that every factor has as (batch, emitted, contracted, shared)."""
    fresh, sizes, roles = iter("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXY"), {}, []

    def new() -> str:
        label = next(fresh)
        sizes[label] = draw(st.integers(1, 3))
        return label

    state = [new() for _ in range(draw(st.integers(1, 3)))]
    terms = ["".join(state)]
    for position in range(draw(st.integers(1, 3))):
        if draw(st.booleans()) and position:
            before, total = draw(st.permutations(state)), math.prod(sizes[label] for label in state)
            split = draw(st.sampled_from([d for d in range(1, total + 1) if total % d == 0]))
            state = [next(fresh), next(fresh)]
            sizes |= dict(zip(state, (split, total // split), strict=True))
            terms.append("".join(before) + "=" + "".join(state))
        kinds = [draw(st.sampled_from(("batch", "contracted", "shared"))) for _ in state]
        fewest = int(all(kind == "shared" for kind in kinds) or all(kind == "contracted" for kind in kinds))
        emitted = [new() for _ in range(draw(st.integers(fewest, 2)))]
        role = {kind: {label for label, k in zip(state, kinds, strict=True) if k == kind} for kind in set(kinds)}
        batch, contracted, shared = (role.get(kind, set()) for kind in ("batch", "contracted", "shared"))
        terms.append("".join(draw(st.permutations(sorted(batch | contracted) + emitted))))
        roles.append((batch, set(emitted), contracted, shared))
        state = [label for label in state if label not in contracted] + emitted
    output = draw(st.permutations(state))
    padded = [math.prod(sizes[label] for label in side) for side in (terms[0], output)]
    true = [draw(st.integers(max(1, size - 1), size)) for size in padded]
    return Chain(", ".join(terms) + " -> " + "".join(output), sizes, *true), roles


def fewer_examples(fraction: int) -> Any:
    return settings(max_examples=max(1, settings.default.max_examples // fraction))


@given(chains())
def test_random_chain_has_the_roles_that_it_was_given(drawn):
    chain, roles = drawn
    assert [tuple(map(set, (s.batch, s.emitted, s.contracted, s.shared))) for s in chain.factor_steps] == roles
    size = dict(chain.sizes)
    for factor, labels in zip(chain.factors, roles, strict=True):
        sizes = tuple(math.prod(size[label] for label in part) for part in labels)
        assert (factor.blocks, factor.fan_out, factor.fan_in, factor.sharing) == sizes
    assert chain.num_params == sum(math.prod(f.shape) for f in chain.factors)
    assert chain.macs == sum(math.prod(size[label] for part in labels for label in part) for labels in roles)
    flipped = chain.T
    assert chain == flipped.T
    assert (flipped.shape, flipped.macs, flipped.num_params) == (chain.shape[::-1], chain.macs, chain.num_params)
    assert flipped.rank_bound == chain.rank_bound
    assert flipped.factors == tuple(factor.T for factor in reversed(chain.factors))


def smallest_cut(chain: Chain) -> int:
    """The rank bound by trying every cut of the factors between two regroups."""
    best, start, inner = min(chain.shape), set(chain.terms[0]), []
    for term in [*chain.terms[1:-1], f"{chain.terms[-1]}="]:
        if "=" not in term:
            inner.append(term)
            continue
        stop, after = term.split("=")
        for far in itertools.product((False, True), repeat=len(inner)):
            sides = start, set(stop)
            for labels, side in zip(inner, far, strict=True):
                sides = (sides[0], sides[1] | set(labels)) if side else (sides[0] | set(labels), sides[1])
            best = min(best, chain.size("".join(sides[0] & sides[1])))
        start, inner = set(after), []
    return best


@given(chains(), st.integers(0, 2**32 - 1))
def test_random_chain_has_at_most_its_rank_bound(drawn, seed):
    chain, _ = drawn
    assert chain.rank_bound == smallest_cut(chain)
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal(factor.shape) for factor in chain.factors]
    matrix = reference(chain, arrays, np.eye(chain.in_features))
    assert np.linalg.matrix_rank(matrix) <= chain.rank_bound <= min(chain.shape)


def check_against_numpy(backend: str, chain: Chain, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = [integers(rng, *factor.shape) for factor in chain.factors]
    x, z = integers(rng, 2, chain.in_features), integers(rng, 2, chain.out_features)

    def compute(arrays, x, z):
        stored = store(chain, arrays)
        # The transposed chain takes the same numbers, every block transposed, in reverse order ...
        flipped = [factor.mT for factor in reversed(stored)]
        products = contract(chain, stored, x), contract(chain.T, flipped, z)
        # ... which is how it stores the same textbook arrays.
        return products, unstore(chain, stored), flipped, store(chain.T, arrays[::-1])

    if backend == "jax":
        compute = importlib.import_module("jax").jit(compute)  # one compilation in place of one an operation
    (y, w), back, flipped, stored = compute([to(backend, array) for array in arrays], to(backend, x), to(backend, z))
    np.testing.assert_array_equal(y, reference(chain, arrays, x))
    np.testing.assert_array_equal(w, z @ reference(chain, arrays, np.eye(chain.in_features)).T)
    for array, other in zip(arrays, back, strict=True):
        np.testing.assert_array_equal(other, array)
    for array, other in zip(flipped, stored, strict=True):
        np.testing.assert_array_equal(other, array)


@pytest.mark.torch
@given(chains(), st.integers(0, 2**32 - 1))
def test_random_chain_against_numpy_torch(drawn, seed):
    check_against_numpy("torch", drawn[0], seed)


@pytest.mark.jax
@fewer_examples(6)  # JAX compiles every operation for every shape
@given(chains(), st.integers(0, 2**32 - 1))
def test_random_chain_against_numpy_jax(drawn, seed):
    check_against_numpy("jax", drawn[0], seed)


PATTERNS = {
    "dense": Chain("j, ij -> i", {"i": 3, "j": 5}),
    "kron": Chain("cd, bd, ac -> ab", {"a": 2, "b": 3, "c": 4, "d": 5}),
    "btt": Chain("cd, sbcd, abcs -> ab", {"a": 4, "b": 3, "c": 2, "d": 5, "s": 2}),
    "btt, 3 cores": Chain(
        "xyz, tkxyz, sjkxyt, ijkxs -> ijk", {"x": 2, "y": 3, "z": 2, "i": 3, "j": 2, "k": 3, "s": 2, "t": 3}
    ),
    "blast": Chain("jn, jnr, ijr, imr -> im", {"j": 2, "n": 3, "r": 4, "i": 3, "m": 2}),
    "monarch, regrouped and padded": Chain(
        "kp, kqp, kq=rl, lsr -> sl", {"k": 4, "p": 3, "q": 5, "r": 5, "l": 4, "s": 3}, 10, 11
    ),
    "padded": Chain("cd, sbcd, abcs -> ab", {"a": 4, "b": 3, "c": 2, "d": 5, "s": 2}, 9, 11),
}
patterns = pytest.mark.parametrize("chain", PATTERNS.values(), ids=PATTERNS)


def draw(backend: str, chain: Chain, *lead: int) -> tuple[list[Any], Any, np.ndarray]:
    """Stored factors, an input, and the matrix."""
    rng = np.random.default_rng(0)
    arrays = [integers(rng, *factor.shape) for factor in chain.factors]
    matrix = reference(chain, arrays, np.eye(chain.in_features)).T
    stored = store(chain, [to(backend, array) for array in arrays])
    return list(stored), to(backend, integers(rng, *lead, chain.in_features)), matrix


# --------------------------------------------------------------------------------------------------------------- shapes


@both_backends
@patterns
@pytest.mark.parametrize("lead", [(), (1,), (4,), (2, 3), (0,), (2, 0), (2, 1, 3, 1)])
def test_any_leading_axes(backend, chain, lead):
    factors, x, matrix = draw(backend, chain, *lead)
    y = contract(chain, factors, x)
    assert tuple(y.shape) == (*lead, chain.out_features)
    np.testing.assert_array_equal(y, np.asarray(x) @ matrix.T)


@pytest.mark.torch
@patterns
def test_non_contiguous_arrays(chain):
    factors, x, matrix = draw("torch", chain, 3, 2)
    x, want = x.transpose(0, 1), (x @ x.new_tensor(matrix.T)).transpose(0, 1)
    assert not x.is_contiguous()
    assert contract(chain, factors, x).equal(want)
    scattered = [factor.mT.contiguous().mT for factor in factors]
    assert contract(chain, scattered, x).equal(want)
    assert contract(chain, scattered, x[:1].expand(4, -1, -1)).equal(want[:1].expand(4, -1, -1))
    every_other = x.repeat_interleave(2, dim=-1)[..., ::2]
    assert contract(chain, factors, every_other).equal(want)


@both_backends
def test_no_factor_is_conjugated(backend):
    chain, rng = PATTERNS["btt"], np.random.default_rng(0)
    arrays = [integers(rng, *f.shape) + 1j * integers(rng, *f.shape) for f in chain.factors]
    x = integers(rng, 3, chain.in_features) + 1j * integers(rng, 3, chain.in_features)
    got = contract(chain, store(chain, [to(backend, array) for array in arrays]), to(backend, x))
    want = np.einsum("zcd,sbcd,abcs->zab", x.reshape(3, 2, 5), *arrays).reshape(3, -1)
    np.testing.assert_array_equal(got, want)


@both_backends
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_dtype_is_kept(backend, dtype):
    module = importlib.import_module("torch" if backend == "torch" else "jax.numpy")
    factors, x, matrix = draw(backend, PATTERNS["kron"], 2)
    convert = (lambda a: a.to(getattr(module, dtype))) if backend == "torch" else (lambda a: a.astype(dtype))
    y = contract(PATTERNS["kron"], [convert(factor) for factor in factors], convert(x))
    assert str(y.dtype).rpartition(".")[2] == dtype
    want = np.asarray(x) @ matrix.T
    got = np.asarray(y.float() if backend == "torch" else y.astype("float32"))
    np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())


# --------------------------------------------------------------------------------------------------------------- errors


@both_backends
@patterns
def test_wrong_x(backend, chain):
    factors, x, _ = draw(backend, chain, 3)
    for wrong in (x[:, :-1], x.mT[:2]):
        with pytest.raises(ShapeError, match=rf"\(\.\.\., {chain.in_features}\).* got \({wrong.shape[0]}, "):
            contract(chain, factors, wrong)
    with pytest.raises(ShapeError, match=r"got \(\)"):
        contract(chain, factors, x[0, 0])


@both_backends
@patterns
def test_wrong_factors(backend, chain):
    factors, x, _ = draw(backend, chain, 3)
    count = len(factors)
    for wrong in (factors[:-1], [*factors, factors[0]]):
        with pytest.raises(ShapeError, match=f"expected {count} factors.* got {len(wrong)}"):
            contract(chain, wrong, x)
        with pytest.raises(ShapeError, match=f"expected {count} factors.* got {len(wrong)}"):
            unstore(chain, wrong)
        with pytest.raises(ShapeError, match=f"expected {count} factors.* got {len(wrong)}"):
            store(chain, wrong)
    # One that is not square, so that swapping fan_in and fan_out shows.
    k, sizes = next((k, f) for k, f in enumerate(chain.factors) if f.fan_in != f.fan_out)
    message = rf"{sizes.name}.*\({sizes.blocks}, {sizes.fan_out}, {sizes.fan_in}\)"
    for array in (factors[k][..., :-1], factors[k].mT):
        wrong = [*factors[:k], array, *factors[k + 1 :]]
        with pytest.raises(ShapeError, match=message):
            contract(chain, wrong, x)
        with pytest.raises(ShapeError, match=message):
            unstore(chain, wrong)
    with pytest.raises(ShapeError, match=sizes.name):
        store(chain, [*factors[:k], factors[k][..., :-1], *factors[k + 1 :]])


@both_backends
def test_axes_of_size_one_may_be_left_out_of_a_factor(backend):
    chain = PATTERNS["kron"]
    factors, x, matrix = draw(backend, chain, 2)
    y = contract(chain, [factor.reshape(factor.shape[1:]) for factor in factors], x)
    np.testing.assert_array_equal(y, np.asarray(x) @ matrix.T)


@both_backends
def test_numpy_arrays_are_no_arrays(backend):
    factors, x, _ = draw(backend, PATTERNS["btt"], 2)
    as_numpy = [np.asarray(factor) for factor in factors]
    for wrong in ((factors, np.asarray(x)), (as_numpy, x), (as_numpy, np.asarray(x))):
        with pytest.raises(TypeError, match=r"torch\.from_numpy.*jnp\.asarray"):
            contract(PATTERNS["btt"], *wrong)


@pytest.mark.torch
@pytest.mark.jax
def test_libraries_do_not_mix():
    (torch_factors, torch_x, _), (jax_factors, jax_x, _) = (draw(name, PATTERNS["btt"], 2) for name in ("torch", "jax"))
    for factors, x in ((torch_factors, jax_x), (jax_factors, torch_x), ([torch_factors[0], jax_factors[1]], torch_x)):
        with pytest.raises(BackendError, match="jax and torch"):
            contract(PATTERNS["btt"], factors, x)


# ---------------------------------------------------------------------------------------------------------------- views

STRUCTURES = [
    "dense",
    "low_rank(rank=3)",
    "kron",
    "kron(num_factors=3)",
    "tt(rank=2)",
    "tt(rank=2, num_cores=3)",
    "btt(rank=2)",
    "btt(rank=2, num_cores=3)",
    "btt(rank=2, num_cores=4)",
    "btt(rank=3, blocks=6)",
    "blast(rank=3)",
    "block_diag",
    "monarch(blocks=6)",
    "monarch(blocks=4)",
    "monarch(blocks=12)",
]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::structops.StructureWarning")
@pytest.mark.parametrize("spec", STRUCTURES)
def test_storing_is_a_view(spec):
    torch = pytest.importorskip("torch")
    chain = structure(spec).chain(36, 48)
    for this in (chain, chain.T):
        arrays = [torch.empty(factor.shape) for factor in this.factors]
        stored = store(this, arrays)
        for array, factor, sizes in zip(arrays, stored, this.factors, strict=True):
            assert factor.shape == (sizes.blocks, sizes.fan_out, sizes.fan_in)
            assert factor.data_ptr() == array.data_ptr()
        contiguous = [torch.empty(factor.shape) for factor in stored]
        for array, factor in zip(unstore(this, contiguous), contiguous, strict=True):
            assert array.data_ptr() == factor.data_ptr()


# --------------------------------------------------------------------------------------------------- torch: compilation


def fresh_chain() -> Chain:
    """A chain that was never run, so nothing can have been cached."""
    return Chain("cd, sbcd, abcs -> ab", {"a": 4, "b": 3, "c": 2, "d": 5, "s": 2}, in_features=9, out_features=11)


def layer(chain: Chain, factors: list[Any]) -> Any:
    nn = importlib.import_module("torch.nn")

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.factors = nn.ParameterList(factors)

        def forward(self, x):
            return contract(chain, list(self.factors), x)

    return Layer()


@pytest.mark.torch
@pytest.mark.parametrize("dynamic", [False, True])
def test_fresh_chain_compiles_to_one_graph(dynamic):
    torch = pytest.importorskip("torch")
    torch._dynamo.reset()
    textbook = [torch.randn(2, 3, 2, 5), torch.randn(4, 3, 2, 2)]
    chain, x = fresh_chain(), torch.randn(6, 9)

    def all_three(arrays, x):
        factors = store(chain, arrays)
        return contract(chain, store(chain, unstore(chain, factors)), x)

    compiled = torch.compile(all_three, fullgraph=True, backend="eager", dynamic=dynamic)
    y = compiled(textbook, x)
    torch.testing.assert_close(y, all_three(textbook, x))


@pytest.mark.torch
def test_batch_sizes_do_not_recompile():
    chain = PATTERNS["padded"]
    torch = pytest.importorskip("torch")
    torch._dynamo.reset()
    factors, _, matrix = draw("torch", chain)
    testing = pytest.importorskip("torch._dynamo.testing")
    counter = testing.CompileCounter()
    compiled = torch.compile(layer(chain, factors), fullgraph=True, backend=counter, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (5, 2, 17, 64):
            x = torch.randn(batch, chain.in_features, dtype=torch.float64)
            torch.testing.assert_close(compiled(x), x @ torch.from_numpy(matrix.T))
    assert counter.frame_count == 1


@pytest.mark.torch
def test_gradients_through_compile():
    torch = pytest.importorskip("torch")
    torch._dynamo.reset()
    chain = fresh_chain()
    factors, x, _ = draw("torch", chain, 6)
    leaves = [factor.clone().requires_grad_() for factor in factors]

    def loss(*leaves):
        return (contract(chain, leaves, x) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(function(*leaves), leaves) for function in (compiled, loss))
    torch.testing.assert_close(got, want)


@pytest.mark.slow
@pytest.mark.torch
@jit_is_deprecated
def test_inductor():
    torch = pytest.importorskip("torch")
    torch._dynamo.reset()
    chain = PATTERNS["kron"]
    factors, x, matrix = draw("torch", chain, 6)
    y = torch.compile(functools.partial(contract, chain), fullgraph=True)(factors, x)
    torch.testing.assert_close(y, x @ torch.from_numpy(matrix.T))


@pytest.mark.torch
@patterns
def test_export_with_any_batch(chain):
    torch = pytest.importorskip("torch")
    factors, x, matrix = draw("torch", chain, 6)

    program = torch.export.export(layer(chain, factors), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (3, 9):
        x = torch.randn(batch, chain.in_features, dtype=torch.float64)
        torch.testing.assert_close(program.module()(x), x @ torch.from_numpy(matrix.T))


@pytest.mark.torch
@patterns
def test_meta_tensors(chain):
    factors, x, _ = draw("torch", chain, 6)
    y = contract(chain, [factor.to("meta") for factor in factors], x.to("meta"))
    assert y.device.type == "meta"
    assert y.shape == (6, chain.out_features)


# --------------------------------------------------------------------------------------------------- torch: derivatives


@pytest.mark.torch
@jit_is_deprecated
@patterns
def test_first_and_second_derivatives(chain):
    torch = pytest.importorskip("torch")
    factors, x, _ = draw("torch", chain, 2)
    inputs = [tensor.clone().requires_grad_() for tensor in (x, *factors)]

    def function(x, *factors):
        return contract(chain, factors, x)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.torch
@jit_is_deprecated
@patterns
def test_torch_func(chain):
    torch = pytest.importorskip("torch")
    factors, x, matrix = draw("torch", chain, 3)
    matrix = torch.from_numpy(matrix)
    apply = functools.partial(contract, chain, factors)
    assert torch.func.vmap(apply)(x).equal(x @ matrix.T)
    assert torch.func.vmap(apply, in_dims=1)(x.mT).equal(x @ matrix.T)
    assert torch.func.jacrev(apply)(x[0]).equal(matrix)
    assert torch.func.jacfwd(apply)(x[0]).equal(matrix)
    assert torch.func.jvp(apply, (x,), (2 * x,))[1].equal(2 * x @ matrix.T)
    assert torch.func.vjp(apply, x)[1](torch.ones(3, chain.out_features, dtype=x.dtype))[0].equal(
        matrix.sum(0).expand(3, -1)
    )
    # An ensemble: several sets of factors for one input.
    ensemble = [torch.stack([factor, 2 * factor]) for factor in factors]
    y = torch.func.vmap(functools.partial(contract, chain), in_dims=(0, None))(ensemble, x)
    assert y.equal(torch.stack([x @ matrix.T, 2 ** len(factors) * x @ matrix.T]))
    # Gradients of every example, for every factor.
    loss = torch.func.grad(lambda factors, x: contract(chain, factors, x).sum())
    per_example = torch.func.vmap(loss, in_dims=(None, 0))(factors, x)
    for stacked, total in zip(per_example, loss(factors, x), strict=True):
        torch.testing.assert_close(stacked.sum(0), total)


@pytest.mark.torch
@patterns
def test_saved_activations_are_what_autograd_keeps(chain):
    torch = pytest.importorskip("torch")
    factors, x, _ = draw("torch", chain, 1)
    factors = [factor.clone().requires_grad_() for factor in factors]
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().size() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        contract(chain, factors, x.requires_grad_())
    for factor in factors:
        kept.pop(factor.untyped_storage().data_ptr())
    assert sum(kept.values()) == chain.saved_activations


# ------------------------------------------------------------------------------------------------------------------ JAX


@pytest.mark.jax
@pytest.mark.parametrize("name", ["kron", "btt, 3 cores", "monarch, regrouped and padded"])
def test_jax_transformations(name):
    jax = pytest.importorskip("jax")
    chain = PATTERNS[name]
    factors, x, matrix = draw("jax", chain, 3)
    want = np.asarray(x) @ matrix.T
    apply = functools.partial(contract, chain, factors)
    np.testing.assert_array_equal(jax.jit(apply)(x), want)
    np.testing.assert_array_equal(jax.vmap(apply)(x), want)
    np.testing.assert_array_equal(jax.jit(jax.vmap(apply))(x), want)
    np.testing.assert_array_equal(jax.jvp(apply, (x,), (2 * x,))[1], 2 * want)
    np.testing.assert_array_equal(jax.jit(jax.jacrev(apply))(x[0]), matrix)
    np.testing.assert_array_equal(jax.linear_transpose(apply, x)(apply(x))[0], want @ matrix)
    gradient = jax.jit(jax.grad(lambda factors, x: (contract(chain, factors, x) ** 2).sum()))(factors, x)
    assert [g.shape for g in gradient] == [f.shape for f in factors]
    # The loss is homogeneous of degree two in every factor: <gradient, factor> = 2 loss.
    for part, factor in zip(gradient, factors, strict=True):
        np.testing.assert_allclose((part * factor).sum(), 2 * (want**2).sum())
    ensemble = [jax.numpy.stack([factor, 2 * factor]) for factor in factors]
    y = jax.vmap(functools.partial(contract, chain), in_axes=(0, None))(ensemble, x)
    np.testing.assert_array_equal(y[1], 2 ** len(factors) * y[0])


@pytest.mark.jax
def test_equal_chains_share_one_trace():
    jax = pytest.importorskip("jax")
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(chain, factors, x):
        traces.append(chain)
        return contract(chain, factors, x)

    factors, x, _ = draw("jax", fresh_chain(), 3)
    for _ in range(3):
        run(fresh_chain(), factors, x)
    assert len(traces) == 1


@both_backends
def test_no_call_derives_the_pattern_again(backend, monkeypatch):
    chain = fresh_chain()
    factors, x, matrix = draw(backend, chain, 3)

    def derive(*_):
        raise AssertionError("the pattern was parsed in a call")

    contract(chain, factors, x)
    for name in ("chain.split_terms", "chain.roles", "chain.strided_moves", "chain.copied_moves", "program._operand"):
        monkeypatch.setattr(f"structops.{name}", derive)
    np.testing.assert_array_equal(contract(chain, factors, x), np.asarray(x) @ matrix.T)
