"""The models of the paper: counts that match its figures, and modules that match their counts."""

import dataclasses
import io
import math
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from structops.errors import ShapeError, StructureError
from structops.spec import structure as spec_of
from structops.studies.counts import PAPER_ROWS, PaperRow, count, counts_table
from structops.studies.models import GPT, MODELS, ResidualMLP, ViT, width_for
from structops.studies.models.layers import cost
from structops.studies.models.sizes import WHERE

GREEDY = "btt(modes='greedy')"
LARGE = {"depth": 12, "heads": 4, "image_size": 224, "patch_size": 32, "classes": 1000}
STRUCTURES = ("dense", "low_rank", "kron", "tt(rank=4)", "btt", "btt(rank=2)", "monarch(blocks=4)", "btt(num_cores=3)")


def small(structure, **fields):
    """One of each model, small, of width 64."""
    yield ResidualMLP(structure, 64, 2, in_features=48, **fields)
    yield ViT(structure, 64, 2, image_size=16, patch_size=4, heads=4, classes=8, **fields)
    yield GPT(structure, 64, 2, heads=2, head_dim=8, vocab=96, context=16, **fields)


# --------------------------------------------------------------------------------------------- the numbers of the paper


@pytest.mark.parametrize(
    ("model", "macs"),
    [
        (ResidualMLP("dense", 32), 123_680),
        (ResidualMLP("dense", 64), 296_512),
        (ResidualMLP("dense", 2048), 107_005_952),
        (ResidualMLP(GREEDY, 128), 95_360),
        (ResidualMLP(GREEDY, 1024), 1_401_856),
        (ResidualMLP(GREEDY, 16384), 77_873_152),
        (ResidualMLP("low_rank", 32), 104_864),
        (ResidualMLP("low_rank", 16384), 113_655_808),
        (ViT("dense", 32, classes=100), 836_960),
        (ViT("dense", 1024, classes=100), 647_981_056),
    ],
)
def test_the_models_of_the_paper_have_its_macs(model, macs):
    assert model.macs_with_norms == macs


@pytest.mark.parametrize(
    ("structure", "width", "millions"),
    [
        *(("dense", 80, 64.754), ("dense", 192, 309.186), ("dense", 384, 1148.461)),
        *((GREEDY, 256, 72.332), (GREEDY, 784, 329.699), (GREEDY, 1936, 1180.977)),
    ],
)
def test_those_of_imagenet_to_all_digits(structure, width, millions):
    assert round(ViT(structure, width, **LARGE).macs_with_norms / 1e6, 3) == millions


def test_gpt_2_with_and_without_its_head():
    model = GPT("dense", 768, heads=12)
    assert round(model.macs / 1e9, 3) == 68.099
    assert round((model.macs - model.head_macs) / 1e9, 3) == 48.318


@pytest.mark.parametrize("row", PAPER_ROWS, ids=lambda row: f"{row.source}-{row.model.structure}-{row.model.width}")
def test_figures_show_what_we_count(row):
    assert abs(row.deviation) < 1.5e-3


@given(width=st.integers(1, 300), depth=st.integers(0, 4), expansion=st.integers(1, 5), outputs=st.integers(1, 99))
@settings(max_examples=25, deadline=None)
def test_counts_of_dense_models_in_closed_form(width, depth, expansion, outputs):
    ffn = 2 * expansion * width**2
    mlp = ResidualMLP("dense", width, depth, expansion=expansion, classes=outputs)
    assert mlp.macs_with_norms == 3072 * width + depth * (ffn + 5 * width) + width * outputs
    vit = ViT("dense", 8 * width, depth, expansion=expansion, classes=outputs)
    d, t, p, pe = 8 * width, 17, 16, 192
    norms = p * pe + p * d + depth * (2 * t * d + 2 * t * d) + t * d
    blocks = depth * (t * (4 * d * d + 2 * expansion * d * d) + 2 * t * t * d)
    assert vit.macs_with_norms == p * pe * d + blocks + d * outputs + 5 * norms
    da, t = 6 * 64, 32
    gpt = GPT("dense", width, depth, heads=6, vocab=outputs, context=t, expansion=expansion)
    blocks = depth * (t * (4 * width * da + ffn) + 2 * t * t * da)
    assert gpt.macs == blocks + t * width * outputs
    assert gpt.macs_with_norms == gpt.macs + 5 * t * (depth * 2 * (width + da) + width)


# ------------------------------------------------------------------------------------------------------- sizes as data


@pytest.mark.parametrize("where", WHERE)
def test_where_chooses_the_layers(where):
    models = list(small("btt", where="all"))[where == "attention" :]
    for model in (dataclasses.replace(model, where=where) for model in models):
        chosen = {layer.name.rpartition(".")[2] for layer in model.layers() if layer.structure == "btt"}
        parts = {"input": {"embed"}, "attention": set("qkvo"), "ffn": {"up", "down"}, "head": {"head"}}
        every = {layer.name.rpartition(".")[2] for layer in model.layers()}
        assert chosen == every & set().union(*(parts[part] for part in WHERE[where]))


def test_an_mlp_has_no_attention():
    with pytest.raises(StructureError, match="an MLP has no attention; where is one of all, all_but_head"):
        ResidualMLP("btt", 64, where="attention")


def test_low_rank_never_squeezes_the_input():
    for where in ("all", "all_but_head"):
        assert next(ResidualMLP("low_rank", 64, where=where).layers()).structure == "dense"


def test_models_are_plain_data():
    for structure in STRUCTURES:
        for model in small(structure):
            again = type(model)(**model.to_dict())
            assert again == model
            assert hash(again) == hash(model)
            assert MODELS[{ResidualMLP: "mlp", ViT: "vit", GPT: "gpt"}[type(model)]] is type(model)
            base = model.base(32)
            assert (base.structure, base.width, base.depth) == ("dense", 32, model.depth)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResidualMLP("btt", 64, where="attn"), "known: all, all_but_head"),
        (lambda: ResidualMLP("btt", 0), "width must be a positive"),
        (lambda: ViT("btt", 60), "no multiple of heads=8"),
        (lambda: ViT("btt", 64, patch_size=5), "do not tile"),
        (lambda: GPT("btt", 64, head_dim=None), "needs heads"),
        (lambda: GPT("btt", 96), "no multiple of head_dim=64"),
        (lambda: ResidualMLP("btx", 64).macs, "did you mean 'btt'"),
        (lambda: width_for(ResidualMLP("btt(blocks=7)", 64), 10**6), "no width from"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(StructureError, match=message):
        make()


def test_counts_need_no_library():
    code = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "jax"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
from structops.studies.models import GPT, width_for
assert width_for(GPT("btt", 64, heads=6, depth=2), 10**10) > 64
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# -------------------------------------------------------------------------------------------------------------- widths


def scanned(model, macs, candidates):
    """The nearest of all candidates."""
    return min(candidates, key=lambda width: abs(dataclasses.replace(model, width=width).macs - macs))


@pytest.mark.parametrize("structure", STRUCTURES[:-1])
@pytest.mark.parametrize("budget", [3 * 10**5, 10**7])
def test_widths_are_the_nearest_to_the_budget(structure, budget):
    squares = structure.startswith(("kron", "tt", "btt"))
    for model in (ResidualMLP(structure, 64), ViT(structure, 64)):
        unit = model.width_unit
        candidates = [n * n for n in range(2, 100)] if squares else range(8, 2400, 4)
        candidates = [width for width in candidates if width % unit == 0]
        found, best = width_for(model, budget), scanned(model, budget, candidates)
        assert found == best


def test_widths_suit_blocks_heads_and_cores():
    assert width_for(ViT("monarch(blocks=16)", 48, heads=3, where="hidden"), 10**8) % 48 == 0
    cube = round(width_for(ResidualMLP("btt(num_cores=3)", 64), 10**7) ** (1 / 3))
    assert width_for(ResidualMLP("btt(num_cores=3)", 64), 10**7) == cube**3
    growing = width_for(GPT("dense", 64, heads=None, where="hidden", depth=3), 10**10)
    assert growing % 64 == 0
    counted = width_for(ResidualMLP("dense", 64), 10**6, lambda model: model.num_params)
    assert ResidualMLP("dense", counted).num_params == pytest.approx(10**6, rel=0.02)


def test_large_widths_are_found_at_once():
    start = time.perf_counter()
    width = width_for(ResidualMLP("dense", 64), 10**12)
    assert ResidualMLP("dense", width).macs == pytest.approx(10**12, rel=1e-3)
    assert time.perf_counter() - start < 2


# -------------------------------------------------------------------------------------------------------------- tables


def test_the_table_shows_every_row_and_models_of_ones_own():
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(counts_table([PAPER_ROWS[0], PaperRow("my own", GPT("btt", 64, 1, heads=1, context=8))]).to_rich())
    text = console.export_text()
    assert "123,680" in text
    assert "+0.02%" in text
    assert "my own" in text


def test_counts_of_a_model_add_up():
    for model in small("btt", weight_norm=True):
        counted = count(model)
        assert counted["linear_macs"] == sum(layer["macs"] for layer in counted["layers"])
        assert counted["macs"] == counted["linear_macs"] + counted["attention_macs"]
        assert counted["num_params"] == sum(layer["num_params"] for layer in counted["layers"])
        assert type(model)(**counted["model"]) == model


# -------------------------------------------------------------------------------------------------------------- modules

torch = pytest.importorskip("torch", reason="needs PyTorch")
from torch.nn import functional  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from structops.torch import StructuredLinear, param_groups, plan  # noqa: E402


def inputs(model, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, GPT):
        return torch.randint(model.vocab, (batch, model.context), generator=generator)
    shape = (model.in_features,) if isinstance(model, ResidualMLP) else (3, model.image_size, model.image_size)
    return torch.randn(batch, *shape, generator=generator)


def randomised(model, seed=0):
    """The module, where nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    network = model.build(generator)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


@pytest.mark.torch
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("norm", [False, True])
def test_modules_have_the_counted_parameters(structure, norm):
    for model in small(structure, weight_norm=norm, where="all"):
        with torch.device("meta"):
            network = model.build()
        assert sum(parameter.numel() for parameter in network.parameters()) == model.all_params
        layers = {name: m for name, m in network.named_modules() if isinstance(m, StructuredLinear)}
        assert {layer.name for layer in model.layers()} == set(layers)
        assert model.num_params == sum(layer.plan.num_params for layer in layers.values())
        for layer in model.layers():
            made = layers[layer.name]
            assert made.structure == spec_of(layer.structure)
            assert (made.in_features, made.zero_init) == (layer.in_features, layer.zero_init)


@pytest.mark.torch
@pytest.mark.parametrize("structure", STRUCTURES)
def test_modules_take_the_counted_macs(structure):
    """Counted by torch, which counts two operations a MAC."""
    for model in small(structure, bias=False):
        network, x = model.build(), inputs(model, batch=2)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            network(x)
        assert counter.get_total_flops() == 2 * 2 * model.macs


@pytest.mark.torch
@pytest.mark.parametrize("structure", ["dense", "low_rank", "btt", "monarch(blocks=4)"])
def test_modules_keep_the_counted_activations(structure):
    """Numbers that autograd saves, each place in memory once; without parameters and statistics of rows."""
    for model in small(structure, bias=False):
        network, batch = model.build(), 8
        x = inputs(model, batch)
        mine = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
        kept, alive = {}, []

        def keep(tensor, mine=mine, kept=kept, alive=alive):
            storage = tensor.untyped_storage()
            if tensor.is_floating_point() and storage.data_ptr() not in mine:
                alive.append(tensor)  # or its memory would be taken again
                kept[storage.data_ptr()] = max(tensor.numel(), kept.get(storage.data_ptr(), 0))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = network(x)
        statistics = batch * (2 * sum(uses for _, uses in model.norms()))
        if not isinstance(model, ResidualMLP):
            statistics += batch * model.depth * model.head_count * model.tokens  # sums of attention weights
        assert out.requires_grad
        assert sum(kept.values()) - statistics == batch * model.activations, type(model)


@pytest.mark.torch
@pytest.mark.parametrize("structure", ["dense", "low_rank", "tt(rank=4)", "btt"])
def test_modules_train(structure):
    for model in small(structure, weight_norm=True):
        network, x = model.build(torch.Generator().manual_seed(0)), inputs(model)
        out = network(x)
        assert not out.any(), "the head starts at zero"
        classes = out.shape[-1]
        assert out.shape == ((3, 16, 96) if isinstance(model, GPT) else (3, model.classes))
        with torch.device("meta"):
            base = model.base(32).build()
        optimizer = torch.optim.Adam(param_groups(network, base=base, lr=1e-2), eps=1e-12)
        target = torch.arange(out[..., 0].numel()) % classes
        losses = []
        for _ in range(5):
            loss = functional.cross_entropy(network(x).flatten(0, -2), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(math.log(classes), rel=1e-5)
        assert losses[-1] < 0.9 * losses[0]
        assert all(parameter.grad.any() for parameter in network.parameters())


@pytest.mark.torch
def test_the_seed_is_that_of_the_generator():
    for model in small("btt"):
        first, again, other = (model.build(torch.Generator().manual_seed(seed)).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.torch
@pytest.mark.parametrize("structure", ["dense", "btt"])
def test_gpt_does_not_look_ahead(structure):
    model = next(m for m in small(structure) if isinstance(m, GPT))
    network, x = randomised(model), inputs(model)
    before = network(x)
    x[:, 9] = (x[:, 9] + 1) % model.vocab
    after = network(x)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert (before[:, 9:] - after[:, 9:]).abs().amax(-1).min() > 1e-3
    torch.testing.assert_close(network(x[:, :5]), after[:, :5])  # sequences may be shorter


def dense(layer, x):
    """A structured layer by its dense matrix."""
    y = x @ layer.operator().to_dense().T
    return y if layer.bias is None else y + layer.bias


def norm(layer, x):
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * layer.weight
    return y if layer.bias is None else y + layer.bias


def feed_forward(block, h):
    z = dense(block.up, norm(block.norm, h))
    return h + dense(block.down, 0.5 * z * (1 + torch.erf(z / math.sqrt(2))))


def attend(block, h, heads, causal):
    """Attention head by head, with the scale of muP."""
    a, x, parts = block.attention, norm(block.attention_norm, h), []
    q, k, v = (dense(layer, x) for layer in (a.q, a.k, a.v))
    size = q.shape[-1] // heads
    for head in range(heads):
        here = slice(head * size, (head + 1) * size)
        logits = 8 / size * norm(a.q_norm, q[..., here]) @ norm(a.k_norm, k[..., here]).mT
        if causal:
            logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -math.inf)
        parts.append(logits.softmax(-1) @ v[..., here])
    return h + dense(a.o, torch.cat(parts, -1))


@pytest.mark.torch
@pytest.mark.parametrize("structure", ["dense", "btt(rank=2)", "low_rank"])
def test_modules_compute_what_their_definitions_say(structure):
    for model in small(structure):
        network, x = randomised(model).double(), inputs(model)
        if isinstance(model, ResidualMLP):
            x = x.double()
            z = dense(network.embed, x)
            h = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
            for block in network.blocks:
                h = feed_forward(block, h)
            expected = dense(network.head, h)
        else:
            if isinstance(model, ViT):
                x, p = x.double(), model.patch_size
                corners = [(i, j) for i in range(0, 16, p) for j in range(0, 16, p)]
                pieces = [x[:, :, i : i + p, j : j + p] for i, j in corners]
                patches = torch.stack([piece.permute(0, 2, 3, 1).flatten(1) for piece in pieces], 1)
                h = norm(network.embed_norm, dense(network.embed, norm(network.patch_norm, patches)))
                h = torch.cat([network.cls.expand(3, 1, 64), h], 1) + network.positions.weight
            else:
                h = network.tokens.weight[x] + network.positions.weight
            for block in network.blocks:
                h = feed_forward(block, attend(block, h, model.head_count, isinstance(model, GPT)))
            h = norm(network.norm, h)
            expected = dense(network.head, h[:, 0] if isinstance(model, ViT) else h)
        torch.testing.assert_close(network(x), expected)


@pytest.mark.torch
def test_inputs_of_another_size_are_refused():
    for model in small("dense"):
        if not isinstance(model, ResidualMLP):
            with pytest.raises(ShapeError, match="expected"):
                model.build()(torch.zeros(2, 17, dtype=torch.long))


@pytest.mark.torch
def test_an_mlp_flattens_images():
    network = randomised(ResidualMLP("btt", 16, 1, in_features=48))
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(network(x), network(x.flatten(1)))


@pytest.mark.torch
def test_what_starts_at_zero():
    vit, gpt = (next(m for m in small("btt") if isinstance(m, kind)) for kind in (ViT, GPT))
    for model, kinds in ((vit, {"q", "o", "down", "head"}), (gpt, {"o", "down", "head"})):
        network = model.build()
        zero = {n.split(".")[-3] for n, p in network.named_parameters() if n.endswith("factors.1") and not p.any()}
        zero |= {"head"} if not network.head(torch.ones(64)).any() else set()
        assert zero == kinds


@pytest.mark.torch
def test_learning_rates_are_those_of_the_paper():
    """The dense network of width 64 at 3e-3, and the same rates in a block tensor-train of width 1024."""
    model = ResidualMLP(GREEDY, 1024)
    with torch.device("meta"):
        network, base = model.build(), model.base().build()
    rates = {row.name: 3e-3 * row.lr_scale for row in plan(network, base=base)}
    assert [rates[f"blocks.0.up.factors.{k}"] for k in (0, 1)] == pytest.approx([3e-3, 3e-3])
    assert [rates[f"blocks.0.down.factors.{k}"] for k in (0, 1)] == pytest.approx([6e-3, 6e-3])
    assert [rates[f"embed.factors.{k}"] for k in (0, 1)] == pytest.approx([0.144, 0.048])
    assert rates["head.factors.0"] == pytest.approx(3e-3 * 64 / 1024)
    assert model.input_layers == ("embed",)
    vit, gpt = (next(m for m in small("btt", weight_norm=True) if isinstance(m, kind)) for kind in (ViT, GPT))
    for model in (vit, gpt):
        with torch.device("meta"):
            network, base = model.build(), model.base(32).build()
        rows = {row.name: row for row in plan(network, base=base)}
        fixed = [name for name, row in rows.items() if row.weight.role in ("embedding", "vector", "scalar")]
        assert {"positions.weight", "blocks.0.attention.v.gains"} <= set(fixed)
        assert "blocks.0.attention.q.gains" not in rows, "a norm undoes it"
        assert {rows[name].lr_scale for name in fixed} == {1.0}


def test_costs_are_those_of_chains():
    assert cost("btt", 1024, 4096)[:3] == (196_608, 196_608, (1024, 2048))
    assert cost("kron", 1024, 1024)[:2] == (2048, 65_536)
