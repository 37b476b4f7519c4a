"""Checkpoints: what is saved comes back, and what is broken, half-written or of another model is refused."""

import copy
import json
import os
import shutil

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, load_model, save_file  # noqa: E402
from torch import nn  # noqa: E402

import structops as so  # noqa: E402
from structops.conversion import CheckpointConfig, LayerConfig, folder  # noqa: E402
from structops.torch import StructuredLinear, densify, export_dense, load, save_pretrained, structurize  # noqa: E402

pytestmark = pytest.mark.torch

SPECS = [
    "dense",
    "low_rank(rank=3)",
    "kron",
    "tt(rank=2)",
    "tt(rank=2, num_cores=3)",
    "btt(rank=2)",
    "btt(num_cores=3)",
    "monarch(blocks=5)",
    "block_diag(blocks=4)",
    "blast(rank=3, blocks=2)",
    "einsum",
    "toeplitz",
    "convolution(spatial_shape=4, kernel_size=3)",
]


class Net(nn.Module):
    """Linear layers, a tied head, a layer used twice, a norm with statistics, and a buffer that is not stored."""

    def __init__(self, width=16, hidden=32):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)
        self.square = nn.Linear(width, width)
        self.again = self.square
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.arange(1, width + 1) / width, persistent=False)

    def forward(self, tokens):
        x = self.embed(tokens) * self.scale
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(self.norm(self.again(self.square(x))))


class ByHand(nn.Module):
    """Structured layers of a user's own, with all options."""

    def __init__(self):
        super().__init__()
        self.up = StructuredLinear(16, 32, "btt(rank=2)", weight_norm=True, recompute=True)
        self.down = StructuredLinear(32, 16, "low_rank(rank=3)", False, zero_init=True, weight_norm="cap")

    def forward(self, x):
        return x + self.down(self.up(x))


TOKENS = torch.arange(10) % 11


def trained(model, *inputs):
    """The model after some steps, so that nothing is as it was drawn."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        (model(*inputs) - 1).square().mean().backward()
        optimizer.step()
    return model


def same(a, b):
    """State dicts are equal in names, values, dtypes and order."""
    one, two = a.state_dict(), b.state_dict()
    assert list(one) == list(two)
    for key, value in one.items():
        assert value.dtype == two[key].dtype, key
        assert torch.equal(value, two[key]), key


def same_files(a, b):
    """Two checkpoints hold the same; safetensors write their metadata in any order."""
    assert (a / "structops.json").read_bytes() == (b / "structops.json").read_bytes()
    with safe_open(a / "model.safetensors", "pt") as one, safe_open(b / "model.safetensors", "pt") as two:
        assert one.metadata() == two.metadata()
        assert one.keys() == two.keys()
        assert all(torch.equal(one.get_tensor(key), two.get_tensor(key)) for key in one.keys())  # noqa: SIM118


@pytest.fixture
def structured():
    torch.manual_seed(0)
    return trained(structurize(Net(), {"up": "btt(rank=2)", "down": "low_rank(rank=3)", "square": "kron"}), TOKENS)


@pytest.fixture
def saved(structured, tmp_path):
    save_pretrained(structured, tmp_path / "model")
    return tmp_path / "model"


# ------------------------------------------------------------------------------------------------------ what comes back


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_structure_comes_back(spec, dtype, tmp_path):
    layer = StructuredLinear(16, 32, spec, dtype=dtype, weight_norm=True)
    save_pretrained(layer, tmp_path)
    again = load(tmp_path, nn.Linear(16, 32))
    assert type(again) is StructuredLinear
    assert (again.structure, again.kind, again.weight_norm) == (so.structure(spec), "Linear", True)
    same(again, layer)
    x = torch.randn(3, 16, dtype=dtype)
    assert torch.equal(again(x), layer(x))


def makes():
    return {
        "a dense module": Net,
        "a class": lambda: Net,
        "a function": lambda: lambda: Net(16, 32),
        "a structured module": lambda: structurize(Net(), "btt"),
        "a function of a structured module": lambda: lambda: structurize(Net(), {"up": "tt", "square": "kron"}),
        "a module of another dtype": lambda: Net().to(torch.float64),
    }


@pytest.mark.parametrize("kind", makes())
def test_it_loads_into_whatever_makes_the_model(kind, structured, saved):
    model = makes()[kind]()
    again = load(saved, model)
    assert again is model if isinstance(model, nn.Module) else type(again) is Net
    same(again, structured)
    assert again.head.weight is again.embed.weight
    assert again.again is again.square
    assert again.training
    assert torch.equal(again.eval()(TOKENS), structured.eval()(TOKENS))
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in structured.named_parameters()]
    trained(again, TOKENS)
    assert again.head.weight is again.embed.weight


def test_layers_built_by_hand_keep_their_options(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(5, 16)
    model = trained(ByHand(), x)
    with torch.no_grad():
        model.up.factors[0].mul_(9)  # so that the caps matter
    save_pretrained(model, tmp_path)

    class Dense(ByHand):
        def __init__(self):
            nn.Module.__init__(self)
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)

    class Other(ByHand):
        def __init__(self):
            nn.Module.__init__(self)
            self.up, self.down = StructuredLinear(16, 32, "btt(rank=2)"), StructuredLinear(32, 16, "kron")

    for make in (ByHand, Dense, Other):
        again = load(tmp_path, make)
        same(again, model)
        assert torch.equal(again(x), model(x))
        up, down = again.up, again.down
        assert (up.weight_norm, up.zero_init, up.product.recompute) == (True, False, True)
        assert (down.weight_norm, down.zero_init, down.product.recompute, down.bias) == ("cap", True, False, None)


def test_it_saves_again_what_it_loaded(structured, saved, tmp_path):
    save_pretrained(load(saved, Net), tmp_path / "again")
    same_files(tmp_path / "again", saved)
    assert sorted(os.listdir(saved)) == ["model.safetensors", "structops.json"]
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        stored = file.keys()
    assert "head.weight" not in stored, "tied arrays are stored once"
    assert not [key for key in stored if key.startswith("again.")]
    data = json.loads((saved / "structops.json").read_text())
    assert data["layers"]["up"] == {
        "structure": {"name": "btt", "rank": 2},
        "in_features": 16,
        "out_features": 32,
        "bias": True,
        "zero_init": False,
        "weight_norm": False,
        "recompute": False,
        "kind": "Linear",
        "dtype": "float32",
    }
    assert set(data["layers"]) == {"up", "down", "square"}


def test_a_function_makes_no_memory_and_draws_nothing(structured, saved):
    seen = []

    def make():
        model = Net()
        seen.extend(parameter.is_meta for parameter in model.parameters())
        assert not model.scale.is_meta
        assert model.head.weight is model.embed.weight
        model.square = StructuredLinear(16, 16, "kron", generator=torch.Generator().manual_seed(0))
        model.again = model.square
        return model

    before = torch.get_rng_state()
    again = load(saved, make)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(seen) > 5
    assert all(seen)
    assert not any(tensor.is_meta for tensor in [*again.parameters(), *again.buffers()])
    assert not nn.Linear(2, 2).weight.is_meta, "building is as ever afterwards"
    with pytest.raises(ZeroDivisionError):
        load(saved, lambda: 1 / 0)
    assert not nn.Linear(2, 2).weight.is_meta


def test_the_model_may_be_compiled(structured, saved, tmp_path):
    compiled = torch.compile(structured.eval(), backend="eager")
    expected = compiled(TOKENS)
    save_pretrained(compiled, tmp_path / "compiled")
    same_files(tmp_path / "compiled", saved)
    target = torch.compile(Net().eval(), backend="eager")
    assert load(saved, target) is target
    torch.testing.assert_close(target(TOKENS), expected)

    part = copy.deepcopy(structured)
    part.up = torch.compile(part.up, backend="eager")  # its parameters are named up._orig_mod.* now
    save_pretrained(part, tmp_path / "part")
    same(load(tmp_path / "part", Net), structured)
    inside = Net()
    inside.up = torch.compile(inside.up, backend="eager")
    again = load(saved, inside)
    with torch.no_grad():  # with gradients torch warns of itself where a compiled layer follows one that is not
        assert torch.equal(again.eval()(TOKENS), structured(TOKENS))


@pytest.mark.parametrize("way", ["torch.compile", "Module.compile"])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_compiled_layer_computes_what_replaced_it(way, inplace):
    x = torch.randn(3, 16)
    model = nn.Sequential(nn.Linear(16, 16))
    plain = structurize(model, "low_rank(rank=2)")
    if way == "torch.compile":
        model[0] = torch.compile(model[0], backend="eager")
    else:
        model[0].compile(backend="eager")
    model(x)
    small = structurize(model, "low_rank(rank=2)", inplace=inplace)
    torch.testing.assert_close(small(x), plain(x))
    torch.testing.assert_close(densify(small, inplace=inplace)(x), plain(x))


def test_what_is_frozen_stays_frozen(structured, saved):
    model = Net()
    for layer in (model.up, model.embed):
        layer.requires_grad_(False)
    again = load(saved, model)
    assert {name for name, p in again.named_parameters() if not p.requires_grad} == {
        "embed.weight",
        "up.bias",
        "up.factors.0",
        "up.factors.1",
    }


def test_hooks_and_attributes_stay(saved):
    model = Net()
    model.up.register_forward_hook(lambda module, args, y: y * 0)
    model.up.note = "mine"
    again = load(saved, model)
    assert again.up.note == "mine"
    assert not again.up(torch.ones(1, 16)).any()


def test_dtypes(structured, saved, tmp_path):
    half = load(saved, Net, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.norm.num_batches_tracked.dtype == torch.int64
    assert half.scale.dtype == torch.float32, "made by the model, as from_pretrained does"
    assert torch.equal(half.up.factors[0], structured.up.factors[0].bfloat16())

    cast = copy.deepcopy(structured).to(torch.bfloat16).eval()
    save_pretrained(cast, tmp_path / "half")
    again = load(tmp_path / "half", Net)
    assert again.scale.dtype == torch.bfloat16
    assert torch.equal(again.eval()(TOKENS), cast(TOKENS))
    double = load(tmp_path / "half", lambda: Net().double(), dtype=torch.float64)
    assert {p.dtype for p in double.parameters()} == {torch.float64} == {double.scale.dtype}


@pytest.mark.gpu
def test_devices(structured, saved, tmp_path):
    for again in (load(saved, Net, device="cuda"), load(saved, Net().cuda())):
        assert {t.device.type for t in [*again.parameters(), *again.buffers()]} == {"cuda"}
        torch.testing.assert_close(again.eval()(TOKENS.cuda()).cpu(), structured.eval()(TOKENS), atol=1e-4, rtol=1e-3)
        save_pretrained(again, tmp_path / "gpu")
        same(load(tmp_path / "gpu", Net), structured)


def test_tensors_that_share_memory_are_stored_each(tmp_path):
    """Flat recurrent weights, slices of one array, transposed views."""
    model = nn.Module()
    flat = torch.randn(12)
    model.a, model.b = nn.Parameter(flat[:4]), nn.Parameter(flat[4:10].view(2, 3))
    model.c = nn.Parameter(torch.randn(3, 5).T)
    model.register_buffer("empty", torch.empty(0, 3))
    model.register_buffer("nothing", torch.empty(0, 3))
    model.register_buffer("number", torch.tensor(3))
    model.rnn = nn.LSTM(3, 4)
    save_pretrained(model, tmp_path)
    same(load(tmp_path, copy.deepcopy(model)), model)


def test_state_dicts_round_trip(structured):
    fresh = structurize(Net(), {"up": "btt(rank=2)", "down": "low_rank(rank=3)", "square": "kron"}, init="mup")
    assert fresh.load_state_dict(structured.state_dict()) == ([], [])
    same(fresh, structured)
    assigned = structurize(Net(), {"up": "btt(rank=2)", "down": "low_rank(rank=3)", "square": "kron"}, init="mup")
    assigned.load_state_dict(copy.deepcopy(structured.state_dict()), assign=True)
    same(assigned, structured)
    assert torch.equal(assigned.eval()(TOKENS), structured.eval()(TOKENS))


def test_loaded_tensors_have_memory_of_their_own(saved):
    """A view of the mapped file is not aligned, and the whole file stays mapped as long as one of them lives."""
    model = load(saved, Net)
    for tensor in model.parameters():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert tensor.data_ptr() % 64 == 0


def test_dense_models_are_saved_too(tmp_path):
    model = Net()
    save_pretrained(model, tmp_path)
    same(load(tmp_path, Net), model)


def test_export_is_dense_and_needs_no_structops(structured, saved, tmp_path):
    target = tmp_path / "dense"
    target.mkdir()
    (target / "model-00001-of-00002.safetensors").write_text("an older checkpoint, in shards")
    (target / "model.safetensors.index.json").write_text("{}")
    (target / "tokenizer.json").write_text("{}")
    export_dense(structured, target)
    assert sorted(os.listdir(target)) == ["model.safetensors", "tokenizer.json"]
    plain = Net()
    assert load_model(plain, target / "model.safetensors") == (set(), [])
    same(plain, densify(structured))
    torch.testing.assert_close(plain.eval()(TOKENS), structured.eval()(TOKENS))
    with pytest.raises(so.CheckpointError, match="dense checkpoint"):
        load(target, Net)
    export_dense(structured, saved)  # over a structured one
    with pytest.raises(so.CheckpointError, match="dense checkpoint"):
        load(saved, Net)


# --------------------------------------------------------------------------------------------------- crashes and damage


class Crash(Exception):
    """The machine went off."""


STEPS = 3  # files moved, and one more


@pytest.mark.parametrize("killed", [False, True], ids=["an exception", "a kill"])
@pytest.mark.parametrize("step", range(STEPS))
def test_a_crash_while_overwriting_never_mixes(step, killed, structured, saved, monkeypatch):
    """Old and new have the same layers, so that nothing but the order of writing tells them apart."""
    newer = trained(copy.deepcopy(structured), TOKENS)
    calls = iter(range(100))

    def replace(a, b):
        if next(calls) == step:
            raise Crash
        os.rename(a, b)

    monkeypatch.setattr(folder.os, "replace", replace)
    if killed:
        monkeypatch.setattr(folder.shutil, "rmtree", lambda *args, **kwargs: None)
    if step == STEPS - 1:
        save_pretrained(newer, saved)
        same(load(saved, Net), newer)
        return
    with pytest.raises(Crash):
        save_pretrained(newer, saved)
    with pytest.raises(so.CheckpointError, match="interrupted"):
        load(saved, Net)
    monkeypatch.undo()
    save_pretrained(newer, saved)
    same(load(saved, Net), newer)


def test_a_crash_while_writing_leaves_the_checkpoint_before(structured, saved, monkeypatch):
    def cut_off(tensors, path, metadata):
        path.write_bytes(b"half of")
        raise Crash

    monkeypatch.setattr("structops.torch.checkpoint.save_file", cut_off)
    with pytest.raises(Crash):
        save_pretrained(trained(copy.deepcopy(structured), TOKENS), saved)
    same(load(saved, Net), structured)
    assert sorted(os.listdir(saved)) == ["model.safetensors", "structops.json"]
    with pytest.raises(Crash):
        save_pretrained(structured, saved.parent / "new")
    with pytest.raises(so.CheckpointError, match="no checkpoint of"):
        load(saved.parent / "new", Net)


def test_a_temporary_folder_left_by_a_kill_harms_nothing(structured, saved):
    (saved / ".structops-dead").mkdir()
    (saved / ".structops-dead" / "model.safetensors").write_text("half")
    same(load(saved, Net), structured)
    (saved / "structops.json").unlink()
    (saved / "model.safetensors").unlink()
    with pytest.raises(so.CheckpointError, match="interrupted"):
        load(saved, Net)


def test_folders_that_are_none(structured, saved, tmp_path):
    empty, file, run = tmp_path / "empty", tmp_path / "file", tmp_path / "run"
    empty.mkdir()
    run.mkdir()
    file.write_text("")
    (run / "structops.json").write_text(json.dumps({"format": 1, "step": 3, "processes": 1, "extra": {}}))
    for path, message in (
        (tmp_path / "nowhere", "is no folder"),
        (file, "is no folder"),
        (empty, "has no structops.json"),
        (run, r"structops\.torch\.distributed\.resume"),
    ):
        with pytest.raises(so.CheckpointError, match=message):
            load(path, Net)
    with pytest.raises(so.CheckpointError, match="is a file"):
        save_pretrained(structured, file)
    (saved / "model.safetensors").unlink()
    with pytest.raises(so.CheckpointError, match="has no weights"):
        load(saved, Net)


@pytest.mark.parametrize("name", ["model.safetensors", "structops.json"])
@given(share=st.floats(0, 0.999))
def test_files_that_were_cut_off(name, share, tmp_path_factory):
    path = tmp_path_factory.mktemp("cut")
    save_pretrained(StructuredLinear(4, 4, "kron"), path)
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[: int(share * (len(whole) - 1))])
    with pytest.raises(so.CheckpointError, match="cut off"):
        load(path, nn.Linear(4, 4))
    shutil.rmtree(path)


def test_weights_of_something_else(structured, saved, tmp_path):
    weights = saved / "model.safetensors"
    tensors = load_file(weights)
    for metadata, message in (
        (None, "was not written by structops"),
        ({"format": "pt"}, "was not written by structops"),
        ({"structops": "0" * 64}, "does not belong"),
    ):
        save_file(tensors, weights, metadata=metadata)
        with pytest.raises(so.CheckpointError, match=message):
            load(saved, Net)
    weights.write_text("a page of an error 404")
    with pytest.raises(so.CheckpointError, match="no file of safetensors"):
        load(saved, Net)
    save_pretrained(structurize(Net(), "btt(rank=1)"), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", weights)
    with pytest.raises(so.CheckpointError, match="does not belong"):
        load(saved, Net)


def change(path, **entries):
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **entries}))
    return data


def test_json_that_was_changed(saved):
    path = saved / "structops.json"
    text = path.read_text()
    layers = json.loads(text)["layers"]
    up = layers["up"]
    for entries, error, message in (
        ({"format": 99, "surprise": 1}, so.CheckpointError, "format 99.*upgrade structops"),
        ({"layers": {**layers, "up": {**up, "structure": {"name": "bttt"}}}}, so.StructureError, "'up'.*'btt'"),
        ({"layers": {**layers, "up": {**up, "structure": {"name": "kron", "x": 1}}}}, so.StructureError, "'up'.*x"),
        ({"layers": {**layers, "up": {**up, "in_features": 0}}}, so.StructureError, "'up'.*at least 1"),
        ({"layers": {**layers, "up": {**up, "in_features": "16"}}}, so.CheckpointError, "in_features is '16'"),
        ({"layers": {**layers, "up": {**up, "bias": 1}}}, so.CheckpointError, "bias is 1"),
        ({"layers": {**layers, "up": {**up, "weight_norm": "most"}}}, so.StructureError, "weight_norm"),
        ({"layers": {**layers, "up": {**up, "magic": 1}}}, so.CheckpointError, "unknown 'magic'"),
        ({"layers": {**layers, "up": 3}}, so.CheckpointError, "expected entries"),
        ({"layers": {**layers, "up": {**up, "zero_init": True}}}, so.CheckpointError, "does not belong"),
        ({"layers": {"up": up}}, so.CheckpointError, "does not belong"),
        ({"tied": {}}, so.CheckpointError, "does not belong"),
        ({"tied": {"a": 1}}, so.CheckpointError, "expected names in tied"),
        ({"buffers": {"scale": "load"}}, so.CheckpointError, "scale has the unknown dtype 'load'"),
        ({"framework": "abacus"}, so.CheckpointError, "'torch' or 'jax'"),
        ({"framework": "jax"}, so.CheckpointError, "structops.jax"),
        ({"surprise": 1}, so.CheckpointError, "unknown 'surprise'"),
    ):
        change(path, **entries)
        with pytest.raises(error, match=message):
            load(saved, Net)
        path.write_text(text)
    for other in ("[]", "3", "{}", "null"):
        path.write_text(other)
        with pytest.raises(so.CheckpointError, match=r"expected entries|has no 'format'|no 'buffers'"):
            load(saved, Net)


class Wider(Net):
    def __init__(self):
        super().__init__(16, 64)


class Without(Net):
    def __init__(self):
        super().__init__()
        del self.down


class Beside(Net):
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(2, 2)


class Narrower(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)


class Longer(Net):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.head.weight = self.embed.weight


class Lazy(Net):
    def __init__(self):
        super().__init__()
        self.extra = nn.LazyLinear(3)


class NotLinear(Net):
    def __init__(self):
        super().__init__()
        self.up = nn.Conv1d(16, 32, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Wider, "up is 64x16 in the model and 32x16 in the checkpoint"),
        (Without, "no layer 'down', which is low_rank.*up, square"),
        (Beside, r"the checkpoint lacks extra\.weight, extra\.bias"),
        (Narrower, r"the model lacks norm\.num_batches"),
        (Longer, r"embed\.weight is \(12, 16\) in the model and \(11, 16\)"),
        (NotLinear, "up is a Conv1d in the model"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_models_are_refused_and_stay_as_they_were(make, message, saved):
    with pytest.raises(so.CheckpointError, match=message):
        load(saved, make)
    model = make()
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    with pytest.raises(so.CheckpointError, match=message):
        load(saved, model)
    assert [a is b for a, b in zip(model.modules(), modules, strict=True)]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_layer_structured_in_the_model_alone_is_refused(tmp_path):
    save_pretrained(nn.Sequential(nn.Linear(8, 8)), tmp_path)
    with pytest.raises(so.CheckpointError, match=r"lacks 0\.factors\.0"):
        load(tmp_path, nn.Sequential(StructuredLinear(8, 8, "kron")))


def test_models_that_cannot_be_saved_or_built(structured, saved, tmp_path):
    with pytest.raises(so.CheckpointError, match="meta device"):
        save_pretrained(StructuredLinear(4, 4, "kron", device="meta"), tmp_path / "meta")
    assert not (tmp_path / "meta").exists()

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(so.CheckpointError, match="_extra_state is a dict"):
        save_pretrained(Extra(2, 2), tmp_path / "extra")
    for model, message in (
        (nn.Sequential(nn.LazyLinear(3)), "0.weight has no size before the first forward"),
        (nn.ParameterDict({"a": nn.Parameter(torch.eye(3).to_sparse())}), "a is a torch.sparse_coo"),
    ):
        with pytest.raises(so.CheckpointError, match=message):
            save_pretrained(model, tmp_path / "odd")
    with pytest.raises(so.CheckpointError, match="no size before the first forward"):
        load(saved, Lazy)
    with pytest.raises(so.CheckpointError, match="expected a module"):
        save_pretrained({"a": 1}, tmp_path / "dict")
    with pytest.raises(so.CheckpointError, match=r"test_checkpoints\.Net, which structops cannot build"):
        load(saved)
    with pytest.raises(so.CheckpointError, match="a function that makes one, got str"):
        load(saved, "Net")
    with pytest.raises(so.CheckpointError, match="it made a int"):
        load(saved, lambda: 3)
    with torch.device("meta"):
        hollow = Net()
    with pytest.raises(so.CheckpointError, match="scale on the meta device"):
        load(saved, hollow)
    hollow.scale = torch.arange(1, 17) / 16
    same(load(saved, hollow), structured)


# ----------------------------------------------------------------------------------------------------------- the format

names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=6)


@st.composite
def configs(draw):
    layer = st.builds(
        LayerConfig,
        structure=st.sampled_from(SPECS).map(so.structure),
        in_features=st.just(16),
        out_features=st.just(32),
        bias=st.booleans(),
        zero_init=st.booleans(),
        weight_norm=st.sampled_from([False, True, "cap"]),
        recompute=st.booleans(),
        kind=st.sampled_from(["Linear", "Conv1D"]),
        dtype=st.sampled_from(["float32", "bfloat16", "complex64"]),
    )
    return CheckpointConfig(
        draw(st.sampled_from(["torch", "jax"])),
        draw(st.dictionaries(names, layer, max_size=3)),
        *(draw(st.dictionaries(names, names, max_size=2)) for _ in range(3)),
    )


@given(config=configs())
def test_the_format_round_trips(config):
    text = config.to_json()
    again = CheckpointConfig.from_json(text)
    assert again == config
    assert again.to_json() == text
    assert again.digest() == config.digest()
    config.check_weights({"structops": again.digest()})
    assert len(text.splitlines()) >= len(config.layers) + 5


@given(config=configs())
def test_the_digest_tells_layers_apart(config):
    for name, layer in config.layers.items():
        other = LayerConfig(**{**vars(layer), "bias": not layer.bias})
        changed = CheckpointConfig(config.framework, {**config.layers, name: other}, {}, config.tied)
        assert changed.digest() != config.digest()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("weight_norm", [False, True, "cap"])
def test_what_a_layer_stores_is_what_the_layer_has(spec, weight_norm):
    for dtype in (torch.float32, torch.complex64):
        layer = StructuredLinear(16, 32, spec, weight_norm=weight_norm, dtype=dtype, device="meta")
        stored = LayerConfig(so.structure(spec), 16, 32, True, weight_norm=weight_norm, dtype=str(dtype)[6:]).stored()
        assert {key: (tuple(p.shape), str(p.dtype)[6:]) for key, p in layer.named_parameters()} == stored
