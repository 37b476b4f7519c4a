"""The plan of JAX models, and what optax makes of it."""

from functools import lru_cache

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="needs JAX")
pytest.importorskip("flax", reason="needs Flax")

import equinox as eqx  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

import structops as so  # noqa: E402
import structops.jax as soj  # noqa: E402
from structops.jax.optimizer import matrix_axes  # noqa: E402
from structops.mup import FAMILIES, MupPlan, Rule  # noqa: E402

pytestmark = pytest.mark.jax

SPECS = ("btt(rank=2)", "low_rank(rank=4)", "kron", "tt(rank=2)", "monarch(blocks=4)", "dense")


class Net(nnx.Module):
    """Embedding, structured and dense layers in a list, a norm, a gain and a head."""

    def __init__(self, width, specs=SPECS, zero_init=False):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(10, width, rngs=rngs)
        self.layers = nnx.List(
            [soj.StructuredLinear(width, width, spec, zero_init=zero_init, rngs=rngs) for spec in specs]
        )
        self.up, self.norm = nnx.Linear(width, 4 * width, rngs=rngs), nnx.LayerNorm(4 * width, rngs=rngs)
        self.gain = nnx.Param(jnp.ones(()))
        self.head = nnx.Linear(4 * width, 10, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(self.up(x))) * self.gain[...]


@lru_cache
def abstract(width, specs=SPECS, zero_init=False):
    return nnx.eval_shape(lambda: Net(width, specs, zero_init))


@lru_cache
def torch_net(width, specs=SPECS, zero_init=False):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    from structops.torch import StructuredLinear

    net = torch.nn.Module()
    net.embed = torch.nn.Embedding(10, width)
    net.layers = torch.nn.ModuleList([StructuredLinear(width, width, s, zero_init=zero_init) for s in specs])
    net.up, net.norm = torch.nn.Linear(width, 4 * width), torch.nn.LayerNorm(4 * width)
    net.gain = torch.nn.Parameter(torch.ones(()))
    net.head = torch.nn.Linear(4 * width, 10, bias=False)
    return net


def numbers(row):
    factor = row.weight.factor
    return (
        *(row.optimizer, row.init, row.init_std, row.lr_scale, row.wd_scale, row.eps_scale),
        *(row.weight.role, row.weight.position, row.weight.count, row.weight.zero, row.weight.known),
        *(factor.blocks, factor.fan_in, factor.fan_out, factor.sharing),
    )


def in_torch(name):
    """The name of a parameter in PyTorch."""
    parent, _, key = name.rpartition(".")
    key = {"kernel": "weight", "embedding": "weight", "scale": "weight"}.get(key, key)
    return f"{parent}.{key}" if parent else key


@pytest.mark.parametrize("base", [None, 16, "absolute", "model"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_plan_in_torch(family, base):
    rule = Rule(family, block_count=True, share_exponent=0.5, init="orthogonal", scale_eps=True)
    theirs = torch_net(64, zero_init=True), torch_net(16)
    from structops.torch import plan as torch_plan

    twin = torch_plan(theirs[0], rule, base=theirs[1] if base == "model" else base)
    ours = soj.plan(abstract(64, zero_init=True), rule, base=abstract(16) if base == "model" else base)
    assert {in_torch(row.name): numbers(row) for row in ours} == {row.name: numbers(row) for row in twin}
    assert ours.reference == twin.reference


@pytest.mark.parametrize("family", FAMILIES)
def test_at_base_every_scale_is_one(family):
    for row in soj.plan(abstract(16), Rule(family), base=abstract(16)):
        assert row.lr_scale == 1
    assert {row.lr_scale for row in soj.plan(abstract(16, ("dense",)), Rule(family))} == {1.0}


def test_names_are_the_paths_of_the_state_also_of_abstract_and_tied_models():
    class Tied(nnx.Module):
        def __init__(self):
            self.net = Net(16)
            self.attend = nnx.MultiHeadAttention(2, 16, decode=False, rngs=nnx.Rngs(0))
            self.zlast, self.again = nnx.Linear(16, 64, rngs=nnx.Rngs(0)), self.net.layers
            self.zlast.kernel = self.net.up.kernel
            self.drop, self.batch = nnx.Dropout(0.1, rngs=nnx.Rngs(1)), nnx.BatchNorm(16, rngs=nnx.Rngs(0))

    model = Tied()
    plan = soj.plan(model)
    state = nnx.state(model, nnx.Param)
    assert [row.name for row in plan] == [".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    assert soj.plan(nnx.eval_shape(Tied)) == plan
    # One layer that stands in two places ties nothing; a kernel that two layers own is tied.
    assert [row.name for row in plan if row.weight.tied] == ["net.up.kernel"]
    assert plan["attend.value.kernel"].weight.out_features == 16
    assert MupPlan.from_json(plan.to_json()) == plan


def test_modules_that_are_no_trees_and_modules_within_trees():
    class Graph(nnx.Module, pytree=False):
        def __init__(self):
            self.layers = [nnx.Linear(3, 5, rngs=nnx.Rngs(0)), soj.StructuredLinear(16, 16, "btt", rngs=nnx.Rngs(0))]

    plan = soj.plan(Graph(), base=8)
    names = ["layers.0.bias", "layers.0.kernel", "layers.1.bias", "layers.1.factors.0", "layers.1.factors.1"]
    assert [row.name for row in plan] == names
    assert plan["layers.1.factors.0"].lr_scale == 1.0
    tree = {"layers": Graph().layers}
    assert soj.plan(tree, base=8) == plan
    moved = soj.scale_by_mup(tree, base=8).update(tree, optax.EmptyState())[0]
    np.testing.assert_allclose(moved["layers"][0].kernel[...], tree["layers"][0].kernel[...] * 8 / 3, rtol=1e-6)


def test_layers_of_nnx():
    rngs = nnx.Rngs(0)
    model = nnx.Dict(
        general=nnx.LinearGeneral((3, 5), (4, 2), axis=(-2, -1), rngs=rngs),
        conv=nnx.Conv(6, 4, (3, 3), feature_group_count=2, rngs=rngs),
        back=nnx.ConvTranspose(6, 4, (3,), rngs=rngs),
        norm=nnx.GroupNorm(8, num_groups=2, rngs=rngs),
        einsum=nnx.Einsum("nta,hab->nthb", (8, 2, 4), (8, 4), rngs=rngs),
        normed=soj.StructuredLinear(16, 16, "btt", weight_norm=True, rngs=rngs),
    )
    rows = {w.name: w for w in soj.weights(model)}
    sizes = {n: (w.role, w.factor.blocks, w.factor.fan_in, w.factor.fan_out, w.known) for n, w in rows.items()}
    assert sizes == {
        "back.bias": ("vector", 1, 1, 4, True),
        "back.kernel": ("hidden", 1, 18, 4, True),
        "conv.bias": ("vector", 1, 1, 4, True),
        "conv.kernel": ("hidden", 2, 27, 2, True),
        "einsum.bias": ("hidden", 1, 8, 4, False),
        "einsum.kernel": ("hidden", 8, 2, 4, False),
        "general.bias": ("vector", 1, 1, 8, True),
        "general.kernel": ("hidden", 1, 15, 8, True),
        "norm.bias": ("vector", 1, 1, 8, True),
        "norm.scale": ("vector", 1, 1, 8, True),
        "normed.bias": ("vector", 1, 1, 16, True),
        "normed.factors.0": ("hidden", 4, 4, 4, True),
        "normed.factors.1": ("hidden", 4, 4, 4, True),
        "normed.gains": ("scalar", 1, 1, 1, True),
    }
    assert matrix_axes(rows["general.kernel"]) == ((-4, -3), (-2, -1))
    assert matrix_axes(rows["conv.kernel"]) == ((-4, -3, -2), (-1,))
    assert any("M001 einsum.kernel" in warning for warning in soj.plan(model).warnings)


def test_layers_stacked_for_a_scan_keep_their_sizes():
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(key):
        rngs = nnx.Rngs(key)
        return nnx.Dict(a=soj.StructuredLinear(16, 16, "btt", rngs=rngs), b=nnx.Linear(16, 4, rngs=rngs))

    model = stack(jax.random.split(jax.random.key(0), 3))
    single = nnx.Dict(a=soj.StructuredLinear(16, 16, "btt", rngs=nnx.Rngs(0)), b=nnx.Linear(16, 4, rngs=nnx.Rngs(0)))
    rule = Rule("muon", init="orthogonal")
    assert soj.plan(model, rule) == soj.plan(single, rule)
    soj.init(model, soj.plan(model, rule), jax.random.key(1))
    blocks = model.a.factors[0][...]
    np.testing.assert_allclose(blocks @ blocks.mT, np.broadcast_to(np.eye(4), (3, 4, 4, 4)), atol=1e-5)


# ------------------------------------------------------------------------------------------- equinox and plain trees


class EqxNet(eqx.Module):
    """A layer of the user's own, with a static plan and a list of factors, and layers of Equinox."""

    factors: list
    plan: so.spec.Plan = eqx.field(static=True)
    embed: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear
    activation: object

    def __init__(self, width, key=None):
        keys = jax.random.split(jax.random.key(0) if key is None else key, 4)
        self.activation = jax.nn.gelu
        self.plan = so.structure("btt").plan(width, 4 * width)
        self.factors = [jax.random.normal(k, s) for k, s in zip(keys[:2], self.plan.stored_shapes, strict=True)]
        self.embed = eqx.nn.Embedding(10, width, key=keys[2])
        self.norm, self.head = eqx.nn.LayerNorm(4 * width), eqx.nn.Linear(4 * width, 10, key=keys[3])

    def __call__(self, token):
        return self.head(self.norm(self.activation(self.plan.apply(self.factors, self.embed(token)))))


def plain(width):
    """The same parameters as a dict, and what they are."""
    net = EqxNet(width)
    tree = {"up": net.factors, "embed": net.embed.weight, "norm": {"scale": net.norm.weight, "bias": net.norm.bias}}
    tree["head"] = {"kernel": net.head.weight.T, "bias": net.head.bias}
    return tree, {"up": net.plan, "head.kernel": (4 * width, 10)}


def test_equinox_and_plain_trees_have_the_plan_of_nnx():
    rngs = nnx.Rngs(0)
    flax = nnx.Dict(
        up=soj.StructuredLinear(64, 256, "btt", bias=False, rngs=rngs),
        embed=nnx.Embed(10, 64, rngs=rngs),
        norm=nnx.LayerNorm(256, rngs=rngs),
        head=nnx.Linear(256, 10, rngs=rngs),
    )
    tree, specs = plain(64)
    roles = {"embed": "embedding"}
    names = {"factors.": "up.factors.", "embed.weight": "embed.embedding", "norm.weight": "norm.scale"}
    names |= {"head.weight": "head.kernel", "up.": "up.factors."}
    plain_base = soj.weights(plain(16)[0], roles, plain(16)[1])
    for base in (None, 16, "absolute", "model"):
        small = nnx.eval_shape(
            lambda: nnx.Dict(
                up=soj.StructuredLinear(16, 64, "btt", bias=False, rngs=nnx.Rngs(0)),
                embed=nnx.Embed(10, 16, rngs=nnx.Rngs(0)),
                norm=nnx.LayerNorm(64, rngs=nnx.Rngs(0)),
                head=nnx.Linear(64, 10, rngs=nnx.Rngs(0)),
            )
        )
        want = {r.name: numbers(r) for r in soj.plan(flax, "sgd", base=small if base == "model" else base)}
        ours = soj.plan(EqxNet(64), "sgd", base=EqxNet(16) if base == "model" else base)
        dicts = soj.plan(tree, "sgd", base=plain_base if base == "model" else base, roles=roles, specs=specs)
        assert not dicts.warnings
        for found in (ours, dicts):
            got = {row.name: numbers(row) for row in found}
            for old, new in names.items():
                got = {
                    (new + name.removeprefix(old) if name.startswith(old) and not name.startswith(new) else name): row
                    for name, row in got.items()
                }
            got = {("embed.embedding" if name == "embed" else name): row for name, row in got.items()}
            assert got == want


def test_layers_of_equinox():
    key = jax.random.key(0)
    model = {
        "conv": eqx.nn.Conv2d(4, 6, 3, groups=2, key=key),
        "scalar": eqx.nn.Linear("scalar", 4, key=key),
        "cell": eqx.nn.GRUCell(3, 4, key=key),
    }
    sizes = {w.name: (w.role, *w.factor.stored_shape, w.known) for w in soj.weights(model)}
    assert sizes == {
        "cell.weight_ih": ("hidden", 1, 12, 3, False),
        "cell.weight_hh": ("hidden", 1, 12, 4, False),
        "cell.bias": ("vector", 1, 12, 1, True),
        "cell.bias_n": ("vector", 1, 4, 1, True),
        "conv.weight": ("hidden", 2, 3, 18, True),
        "conv.bias": ("vector", 1, 6, 1, True),
        "scalar.weight": ("hidden", 1, 4, 1, True),
        "scalar.bias": ("vector", 1, 4, 1, True),
    }


def test_what_nothing_tells_is_guessed_and_said():
    plan = soj.plan({"w": jnp.zeros((8, 4)), "b": jnp.zeros(4), "steps": jnp.zeros((), jnp.int32)})
    assert [row.name for row in plan] == ["b", "w"]
    assert plan["w"].weight.in_features == 8
    assert not plan["w"].weight.known
    assert plan.warnings[0].startswith("M001 w")
    assert soj.plan({"w": jnp.zeros((8, 4))}, roles={"w": "readout"}).warnings == ()
    turned = soj.weights({"w": jnp.zeros((8, 4))}, specs={"w": (4, 8)})[0]
    assert matrix_axes(turned) == ((-1,), (-2,))


def test_zero_marks_dense_weights_and_last_factors():
    plan = soj.plan(abstract(16, ("low_rank(rank=4)",)), zero=("layers.0", "head"))
    assert [row.name for row in plan if row.init == "zero"] == ["head.kernel", "layers.0.factors.1"]
    assert plan["layers.0.factors.0"].init_std == 1 / 4  # the exception: 1 / sqrt(fan_in), not sqrt(rank) / fan_in


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"roles": {"head": "output"}}, "roles: expected one of hidden"),
        ({"roles": {"tail": "readout"}}, "roles: 'tail' fits no parameter"),
        ({"zero": "tail"}, "zero: 'tail' fits no parameter"),
        ({"specs": {"tail": (3, 4)}}, "specs: 'tail' fits no parameter"),
        ({"specs": {"head": (3, 4)}}, r"specs: head has shape \(8, 2\), which is no weight of 3 inputs, 4 outputs"),
        ({"specs": {"head": "btt"}}, r"expected a Plan or a pair \(in_features, out_features\), got 'btt'"),
        ({"specs": {"up": so.structure("btt").plan(16, 16)}}, "specs: 'up' expects stored factors of shapes"),
        ({"base": 3.5}, "base is None, a fan-in, 'absolute' or the base model, got 3.5"),
        ({"base": "relative"}, "base is None"),
        ({"base": {}}, "dict has none"),
        ({"base": {"tail": jnp.zeros((3, 4))}}, "the base model has no layer 'head'"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(so.StructureError, match=message):
        soj.plan({"head": jnp.zeros((8, 2)), "up": [jnp.zeros((1, 3, 4))]}, **arguments)


# ---------------------------------------------------------------------------------------------------------------- optax


def models():
    tree, specs = plain(16)
    equinox = eqx.filter(EqxNet(16), eqx.is_array)
    return {
        "nnx": (nnx.state(Net(16), nnx.Param), soj.plan(abstract(16), base=8)),
        "equinox": (equinox, soj.plan(EqxNet(16), base=8)),
        "dict": (tree, soj.plan(tree, base=8, specs=specs)),
        "array": (jnp.ones((4, 4)), soj.plan(jnp.ones((4, 4)), base=8)),
        "variable": (nnx.Param(jnp.ones((4, 4))), soj.plan(nnx.Param(jnp.ones((4, 4))), base=8)),
    }


def named(tree):
    """Leaves by dotted name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    return {name.removesuffix("value").removesuffix("."): leaf for name, (_, leaf) in zip(names, leaves, strict=True)}


@pytest.mark.parametrize("kind", ["nnx", "equinox", "dict", "array", "variable"])
def test_updates_are_scaled_on_every_leaf_under_jit(kind):
    tree, plan = models()[kind]
    ones = jax.tree.map(jnp.ones_like, tree)
    scaling = soj.scale_by_mup(None, plan)
    assert jax.tree.leaves(scaling.init(tree)) == []
    step = jax.jit(lambda updates: scaling.update(updates, scaling.init(tree))[0])
    moved = named(step(ones))
    assert set(moved) == {row.name for row in plan}
    for row in plan:
        np.testing.assert_allclose(moved[row.name], row.lr_scale, rtol=1e-6)
    sgd = soj.partition(lambda lr, weight_decay: optax.sgd(lr), plan, lr=1.0)
    again = named(jax.jit(sgd.update)(ones, sgd.init(tree))[0])
    for row in plan:
        np.testing.assert_allclose(again[row.name], -row.lr_scale, rtol=1e-6)


def test_updates_of_another_model_are_refused():
    scaling = soj.scale_by_mup(abstract(16, ("btt",)))
    with pytest.raises(so.StructureError, match="the plan has no parameter 'tail'; it is that of another model"):
        scaling.update({"tail": jnp.ones(3)}, scaling.init({}))


@pytest.mark.parametrize("decay", ["independent", "sqrt", "coupled"])
def test_weight_decay_follows_the_policy(decay):
    net = Net(64, ("btt",))
    plan = soj.plan(net, Rule(decay=decay))
    params = jax.tree.map(jnp.ones_like, nnx.state(net, nnx.Param))
    transform = soj.partition(optax.adamw, plan, lr=0.1, weight_decay=0.5)
    updates, _ = transform.update(jax.tree.map(jnp.zeros_like, params), transform.init(params), params)
    shrunk = named(updates)
    power = {"independent": 0.5, "sqrt": 0.5 * 4**0.5, "coupled": 4.0}[decay]  # of two factors with four times the rate
    np.testing.assert_allclose(shrunk["layers.0.factors.0"], -0.05 * power, rtol=1e-6)
    np.testing.assert_allclose(shrunk["up.kernel"], -0.05, rtol=1e-6)
    for name in ("up.bias", "norm.scale", "gain"):
        assert not shrunk[name].any()


def test_partition_takes_schedules_eps_and_an_optimiser_for_the_rest():
    net = Net(16, ("btt",))
    params = jax.tree.map(jnp.ones_like, nnx.state(net, nnx.Param))
    made = []

    def maker(name):
        def make(lr, weight_decay, eps):
            made.append((name, float(lr(0)), weight_decay, eps))
            return optax.sgd(lr)

        return make

    plan = soj.plan(net, Rule("muon", scale_eps=True))
    transform = soj.partition(
        maker("muon"),
        plan,
        lr=lambda count: 1.0 / (1 + count),
        adam_lr=lambda count: 10.0,
        weight_decay=0.1,
        eps=1e-8,
        make_adam=maker("adam"),
    )
    want = {
        (
            "muon" if row.optimizer == "muon" else "adam",
            (1.0 if row.optimizer == "muon" else 10.0) * row.lr_scale,
            0.1 * row.wd_scale,
            1e-8 * row.eps_scale,
        )
        for row in plan
    }
    assert set(made) == want
    assert len(made) == len(want)  # one transformation for every distinct one
    state = transform.init(params)
    for count in range(2):
        updates, state = transform.update(params, state)
        np.testing.assert_allclose(named(updates)["up.kernel"], -1 / (1 + count), rtol=1e-6)
        np.testing.assert_allclose(named(updates)["head.kernel"], -10.0, rtol=1e-6)


def test_steps_equal_those_of_torch():
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    from structops.torch import StructuredLinear, param_groups
    from structops.torch import plan as torch_plan

    flax = nnx.Dict(
        up=soj.StructuredLinear(16, 64, "btt(rank=2)", param_dtype=jnp.float64, rngs=nnx.Rngs(0)),
        down=soj.StructuredLinear(64, 16, "low_rank(rank=4)", param_dtype=jnp.float64, rngs=nnx.Rngs(1)),
    )
    twin = torch.nn.ModuleDict({})
    twin["up"] = StructuredLinear(16, 64, "btt(rank=2)", dtype=torch.float64)
    twin["down"] = StructuredLinear(64, 16, "low_rank(rank=4)", dtype=torch.float64)
    graph, params = nnx.split(flax)
    start = named(params)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(start[name])))
    x = np.random.default_rng(0).standard_normal((8, 16))

    optimizer = torch.optim.AdamW(param_groups(twin, torch_plan(twin, base=8), lr=1e-2, weight_decay=0.1))
    transform = soj.partition(optax.adamw, soj.plan(flax, base=8), lr=1e-2, weight_decay=0.1)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)

        def loss(params):
            model = nnx.merge(graph, params)
            return ((model.down(jnp.tanh(model.up(jnp.asarray(x)))) - x) ** 2).sum()

        updates, state = transform.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = transform.init(params)
    for _ in range(5):
        params, state = step(params, state)
        optimizer.zero_grad()
        inputs = torch.from_numpy(x)
        ((twin["down"](torch.tanh(twin["up"](inputs))) - inputs) ** 2).sum().backward()
        optimizer.step()
    assert len(traces) == 1
    ours = named(params)
    for name, parameter in twin.named_parameters():
        np.testing.assert_allclose(ours[name], parameter.detach().numpy(), atol=1e-10)
        assert np.abs(ours[name] - start[name]).max() > 1e-3


# ----------------------------------------------------------------------------------------------------------------- muon


def test_muon_orthogonalises_every_block():
    layer = soj.StructuredLinear(64, 256, "btt(rank=2)", rngs=nnx.Rngs(0))
    plan = soj.plan(layer, "muon")
    params = nnx.state(layer, nnx.Param)
    gradient = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)
    muon = optax.contrib.muon(1.0, ns_steps=12, muon_weight_dimension_numbers=soj.muon_dims(plan))
    update, _ = jax.jit(muon.update)(gradient, muon.init(params), params)
    for k, factor in enumerate(layer.plan.factors):
        blocks = -named(update)[f"factors.{k}"]
        assert blocks.shape == (factor.blocks, factor.fan_out, factor.fan_in)
        values = np.linalg.svd(np.asarray(blocks), compute_uv=False) / max(1, factor.fan_out / factor.fan_in) ** 0.5
        assert values.min() > 0.6  # optax's iteration stops between 0.7 and 1.2
        assert values.max() < 1.3
    assert named(update)["bias"].any()  # by Adam


def test_dimension_numbers():
    dims = soj.muon_dims(soj.plan(abstract(16, ("btt",)), "muon"))(nnx.state(abstract(16, ("btt",)), nnx.Param))
    flat = {
        ".".join(map(str, path)): leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
        for path, leaf in nnx.to_flat_state(dims)
    }
    numbers = optax.contrib.MuonDimensionNumbers
    assert {name for name, dim in flat.items() if dim is not None} == {
        *("layers.0.factors.0", "layers.0.factors.1", "up.kernel")
    }
    assert flat["layers.0.factors.0"] == numbers((-1,), (-2,))
    assert flat["up.kernel"] == numbers((-2,), (-1,))
    with pytest.raises(so.StructureError, match="an optimiser of matrices"):
        soj.muon_dims(soj.plan(abstract(16, ("btt",))))


@pytest.mark.parametrize("how", ["chain", "partition"])
def test_muon_trains(how):
    model = Net(16, ("btt", "kron"))
    plan = soj.plan(model, "muon")
    dims = soj.muon_dims(plan)
    if how == "chain":
        muon = optax.contrib.muon(0.02, adam_learning_rate=3e-3, muon_weight_dimension_numbers=dims)
        transform = optax.chain(muon, soj.scale_by_mup(plan))
    else:

        def muon(lr, weight_decay):
            return optax.contrib.muon(lr, weight_decay=weight_decay, muon_weight_dimension_numbers=dims)

        transform = soj.partition(muon, plan, lr=0.02, weight_decay=0.01, make_adam=optax.adamw, adam_lr=3e-3)
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    tokens = jnp.arange(10)
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)

        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(tokens), (3 * tokens) % 10).mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    losses = [float(step(model, optimizer)) for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]
    assert len(traces) == 1


# ----------------------------------------------------------------------------------------------------------------- init


@pytest.mark.parametrize("how", ["paper", "orthogonal", "kaiming"])
def test_init_is_that_of_the_plan(how):
    model = Net(64, (*SPECS, "toeplitz"), zero_init=True)
    before = named(jax.tree.map(jnp.copy, nnx.state(model, nnx.Param)))
    plan = soj.plan(model, Rule(init=how), zero="head")
    assert soj.init(model, plan, jax.random.key(3)) is model
    after = named(nnx.state(model, nnx.Param))
    for row in plan:
        array = np.asarray(after[row.name])
        if row.init == "constant":
            assert (array == before[row.name]).all()
        elif row.init == "zero":
            assert not array.any()
        elif row.init == "orthogonal" and "toeplitz" not in row.weight.structure:
            factor = row.weight.factor
            values = np.linalg.svd(array, compute_uv=False)
            np.testing.assert_allclose(values, (factor.fan_out / factor.fan_in) ** 0.5, rtol=1e-4)
        else:
            assert array.std() == pytest.approx(row.init_std, rel=5 / array.size**0.5)


def test_init_of_trees_makes_new_ones_and_depends_on_key_and_name_alone():
    model = EqxNet(16)
    plan = soj.plan(model, Rule(init="orthogonal"))
    first, again, other = (soj.init(model, plan, jax.random.key(seed)) for seed in (0, 0, 1))
    assert isinstance(first, EqxNet)
    assert first.activation is model.activation
    for one, same, different in zip(first.factors, again.factors, other.factors, strict=True):
        assert (one == same).all()
        assert not (one == different).any()
    assert not (first.factors[0] == model.factors[0]).any()
    tree = {"a": jnp.zeros((8, 4)), "b": jnp.zeros((8, 4))}
    both = soj.init(tree, soj.plan(tree), jax.random.key(0))
    alone = soj.init({"b": tree["b"]}, soj.plan({"b": tree["b"]}), jax.random.key(0))
    assert (both["b"] == alone["b"]).all()
    assert not (both["a"] == both["b"]).any()
    half = soj.init(
        {"a": jnp.zeros((4, 8, 4), jnp.bfloat16)}, soj.plan(tree, Rule(init="orthogonal")), jax.random.key(0)
    )
    assert half["a"].dtype == jnp.bfloat16


def test_orthogonal_kernels_of_several_axes():
    model = nnx.LinearGeneral((2, 4), (3, 8), axis=(-2, -1), rngs=nnx.Rngs(0))
    soj.init(model, soj.plan(model, Rule(init="orthogonal")), jax.random.key(0))
    values = np.linalg.svd(np.asarray(model.kernel[...]).reshape(8, 24), compute_uv=False)
    np.testing.assert_allclose(values, 3**0.5, rtol=1e-5)


def test_init_refuses_the_plan_of_another_model():
    with pytest.raises(so.StructureError, match="another model"):
        soj.init({"c": jnp.ones(3)}, soj.plan({"a": jnp.ones(3)}), jax.random.key(0))
