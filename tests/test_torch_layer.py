"""The torch layer and its parameter groups, as a user of ``nn.Linear`` would try them."""

import copy
import io
import math

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import structops as so  # noqa: E402
from structops.torch import StructuredLinear, param_groups  # noqa: E402

pytestmark = pytest.mark.torch

SPECS = [
    "dense",
    "low_rank(rank=3)",
    "kron",
    "tt(rank=2)",
    "tt(rank=2, num_cores=3)",
    "btt(rank=2)",
    "btt(blocks=4)",
    "btt(num_cores=3)",
    "monarch(blocks=4)",
    "monarch(blocks=5)",
    "block_diag(blocks=4)",
    "blast(rank=3, blocks=2)",
    "einsum",
    "toeplitz",
    "convolution(spatial_shape=4, kernel_size=3)",
]


def layer(spec, n=16, m=32, **kwargs):
    kwargs.setdefault("dtype", torch.float64)
    return StructuredLinear(n, m, spec, generator=torch.Generator().manual_seed(0), **kwargs)


@pytest.fixture(params=SPECS)
def spec(request):
    return request.param


def test_equals_a_dense_layer(spec):
    structured = layer(spec)
    nn.init.normal_(structured.bias, generator=torch.Generator().manual_seed(1))
    dense = nn.Linear(16, 32, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(structured.operator().to_dense())
        dense.bias.copy_(structured.bias)
    for lead in ((), (5,), (2, 3), (0,)):
        x = torch.randn(*lead, 16, dtype=torch.float64)
        torch.testing.assert_close(structured(x), dense(x))


def test_gradients_equal_those_through_the_dense_matrix(spec):
    structured = layer(spec, bias=False)
    x = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 32, dtype=torch.float64)
    inputs = [x, *structured.factors]
    fast = torch.autograd.grad((structured(x) * weight).sum(), inputs)
    slow = torch.autograd.grad((x @ structured.operator().to_dense().T * weight).sum(), inputs)
    for ours, dense in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, dense)


def test_factors_are_stored_as_blocks_of_matrices(spec):
    structured = layer(spec)
    plan = structured.structure.plan(16, 32)
    assert [tuple(f.shape) for f in structured.factors] == list(plan.stored_shapes)
    assert sum(f.numel() for f in structured.factors) == plan.num_params == so.num_params(structured.operator())


def test_compiles_to_one_graph(spec):
    structured = layer(spec)
    torch._dynamo.reset()  # all specs share the code of forward, and its recompilations are limited
    compiled = torch.compile(structured, fullgraph=True, backend="eager")
    x = torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), structured(x))


def test_copies_saves_and_moves(spec):
    structured = layer(spec)
    x = torch.randn(3, 16, dtype=torch.float64)
    clone = copy.deepcopy(structured)
    with torch.no_grad():
        clone.factors[0].zero_()
    assert structured.factors[0].abs().sum() > 0, "a deep copy shares parameters"

    file = io.BytesIO()
    torch.save(structured.state_dict(), file)
    file.seek(0)
    other = StructuredLinear(16, 32, spec, dtype=torch.float64)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other(x), structured(x))

    single = copy.deepcopy(structured).to(torch.float32)
    assert single(x.float()).dtype == torch.float32


def test_functional_call_uses_the_parameters_it_is_given(spec):
    structured = layer(spec)
    zeros = {name: torch.zeros_like(value) for name, value in structured.named_parameters()}
    x = torch.randn(3, 16, dtype=torch.float64)
    assert not torch.func.functional_call(structured, zeros, x).any()
    per_sample = torch.func.vmap(lambda v: structured(v))(x)
    torch.testing.assert_close(per_sample, structured(x))


def test_meta_device_allocates_nothing_and_can_be_filled():
    meta = StructuredLinear(64, 64, "btt", device="meta")
    assert all(p.is_meta for p in meta.parameters())
    assert meta(torch.empty(2, 64, device="meta")).shape == (2, 64)
    filled = meta.to_empty(device="cpu")
    filled.reset_parameters(torch.Generator().manual_seed(3))
    twin = StructuredLinear(64, 64, "btt", generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(filled.parameters(), twin.parameters(), strict=True))


def test_init_has_the_standard_deviation_of_the_rule():
    structured = StructuredLinear(1024, 4096, "btt(rank=4)", generator=torch.Generator().manual_seed(0))
    for factor, row in zip(structured.requires_grad_(False).factors, so.mup.scales(structured.plan), strict=True):
        assert float(factor.std()) == pytest.approx(row.init_std, rel=0.02)
        assert abs(float(factor.mean())) < 0.02 * row.init_std
    assert not structured.bias.any()


def test_zero_init_is_zero_and_learns_in_two_steps():
    structured = layer("btt(rank=2)", zero_init=True)
    x = torch.randn(8, 16, dtype=torch.float64)
    assert not structured(x).any()
    optimizer = torch.optim.SGD(structured.factors, lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        ((structured(x) - 1) ** 2).mean().backward()
        first, last = (bool(f.grad.abs().sum() > 0) for f in structured.factors)
        assert last
        assert first == (step > 0), "the first factor has a gradient once the last has moved"
        optimizer.step()


def test_zero_init_of_low_rank_takes_the_papers_exception():
    structured = StructuredLinear(1024, 1024, "low_rank(rank=32)", zero_init=True).requires_grad_(False)
    assert float(structured.factors[0].std()) == pytest.approx(1 / math.sqrt(1024), rel=0.05)
    assert not structured.factors[1].any()


def test_half_precision_and_autocast():
    structured = StructuredLinear(64, 64, "btt(rank=2)", dtype=torch.bfloat16)
    assert structured(torch.ones(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    single = StructuredLinear(64, 64, "btt(rank=2)")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert single(torch.ones(2, 64)).dtype == torch.bfloat16


@pytest.mark.parametrize("weight_norm", [False, True, "cap"])
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_low_precision_is_near_the_dense_layer_in_float32(spec, how, weight_norm):
    """Values and gradients, to 2 % of the norm of each: a few roundings of bfloat16, which are up to 0.4 %."""
    structured = layer(spec, dtype=torch.float32, weight_norm=weight_norm)
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(40, 16, generator=generator), torch.randn(40, 32, generator=generator)
    with torch.no_grad():
        structured.bias.normal_(generator=generator)
        structured.factors[0].mul_(3)  # so that the cap is at work
    exact_x = x.clone().requires_grad_()
    exact = exact_x @ structured.operator().to_dense().T + structured.bias
    wanted = torch.autograd.grad((exact * weight).sum(), [exact_x, *structured.parameters()])

    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    low, low_x = copy.deepcopy(structured).to(dtype), x.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        y = low(low_x)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad((y.float() * weight).sum(), [low_x, *low.parameters()])
    for ours, theirs in zip([y, *found], [exact, *wanted], strict=True):
        assert ours.dtype == (torch.bfloat16 if ours is y else dtype)
        # The gradient of a capped factor has no part along the factor: two large numbers cancel.
        assert (ours.float() - theirs).norm() <= (0.05 if weight_norm else 0.02) * theirs.norm() + 1e-6


def test_compiled_gradients_and_exported_values(spec):
    structured = layer(spec, weight_norm=True)
    x = torch.randn(3, 16, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(structured, fullgraph=True, backend="aot_eager")
    ours, theirs = (
        torch.autograd.grad(run(x).square().sum(), list(structured.parameters())) for run in (compiled, structured)
    )
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(structured, (x,), dynamic_shapes=({0: tokens},)).module()
    more = torch.randn(7, 16, dtype=torch.float64)
    torch.testing.assert_close(program(more), structured(more))


def test_autocast_leaves_double_precision_alone(spec):
    structured = layer(spec)
    x = torch.randn(3, 16, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = structured(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, structured(x))


@pytest.mark.parametrize("weight_norm", [False, True])
def test_checkpointed_and_per_sample_gradients(spec, weight_norm):
    structured = layer(spec, weight_norm=weight_norm)
    x = torch.randn(3, 16, dtype=torch.float64)
    parameters = dict(structured.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(structured, parameters, (x,)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    saving = checkpoint(structured, x, use_reentrant=False).square().sum()
    again = dict(zip(parameters, torch.autograd.grad(saving, list(parameters.values())), strict=True))
    plain = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
    for (name, grads), wanted in zip(per_sample.items(), plain, strict=True):
        torch.testing.assert_close(grads.sum(0), wanted, msg=name)
        torch.testing.assert_close(again[name], wanted, msg=name)


def test_wrong_input_says_what_was_expected():
    with pytest.raises(so.ShapeError, match=r"16.*\(3, 15\)"):
        layer("btt")(torch.zeros(3, 15, dtype=torch.float64))


def test_repr_names_structure_and_share_of_dense():
    text = repr(layer("btt(rank=2)"))
    assert "btt(rank=2)" in text
    assert "of dense" in text


# -------------------------------------------------------------------------------------------------------------- groups


class Net(nn.Module):
    """A tiny transformer-like model with every kind of parameter, one of them tied."""

    def __init__(self, width, structure="btt"):
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.up = StructuredLinear(width, 4 * width, structure)
        self.down = StructuredLinear(4 * width, width, structure)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)
        self.tied = self.head


def by_parameter(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in groups for p in group["params"]}


def test_groups_cover_every_parameter_exactly_once():
    model = Net(64)
    groups = param_groups(model, lr=0.1, weight_decay=0.01)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    assert all(set(group) == {"params", "lr", "lr_scale", "weight_decay"} for group in groups)
    assert len({(g["lr_scale"], g["weight_decay"]) for g in groups}) == len(groups), "groups are merged"
    torch.optim.AdamW(groups).step()


def test_rates_relative_to_the_dense_layer_replaced():
    model = Net(1024)
    groups = by_parameter(model, param_groups(model, lr=1e-3))
    assert groups["up.factors.0"]["lr"] == pytest.approx(16e-3)
    assert groups["up.factors.1"]["lr_scale"] == 16
    assert groups["down.factors.0"]["lr_scale"] == 32
    assert groups["head.weight"]["lr_scale"] == groups["embedding.weight"]["lr_scale"] == 1
    assert groups["up.bias"]["lr_scale"] == groups["norm.weight"]["lr_scale"] == 1


def test_rates_of_the_paper_with_a_base_model():
    """The worked learning rates of the paper's recipe: 3e-3 at width 64, for width 1024."""
    model, base = Net(1024), Net(64, "dense")
    groups = by_parameter(model, param_groups(model, lr=3e-3, base=base))
    for name in ("up.factors.0", "up.factors.1"):
        assert groups[name]["lr"] == pytest.approx(3.0e-3)
    for name in ("down.factors.0", "down.factors.1"):
        assert groups[name]["lr"] == pytest.approx(6.0e-3)
    assert groups["head.weight"]["lr"] == pytest.approx(3e-3 * 64 / 1024)
    assert groups["embedding.weight"]["lr"] == pytest.approx(3e-3)


def test_rates_with_a_base_width():
    square = StructuredLinear(1024, 1024, "btt", bias=False)
    (group,) = param_groups(square, lr=3e-3, base=64)
    assert group["lr"] == pytest.approx(3e-3 * 64 / (2 * math.sqrt(1024)))


def test_naive_rates_are_those_of_the_dense_layer():
    model = Net(1024)
    groups = by_parameter(model, param_groups(model, lr=1e-3, structure_aware=False))
    assert {group["lr"] for group in groups.values()} == {1e-3}


def test_weight_decay_is_as_fast_as_that_of_the_dense_layer():
    """The decay per step of a product of k factors is k times lr times decay; it equals that of the dense layer."""
    model = Net(1024)
    groups = by_parameter(model, param_groups(model, lr=1e-3, weight_decay=0.1))
    dense = groups["head.weight"]["lr"] * groups["head.weight"]["weight_decay"]
    for name in ("up", "down"):
        total = sum(groups[f"{name}.factors.{k}"]["lr"] * groups[f"{name}.factors.{k}"]["weight_decay"] for k in (0, 1))
        assert total == pytest.approx(dense)
    assert groups["up.bias"]["weight_decay"] == groups["norm.weight"]["weight_decay"] == 0


def test_sgd_takes_its_own_rule():
    square = StructuredLinear(1024, 1024, "btt(rank=4)", bias=False)
    scales = [group["lr_scale"] for group in param_groups(square, optimizer="sgd")]
    assert scales == [0.125, 2]


def test_groups_of_a_compiled_model_are_the_same():
    model = Net(64)
    compiled = torch.compile(model, backend="eager")
    plain = [(g["lr_scale"], [id(p) for p in g["params"]]) for g in param_groups(model, base=Net(16))]
    assert [(g["lr_scale"], [id(p) for p in g["params"]]) for g in param_groups(compiled, base=Net(16))] == plain


def test_errors_of_groups():
    with pytest.raises(so.StructureError, match="no rule for optimizer 'magic'"):
        param_groups(Net(64), optimizer="magic")
    with pytest.raises(so.StructureError, match="no layer 'up'"):
        param_groups(Net(64), base=nn.Sequential(nn.Linear(3, 3)))


@pytest.mark.parametrize("spec", ["monarch(blocks=5)", "circulant", "toeplitz"])
def test_compiles_when_the_input_is_itself_a_parameter(spec):
    """Learned queries, say: a Parameter is a subclass of Tensor."""
    structured = layer(spec, 16, 16)
    queries = nn.Parameter(torch.randn(3, 16, dtype=torch.float64))
    torch._dynamo.reset()
    compiled = torch.compile(lambda: structured(queries), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(), structured(queries))
