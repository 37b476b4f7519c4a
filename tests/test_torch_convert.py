"""`structurize` and `densify` on torch models of every kind, as users would try them."""

import copy
import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="needs PyTorch")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, prune  # noqa: E402

import structops as so  # noqa: E402
from structops.conversion import Conversion  # noqa: E402
from structops.torch import StructuredLinear, densify, param_groups, structurize, survey  # noqa: E402

pytestmark = pytest.mark.torch

# A structure of which every 12x12 matrix is a member, and what it becomes.
EXACT = ["dense", "low_rank(rank=12)", "btt(rank=4, modes=((4, 3), (3, 4)))", "tt(rank=9, modes=((4, 3), (4, 3)))"]


SPECS = ["low_rank(rank=1)", "btt", "tt", "kron", "monarch(blocks=2)", "dense", "block_diag(blocks=1)"]


def mlp(*widths, bias=True, dtype=torch.float64):
    torch.manual_seed(sum(widths))
    layers = [nn.Linear(n, m, bias, dtype=dtype) for n, m in itertools.pairwise(widths)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.GELU())][:-1])


def states_are_equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert list(one) == list(other)
    return all(torch.allclose(one[key], other[key], atol=1e-10) for key in one)


# ---------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("spec", EXACT)
def test_exact_there_and_back(spec):
    model = mlp(12, 12, 12)
    structured = structurize(model, spec)
    assert [type(layer) for layer in structured] == [StructuredLinear, nn.GELU, StructuredLinear]
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(structured(x), model(x))
    back = densify(structured)
    assert [type(layer) for layer in back] == [nn.Linear, nn.GELU, nn.Linear]
    assert states_are_equal(back, model)
    assert isinstance(structured[0], StructuredLinear)  # a copy was made dense


@given(
    widths=st.lists(st.integers(1, 13), min_size=2, max_size=4),
    spec=st.sampled_from(
        ["low_rank(rank=1)", "btt", "tt", "kron", "monarch(blocks=2)", "dense", "block_diag(blocks=1)"]
    ),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@pytest.mark.filterwarnings("ignore::structops.StructureWarning")  # narrow layers cap ranks
def test_any_widths(widths, spec, bias, dtype):
    """The layer is the nearest member to the weight, found without structops' layers, and the bias stays."""
    model = mlp(*widths, bias=bias, dtype=dtype)
    structured = structurize(model, spec)
    for old, new in zip(model, structured, strict=True):
        if isinstance(old, nn.Linear):
            nearest = so.project(old.weight.detach(), spec).to_dense()
            assert new.factors[0].dtype == dtype
            torch.testing.assert_close(new.operator().to_dense().detach(), nearest)
            assert (new.bias is None) == (old.bias is None)
            assert old.bias is None or torch.equal(new.bias, old.bias)
            weight = old.weight.detach().double()
            error = (weight - nearest.double()).norm() / weight.norm()
            assert new.projection.error == pytest.approx(float(error), abs=1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert structured(torch.zeros(3, widths[0], dtype=dtype)).shape == (3, widths[-1])


def test_a_single_layer():
    layer = nn.Linear(12, 8)
    new = structurize(layer, "low_rank(rank=8)")
    assert isinstance(new, StructuredLinear)
    torch.testing.assert_close(new.operator().to_dense(), layer.weight, atol=1e-5, rtol=1e-5)
    assert type(densify(new)) is nn.Linear
    with pytest.raises(so.StructureError, match="take what structurize returns"):
        structurize(layer, "btt", inplace=True)
    with pytest.raises(so.StructureError, match="take what densify returns"):
        densify(new, inplace=True)


# ------------------------------------------------------------------------------------------------- in place and copied


def test_in_place_and_copied():
    model = mlp(12, 16, 12)
    before = copy.deepcopy(model.state_dict())
    copied = structurize(model, "btt")
    assert [type(layer) for layer in model] == [nn.Linear, nn.GELU, nn.Linear]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert copied[0].bias is not model[0].bias
    bias = model[0].bias
    assert structurize(model, "btt", inplace=True) is model
    assert isinstance(model[0], StructuredLinear)
    assert model[0].bias is bias
    assert densify(model, inplace=True) is model
    assert isinstance(model[0], nn.Linear)
    assert model[0].bias is bias


def test_a_copy_never_holds_the_dense_weights():
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    weight = model[0].weight
    made = []
    deepcopy = nn.Parameter.__deepcopy__

    def watched(self, memo):
        made.append(self)
        return deepcopy(self, memo)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Parameter, "__deepcopy__", watched)
        structured = structurize(model, "btt")
    assert not made
    assert not any(parameter is weight for parameter in structured.parameters())


def test_the_model_is_left_as_it_was_when_a_layer_fails():
    model = mlp(12, 16, 12)
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    bias = model[0].bias.detach().clone()
    with pytest.raises(so.EntryError, match="finite"):
        structurize(model, "btt", inplace=True)
    assert [type(layer) for layer in model] == [nn.Linear, nn.GELU, nn.Linear]
    assert torch.equal(model[0].bias, bias)


# ------------------------------------------------------------------------------------------------------- what survives


def test_hooks_and_their_handles_survive():
    model = mlp(12, 12)
    seen = []
    handles = [
        model[0].register_forward_pre_hook(lambda *_: seen.append("before")),
        model[0].register_forward_hook(lambda *_: seen.append("after")),
        model[0].register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    structurize(model, "btt", inplace=True)
    x = torch.zeros(2, 12, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()
    assert seen == ["before", "after", "backward"]
    for handle in handles:
        handle.remove()
    model(x)
    assert len(seen) == 3


def test_flags_and_attributes_survive():
    model = mlp(12, 12, 12).eval()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    model[0].note = "mine"
    for structured in (structurize(model, "btt"), structurize(model, "btt", init="mup", weight_norm=True)):
        assert not structured[0].training
        assert [p.requires_grad for p in structured[0].weights()] == [False] * len(structured[0].weights())
        assert structured[0].bias.requires_grad
        assert all(p.requires_grad for p in structured[2].weights())
        assert not structured[2].bias.requires_grad
        assert structured[0].note == "mine"
        back = densify(structured)
        assert not back[0].training
        assert not back[0].weight.requires_grad
        assert not back[2].bias.requires_grad
        assert back[0].note == "mine"


def test_a_layer_with_two_places_is_converted_once():
    model = nn.Module()
    model.one = nn.Linear(12, 12)
    model.two = nn.ModuleList([model.one, nn.Linear(12, 12)])
    structured = structurize(model, "btt")
    assert structured.one is structured.two[0]
    assert isinstance(structured.one, StructuredLinear)
    assert len(survey(structured)) == 2
    back = densify(structured)
    assert back.one is back.two[0]


def test_buffers_and_other_modules_are_left_alone():
    model = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Embedding(3, 12))
    model.register_buffer("table", torch.arange(3))
    structured = structurize(model, "btt")
    assert torch.equal(structured.table, model.table)
    assert torch.equal(structured[2].weight, model[2].weight)
    assert set(dict(structured.named_buffers())) == set(dict(model.named_buffers()))


def test_biases_that_are_tied_stay_tied():
    model = mlp(12, 12, 12)
    model[2].bias = model[0].bias
    structured = structurize(model, "btt")
    assert structured[2].bias is structured[0].bias


def test_a_state_dict_and_an_optimiser_fit():
    model = structurize(mlp(12, 16, 12), "btt(rank=2)")
    twin = structurize(mlp(12, 16, 12), "btt(rank=2)", init="mup")
    twin.load_state_dict(model.state_dict())
    x = torch.randn(4, 12, dtype=torch.float64)
    assert torch.equal(twin(x), model(x))
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
    first = model(x).square().mean()
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < first


# ----------------------------------------------------------------------------------------------------------- obstacles


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.inner = nn.Linear(16, 16)
        self.out = nn.Linear(16, 12, bias=False)
        self.out.weight = self.embed.weight


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced_forward():
    layer = nn.Linear(12, 12)
    layer.forward = lambda x: x
    return layer


OBSTACLES = {
    "tied to 0.embed.weight": Tied,
    "parametrised": lambda: parametrizations.weight_norm(nn.Linear(12, 12)),
    "orthogonal is parametrised": lambda: parametrizations.orthogonal(nn.Linear(12, 12)),
    "subclass of Linear": lambda: Scaled(12, 12),
    "weight_orig": lambda: prune.l1_unstructured(nn.Linear(12, 12), "weight", 0.5),
    "forward was replaced": replaced_forward,
    "a structure already": lambda: StructuredLinear(12, 12, "kron"),
    "MultiheadAttention itself": lambda: nn.MultiheadAttention(12, 2),
}


@pytest.mark.parametrize("what", OBSTACLES)
def test_what_cannot_be_converted_stays_or_is_an_error(what):
    model = nn.Sequential(OBSTACLES[what](), nn.Linear(12, 12))
    message = what.removeprefix("orthogonal is ")
    table = structurize(model, "btt", dry_run=True)
    bad = [row for row in table if message in row.reason]
    assert len(bad) == 1
    with pytest.raises(so.StructureError, match=message):
        structurize(model, "btt", select=bad[0].name)
    structurize(model, "btt", inplace=True)  # PyTorch cannot copy a layer that was pruned
    assert survey(model)["1"].structure == "btt"


def test_a_tie_survives():
    structured = structurize(Tied(), "btt")
    assert structured.out.weight is structured.embed.weight
    assert isinstance(structured.inner, StructuredLinear)


@pytest.mark.parametrize("name", ["head", "lm_head", "classifier", "router", "gate"])
def test_heads_and_routers_stay_unless_selected(name):
    model = nn.Module()
    model.up = nn.Linear(12, 16)
    setattr(model, name, nn.Linear(16, 4))
    assert type(getattr(structurize(model, "btt"), name)) is nn.Linear
    assert type(getattr(structurize(model, "btt", select=name), name)) is StructuredLinear


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": "zeros"}, "init: expected 'project' or 'mup', got 'zeros'"),
        ({"zero": True}, "give zero with init='mup'"),
        ({"init": "mup", "calibration": {}}, "drawn anew need none"),
        ({"calibration": {"0": torch.eye(12)}}, "no moments for 2; calibrate"),
        ({"init": "mup", "zero": True}, "none of the layers has the name"),
        ({"init": "mup", "zero": "*.down"}, r"zero: '\*.down' fits no linear layer"),
        ({"select": "x"}, "fits no linear layer"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(so.StructureError, match=message):
        structurize(mlp(12, 16, 12), "btt", **arguments)


def test_a_layer_without_a_size():
    for function in (lambda m: structurize(m, "btt"), survey):
        with pytest.raises(so.StructureError, match=r"0.weight has no size before the first forward; run one batch"):
            function(nn.Sequential(nn.LazyLinear(12)))


def test_no_module():
    for function in (lambda m: structurize(m, "btt"), survey):
        with pytest.raises(so.StructureError, match="expected a module of PyTorch, got dict"):
            function({"weight": torch.zeros(3, 3)})
    with pytest.raises(so.StructureError, match="fits no linear layer"):
        densify(structurize(mlp(12, 12), "btt"), "x")


# -------------------------------------------------------------------------------------------------- initial values


def test_drawn_anew():
    model = mlp(16, 16, 16)
    generator = torch.Generator().manual_seed(3)
    structured = structurize(model, "btt(rank=2)", init="mup", generator=generator)
    again = structurize(model, "btt(rank=2)", init="mup", generator=torch.Generator().manual_seed(3))
    assert states_are_equal(structured, again)
    assert structured[0].projection is None
    assert not structured[0].bias.any()
    assert model[0].bias.any()
    std = float(structured[0].factors[0].detach().std())
    assert std == pytest.approx(so.mup.scales(so.structure("btt(rank=2)").chain(16, 16))[0].init_std, rel=0.3)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down_proj = nn.Linear(16, 32), nn.Linear(32, 16)


def test_ends_of_residual_branches_start_at_zero():
    model = nn.ModuleDict({"a": Block(), "b": Block(), "head": nn.Linear(16, 16)})
    found = structurize(model, "btt", init="mup", zero=True)
    named = structurize(model, "btt", init="mup", zero=["*.down_proj"])
    for structured in (found, named):
        for block in (structured["a"], structured["b"]):
            assert block.down_proj.zero_init
            assert not block.down_proj.factors[-1].any()
            assert block.down_proj.factors[0].any()
            assert not block.up.zero_init
    everywhere = structurize(model, "btt", select="*", init="mup", zero=True)
    assert everywhere["head"].zero_init


def test_weight_normalisation_keeps_projected_weights():
    model = mlp(16, 16)
    with torch.no_grad():
        model[0].weight.mul_(10)  # far above the cap
    plain = structurize(model, "btt(rank=4)")
    normed = structurize(model, "btt(rank=4)", weight_norm=True)
    assert (normed[0].gains > 1).all()
    torch.testing.assert_close(normed[0].operator().to_dense(), plain[0].operator().to_dense())


def test_calibrated_with_second_moments():
    """Inputs that lie in a plane: a layer of rank 2 then errs nowhere, one that ignores them does."""
    model = mlp(12, 12, bias=False)
    basis = torch.randn(2, 12, dtype=torch.float64)
    x = torch.randn(50, 2, dtype=torch.float64) @ basis
    moments = {"0": x.T @ x / 50}
    blind = structurize(model, "low_rank(rank=2)")
    seeing = structurize(model, "low_rank(rank=2)", calibration=moments)
    assert (seeing(x) - model(x)).norm() < 1e-6 * model(x).norm()
    assert (blind(x) - model(x)).norm() > 0.1 * model(x).norm()
    assert seeing[0].projection.error < 1e-6


@pytest.mark.parametrize("spec", ["low_rank(rank=3)", "btt(rank=4, blocks=2)", "block_diag(blocks=3)"])
def test_calibrated_with_moments(spec):
    """With a bias the mean of the inputs costs nothing; without one the second moments count as they are."""
    torch.manual_seed(0)
    x = torch.randn(400, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64) + 5 * torch.randn(12)
    for bias in (True, False):
        model = mlp(12, 12, bias=bias)
        moments = so.projection.Moments.zeros(12, x).add(x)
        before = model[0].bias.detach().clone() if bias else None
        found = structurize(model, spec, calibration={"0": moments})
        C = x.T @ x / 400
        rival = structurize(model, spec, calibration={"0": C})
        if bias:
            W, A = model[0].weight, found[0].operator().to_dense()
            torch.testing.assert_close(found[0].bias - before, (W - A) @ x.mean(0))
            assert torch.equal(model[0].bias, before)
            assert (found(x) - model(x)).norm() < 0.99 * (rival(x) - model(x)).norm()
            # The mean of the outputs is right to rounding.
            torch.testing.assert_close(found(x).mean(0), model(x).mean(0))
        else:
            torch.testing.assert_close(found(x), rival(x))
        blind = structurize(model, spec)
        assert (found(x) - model(x)).norm() < 0.9 * (blind(x) - model(x)).norm()


# -------------------------------------------------------------------------------------------------- meta, table, T5


def test_on_the_meta_device():
    with torch.device("meta"):
        model = mlp(64, 64, 64)
    structured = structurize(model, "btt")
    assert all(parameter.is_meta for parameter in structured.parameters())
    structured.to_empty(device="cpu")
    for layer in structured:
        if isinstance(layer, StructuredLinear):
            layer.reset_parameters(torch.Generator().manual_seed(0))
    assert structured(torch.zeros(2, 64, dtype=torch.float64)).isfinite().all()


def test_the_dry_run_tells_what_is_done():
    model = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 64), nn.Linear(64, 16), nn.MultiheadAttention(16, 2))
    before = copy.deepcopy(model.state_dict())
    table = structurize(model, "low_rank(rank=2)", dry_run=True)
    assert isinstance(table, Conversion)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [row.structure for row in table] == ["low_rank(rank=2)", "low_rank(rank=2)", "dense"]
    assert {k.name for k in table.kept} == {"0.weight", "3.in_proj_weight"}
    assert table.params == sum(p.numel() for p in model.parameters())
    structured = structurize(model, "low_rank(rank=2)")
    done = survey(structured)
    assert [row.params for row in done] == [row.params for row in table]
    assert table.params - table.saved == sum(p.numel() for p in structured.parameters())
    assert done.params == table.params
    assert done["1"].error == structured[1].projection.error
    assert re.search(r"1 +Linear +64x16 +low_rank\(rank=2\) +160 +160 +0.156 +\d", str(table))


def test_the_stand_in_for_the_weight():
    layer = structurize(nn.Linear(12, 8, dtype=torch.bfloat16), "btt")
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.shape, weight.device.type) == (torch.bfloat16, (8, 12), "cpu")
    assert (weight.size(0), weight.ndim, weight.numel(), len(weight)) == (8, 2, 96, 8)
    assert weight.requires_grad
    assert weight.data.dtype == torch.bfloat16
    assert "to_dense" in repr(weight)
    uses = [
        lambda: weight + 1,
        lambda: torch.ones(12, dtype=torch.bfloat16) @ weight.T,
        lambda: weight @ torch.ones(12, dtype=torch.bfloat16),
        lambda: nn.functional.linear(torch.ones(12, dtype=torch.bfloat16), weight),
        lambda: weight.float(),
        lambda: weight[0],
        lambda: weight.sum(),
        lambda: weight.data.normal_(),
        lambda: nn.init.zeros_(weight),
        lambda: weight.detach().clone(),
        lambda: weight.tolist(),
    ]
    for use in uses:
        with pytest.raises(so.EntryError, match=r"layer.operator\(\).to_dense\(\)"):
            use()


def test_layers_that_read_the_weight_run():
    """The fast path of nn.TransformerEncoderLayer reads linear1.weight; it has to notice that it cannot."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dtype=torch.float64).eval()
    structured = structurize(layer, "dense")
    assert isinstance(structured.linear1, StructuredLinear)
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(structured(x), layer(x))


def test_the_stand_in_inside_a_compiled_function():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.wo = structurize(nn.Linear(12, 8), "btt")

        def forward(self, x):
            if isinstance(self.wo.weight, torch.Tensor) and x.dtype != self.wo.weight.dtype:
                x = x.to(self.wo.weight.dtype)
            return self.wo(x)

    model = Reads()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), model(x))
    # No numbers can be had there, either.
    wrong = torch.compile(lambda x: x @ model.wo.weight.T, fullgraph=True, backend="aot_eager")
    assert wrong(x.float()).isnan().all()


# ------------------------------------------------------------------------------------------------------------ warnings


def test_what_a_structure_says_is_told_once():
    model = mlp(16, 16, 16, 16)
    with pytest.warns(so.StructureWarning) as told:
        structurize(model, "btt(rank=9)")
    assert len(told) == 1
    assert str(told[0].message).startswith("0 and 2 more: btt(rank=9): rank 9 is more than useful")
    with pytest.warns(so.StructureWarning) as told:
        structurize(model, "btt(rank=9)", dry_run=True)
    assert len(told) == 1


def test_a_conversion_of_nothing_is_told():
    with pytest.warns(so.StructureWarning, match="no layer was converted .*the model: it has a structure already"):
        structurize(StructuredLinear(12, 12, "kron"), "btt")
    with pytest.warns(so.StructureWarning, match="it has no linear layer"):
        structurize(nn.Sequential(nn.GELU()), "btt")
