"""Calibration and healing of JAX models."""

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="needs JAX")
pytest.importorskip("flax", reason="needs Flax")

import equinox as eqx  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from flax import linen, nnx  # noqa: E402

import structops as so  # noqa: E402
from structops.jax import Calibration, Healing, calibrate, heal, structurize  # noqa: E402
from structops.projection import Moments  # noqa: E402

pytestmark = pytest.mark.jax

X = jax.random.normal(jax.random.key(0), (2, 6, 8), jnp.float64) + 1


class Net(nnx.Module):
    """Two layers with dropout between them, and attention that nobody calls."""

    def __init__(self, rate=0.5):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(8, 16, param_dtype=jnp.float64, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.down = nnx.LinearGeneral((4, 4), 8, axis=(-2, -1), param_dtype=jnp.float64, rngs=rngs)
        self.unused = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x, attention_mask=None):
        x = self.drop(jnp.tanh(self.up(x)))
        return self.down(x.reshape((*x.shape[:-1], 4, 4)))


RUNS = {
    "eager": None,
    "jit": lambda model, batch: nnx.jit(lambda model, x: model(x))(model, batch),
    "vmap": lambda model, batch: jax.vmap(jax.vmap(model))(batch),
    "scan": lambda model, batch: jax.lax.scan(lambda _, x: (None, model(x)), None, batch)[1],
}


@pytest.mark.parametrize("run", RUNS)
def test_moments_of_the_inputs(run):
    model = Net()
    with pytest.warns(so.StructureWarning, match="no vector came to unused; left out"):
        found = calibrate(model, [X[:1], X[1:]], forward=RUNS[run])
    assert set(found) == {"up", "down"}
    rows = X.reshape(-1, 8)
    assert isinstance(found["up"], Moments)
    assert float(found["up"].count) == 12
    np.testing.assert_allclose(found["up"].covariance, rows.T @ rows / 12, rtol=1e-10)
    hidden = jnp.tanh(model.up(rows))  # without dropout: in evaluation mode
    np.testing.assert_allclose(found["down"].covariance, hidden.T @ hidden / 12, rtol=1e-10)
    assert isinstance(model.up, nnx.Linear)
    assert not model.drop.deterministic


def test_masks_weights_and_selection():
    mask = jnp.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    batch = {"x": X, "attention_mask": mask}
    found = calibrate(Net(), [batch], "up")
    rows = X[mask != 0]
    np.testing.assert_allclose(found["up"].covariance, rows.T @ rows / 8, rtol=1e-10)
    ones = calibrate(Net(), [batch, batch], "up", weights=lambda name, x, batch: None, max_batches=1)
    assert float(ones["up"].count) == 12
    assert float(calibrate(Net(), [((X,), {})], ["up"])["up"].count) == 12
    small = structurize(Net(), "block_diag(blocks=2)", "up", calibration=found)
    W = Net().up.kernel[...].T
    expected = so.project(W, "block_diag(blocks=2)", covariance=found["up"].centred)
    np.testing.assert_allclose(small.up.operator().to_dense(), expected.to_dense(), atol=1e-9)


def test_calibration_of_equinox_and_linen():
    mlp = eqx.nn.MLP(8, 4, 16, 1, key=jax.random.key(0))
    found = calibrate(mlp, [X[0]], forward=lambda model, batch: jax.vmap(model)(batch))
    assert {name: moments.features for name, moments in found.items()} == {"layers.0": 8, "layers.1": 16}
    np.testing.assert_allclose(found["layers.0"].mean, X[0].mean(0), rtol=1e-10)

    class Model(linen.Module):
        """One layer."""

        @linen.compact
        def __call__(self, x):
            return linen.Dense(4, name="up")(x)

    params = Model().init(jax.random.key(0), X[0])["params"]
    found = calibrate(params, [X[0]], forward=lambda params, batch: Model().apply({"params": params}, batch))
    np.testing.assert_allclose(found["up"].mean, X[0].mean(0), rtol=1e-6)
    with pytest.raises(so.StructureError, match="give forward="):
        calibrate(params, [X[0]])


def test_errors_of_calibration():
    with pytest.raises(so.StructureError, match="expected an iterable of batches"):
        calibrate(Net(), X)
    with pytest.raises(so.StructureError, match="there is no batch"):
        calibrate(Net(), [])
    with pytest.raises(so.StructureError, match="a batch is an array"):
        calibrate(Net(), ["x"], "up")
    with pytest.raises(so.StructureError, match="no vector came to unused"):
        calibrate(Net(), [X], "unused")
    with pytest.raises(so.EntryError, match="inputs of up are not finite"):
        calibrate(Net(), [X.at[0, 0, 0].set(jnp.nan)], "up")
    stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(8, 8, key=key))(jax.random.split(jax.random.key(0), 3))
    with pytest.raises(so.StructureError, match="stack of layers"):
        calibrate({"a": stack}, [X], "a")


def same(ours, theirs):
    """Two calibrations of the same layers with the same numbers."""
    assert list(ours) == list(theirs)
    for name, moments in ours.items():
        for key, array in moments.arrays().items():
            other = theirs[name].arrays()[key]
            assert isinstance(array, jax.Array)
            assert array.dtype == other.dtype, key
            np.testing.assert_array_equal(array, other)


def test_parts_of_the_data_add_up():
    found = calibrate(Net(), [X], ["up", "down"])
    assert isinstance(found, Calibration)
    both = calibrate(Net(), [X[:1]], ["up", "down"]) + calibrate(Net(), [X[1:]], ["up"])
    assert isinstance(both, Calibration)
    assert set(both) == {"up", "down"}
    assert float(both["up"].count) == 12
    np.testing.assert_allclose(both["up"].covariance, found["up"].covariance, rtol=1e-10)
    assert float(both["down"].count) == 6
    with pytest.raises(TypeError):
        _ = found + {}


def test_a_calibration_there_and_back(tmp_path):
    found, file = calibrate(Net(), [X], ["up", "down"]), tmp_path / "moments.safetensors"
    found.save(file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    back = Calibration.load(file, framework="jax")
    same(back, found)
    device = jax.devices()[-1]
    placed = Calibration.load(file, device, framework="jax")
    same(placed, found)
    assert placed["up"].mean.devices() == {device}
    small = structurize(Net(), "block_diag(blocks=2)", ["up", "down"], calibration=back)
    wanted = structurize(Net(), "block_diag(blocks=2)", ["up", "down"], calibration=found)
    np.testing.assert_array_equal(small.up.operator().to_dense(), wanted.up.operator().to_dense())
    shared = Calibration({"q": found["up"], "down": found["down"], "k": found["up"]})
    assert (shared + shared).groups() == shared.groups() == [["q", "k"], ["down"]]
    assert shared.nbytes == found.nbytes == 8 * (1 + 8 + 64 + 1 + 16 + 256)
    shared.save(file)
    assert file.stat().st_size < found.nbytes + 1000
    again = Calibration.load(file, framework="jax")
    assert again.groups() == shared.groups()
    same(again, shared)
    with pytest.raises(so.BackendError, match="framework is 'torch' or 'jax', got 'numpy'"):
        Calibration.load(file, framework="numpy")


def test_numbers_of_64_bits_are_not_cut(tmp_path):
    calibrate(Net(), [X], "up").save(tmp_path / "wide")
    layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    calibrate(layer, [X.astype(jnp.float32)]).save(tmp_path / "narrow")
    with jax.enable_x64(False):
        with pytest.raises(so.EntryError, match="has numbers of 64 bits, which JAX would cut to float32"):
            Calibration.load(tmp_path / "wide", framework="jax")
        narrow = Calibration.load(tmp_path / "narrow", framework="jax")[""]  # its count is of 64 bits
        assert float(narrow.count) == 12
        assert narrow.count.dtype == narrow.mean.dtype == jnp.float32


@pytest.mark.torch
def test_a_calibration_is_read_by_the_other_library(tmp_path):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    found, file = calibrate(Net(), [X], ["up", "down"]), tmp_path / "moments"
    found.save(file)
    theirs = Calibration.load(file)
    assert list(theirs) == list(found)
    for name, moments in theirs.items():
        assert isinstance(moments.mean, torch.Tensor)
        assert moments.centred.dtype == torch.float64
        np.testing.assert_array_equal(moments.mean, found[name].mean)
    assert theirs.table() == found.table()
    theirs.save(file)
    same(Calibration.load(file, framework="jax"), found)


def test_the_table_of_a_calibration():
    """Effective rank, largest variance and mean of a distribution that is known."""
    x = jnp.concat([jnp.eye(4), -jnp.eye(4)]) * jnp.array([3.0, 1, 1, 1]) + jnp.array([2.0, 0, 0, 0])
    for scale in (1.0, 1e-12):
        found = calibrate(nnx.Linear(4, 1, rngs=nnx.Rngs(0)), [(scale * x).astype(jnp.float32)])
        head, line = found.table().splitlines()
        assert head.split() == ["layer", "inputs", "vectors", "effective", "rank", "top", "mean"]
        # variances 9/4, 1/4, 1/4, 1/4: (12/4)^2 / (84/16); the mean has 4 of 4 + 3
        assert line.split() == ["(the", "model)", "4", "8", "1.7", "75.0%", "57.1%"]
    assert repr(found) == "Calibration(1 layers, 1 different inputs, 88 bytes)"
    constant = calibrate(nnx.Linear(4, 1, rngs=nnx.Rngs(0)), [jnp.ones((3, 4))])
    assert constant.table().splitlines()[1].split()[-3:] == ["0.0", "0.0%", "100.0%"]


# ------------------------------------------------------------------------------------------------------------- healing


def test_healing_brings_the_model_to_its_teacher():
    teacher = Net(0.1)
    model = structurize(teacher, "low_rank(rank=2)", ["up", "down"])
    before = jax.tree.map(jnp.copy, nnx.state(teacher, nnx.Param))
    kept = model.unused.kernel[...]
    done = heal(model, [X], teacher, steps=60, lr=1e-2, match="values")
    assert isinstance(done, Healing)
    assert done.model is model
    assert len(done.losses) == len(done.distances) == 60
    assert done.losses == done.distances
    assert np.mean(done.losses[-10:]) < 0.5 * np.mean(done.losses[:5])
    assert repr(done).startswith("Healing(60 steps, loss ")
    for one, other in zip(jax.tree.leaves(nnx.state(teacher, nnx.Param)), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(model.unused.kernel[...], kept)
    assert model.drop.rngs.count[...] == 60  # dropout was on, with the model's own stream
    assert not model.drop.deterministic


def test_first_loss_and_first_step_are_those_of_the_definition():
    teacher = Net(0.0)
    model = structurize(teacher, "low_rank(rank=2)", ["up", "down"])
    labels = jnp.ones((2, 6, 8))
    mask = jnp.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    batch = {"x": X, "attention_mask": mask}
    ours, theirs = (jax.nn.log_softmax(m(X) / 3, -1) for m in (model, teacher))
    distance = (9 * (jnp.exp(theirs) * (theirs - ours)).sum(-1))[mask != 0].mean()
    error = ((model(X) - labels) ** 2).mean()
    before = [factor[...] for factor in model.up.factors]
    done = heal(
        model,
        [batch],
        teacher,
        steps=1,
        loss=lambda output, batch: ((output - labels) ** 2).mean(),
        alpha=0.25,
        temperature=3.0,
        optimizer=optax.sgd(0.0),
        clip=None,
    )
    np.testing.assert_allclose(done.distances, [distance], rtol=1e-10)
    np.testing.assert_allclose(done.losses, [0.75 * error + 0.25 * distance], rtol=1e-10)
    np.testing.assert_array_equal(model.up.factors[0][...], before[0])
    # Adam moves every number by its learning rate at first: that of the plan.
    heal(model, [X], teacher, steps=1, lr=1e-3, warmup=0, match="values", clip=None)
    moved = jnp.abs(model.up.factors[0][...] - before[0]).max()
    np.testing.assert_allclose(moved, 1e-3 * so.mup.scales(model.up.plan)[0].lr_scale, rtol=1e-3)


def test_healing_of_equinox():
    teacher = eqx.nn.MLP(8, 4, 16, 1, key=jax.random.key(0))
    model = structurize(teacher, "low_rank(rank=2)")
    run = lambda model, batch: jax.vmap(model)(batch)  # noqa: E731
    done = heal(model, list(X), teacher, steps=100, lr=2e-2, forward=run, schedule="linear")
    assert done.losses[-1] < 0.5 * done.losses[0]
    assert jax.tree.structure(done.model) == jax.tree.structure(model)
    assert (done.model.layers[0].factors[0] != model.layers[0].factors[0]).any()


def test_errors_of_healing():
    model, teacher = Net(), Net()
    with pytest.raises(so.StructureError, match="give a teacher"):
        heal(model, [X])
    with pytest.raises(so.StructureError, match="share parameters"):
        heal(model, [X], model)
    with pytest.raises(so.StructureError, match="expected a module of Flax NNX or Equinox, got dict"):
        heal({}, [X], teacher)
    for name, value in {"steps": 0, "alpha": 2, "temperature": 0, "match": "x", "schedule": "x"}.items():
        with pytest.raises(so.StructureError, match=name):
            heal(model, [X], teacher, **{name: value})
    with pytest.raises(so.StructureError, match="no batch after 1 of 2 steps"):
        heal(model, iter([X]), teacher, steps=2)
    with pytest.raises(so.ShapeError, match=r"the model gives \(2, 6, 8\), the teacher \(2, 6, 4\)"):
        heal(model, [X], nnx.Linear(8, 4, rngs=nnx.Rngs(0)), steps=1)
    with pytest.raises(so.StructureError, match="expected an array or an output with logits"):
        heal(model, [X], teacher, steps=1, forward=lambda model, batch: "x")
    before = model.up.kernel[...]
    with pytest.raises(so.EntryError, match="the loss of step 1 is nan"):
        heal(model, [X * jnp.nan], teacher, steps=1)
    np.testing.assert_array_equal(model.up.kernel[...], before)
