"""`calibrate`: the moments are those of the inputs, whatever the batch, and the model is left as it was."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="needs PyTorch")

from torch import nn  # noqa: E402

import structops as so  # noqa: E402
from structops.projection import Moments  # noqa: E402
from structops.torch import Calibration, calibrate, compress, densify, structurize, survey  # noqa: E402

pytestmark = pytest.mark.torch


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.Dropout(0.5), nn.GELU(), nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 3)
    return nn.Sequential(*layers).to(dtype)


def reference(rows, weights=None):
    """Count, mean and second moments from all vectors at once, in double precision."""
    rows = rows.reshape(-1, rows.shape[-1]).double()
    w = torch.ones(len(rows)).double() if weights is None else weights.reshape(-1).double()
    return w.sum(), w @ rows / w.sum(), rows.T @ (w[:, None] * rows) / w.sum()


def check(moments, rows, weights=None):
    assert isinstance(moments, Moments)
    count, mean, second = reference(rows, weights)
    torch.testing.assert_close(moments.count.double(), count)
    torch.testing.assert_close(moments.mean.double(), mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(moments.covariance.double(), second, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------ what is counted


class Named(nn.Module):
    """Takes its input by name."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, pixels, shift=0.0):
        return self.inner(pixels + shift)


KINDS = {
    "tensor": (mlp, lambda x: x, None),
    "with labels": (mlp, lambda x: (x, torch.zeros(len(x))), None),
    "list of one": (mlp, lambda x: [x], None),
    "mapping": (Named, lambda x: {"pixels": x}, None),
    "mapping with labels": (Named, lambda x: ({"pixels": x}, torch.zeros(len(x))), None),
    "call": (Named, lambda x: ((x - 1,), {"shift": torch.tensor(1.0)}), None),
    "own": (mlp, lambda x: "abc" if x is None else {"x": [x]}, lambda model, batch: model(batch["x"][0])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_any_kind(kind):
    build, pack, forward = KINDS[kind]
    model, x = build(), torch.randn(10, 2, 6)
    batches = (pack(part) for part in x.split(4))  # an iterator, the last batch smaller
    found = calibrate(model, batches, forward=forward)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    assert list(found) == [name for name, _ in layers]
    net = getattr(model, "inner", model).eval()
    with torch.no_grad():
        for (name, _), inputs in zip(layers, [x, net[:3](x), net[:5](x)], strict=True):
            check(found[name], inputs)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("a text", "got str; give forward="),
        ([], "got list; give forward="),
        (3, "got int; give forward="),
    ],
)
def test_a_batch_of_no_kind(batch, message):
    with pytest.raises(so.StructureError, match=message):
        calibrate(mlp(), [batch])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (torch.ones(2, 6), r"got a Tensor; give \[batch\]"),
        ({"pixels": torch.ones(2, 6)}, r"got a dict; give \[batch\]"),
        (7, "got a int"),
        ([], "there is no batch"),
        (iter(()), "there is no batch"),
    ],
)
def test_batches_that_are_none(batches, message):
    with pytest.raises(so.StructureError, match=message):
        calibrate(mlp(), batches)


def test_it_stops_where_it_should():
    taken = []

    def endless():
        while True:
            taken.append(0)
            yield torch.ones(2, 6)

    assert float(calibrate(mlp(), endless(), max_batches=3)["0"].count) == 6
    assert len(taken) == 3


def test_sixteen_bits_are_summed_in_float32():
    x = (torch.randn(4000, 6) + 100).bfloat16()
    moments = calibrate(mlp(torch.bfloat16), x.split(1000))["0"]
    assert moments.mean.dtype == moments.centred.dtype == torch.float32
    exact = torch.cov(x.double().T, correction=0)
    torch.testing.assert_close(moments.centred.double(), exact, rtol=1e-3, atol=1e-3)


def test_weights_of_the_user():
    x, share = torch.randn(3, 5, 6), torch.rand(3, 5)
    asked = []

    def weights(name, inputs, batch):
        asked.append(name)
        assert torch.equal(batch[0], x)
        return share if name == "0" else None

    model = mlp().eval()
    found = calibrate(model, [(x, share)], weights=weights)
    assert asked == ["0", "3", "5"]
    check(found["0"], x, share)
    check(found["3"], model[:3](x).detach())


class Tokens(nn.Module):
    """Three-dimensional, flattened, pooled, and other inputs of linear layers."""

    def __init__(self):
        super().__init__()
        self.whole, self.flat, self.pooled, self.some = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x, attention_mask):
        self.whole(x)
        self.flat(x.flatten(0, 1))
        self.some(x.flatten(0, 1)[:7])
        return self.pooled(x[:, 0])


def test_padding_is_left_out_where_shapes_fit():
    x, mask = torch.randn(3, 4, 4), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    x[1, 2] = torch.inf  # what padding holds does not matter
    model = Tokens()
    for batch in (
        {"x": x, "attention_mask": mask},
        ((x,), {"attention_mask": mask.bool()}),
        ({"x": x} | {"attention_mask": mask}, 0),
    ):
        with pytest.raises(so.EntryError, match="inputs of some are not finite"):  # of other shapes: counted whole
            calibrate(model, [batch])
        found = calibrate(model, [batch], select=["whole", "flat", "pooled"])
        check(found["whole"], x[mask.bool()])
        check(found["flat"], x[mask.bool()])
        check(found["pooled"], x[:, 0])


def test_a_mask_of_another_form_is_none():
    x = torch.randn(3, 4, 4)
    found = calibrate(Tokens(), [{"x": x, "attention_mask": torch.zeros(3, 1, 4, 4)}])
    check(found["whole"], x)


# -------------------------------------------------------------------------------------------- layers that share inputs


class Wires(nn.Module):
    """Linear layers that are given tensors as a plan says; a tensor may be changed in place between."""

    def __init__(self, count=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 2) for _ in range(count))

    def forward(self, plan, tensors, inputs=None):
        for layer, k, change in plan:
            if change:
                tensors[k] += 1
            if inputs is not None:
                inputs[layer].append(tensors[k].clone())
            self.layers[layer](tensors[k])


plans = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.booleans()), max_size=7)


@given(batches=st.lists(plans, min_size=1, max_size=4), inference=st.booleans())
@pytest.mark.filterwarnings("ignore:calibrate. no vector came")
@settings(max_examples=100)
def test_sharing_changes_no_number(batches, inference):
    """Whatever layers get in whatever order: the moments are those of a layer that is alone."""
    model, inputs = Wires(), [[], [], []]
    torch.manual_seed(0)

    def forward(model, plan):
        with torch.inference_mode(inference):
            model(plan, [torch.randn(4, 3), torch.randn(4, 3)], inputs)

    if not any(batches):
        with pytest.raises(so.StructureError, match=r"no vector came to layers\.0, layers\.1, layers\.2"):
            calibrate(model, batches, forward=forward)
        return
    found = calibrate(model, batches, forward=forward)
    assert {int(name[-1]) for name in found} == {k for k in range(3) if inputs[k]}
    for name, moments in found.items():
        check(moments, torch.cat(inputs[int(name[-1])]))


EACH = [(0, 0, False), (1, 0, False), (2, 0, False)]


@pytest.mark.parametrize(
    ("second", "groups"),
    [
        (EACH, [[0, 1, 2]]),
        ([], [[0, 1, 2]]),
        ([(0, 0, False), (1, 0, False), (2, 1, False)], [[0, 1], [2]]),
        ([(0, 0, False), (1, 0, False)], [[0, 1], [2]]),  # called less often
        ([(0, 0, False), (1, 0, True), (2, 0, False)], [[0], [1, 2]]),  # changed in place after the first layer
        ([*EACH, (0, 1, False), (1, 1, False), (2, 1, False)], [[0, 1, 2]]),
        ([(1, 0, False), (2, 0, False), (0, 0, False)], [[0, 1, 2]]),
    ],
)
def test_what_is_shared(second, groups):
    found = calibrate(Wires(), [EACH, second], forward=lambda model, plan: model(plan, list(torch.randn(2, 5, 3))))
    shared = [sorted(int(name[-1]) for name in group) for group in found.groups()]
    assert sorted(map(sorted, shared)) in (groups, [[0, 1, 2]] if len(groups) == 1 else [[0], [1], [2]])
    assert len(shared) >= len(groups)


def test_queries_keys_and_values_of_llama_share():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 50}
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, bos_token_id=1, eos_token_id=2))
    tokens = torch.randint(3, 50, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    found = calibrate(model, [{"input_ids": tokens, "attention_mask": mask}] * 2)
    kinds = [[name.rpartition(".")[2] for name in group] for group in found.groups()]
    assert kinds == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert list(found) == [row.name for row in structurize(model, "btt", dry_run=True).converted]
    alone = calibrate(model, [{"input_ids": tokens[:1]}, {"input_ids": tokens[1:, :3]}] * 2)  # without padding
    for name, moments in found.items():
        assert float(moments.count) == 18
        torch.testing.assert_close(moments.covariance, alone[name].covariance, rtol=1e-4, atol=1e-6)
    small = structurize(model, "low_rank(rank=2)", calibration=found)
    assert survey(small).converted[0].optimality == "exact"


# -------------------------------------------------------------------------------------------------- what is left alone


def test_the_model_is_left_as_it_was():
    model = mlp()
    model.train()
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    x = torch.randn(50, 6)
    calibrate(model, [x])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    check(calibrate(model, [x])["3"], model.eval()[:3](x).detach())  # without dropout


def test_also_after_an_error():
    model = mlp().train()
    with pytest.raises(so.ShapeError, match=r"expected x of shape \(..., 6\)"):
        calibrate(model, [torch.ones(2, 6), torch.ones(2, 7)])
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_single_layer_and_hooks_of_others():
    layer, x = nn.Linear(5, 2), torch.randn(7, 5)
    layer.register_forward_pre_hook(lambda layer, args: (2 * args[0],))
    found = calibrate(layer, [x])
    check(found[""], 2 * x)  # what the layer is given in the end
    assert "(the model)" in found.table()
    structured = structurize(layer, "low_rank(rank=1)", calibration=found)
    assert structured.projection.optimality == "exact"


def test_a_compiled_model():
    model, x = mlp(), torch.randn(9, 6)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    check(calibrate(compiled, [x])["0"], x)


# ----------------------------------------------------------------------------------------------------------- selection


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts, self.lm_head = (
            nn.Linear(4, 2),
            nn.ModuleList([nn.Linear(4, 4) for _ in range(2)]),
            nn.Linear(4, 4),
        )

    def forward(self, x):
        chosen = (x[..., 0] > 0).long()
        y = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            y[chosen == k] = expert(x[chosen == k])
        self.router(x)
        return self.lm_head(y)


def test_selection_is_that_of_structurize():
    model, x = Experts(), torch.randn(20, 4)
    assert list(calibrate(model, [x])) == ["experts.0", "experts.1"]
    rules = {"experts.*": "btt", "router": "low_rank(rank=1)", "experts.0": False}
    assert list(calibrate(model, [x], rules)) == ["experts.1", "router"]
    assert structurize(model, rules, calibration=calibrate(model, [x], rules)).lm_head is not None
    with pytest.raises(so.StructureError, match="'attn' fits no linear layer"):
        calibrate(model, [x], "attn")
    with pytest.raises(so.StructureError, match="no layer is selected"):
        calibrate(model, [x], lambda name, layer: False)


def test_layers_that_nothing_reaches():
    model, x = Experts(), torch.randn(20, 4)
    x[:, 0] = x[:, 0].abs() + 1e-3
    with pytest.warns(so.StructureWarning, match=r"no vector came to experts\.0; left out"):
        found = calibrate(model, [x])
    check(found["experts.1"], x)
    with pytest.raises(so.StructureError, match=r"calibration: no moments for experts\.0"):
        structurize(model, "btt", calibration=found)
    with pytest.raises(so.StructureError, match="does the model's forward call them"):
        calibrate(model, [x], "experts.0")


def test_inputs_that_are_not_finite():
    with pytest.raises(so.EntryError, match="inputs of 0, 3, 5 are not finite"):
        calibrate(mlp(), [torch.full((2, 6), torch.nan)])


def test_no_numbers():
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    with pytest.raises(so.StructureError, match="meta device"):
        calibrate(model, [torch.ones(2, 3, device="meta")])


# ------------------------------------------------------------------------------------------------------ the result


def test_ranks_add_up():
    """Two halves give what the whole does, and what is shared stays shared."""
    whole, model = torch.randn(20, 4) + 3, Experts()
    whole[:, 0] = torch.tensor([1.0, -1.0]).repeat(10)
    whole[:10, 0] = 1
    with pytest.warns(so.StructureWarning, match=r"experts\.0"):
        first = calibrate(model, [whole[:10]])
    both, whole = first + calibrate(model, [whole[10:]]), calibrate(model, [whole])
    assert isinstance(both, Calibration)
    assert set(both) == set(whole)
    for name, moments in whole.items():
        torch.testing.assert_close(both[name].covariance, moments.covariance)
        assert both[name].count == moments.count
    wires = calibrate(Wires(), [EACH], forward=lambda model, plan: model(plan, list(torch.randn(2, 5, 3))))
    assert (wires + wires).groups() == wires.groups() == [["layers.0", "layers.1", "layers.2"]]
    assert float((wires + wires)["layers.2"].count) == 10
    with pytest.raises(TypeError):
        _ = wires + 1


def test_there_and_back(tmp_path):
    found = calibrate(Wires(), [EACH], forward=lambda model, plan: model(plan, list(torch.randn(2, 5, 3))))
    file = tmp_path / "moments.safetensors"
    found.save(file)
    assert os.listdir(tmp_path) == [file.name]
    back = Calibration.load(file)
    assert back.groups() == found.groups()
    assert list(back) == list(found)
    for key, array in found["layers.0"].arrays().items():
        assert torch.equal(back["layers.0"].arrays()[key], array)
        assert back["layers.0"].arrays()[key].dtype == array.dtype
    assert file.stat().st_size < 3 * found.nbytes + 1000


def test_complex_moments_that_do_not_lie_row_by_row(tmp_path):
    spread = torch.tensor([[2.0, 1j], [-1j, 3.0]])
    found = Calibration({"a": Moments(torch.tensor(4.0), torch.tensor([1j, 0.0]), spread.T)})
    found.save(tmp_path / "file")
    back = Calibration.load(tmp_path / "file", "cpu")["a"]
    assert torch.equal(back.centred, spread.T / 4)
    assert torch.equal(back.mean, found["a"].mean)
    # variances 3/4 and 2/4 on the diagonal; along the axes (5 +- sqrt 5) / 8; the mean has 1 of 1 + 5/4
    assert found.table().splitlines()[1].split() == ["a", "2", "4", "1.7", "72.4%", "44.4%"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    found = calibrate(mlp(), [torch.randn(5, 6)])
    file = tmp_path / "moments.safetensors"
    found.save(file)
    old = file.read_bytes()

    def fail(*args):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        calibrate(mlp(), [torch.randn(5, 6)]).save(file)
    assert file.read_bytes() == old
    assert os.listdir(tmp_path) == [file.name]


def test_a_file_of_something_else(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(so.EntryError, match="is no calibration"):
        Calibration.load(tmp_path / "model.safetensors")


def test_names_with_dots_are_stored_in_order(tmp_path):
    model = nn.ModuleDict({"b": nn.ModuleDict({"x": nn.Linear(2, 2)}), "a": nn.Linear(2, 2)})
    found = calibrate(model, [torch.randn(3, 2)], forward=lambda model, x: model["a"](model["b"]["x"](x)))
    found.save(tmp_path / "file")
    assert list(Calibration.load(tmp_path / "file")) == ["b.x", "a"]
    with open(tmp_path / "file", "rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    assert set(header["__metadata__"]) == {"format", "structops.calibration"}


def test_the_table():
    """Effective rank, largest variance and mean of a distribution that is known."""
    x = torch.cat([torch.eye(4), -torch.eye(4)]) * torch.tensor([3.0, 1.0, 1.0, 1.0]) + torch.tensor([2.0, 0, 0, 0])
    found = calibrate(nn.Linear(4, 1), [x])
    head, line = found.table().splitlines()
    assert head.split() == ["layer", "inputs", "vectors", "effective", "rank", "top", "mean"]
    # variances 9/4, 1/4, 1/4, 1/4: (12/4)^2 / (84/16); the mean has 4 of 4 + 3
    assert line.split() == ["(the", "model)", "4", "8", "1.7", "75.0%", "57.1%"]
    assert repr(found) == "Calibration(1 layers, 1 different inputs, 88 bytes)"
    constant = calibrate(nn.Linear(4, 1), [torch.ones(3, 4)])
    assert constant.table().splitlines()[1].split()[-3:] == ["0.0", "0.0%", "100.0%"]
    assert repr(calibrate(nn.Linear(64, 1), [torch.ones(3, 64)])).endswith("16.3 KiB)")


# ------------------------------------------------------------------------------------------------------ what it is for


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spec", ["low_rank(rank=3)", "btt(rank=1)", "monarch(blocks=4)", "block_diag(blocks=4)"])
def test_outputs_are_nearer_than_without(spec, bias):
    torch.manual_seed(0)
    layer = nn.Linear(16, 16, bias)
    x = torch.randn(500, 16) @ torch.randn(16, 16) * torch.linspace(0.1, 3, 16) + 5 * torch.randn(16)
    plain, aware = structurize(layer, spec), structurize(layer, spec, calibration=calibrate(layer, [x]))
    with torch.no_grad():
        errors = [(new(x) - layer(x)).square().mean() for new in (plain, aware)]
        assert errors[1] < 0.8 * errors[0]
        if bias:  # the mean of the output is kept
            torch.testing.assert_close(aware(x).mean(0), layer(x).mean(0), rtol=1e-3, atol=1e-3)


def test_low_rank_is_the_best_there_is():
    """With a bias, the nearest outputs are the leading principal components of the outputs about their mean."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 10).double()
    x = torch.randn(400, 12).double() @ torch.randn(12, 12).double() + 7
    aware = structurize(layer, "low_rank(rank=3)", calibration=calibrate(layer, [x]))
    with torch.no_grad():
        y = layer(x)
        left = (aware(x) - y).square().sum()
        tail = torch.linalg.svdvals(y - y.mean(0))[3:].square().sum()
    torch.testing.assert_close(left, tail, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------- one after another


def correlated(rows, width):
    torch.manual_seed(1)
    return torch.randn(rows, width) @ torch.randn(width, width) * torch.linspace(0.1, 2, width) + torch.randn(width)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_makes_up_for_those_before_it(bias):
    """The second layer of a linear network is regressed on what the first one left: computed here by lstsq."""
    x = correlated(300, 10).double()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8, bias), nn.Linear(8, 6, bias)).double()
    made = compress(model, "low_rank(rank=3)", x.split(100), damping=0)
    first = structurize(model, "low_rank(rank=3)", calibration=calibrate(model, [x]))
    assert [type(layer).__name__ for layer in made] == ["StructuredLinear"] * 2
    torch.testing.assert_close(made[0](x), first[0](x))  # nothing before it changed
    with torch.no_grad():
        inputs, wanted = made[0](x), model(x)
        if bias:
            inputs, wanted = inputs - inputs.mean(0), wanted - wanted.mean(0)
        best = inputs @ torch.linalg.lstsq(inputs, wanted, driver="gelsd").solution
        u, s, vh = torch.linalg.svd(best, full_matrices=False)
        nearest = u[:, :3] @ torch.diag(s[:3]) @ vh[:3]
        found = made(x) - (model(x).mean(0) if bias else 0)
    torch.testing.assert_close(found, nearest, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", ["low_rank(rank=2)", "btt(rank=1)", "monarch(blocks=4)"])
def test_one_after_another_is_nearer(spec):
    torch.manual_seed(0)
    widths = [16, 16, 16, 16]
    model = nn.Sequential(*[part for n in widths for part in (nn.Linear(n, 16), nn.GELU())][:-1])
    x = correlated(400, 16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made = compress(model, spec, x.split(100))
    at_once = structurize(model, spec, calibration=calibrate(model, [x]))
    with torch.no_grad():
        errors = [float((new(x) - model(x)).square().mean()) for new in (made, at_once)]
    assert errors[0] < 0.9 * errors[1]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert made.training
    assert not any(module._forward_pre_hooks for net in (made, model) for module in net.modules())


@pytest.mark.parametrize("rows", [5, 40])
def test_damping_is_a_ridge_towards_the_dense_weight(rows):
    """Without a structure in the second layer: the regression, written as least squares over stacked rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 6, bias=False)).double()
    x = correlated(rows, 10).double()
    made = compress(model, {"0": "low_rank(rank=2)", "1": "dense"}, [x], damping=0.1)
    with torch.no_grad():
        inputs, W = made[0](x), model[1].weight
        root = (0.1 * inputs.var(0, correction=0).mean() * rows).sqrt() * torch.eye(8).double()
        left, right = torch.cat([inputs, root]), torch.cat([model(x), root @ W.T])
        expected = torch.linalg.lstsq(left, right).solution.T
    torch.testing.assert_close(made[1].operator().to_dense().detach(), expected)


def test_members_are_found_exactly():
    model = densify(structurize(mlp().double(), "low_rank(rank=2)"))
    made = compress(model, "low_rank(rank=2)", [correlated(60, 6).double()], damping=1e-3)
    x = torch.randn(9, 6).double()
    torch.testing.assert_close(made.eval()(x), model.eval()(x))


def test_conv1d_and_a_single_layer():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 8}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    tokens = torch.randint(40, (8, 8))
    rules = {"*.mlp.*": "low_rank(rank=4)", "*.c_attn": "btt(rank=2)"}
    made = compress(model, rules, ({"input_ids": part} for part in tokens.split(4)))
    assert [row.structure for row in survey(made).converted] == ["btt(rank=2)", *["low_rank(rank=4)"] * 2]
    with torch.no_grad():
        errors = [
            float((new(tokens).logits - model(tokens).logits).square().mean())
            for new in (made, structurize(model, rules))
        ]
    assert errors[0] < errors[1]
    layer, x = nn.Linear(8, 8), correlated(100, 8)
    alone, aware = (
        compress(layer, "low_rank(rank=2)", [x], damping=0),
        structurize(layer, "low_rank(rank=2)", calibration=calibrate(layer, [x])),
    )
    torch.testing.assert_close(alone(x), aware(x), rtol=1e-3, atol=1e-3)


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.first(x)
        return self.second(h[h[:, 0] > 0])


def test_layers_that_get_other_vectors():
    with pytest.raises(so.StructureError, match=r"second gets other vectors after .* use structurize"):
        compress(Routed(), "block_diag(blocks=4)", [torch.randn(100, 4)])
    with pytest.raises(so.StructureError, match="damping must be at least 0"):
        compress(Routed(), "low_rank(rank=1)", [torch.randn(100, 4)], damping=-1)
    with pytest.raises(so.StructureError, match="there is no batch"):
        compress(Routed(), "low_rank(rank=1)", [])
