"""Mixtures of structured experts in both libraries, against a loop over vectors, and the loss that balances them."""

import copy

import numpy as np
import pytest

import structops as so
from structops import Routed
from structops.errors import GradientError, ShapeError, StructureError
from structops.mup import init_stds

MEMBERS = ["btt", "btt(rank=2)", "tt(rank=2)", "low_rank(rank=3)", "blast(rank=3, blocks=2)", "einsum", "btt(pad=True)"]


# --------------------------------------------------------------------------------------------------------------- sizes


def test_counts_of_the_paper():
    spec = Routed("btt", experts=8, top_k=2)
    assert spec.num_params(1024, 1024) == 8 * 65_536 + 8_192 == 532_480
    assert spec.macs(1024, 1024) == 2 * 65_536 + 8_192 == 139_264
    assert spec.chain(1024, 1024) == so.structure("btt(rank=8)").chain(1024, 1024)
    assert spec.rank_label(1024, 1024) == "s"
    assert spec.expert_scales(1024, 1024) == init_stds(so.structure("btt").chain(1024, 1024))


@pytest.mark.parametrize("member", MEMBERS)
def test_text_reads_back(member):
    spec = Routed(member, experts=4, top_k=3)
    assert Routed.parse(str(spec)) == spec
    assert hash(spec) == hash(Routed(so.structure(member), 4, 3))


def test_text_is_that_of_the_docs():
    assert str(Routed()) == "routed(structure=btt, experts=8, top_k=2)"
    assert Routed.parse("routed(structure=btt(blocks=8), experts=4)").structure == "btt(blocks=8)"
    assert Routed.parse("routed") == Routed()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: Routed(experts=1), "experts must be .* at least 2"),
        (lambda: Routed(experts=True), "experts must be"),
        (lambda: Routed(experts=4, top_k=5), "top_k<=4"),
        (lambda: Routed(top_k=0), "top_k must be"),
        (lambda: Routed("bt"), "did you mean"),
        (lambda: Routed("kron").member(16, 16), "low_rank, tt, btt, blast, einsum"),
        (lambda: Routed("toeplitz").member(16, 16), "low_rank, tt, btt, blast, einsum"),
        (lambda: Routed("btt(num_cores=3)").member(64, 64), "no rank axis"),
        (lambda: Routed().member(0, 16), "in_features"),
        (lambda: Routed.parse("btt"), "routed"),
        (lambda: Routed.parse("routed(k=2)"), "accepts structure, experts, top_k"),
        (lambda: so.structure("routed(structure=btt)"), "RoutedLinear"),
        (lambda: so.structure(Routed()), "RoutedLinear"),
    ],
)
def test_wrong_specs(wrong, says):
    with pytest.raises(StructureError, match=says):
        wrong()


# --------------------------------------------------------------------------------------------------------------- layers


def torch_layer(n=12, m=20, member="btt", experts=4, top_k=2, gate=True, **kwargs):
    torch = pytest.importorskip("torch")
    from structops.torch import RoutedLinear

    kwargs.setdefault("dtype", torch.float64)
    generator = torch.Generator().manual_seed(0)
    layer = RoutedLinear(n, m, member, experts, top_k, generator=generator, **kwargs)
    with torch.no_grad():
        if gate:
            layer.gate.normal_(generator=generator)
        if layer.bias is not None:
            layer.bias.normal_(generator=generator)
    return layer


def rows(count=9, n=12, dtype="float64"):
    torch = pytest.importorskip("torch")
    return torch.randn(count, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(
        getattr(torch, dtype)
    )


def one_by_one(layer, x):
    """Every vector by itself, with dense experts; only products of matrices with vectors, and their gradients."""
    torch = pytest.importorskip("torch")
    plan = so.structure(layer.spec.structure).plan(layer.in_features, layer.out_features)
    dense = [plan.operator([f[e] for f in layer.factors]).to_dense() for e in range(layer.spec.experts)]
    results = []
    for row in x.reshape(-1, layer.in_features):
        logits = [row @ weight for weight in layer.gate]
        best = sorted(range(len(logits)), key=lambda e: (-float(logits[e].detach()), e))[: layer.spec.top_k]
        scale = sum(torch.exp(logits[e]) for e in best)
        results.append(sum(torch.exp(logits[e]) / scale * (dense[e] @ row) for e in best))
    y = torch.stack(results) if layer.bias is None else torch.stack(results) + layer.bias
    return y.reshape(*x.shape[:-1], layer.out_features)


@pytest.mark.torch
@pytest.mark.parametrize("dispatch", ["masked", "gathered"])
@pytest.mark.parametrize("member", MEMBERS)
def test_values_and_gradients_equal_a_loop_over_vectors(member, dispatch):
    torch = pytest.importorskip("torch")
    layer, x = torch_layer(member=member, dispatch=dispatch), rows().requires_grad_()
    weights = [x, *layer.parameters()]
    y, expected = layer(x), one_by_one(layer, x)
    torch.testing.assert_close(y, expected)
    seed = torch.randn_like(y)
    for mine, theirs in zip(
        torch.autograd.grad(y, weights, seed), torch.autograd.grad(expected, weights, seed), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.torch
@pytest.mark.parametrize("dispatch", ["auto", "masked", "gathered"])
def test_leading_axes(dispatch):
    torch = pytest.importorskip("torch")
    layer = torch_layer(dispatch=dispatch)
    for lead in ((), (1,), (2, 3), (0,), (2, 0)):
        x = torch.randn(*lead, 12, dtype=torch.float64)
        y = layer(x)
        assert y.shape == (*lead, 20)
        if x.numel():
            torch.testing.assert_close(y, one_by_one(layer, x))
        y.sum().backward()
    with pytest.raises(ShapeError, match=r"\(\.\.\., 12\)"):
        layer(torch.zeros(3, 13))


@pytest.mark.torch
def test_all_experts_are_a_softmax_of_all():
    torch = pytest.importorskip("torch")
    layer, x = torch_layer(experts=3, top_k=3, bias=False), rows()
    plan = so.structure("btt").plan(12, 20)
    each = torch.stack([x @ plan.operator([f[e] for f in layer.factors]).to_dense().T for e in range(3)])
    gates = (x @ layer.gate.T).softmax(-1)
    torch.testing.assert_close(layer(x), torch.einsum("ne,enm->nm", gates, each))


@pytest.mark.torch
def test_a_gate_of_zero_takes_the_first_experts():
    pytest.importorskip("torch")
    layer = torch_layer(gate=False, experts=6)
    assert not layer.gate.any()
    layer(rows()).sum().backward()
    used = layer.factors[0].grad.flatten(1).any(1)
    assert used.tolist() == [True, True, False, False, False, False]


@pytest.mark.torch
@pytest.mark.parametrize("norm", [True, "cap"])
def test_weight_norm_caps_each_factor(norm):
    torch = pytest.importorskip("torch")
    layer, x = torch_layer(weight_norm=norm), rows()
    with torch.no_grad():
        layer.factors[0].mul_(100)
    plain = copy.deepcopy(layer)
    plain.weight_norm = False
    with torch.no_grad():
        for factor, cap in zip(plain.factors, layer.caps, strict=True):
            factor.mul_((cap / (factor.square().mean() + 1e-8).sqrt()).clip(max=1))
    torch.testing.assert_close(layer(x), plain(x))
    assert (layer.gains is None) == (norm == "cap")


# ----------------------------------------------------------------------------------------------------------------- loss


def formula(x, gates, top_k, weight=0.01):
    """The auxiliary loss in numpy, one term a layer."""
    terms = []
    for gate in gates:
        logits = x @ gate.T
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        chosen = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
        f = np.bincount(chosen.ravel(), minlength=len(gate)) / chosen.size
        z = np.log(np.exp(logits).sum(1))
        terms.append(len(gate) * (p.mean(0) * f).sum() + 0.1 * (z**2).mean())
    return weight * np.mean(terms)


def two_layers():
    from torch import nn

    return nn.Sequential(torch_layer(12, 12, zero_init=True, bias=False), nn.Identity(), torch_layer(12, 12))


@pytest.mark.torch
def test_the_loss_is_that_of_the_formula():
    torch = pytest.importorskip("torch")
    from structops.torch import router_loss

    model, x = two_layers(), rows()
    with router_loss(model) as balance:
        between = model[0](x)
        model[2](x)
        value = balance()
    assert not between.any()
    gates = [layer.gate.detach().numpy() for layer in (model[0], model[2])]
    assert value.item() == pytest.approx(formula(x.numpy(), gates, 2), rel=1e-12)
    value.backward()
    assert all(layer.gate.grad.any() for layer in (model[0], model[2]))
    with torch.no_grad(), router_loss(model) as balance:
        model(x)
        assert not balance().requires_grad
    assert model[0].collected is None


@pytest.mark.torch
def test_the_loss_is_least_at_uniform_routing():
    torch = pytest.importorskip("torch")
    from structops.torch.routed import balance_loss, top_gates

    logits = 20 * torch.eye(4, dtype=torch.float64)
    z = 0.1 * float(logits.logsumexp(-1).square().mean())
    assert float(balance_loss(logits, top_gates(logits, 1)[1])) == pytest.approx(1 + z)
    skewed = logits[[0, 0, 0, 1]]
    assert float(balance_loss(skewed, top_gates(skewed, 1)[1])) == pytest.approx(4 * (9 + 1) / 16 + z)


@pytest.mark.torch
def test_the_block_says_what_is_wrong():
    pytest.importorskip("torch")
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    from structops.torch import router_loss

    model, x = two_layers(), rows().requires_grad_()
    with pytest.raises(StructureError, match="no RoutedLinear"), router_loss(nn.Linear(2, 2)):
        pass
    with router_loss(model) as balance:
        with pytest.raises(StructureError, match="no routed layer ran"):
            balance()
        with pytest.raises(StructureError, match="already"), router_loss(model):
            pass
        checkpoint(model, x, use_reentrant=True)
        with pytest.raises(GradientError, match="use_reentrant=False"):
            balance()
    assert copy.deepcopy(model)[0].collected is None


@pytest.mark.torch
def test_checkpointing_gives_the_same_gradients():
    torch = pytest.importorskip("torch")
    from torch.utils.checkpoint import checkpoint

    from structops.torch import router_loss

    found = []
    for run in (lambda model, x: model(x), lambda model, x: checkpoint(model, x, use_reentrant=False)):
        for inside in (True, False):
            model = two_layers()
            with router_loss(model) as balance:
                loss = run(model, rows()).square().mean() + balance()
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
            found.append([p.grad for p in model.parameters()])
    for others in found[1:]:
        torch.testing.assert_close(others, found[0])


@pytest.mark.torch
def test_compiled_whole():
    torch = pytest.importorskip("torch")
    from structops.torch import router_loss

    model, again, x = two_layers(), two_layers(), rows()
    compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for each, module in ((model, model), (again, compiled)):
            each.zero_grad()
            with router_loss(module) as balance:
                loss = module(x).square().mean() + balance()
            loss.backward()
        for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.torch
def test_under_ddp(tmp_path):
    torch = pytest.importorskip("torch")
    import torch.distributed as dist

    from structops.torch import router_loss

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, x = two_layers(), rows()
        wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        for module in (model, wrapped):
            with router_loss(module) as balance:
                (module(x).square().mean() + balance()).backward()
        for mine, theirs in zip(model.parameters(), wrapped.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
    finally:
        dist.destroy_process_group()


@pytest.mark.torch
def test_it_is_no_operator():
    torch = pytest.importorskip("torch")
    for wrong in (
        lambda: so.project(torch.eye(16), Routed()),
        lambda: so.random(Routed(), (16, 16), like=torch.zeros(1)),
    ):
        with pytest.raises(StructureError, match="RoutedLinear"):
            wrong()


@pytest.mark.torch
def test_vmap_takes_the_masked_way():
    torch = pytest.importorskip("torch")
    layer, x = torch_layer(), rows(6)
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x))


@pytest.mark.torch
@pytest.mark.parametrize("dispatch", ["masked", "gathered"])
def test_half_precision_routes_in_single(dispatch):
    torch = pytest.importorskip("torch")
    layer, x = torch_layer(dispatch=dispatch), rows()
    half = copy.deepcopy(layer).to(torch.bfloat16)
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert half.logits(x.bfloat16()).dtype == torch.float32
    single = layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        cast = single(x.float())
        assert single.logits(x.float()).dtype == torch.float32
    assert cast.dtype == torch.bfloat16
    torch.testing.assert_close(cast.float(), single(x.float()), rtol=0.05, atol=0.1)


@pytest.mark.torch
def test_training_comes_to_use_several_experts():
    torch = pytest.importorskip("torch")
    from structops.torch import param_groups, router_loss
    from structops.torch.routed import top_gates

    torch.manual_seed(0)
    layer = torch_layer(16, 16, gate=False, dtype=torch.float32)
    x = torch.randn(256, 16)
    target = torch.where(x[:, :1] > 0, x @ torch.randn(16, 16), x @ torch.randn(16, 16)) / 4
    optimizer = torch.optim.Adam(param_groups(layer, lr=1e-2))
    losses = []
    for _ in range(60):
        with router_loss(layer) as balance:
            error = (layer(x) - target).square().mean()
            loss = error + balance()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(error.item())
    counts = torch.bincount(top_gates(layer.logits(x), 2)[1].flatten(), minlength=4)
    assert losses[-1] < 0.6 * losses[0]
    assert (counts > 25).sum() >= 3


# ------------------------------------------------------------------------------------------------- what is around them


def test_scales_are_those_of_one_expert(backend):
    if backend == "torch":
        from structops.torch import RoutedLinear, StructuredLinear, plan

        layer, single = RoutedLinear(256, 1024), StructuredLinear(256, 1024, "btt")
        stds = [float(f.detach().std()) for f in layer.factors]
    else:
        from flax import nnx

        from structops.jax import RoutedLinear, StructuredLinear, plan

        layer = RoutedLinear(256, 1024, rngs=nnx.Rngs(0))
        single = StructuredLinear(256, 1024, "btt", rngs=nnx.Rngs(0))
        stds = [float(f[...].std()) for f in layer.factors]
    for optimizer in ("adam", "sgd", "muon"):
        for base in (None, 64):
            mine, theirs = plan(layer, optimizer, base=base), plan(single, optimizer, base=base)
            for name in ("factors.0", "factors.1"):
                assert mine[name].init_std == theirs[name].init_std
                assert mine[name].lr_scale == theirs[name].lr_scale
    assert stds == pytest.approx(layer.spec.expert_scales(256, 1024), rel=0.02)
    assert plan(layer)["gate"].lr_scale == 1
    assert plan(layer)["gate"].init == "zero"
    assert plan(layer, base=64)["gate"].lr_scale == 64 / 256  # as a dense readout of growing fan-in
    assert not plan(layer).warnings


@pytest.mark.torch
def test_a_plan_and_its_init_reach_every_parameter():
    torch = pytest.importorskip("torch")
    from structops.mup import Rule
    from structops.torch import init_, param_groups, plan

    layer = torch_layer(16, 16, weight_norm=True, zero_init=True)
    assert {row.name for row in plan(layer)} == {name for name, _ in layer.named_parameters()}
    assert sum(len(group["params"]) for group in param_groups(layer)) == 5
    assert not layer.factors[1].any()
    init_(layer, plan(layer, Rule(init="orthogonal")))
    assert not layer.gate.any()
    block = layer.factors[0][2, 1].detach()
    torch.testing.assert_close(block @ block.T, torch.eye(4, dtype=torch.float64))
    base, wide = torch_layer(16, 16), torch_layer(64, 64)
    assert plan(wide, base=base)["factors.0"].lr_scale == 1 / 2


@pytest.mark.torch
def test_converting_leaves_it_alone():
    from torch import nn

    from structops.torch import structurize, survey

    model = nn.Sequential(nn.Linear(16, 16), torch_layer(16, 16))
    before = {name: p.clone() for name, p in model[1].named_parameters()}
    structurize(model, "btt", select="*")
    assert type(model[1]).__name__ == "RoutedLinear"
    assert all((before[name] == p).all() for name, p in model[1].named_parameters())
    assert "1.gate" in str(survey(model))


@pytest.mark.torch
def test_saved_and_loaded(tmp_path):
    torch = pytest.importorskip("torch")
    from structops.torch import RoutedLinear, load, save_pretrained

    layer, x = torch_layer(), rows()
    other = RoutedLinear(12, 20, "btt", 4, 2, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    assert (other(x) == layer(x)).all()
    save_pretrained(layer, tmp_path)
    again = load(tmp_path, lambda: RoutedLinear(12, 20, "btt", 4, 2))
    assert (again(x) == layer(x)).all()
    with pytest.raises(so.CheckpointError):
        load(tmp_path, lambda: RoutedLinear(12, 20, "btt", 5, 2))
    with torch.device("meta"):
        empty = RoutedLinear(12, 20)
    assert empty(torch.zeros(3, 12, device="meta")).shape == (3, 20)
    empty.to_empty(device="cpu").reset_parameters()
    assert not empty(torch.zeros(3, 12)).any()
    assert "routed(structure=btt, experts=8, top_k=2)" in repr(empty)
    with pytest.raises(StructureError, match="'gathered'"):
        RoutedLinear(12, 20, dispatch="fast")


# ------------------------------------------------------------------------------------------------------------------ JAX


@pytest.mark.torch
@pytest.mark.jax
@pytest.mark.parametrize("member", ["btt(rank=2)", "blast(rank=3, blocks=2)"])
def test_jax_equals_torch(member):
    pytest.importorskip("torch")
    jax = pytest.importorskip("jax")
    from flax import nnx

    from structops.jax import RoutedLinear, router_loss
    from structops.torch import router_loss as torch_loss

    theirs, x = torch_layer(member=member, weight_norm=True), rows()
    mine = RoutedLinear(12, 20, member, 4, 2, weight_norm=True, param_dtype="float64", rngs=nnx.Rngs(0))
    for k, factor in enumerate(theirs.factors):
        mine.factors[k][...] = jax.numpy.asarray(factor.detach().numpy())
    mine.gate[...] = jax.numpy.asarray(theirs.gate.detach().numpy())
    mine.bias[...] = jax.numpy.asarray(theirs.bias.detach().numpy())

    def loss(model, x):
        return (model(x) ** 2).mean() + router_loss(model)

    value, grads = nnx.jit(nnx.value_and_grad(loss))(mine, jax.numpy.asarray(x.numpy()))
    with torch_loss(theirs) as balance:
        expected = theirs(x).square().mean() + balance()
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(grads["gate"][...], theirs.gate.grad.numpy(), atol=1e-12)
    for k, factor in enumerate(theirs.factors):
        np.testing.assert_allclose(grads["factors"][k][...], factor.grad.numpy(), atol=1e-12)


@pytest.mark.jax
def test_jax_scan_over_layers():
    jax = pytest.importorskip("jax")
    from flax import nnx

    from structops.jax import RoutedLinear, router_loss, scale_by_mup

    x = jax.random.normal(jax.random.key(1), (6, 16))

    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        layer = RoutedLinear(16, 16, experts=4, param_dtype="float64", rngs=nnx.Rngs(key))
        layer.gate[...] = jax.random.normal(key, layer.gate.shape, layer.gate.dtype)
        return layer

    stack = make(jax.random.split(jax.random.key(0), 2))

    def scanned(stack, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def step(x, layer):
            return x + layer(x)

        return (step(x, stack) ** 2).mean() + router_loss(stack)

    def looped(layers, x):
        for layer in layers:
            x = x + layer(x)
        return (x**2).mean() + sum(router_loss(layer) for layer in layers) / 2

    graph, state = nnx.split(stack)
    layers = nnx.List([nnx.merge(graph, jax.tree.map(lambda a, k=k: a[k], state)) for k in range(2)])
    value, grads = nnx.jit(nnx.value_and_grad(scanned))(stack, x)
    expected, others = nnx.jit(nnx.value_and_grad(looped))(layers, x)
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    for k in range(2):
        np.testing.assert_allclose(grads["gate"][...][k], others[k]["gate"][...], atol=1e-12)
    transform = scale_by_mup(stack)
    updates, _ = transform.update(grads, transform.init(grads))
    np.testing.assert_allclose(updates["factors"][0][...], 2 * grads["factors"][0][...])
    np.testing.assert_allclose(updates["gate"][...], grads["gate"][...])


@pytest.mark.jax
def test_jax_reads_without_writing():
    jax = pytest.importorskip("jax")
    from flax import nnx

    from structops.jax import RoutedLinear, router_loss

    layer = RoutedLinear(16, 8, rngs=nnx.Rngs(0), dtype="bfloat16")
    layer.eval()
    x = jax.numpy.ones((5, 2, 16))
    y = jax.jit(lambda x: layer(x))(x)
    assert (y.shape, y.dtype) == ((5, 2, 8), jax.numpy.bfloat16)
    assert jax.vmap(layer)(x).shape == (5, 2, 8)
    assert layer(jax.numpy.zeros((0, 16))).shape == (0, 8)
    assert not layer.balance[...]
    layer.gate[...] = jax.numpy.ones_like(layer.gate[...])
    layer.reset_parameters(nnx.Rngs(1))
    assert not layer.gate[...].any()
    with pytest.raises(StructureError, match="no RoutedLinear"):
        router_loss(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ShapeError, match="16"):
        layer(jax.numpy.ones((5, 15)))


@pytest.mark.torch
def test_a_gate_is_a_readout_of_the_dense_layer_in_the_base_model() -> None:
    import torch
    from torch import nn

    from structops.torch import RoutedLinear, plan

    with torch.device("meta"):
        model = nn.Sequential(RoutedLinear(256, 256), nn.GELU(), nn.Linear(256, 10))
        base = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    rates = {row.name: row.lr_scale for row in plan(model, base=base)}
    assert rates["0.gate"] == rates["2.weight"] == 64 / 256
    assert rates["0.factors.0"] == pytest.approx(64 / 16 / 2)  # of one expert, of modes of 16
