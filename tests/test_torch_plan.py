"""The plan of a torch model: the same on every form of it, and what is made from it."""

from __future__ import annotations

import copy
import io
import math

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")

from torch import nn  # noqa: E402
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LambdaLR, LinearLR, SequentialLR  # noqa: E402

import structops as so  # noqa: E402
from structops.mup import MupPlan, Rule, init_stds  # noqa: E402
from structops.torch import Muon, StructuredLinear, guard, init_, lint, param_groups, plan, probe, split  # noqa: E402
from structops.torch.weights import as_blocks, from_blocks, weights  # noqa: E402

pytestmark = pytest.mark.torch


def seed(number=0):
    return torch.Generator().manual_seed(number)


class Block(nn.Module):
    """A residual block with every kind of layer that has a rule of its own."""

    def __init__(self, width, structure, **kwargs):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = StructuredLinear(width, 4 * width, structure, **kwargs)
        self.down = StructuredLinear(4 * width, width, structure, zero_init=True, **kwargs)
        self.gain = nn.Parameter(torch.ones(1))  # FSDP2 takes no scalars

    def forward(self, x):
        return x + self.gain * self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, width=16, structure="btt", **kwargs):
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.block = Block(width, structure, **kwargs)
        self.head = nn.Linear(width, 11)

    def forward(self, tokens):
        return self.head(self.block(self.embedding(tokens)))


def listed(groups):
    return [id(p) for group in groups for p in group["params"]]


def loss_of(model, tokens):
    return nn.functional.cross_entropy(model(tokens), (tokens + 1) % 11)


# ------------------------------------------------------------------------------------------- the same in every form


@pytest.fixture
def process_group(tmp_path):
    """One process with gloo."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model.block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def on_meta():
    with torch.device("meta"):
        return Net()


def reloaded(assign):
    source, file = Net(), io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    model = Net()
    model.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    return model


def checkpointed():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Net()
    model.block = checkpoint_wrapper(model.block)
    return model


FORMS = {
    "plain": Net,
    "compiled": lambda: torch.compile(Net(), backend="eager"),
    "deepcopy": lambda: copy.deepcopy(Net()),
    "meta": on_meta,
    "to_empty": lambda: on_meta().to_empty(device="cpu"),
    "reload": lambda: reloaded(False),
    "assign": lambda: reloaded(True),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(Net()),
    "checkpointed": checkpointed,
    "bfloat16": lambda: Net().to(torch.bfloat16),
    "frozen": lambda: Net().requires_grad_(False),
    "ddp": lambda: nn.parallel.DistributedDataParallel(Net()),
    "ddp, compiled": lambda: torch.compile(nn.parallel.DistributedDataParallel(Net()), backend="eager"),
    "fsdp2": lambda: sharded(Net()),
    "fsdp2, meta": lambda: sharded(on_meta()),
    "fsdp2, compiled": lambda: torch.compile(sharded(Net()), backend="eager"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_the_plan_and_the_groups_are_the_same_in_every_form(form, optimizer, process_group):
    rule = Rule(optimizer, scale_eps=True)
    expected, model = plan(Net(), rule, base=Net(4, "dense")), FORMS[form]()
    found = plan(model, rule, base=Net(4, "dense"))
    assert found == expected
    assert found.fingerprint == expected.fingerprint
    groups = param_groups(model, found, lr=0.1, weight_decay=0.1, named=True)
    twin = param_groups(Net(), expected, lr=0.1, weight_decay=0.1, named=True)
    strip = [{**g, "params": [name for name, _ in g["params"]]} for g in groups]
    assert strip == [{**g, "params": [name for name, _ in g["params"]]} for g in twin]
    assert sorted(listed(param_groups(model, found))) == sorted(id(p) for p in model.parameters())


def test_a_module_of_the_user_may_be_called_module():
    model = nn.ModuleDict({"module": nn.Linear(4, 4), "_orig_mod": nn.Linear(4, 4)})
    names = ["module.weight", "module.bias", "_orig_mod.weight", "_orig_mod.bias"]
    assert [row.name for row in plan(model)] == names
    assert [row.name for row in plan(torch.compile(model, backend="eager"))] == names


# ------------------------------------------------------------------------------------------------------------- groups


def test_groups_are_merged_sorted_and_never_empty():
    model = Net(64)
    groups = param_groups(model, lr=0.1, weight_decay=0.1)
    keys = [(group["lr_scale"], group["weight_decay"]) for group in groups]
    assert keys == sorted(set(keys))
    assert all(group["params"] for group in groups)
    muon, adam = split(model, plan(model, "muon"))
    assert sorted(listed(muon) + listed(adam)) == sorted(id(p) for p in model.parameters())
    assert len(listed(muon)) == 4
    assert split(nn.LayerNorm(4), plan(nn.LayerNorm(4), "muon"))[0] == []
    bare = StructuredLinear(4, 4, "btt", bias=False)
    assert split(bare, plan(bare, "muon"))[1] == []


def test_named_groups_give_the_state_its_names():
    model = Net()
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, named=True))
    loss_of(model, torch.arange(5)).backward()
    optimizer.step()
    names = [name for group in optimizer.state_dict()["param_groups"] for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    other = torch.optim.AdamW(param_groups(Net(), lr=1.0, named=True))
    other.load_state_dict(optimizer.state_dict())
    assert [g["lr_scale"] for g in other.param_groups] == [g["lr_scale"] for g in optimizer.param_groups]


def test_eps_follows_the_plan():
    layer = StructuredLinear(64, 64, "btt", bias=False)
    (group,) = param_groups(layer, optimizer=Rule(scale_eps=True), eps=1e-8)
    assert group["eps"] == pytest.approx(1e-8)  # 8 blocks of 8 outputs: gradients of the size of the dense layer's
    layer = StructuredLinear(64, 64, "low_rank(rank=4)", bias=False)
    low, high = param_groups(layer, optimizer=Rule(scale_eps=True), eps=1e-8)
    assert sorted([low["eps"], high["eps"]]) == pytest.approx([1e-8, 16e-8])


def test_plans_of_other_models_are_refused():
    for other, text in (
        (nn.Sequential(nn.Linear(3, 3)), "embedding.weight"),
        (Net(32), r"embedding.weight is \(11, 16\) here and \(11, 32\)"),
    ):
        with pytest.raises(so.StructureError, match=f"{text}.*another model"):
            param_groups(Net(), plan(other))
        with pytest.raises(so.StructureError, match=f"{text}.*another model"):
            init_(Net(), plan(other))
    with pytest.raises(so.StructureError, match="which the model lacks"):
        param_groups(Net().head, plan(Two()))
    with pytest.raises(so.StructureError, match="expected the module"):
        plan(list(Net().parameters()))
    with pytest.raises(so.StructureError, match="use param_groups"):
        split(Net(), plan(Net(), "adam"))


class Two(nn.Linear):
    """The head of the model, and a parameter more."""

    def __init__(self):
        super().__init__(16, 11)
        self.more = nn.Parameter(torch.ones(3))


# ---------------------------------------------------------------------------------------------------------- schedules


def optimizers_of(model):
    return torch.optim.AdamW(param_groups(model, lr=0.1))


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: LambdaLR(o, lambda t: (t + 1) / 10),
        lambda o: LambdaLR(o, lambda t: t / 10),  # starts at zero, before the guard looks
        lambda o: CosineAnnealingLR(o, 10),
        lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=2), CosineAnnealingLR(o, 5)], [2]),
    ],
)
@pytest.mark.parametrize("first", ["guard", "schedule"])
def test_relative_schedulers_keep_ratios(schedule, first):
    optimizer = optimizers_of(Net())
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    assert len(scales) > 1
    if first == "guard":
        guard(optimizer)
    scheduler = schedule(optimizer)
    if first == "schedule":
        guard(optimizer)
    for _ in range(6):
        optimizer.step()
        scheduler.step()
        rates = [group["lr"] for group in optimizer.param_groups]
        assert [rate * scales[0] for rate in rates] == pytest.approx([rates[0] * scale for scale in scales])


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: CosineAnnealingLR(o, 3, eta_min=0.05),
        lambda o: CyclicLR(o, 1e-3, 1e-2, step_size_up=2, cycle_momentum=False),
    ],
)
def test_the_guard_stops_absolute_schedulers(schedule):
    optimizer = optimizers_of(Net())
    guard(optimizer)
    scheduler = schedule(optimizer)

    def run():
        for _ in range(4):
            optimizer.step()
            scheduler.step()

    with pytest.raises(so.StructureError, match=r"lr / lr_scale is .* in group 0"):
        run()


def test_the_guard_knows_its_groups_and_can_be_removed():
    model = Net()
    groups = param_groups(model, lr=0.1)
    free = {"params": [nn.Parameter(torch.zeros(2))], "lr": 7.0}
    other = {"params": [nn.Parameter(torch.zeros(2))], "lr": 0.3, "lr_scale": 1.0}
    optimizer = torch.optim.SGD([*groups, free, other])
    handle = guard(optimizer)
    optimizer.param_groups[-2]["lr"] = 1.0  # has no scale
    optimizer.param_groups[-1]["lr"] = 1.0  # started with another rate
    optimizer.step()
    optimizer.param_groups[0]["lr"] *= 2
    with pytest.raises(so.StructureError, match="ratios"):
        optimizer.step()
    handle.remove()
    optimizer.step()
    with pytest.raises(so.StructureError, match="lr_scale"):
        guard(torch.optim.SGD(model.parameters(), lr=1.0))


# ----------------------------------------------------------------------------------------------------- roles and zeros


def roles_of(model, **kwargs):
    return {weight.name: weight.role for weight in weights(model, **kwargs)}


def test_roles_of_the_layers_of_torch():
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(7, 8),
            "conv": nn.Conv2d(4, 6, 3, groups=2),
            "back": nn.ConvTranspose1d(4, 6, 5, groups=2),
            "attention": nn.MultiheadAttention(8, 2, kdim=3, add_bias_kv=True),
            "fused": nn.MultiheadAttention(8, 2),
            "lstm": nn.LSTM(3, 5),
            "norm": nn.LayerNorm((2, 3)),
            "batch": nn.BatchNorm1d(5),
            "list": nn.ParameterList([torch.ones(3), torch.ones(())]),
            "normed": StructuredLinear(16, 16, "btt", weight_norm=True),
            "lm_head": nn.Linear(8, 7),
        }
    )
    found = plan(model)
    assert sorted(listed(param_groups(model, found))) == sorted(id(p) for p in model.parameters())
    assert not found.warnings
    sizes = {row.name: (row.weight.role, *row.weight.factor.stored_shape) for row in found}
    assert sizes["table.weight"] == ("embedding", 1, 8, 1)
    assert sizes["conv.weight"] == ("hidden", 2, 3, 18)
    assert sizes["back.weight"] == ("hidden", 2, 3, 10)
    assert sizes["attention.k_proj_weight"] == ("hidden", 1, 8, 3)
    assert sizes["attention.bias_k"] == ("vector", 1, 8, 1)
    assert sizes["fused.in_proj_weight"] == ("hidden", 1, 24, 8)
    assert sizes["fused.out_proj.weight"] == ("hidden", 1, 8, 8)
    assert sizes["lstm.weight_ih_l0"] == ("hidden", 1, 20, 3)
    assert sizes["norm.weight"] == ("vector", 1, 6, 1)
    assert sizes["list.0"] == ("vector", 1, 3, 1)
    assert sizes["list.1"] == ("scalar", 1, 1, 1)
    assert sizes["normed.gains"] == ("scalar", 1, 1, 1)
    assert sizes["lm_head.weight"] == ("readout", 1, 7, 8)


def test_conv1d_of_transformers_is_a_linear_layer_that_is_stored_transposed():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.empty(8, 32)), nn.Parameter(torch.empty(32))

    model = Conv1D()
    (weight, bias) = weights(model)
    assert (weight.factor.fan_in, weight.factor.fan_out, bias.role) == (8, 32, "vector")
    init_(model, plan(model, Rule(init="orthogonal")), seed())
    assert torch.linalg.svdvals(model.weight.detach()) == pytest.approx(2.0)


def test_roles_are_given_by_globs():
    model = nn.ModuleDict({"stem": nn.Linear(8, 16), "a": Two(), "out": nn.Linear(16, 3)})
    roles = roles_of(model, roles={"stem": "embedding", "*out": "readout", "a.more": "scalar"})
    assert roles == {
        "stem.weight": "embedding",
        "stem.bias": "vector",
        "a.weight": "hidden",
        "a.bias": "vector",
        "a.more": "scalar",
        "out.weight": "readout",
        "out.bias": "vector",
    }
    assert roles_of(model, roles={"*.weight": "hidden", "out": "readout"})["out.weight"] == "readout", "the last wins"
    with pytest.raises(so.StructureError, match=r"'stemm' fits no parameter or layer.*stem.weight"):
        plan(model, roles={"stemm": "embedding"})
    with pytest.raises(so.StructureError, match=r"expected one of hidden, embedding.*'out'"):
        plan(model, roles={"out": "output"})


class Positions(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, 5, width))
        self.inner = nn.Linear(width, width)


def test_m001_a_parameter_that_no_layer_describes():
    model = Positions(8)
    (warning,) = plan(model).warnings
    assert warning.startswith("M001 positions: ")
    named = plan(model, roles={"positions": "embedding"})
    assert not named.warnings
    assert named["positions"].init_std == 1
    assert named["positions"].weight.factor.stored_shape == (1, 8, 1)
    assert plan(model, roles={"positions": "vector"})["positions"].init == "constant"
    # A plan with roles is that of the model, whose own guess is another one.
    assert len(listed(param_groups(model, named))) == 3
    init_(model, named, seed())
    assert float(model.positions.detach().std()) == pytest.approx(1, rel=0.3)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(11, 8)
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.wte.weight


def test_m002_tied_embeddings():
    found = plan(Tied())
    assert [(row.name, row.weight.role, row.weight.tied) for row in found] == [("wte.weight", "embedding", True)]
    assert found.warnings[0].startswith("M002 wte.weight")
    assert len(listed(param_groups(Tied(), found))) == 1


def test_one_layer_under_two_names_is_not_tied():
    model = Net()
    model.alias = model.head
    assert not plan(model).warnings
    assert len(plan(model)) == len(list(model.parameters()))


def test_other_warnings():
    kron = StructuredLinear(16, 16, "kron")
    assert [w[:4] for w in plan(kron).warnings] == ["M007", "M007"]
    assert not plan(kron, Rule(share_exponent=0.5)).warnings
    assert not plan(kron, "muon").warnings
    assert [w.partition(":")[0] for w in plan(Net(), "adafactor").warnings] == [
        "M009 block.down.factors.1 starts at zero, and an update of adafactor is relative to the parameter's size"
    ]
    assert [w[:4] for w in plan(Net(1024), Rule(decay="coupled")).warnings] == ["M012"] * 4
    deep = StructuredLinear(256, 256, "btt(num_cores=4)")
    assert [w[:4] for w in plan(deep).warnings] == ["M010"]
    assert not plan(deep, Rule(init="orthogonal")).warnings


def test_zeros_are_given_by_globs():
    model = nn.ModuleDict({"down": StructuredLinear(16, 16, "btt"), "head": nn.Linear(16, 3), "mid": nn.Linear(16, 16)})
    found = plan(model, zero=("do*", "head"))
    assert [row.name for row in found if row.init == "zero"] == ["down.factors.1", "head.weight"]
    assert plan(model, zero="*.weight")["mid.weight"].init_std == 0
    assert all(f.abs().sum() for f in model["down"].factors)
    init_(model, found, seed())
    assert [bool(f.any()) for f in model["down"].factors] == [True, False]
    assert not model["head"].weight.any()
    assert model["mid"].weight.any()
    for pattern in ("down.factors.0", "nothing", "head.bias"):
        with pytest.raises(so.StructureError, match=f"zero: '{pattern}' fits no"):
            plan(model, zero=pattern)


def test_lazy_layers_have_no_plan_yet():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(so.StructureError, match=r"0\.weight has no size before the first forward"):
        plan(model)


# --------------------------------------------------------------------------------------------------------------- bases


def test_bases():
    model, dense = Net(64), Net(64, "dense")
    assert {row.lr_scale for row in plan(model, base=Net(64))} == {1.0}
    assert {row.lr_scale for row in plan(dense, base=dense)} == {1.0}
    replaced = plan(model)
    assert [row.lr_scale for row in plan(model, base=dense)] == [row.lr_scale for row in replaced]
    up = "block.up.factors.0"
    assert replaced[up].lr_scale == 4
    assert plan(model, base=16)[up].lr_scale == 1
    assert plan(model, base="absolute")[up].lr_scale == 1 / 16
    assert plan(model, base=Net(16))[up].lr_scale == 0.5
    for wrong in (1.5, "relative", [1]):
        with pytest.raises(so.StructureError, match="base is None"):
            plan(model, base=wrong)
    with pytest.raises(so.StructureError, match="no layer"):
        plan(model, base=nn.Sequential(nn.Linear(2, 2)))


def test_as_data():
    found = plan(Net(64, "kron"), Rule("sgd", block_count=True, init="orthogonal"), base=16)
    assert MupPlan.from_json(found.to_json()) == found
    wider = plan(Net(256, "kron"), found.rule, base=16)
    assert wider.fingerprint != found.fingerprint
    assert not found.diff(MupPlan.from_json(found.to_json()))
    assert any(line.startswith("block.up.factors.0: init_std") for line in found.diff(wider))
    table = str(found).splitlines()
    assert "fan-in 16" in table[0]
    assert len(table) == 2 + len(found) + len(found.warnings)
    assert "hidden parameter of block.down" in found.explain("block.down.factors.1")
    with pytest.raises(KeyError, match="no parameter 'x'"):
        found.explain("x")


# ---------------------------------------------------------------------------------------------------------------- init


@pytest.mark.parametrize("how", ["paper", "kaiming", "orthogonal"])
def test_init_has_the_std_of_the_plan(how):
    model = Net(256, "btt(rank=4)")
    found = plan(model, Rule(init=how), zero=("head",))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    init_(model, found, seed())
    for row, (name, parameter) in zip(found, model.named_parameters(), strict=True):
        assert row.name == name
        value = parameter.detach()
        if row.init == "constant":
            assert bool((value == 7).all()), "vectors and scalars stay as they are"
        elif row.init == "zero":
            assert not value.any()
        else:
            assert float(value.square().mean().sqrt()) == pytest.approx(row.init_std, rel=0.05)
    assert found["head.weight"].init == found["block.down.factors.1"].init == "zero"
    assert found["embedding.weight"].init_std == 1


@pytest.mark.parametrize(
    "spec", ["dense", "btt(rank=2)", "tt(rank=2)", "kron", "low_rank(rank=3)", "monarch(blocks=4)"]
)
@pytest.mark.parametrize("sizes", [(16, 64), (64, 16)])
def test_orthogonal_blocks(spec, sizes):
    layer = StructuredLinear(*sizes, spec)
    init_(layer, plan(layer, Rule(init="orthogonal")), seed())
    for factor, value in zip(layer.plan.factors, layer.factors, strict=True):
        values = torch.linalg.svdvals(value.detach())
        torch.testing.assert_close(values, torch.full_like(values, math.sqrt(factor.fan_out / factor.fan_in)))


def test_orthogonal_kernels():
    model = nn.ModuleList([nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose1d(4, 6, 5, groups=2), nn.Linear(8, 4)])
    found = plan(model, Rule(init="orthogonal"))
    init_(model, found, seed())
    for row in found:
        if row.weight.is_matrix:
            factor, value = row.weight.factor, dict(model.named_parameters())[row.name].detach()
            blocks = as_blocks(value, factor)
            torch.testing.assert_close(from_blocks(blocks, value.shape, factor), value)
            values = torch.linalg.svdvals(blocks)
            torch.testing.assert_close(values, torch.full_like(values, math.sqrt(factor.fan_out / factor.fan_in)))
    with torch.no_grad():  # a block maps a group of channels to another, and nothing else
        kernel = as_blocks(model[1].weight, found["1.weight"].weight.factor)
        x = torch.zeros(1, 4, 1)
        x[0, 2:] = torch.tensor([[1.0], [-2.0]])
        y = model[1](x) - model[1].bias[:, None]
        assert not y[0, :3].any()
        expected = torch.einsum("oik,i->ok", kernel[1].reshape(3, 2, 5), x[0, 2:, 0])
        torch.testing.assert_close(y[0, 3:], expected)


def test_orthogonal_init_is_uniform_and_of_factors_without_blocks_gaussian():
    """The mean over many draws vanishes, which that of a plain QR does not."""
    layer = StructuredLinear(8192, 8192, "block_diag(blocks=4096)", bias=False)
    init_(layer, plan(layer, Rule(init="orthogonal")), seed())
    assert float(layer.factors[0].detach().mean(0).abs().max()) < 0.05
    toeplitz = StructuredLinear(512, 512, "toeplitz", bias=False)
    init_(toeplitz, plan(toeplitz, Rule(init="orthogonal")), seed())
    assert float(toeplitz.factors[0].detach().std()) == pytest.approx(init_stds(toeplitz.plan)[0], rel=0.1)


@pytest.mark.parametrize(
    "spec", ["low_rank(rank=3)", "btt(rank=2)", "dense", "blast(rank=3, blocks=2)", "monarch(blocks=5)"]
)
@pytest.mark.parametrize("zero", [False, True])
def test_plan_and_layer_agree_on_the_init(spec, zero):
    """In the std, which for low rank before zeros is the paper's exception, and in every number."""
    layer = StructuredLinear(16, 32, spec, zero_init=zero, bias=False, generator=seed(5))
    found = plan(layer)
    assert [row.init_std for row in found] == pytest.approx(list(init_stds(layer.plan, zero_last=zero)))
    twin = StructuredLinear(16, 32, spec, zero_init=zero, bias=False)
    init_(twin, found, seed(5))
    for ours, theirs in zip(twin.factors, layer.factors, strict=True):
        assert torch.equal(ours, theirs)


def test_the_exception_for_low_rank_also_for_globs_and_orthogonal():
    model = nn.ModuleDict({"down": StructuredLinear(64, 64, "low_rank(rank=4)")})
    assert plan(model)["down.factors.0"].init_std == pytest.approx(2 / 64)
    found = plan(model, Rule(init="orthogonal"), zero="down")
    assert found["down.factors.0"].init_std == pytest.approx(1 / 8)
    init_(model, found, seed())
    assert torch.linalg.svdvals(model["down"].factors[0].detach()[0]) == pytest.approx(1.0)


@pytest.mark.parametrize("form", [form for form in FORMS if "meta" not in form])
def test_init_gives_the_same_numbers_in_every_form(form, process_group):
    rule = Rule(init="orthogonal")
    plain, model = Net(), FORMS[form]()
    init_(plain, plan(plain, rule), seed(1))
    init_(model, plan(model, rule), seed(1))
    for row, ours, theirs in zip(plan(plain, rule), plain.parameters(), model.parameters(), strict=True):
        whole = theirs.full_tensor() if hasattr(theirs, "full_tensor") else theirs
        if row.init != "constant":
            assert torch.equal(whole.detach(), ours.detach().to(whole.dtype)), row.name


def test_init_of_other_dtypes_and_padding():
    model = nn.Embedding(5, 4, padding_idx=2, dtype=torch.float64)
    init_(model, plan(model), seed())
    assert [bool(row.any()) for row in model.weight] == [True, True, False, True, True]
    half = StructuredLinear(16, 16, "btt", dtype=torch.bfloat16)
    init_(half, plan(half, Rule(init="orthogonal")), seed())
    assert half.factors[0].dtype == torch.bfloat16
    torch.manual_seed(0)
    init_(half, plan(half))
    first = half.factors[0].clone()
    init_(half, plan(half))
    assert not torch.equal(first, half.factors[0]), "without a generator the global one is used, and moves on"


def test_init_needs_memory(process_group):
    for model in (on_meta(), sharded(on_meta())):
        with pytest.raises(so.StructureError, match=r"embedding.weight is on the meta device.*to_empty"):
            init_(model, plan(model))
    model = sharded(on_meta()).to_empty(device="cpu")
    init_(model, plan(model), seed())
    assert model.head.weight.full_tensor().isfinite().all()


# --------------------------------------------------------------------------------------------------------------- Muon


def after(optimizer, parameter, gradients):
    for gradient in gradients:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(8, 8), (32, 8), (8, 32)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_on_matrices_is_that_of_torch(shape, nesterov):
    start = torch.randn(shape, generator=seed())
    gradients = [torch.randn(shape, generator=seed(k)) for k in range(4)]
    kwargs = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9, "nesterov": nesterov}
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    mine = after(Muon([ours], **kwargs), ours, gradients)
    torch.testing.assert_close(mine, after(torch.optim.Muon([theirs], **kwargs), theirs, gradients), atol=4e-3, rtol=0)


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 32, 8), (5, 4, 24)])
def test_muon_updates_every_block_as_if_it_were_alone(shape):
    gradients = [
        torch.randn(shape, generator=seed(k)) * torch.logspace(0, 3, shape[0])[:, None, None] for k in range(3)
    ]
    together = nn.Parameter(torch.zeros(shape))
    together = after(Muon([together], lr=1.0), together, gradients)
    for k in range(shape[0]):
        alone = nn.Parameter(torch.zeros(shape[1:]))
        alone = after(torch.optim.Muon([alone], lr=1.0, weight_decay=0.0), alone, [g[k] for g in gradients])
        torch.testing.assert_close(together[k], alone, atol=3e-2, rtol=0)


def test_muon_makes_blocks_orthogonal():
    blocks = nn.Parameter(torch.zeros(6, 24, 8))
    after(Muon([blocks], lr=1.0), blocks, [torch.randn(6, 24, 8, generator=seed())])
    values = torch.linalg.svdvals(blocks.detach()) / math.sqrt(3)
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.25
    still = nn.Parameter(torch.ones(2, 3, 3))
    assert torch.equal(after(Muon([still]), still, [torch.zeros(2, 3, 3)]), torch.ones(2, 3, 3))


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(4, 6, 5), nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2)]
)
def test_muon_of_convolutions_takes_the_kernel_as_matrices(layer):
    found = plan(layer, "muon")
    groups, rest = split(layer, found, lr=1.0)
    factor = found["weight"].weight.factor
    assert len(listed(groups)) == len(listed(rest)) == 1
    start = layer.weight.detach().clone()
    after(Muon(groups), layer.weight, [torch.randn(start.shape, generator=seed())])
    change = as_blocks(layer.weight.detach() - start, factor)
    values = torch.linalg.svdvals(change) / math.sqrt(max(1, factor.fan_out / factor.fan_in))
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.25


def test_muon_says_what_it_does_not_take():
    for parameter, text in (
        (torch.zeros(3), "real matrices"),
        (torch.zeros(3, 3, dtype=torch.complex64), "real matrices"),
        (torch.zeros(2, 2, 3, 3), "layout='kernel'"),
    ):
        with pytest.raises(so.StructureError, match=text):
            Muon([nn.Parameter(parameter)])
    with pytest.raises(so.StructureError, match="layout is"):
        Muon([{"params": [nn.Parameter(torch.zeros(3, 3))], "layout": "conv"}])
    with pytest.raises(so.StructureError, match="lr must be"):
        Muon([nn.Parameter(torch.zeros(3, 3))], lr=-1.0)
    table = nn.Embedding(4, 4, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(so.StructureError, match="sparse"):
        Muon(table.parameters()).step()


def test_muon_goes_on_from_its_state():
    gradients = [torch.randn(2, 4, 4, generator=seed(k)) for k in range(4)]
    whole = nn.Parameter(torch.zeros(2, 4, 4))
    after(Muon([whole], lr=0.1), whole, gradients)
    part = nn.Parameter(torch.zeros(2, 4, 4))
    first = Muon([part], lr=0.1)
    after(first, part, gradients[:2])
    second = Muon([part], lr=9.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(after(second, part, gradients[2:]), whole.detach())
    assert second.step(lambda: 3.0) == 3.0


@pytest.mark.parametrize("form", ["plain", "compiled", "fsdp2"])
def test_muon_and_adam_train_a_model(form, process_group):
    model = FORMS[form]()
    found = plan(model, "muon")
    init_(model, found, seed())
    tokens = torch.arange(11)
    muon, adam = split(model, found, lr=0.05, adam_lr=0.02, weight_decay=0.01)
    optimizers = [Muon(muon), torch.optim.AdamW(adam)]
    for optimizer in optimizers:
        guard(optimizer)
    first = loss_of(model, tokens).item()
    for _ in range(25):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, tokens).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert loss_of(model, tokens).item() < 0.2 * first


# --------------------------------------------------------------------------------------------------------------- probe


class Sign(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.direction(p, p.grad), alpha=group["lr"])

    def direction(self, p, g):
        return g.sign()


def polar(g):
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    return u * (s > 1e-9 * s.amax(-1, keepdim=True)).unsqueeze(-2) @ v


class Orthogonal(Sign):
    """Muon without a shape factor, on batches."""

    def direction(self, p, g):
        return polar(g)


class Spectral(Sign):
    def direction(self, p, g):
        return polar(g) * math.sqrt(p.shape[-2] / p.shape[-1])


class Flat(Sign):
    """Reads blocks as rows of one matrix, as some do."""

    def direction(self, p, g):
        return polar(g.reshape(len(g), -1)).reshape(g.shape)


class WrongAxes(Sign):
    """Orthogonalises blocks, with the shape factor of the first two axes."""

    def direction(self, p, g):
        return polar(g) * math.sqrt(max(1, p.shape[0] / p.shape[1]))


class Lamb(Sign):
    def direction(self, p, g):
        return g.sign() * p.norm() / g.sign().norm().clamp(min=1e-9)


class Scaled(Sign):
    """Follows no rule: its step grows with the fan-in."""

    def direction(self, p, g):
        return g.sign() * p.shape[-1]


@pytest.mark.parametrize(
    ("optimizer", "kwargs", "family", "blocks"),
    [
        (torch.optim.SGD, {}, "sgd", "batched"),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, "sgd", "batched"),
        (torch.optim.ASGD, {}, "sgd", "batched"),
        (torch.optim.Adam, {"lr": 0.1}, "adam", "batched"),
        (torch.optim.AdamW, {"weight_decay": 0.5}, "adam", "batched"),
        (torch.optim.NAdam, {}, "adam", "batched"),
        (torch.optim.RAdam, {}, "adam", "batched"),
        (torch.optim.RMSprop, {}, "adam", "batched"),
        (torch.optim.Adagrad, {}, "adam", "batched"),
        (torch.optim.Adamax, {}, "adam", "batched"),
        (torch.optim.Rprop, {}, "adam", "batched"),
        (torch.optim.Adafactor, {}, "adafactor", "batched"),
        (torch.optim.Muon, {}, "muon", "refused"),
        (torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw"}, "muon_match_rms", "refused"),
        (Muon, {"weight_decay": 0.1}, "muon", "batched"),
        (Sign, {}, "adam", "batched"),
        (Orthogonal, {}, "muon_unscaled", "batched"),
        (Spectral, {}, "muon_spectral", "batched"),
        (Flat, {}, "muon_unscaled", "flattened"),
        (WrongAxes, {}, "muon", "flattened"),
        (Lamb, {}, "adafactor", "batched"),
    ],
)
def test_probe_tells_the_family(optimizer, kwargs, family, blocks):
    found = probe(optimizer, **kwargs)
    assert (found.family, found.blocks) == (family, blocks), str(found)
    assert Rule(found.family)
    assert "gradient^" in str(found)


def test_the_probe_agrees_with_the_names():
    from structops.mup import family

    for name in (
        "SGD",
        "Adam",
        "AdamW",
        "NAdam",
        "RAdam",
        "Adamax",
        "RMSprop",
        "Adagrad",
        "Rprop",
        "Adafactor",
        "Muon",
    ):
        assert probe(getattr(torch.optim, name)).family == family(name).name


def test_the_probe_takes_functions_and_leaves_the_random_state_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert probe(lambda parameters: torch.optim.SGD(parameters, lr=0.1)).family == "sgd"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("optimizer", "kwargs", "text"),
    [
        (torch.optim.Adadelta, {}, r"no family fits Adadelta(.|\n)*gradient\^0\."),
        (Scaled, {}, "no family fits Scaled"),
        (torch.optim.Adam, {"eps": 1e-2}, "no family fits Adam"),
        (torch.optim.LBFGS, {}, "LBFGS cannot be probed"),
        (torch.optim.SparseAdam, {}, "SparseAdam cannot be probed"),
        (torch.optim.SGD, {"lr": 0.0}, "makes no update"),
        (torch.optim.SGD, {"speed": 1}, "cannot be probed.*speed"),
    ],
)
def test_the_probe_says_why_nothing_fits(optimizer, kwargs, text):
    with pytest.raises(so.StructureError, match=text):
        probe(optimizer, **kwargs)


def test_an_optimizer_that_does_not_fit_the_plan_is_named() -> None:
    layer = StructuredLinear(64, 64, "btt")
    assert lint(plan(layer), torch.optim.AdamW) == ()
    assert lint(plan(layer, "muon"), Muon) == ()
    (wrong,) = lint(plan(layer), torch.optim.SGD)
    assert wrong.startswith("M016 the plan is for adam, and SGD behaves like sgd")
    (refused,) = lint(plan(layer, "muon"), torch.optim.Muon)
    assert refused.startswith("M008 Muon refuses factors of several blocks (factors.0, factors.1)")
    assert "structops.torch.Muon" in refused
    assert lint(plan(StructuredLinear(64, 64, "dense"), "muon"), torch.optim.Muon) == ()
