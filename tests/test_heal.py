"""`heal`: the loss is the one that is written down, the training does what it says, and all else stays as it was."""

import copy
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="needs PyTorch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

import structops as so  # noqa: E402
from structops.torch import Healing, StructuredLinear, heal, param_groups, structurize  # noqa: E402

pytestmark = pytest.mark.torch


def teacher(*widths):
    torch.manual_seed(0)
    n, hidden, m = widths or (12, 16, 5)
    return nn.Sequential(nn.Linear(n, hidden), nn.GELU(), nn.Linear(hidden, m))


def batches(count=4, size=32, features=12, seed=0):
    return list(torch.randn(count, size, features, generator=torch.Generator().manual_seed(seed)))


def cross_entropy(output, batch):
    return functional.cross_entropy(output, batch[1])


class Constant(nn.Module):
    """Answers what it holds, whatever comes."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, x=None, attention_mask=None):
        return self.value


# ------------------------------------------------------------------------------------------------------------ the loss


@given(temperature=st.floats(0.5, 8), size=st.integers(2, 6), seed=st.integers(0, 99))
def test_the_distance_of_logits(temperature, size, seed):
    torch.manual_seed(seed)
    ours, theirs = torch.randn(3, size), torch.randn(3, size)
    done = heal(Constant(ours.clone()), [torch.ones(1)], Constant(theirs), steps=1, temperature=temperature)
    p, q = ([[math.exp(v / temperature) for v in row] for row in value.tolist()] for value in (theirs, ours))
    p, q = ([[v / sum(row) for v in row] for row in rows] for rows in (p, q))
    each = [sum(a * math.log(a / b) for a, b in zip(*rows, strict=True)) for rows in zip(p, q, strict=True)]
    expected = temperature**2 * sum(each) / 3
    assert done.losses == done.distances == [pytest.approx(expected, rel=1e-3, abs=1e-5)]


def test_the_distance_of_values():
    ours, theirs = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    done = heal(Constant(ours.clone()), [torch.ones(1)], Constant(theirs), steps=1, match="values")
    assert done.losses == [pytest.approx(float((ours - theirs).square().mean()))]


@pytest.mark.parametrize("match", ["logits", "values"])
def test_padding_plays_no_part(match):
    ours, theirs = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    done = heal(Constant(ours.clone()), [{"attention_mask": mask}], Constant(theirs), steps=1, match=match)
    picked = heal(Constant(ours[mask.bool()]), [torch.ones(1)], Constant(theirs[mask.bool()]), steps=1, match=match)
    assert done.losses == [pytest.approx(picked.losses[0])]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_both_losses(alpha):
    model, labels = teacher(), torch.randint(5, (32,))
    student = structurize(model, "low_rank(rank=2)")
    batch = batches(1)[0], labels
    alone = heal(copy.deepcopy(student), [batch], loss=cross_entropy, steps=1).losses[0]
    done = heal(student, [batch], model, loss=cross_entropy, steps=1, alpha=alpha)
    assert done.losses == [pytest.approx((1 - alpha) * alone + alpha * done.distances[0])]


def test_only_labels():
    torch.manual_seed(0)
    labels = [(x, x[:, :5].argmax(-1)) for x in batches()]
    model = teacher()
    done = heal(model, labels, loss=cross_entropy, steps=200, lr=1e-2)
    assert done.distances == []
    assert done.losses[-1] < 0.3 * done.losses[0]


# -------------------------------------------------------------------------------------------------------- the training


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("match", ["logits", "values"])
def test_a_model_comes_back_to_its_teacher(schedule, match):
    """A teacher that is of low rank itself: what projection lost after noise is learnt again."""
    model = structurize(teacher(12, 16, 5), "low_rank(rank=3)")
    student = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    done = heal(student, batches(), model, steps=300, lr=1e-2, schedule=schedule, match=match)
    assert isinstance(done, Healing)
    assert len(done.losses) == 300
    assert done.losses[-1] < 1e-2 * done.losses[0]
    assert repr(done).startswith("Healing(300 steps, loss ")


def test_learning_rates_follow_the_factors():
    """The first step of Adam moves every number by its learning rate."""
    layer = StructuredLinear(64, 256, "btt")
    before = {name: value.detach().clone() for name, value in layer.named_parameters()}
    heal(layer, batches(1, features=64), Constant(torch.randn(32, 256)), steps=1, lr=1e-4, warmup=0, clip=None)
    scales = {id(p): group["lr_scale"] for group in param_groups(layer) for p in group["params"]}
    assert len(set(scales.values())) == 2
    for name, parameter in layer.named_parameters():
        step = (parameter.detach() - before[name]).abs().median()
        assert float(step) == pytest.approx(1e-4 * scales[id(parameter)], rel=0.02)


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 0.5), ("linear", 0.5)])
def test_rates_rise_and_fall(schedule, middle):
    model = teacher()
    optimizer = torch.optim.SGD(param_groups(model, lr=1e-3), lr=0.5)
    rates = []
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: rates.append(optimizer.param_groups[0]["lr"]))
    heal(model, batches(), teacher(), steps=50, lr=7, optimizer=optimizer, warmup=0.2, schedule=schedule)
    assert rates[:10] == pytest.approx([1e-4 * k for k in range(1, 11)])
    assert rates[10] == pytest.approx(1e-3)
    assert rates[30] == pytest.approx(1e-3 * middle)
    assert all(b < a for a, b in itertools.pairwise(rates[10:]))
    assert 0 < rates[-1] < 1e-4


def test_gradients_are_clipped():
    norms = []
    for clip in (None, 1e-3):
        model = teacher()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        heal(model, batches(1), Constant(10 * torch.randn(32, 5)), steps=1, optimizer=optimizer, clip=clip)
        norms.append(float((torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm()))
    assert norms[0] > 1e-2
    assert norms[1] == pytest.approx(1e-3, rel=1e-2)


def test_data_are_gone_through_again():
    seen = []

    class Loader:
        def __iter__(self):
            for x in batches(3):
                seen.append(float(x[0, 0]))
                yield x

    heal(teacher(), Loader(), Constant(torch.zeros(32, 5)), steps=7)
    assert len(seen) == 7
    assert seen[:3] == seen[3:6]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no batch after 0 of 5 steps"),
        (iter(batches(3)), "no batch after 3 of 5 steps"),
        (torch.ones(2, 12), r"got a Tensor; give \[batch\]"),
    ],
)
def test_data_that_end(data, message):
    with pytest.raises(so.StructureError, match=message):
        heal(teacher(), data, Constant(torch.zeros(32, 5)), steps=5)


def test_a_generator_that_lasts():
    taken = []
    stream = (taken.append(0) or x for x in batches(9))
    assert len(heal(teacher(), stream, Constant(torch.zeros(32, 5)), steps=5).losses) == 5
    assert len(taken) == 5


def test_mixed_precision():
    dtypes = []
    model = structurize(teacher(), "low_rank(rank=2)")
    model.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    done = heal(model, batches(), teacher(), steps=4, autocast=torch.bfloat16)
    assert dtypes == [torch.bfloat16] * 4
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(map(math.isfinite, done.losses))


def test_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 8}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    tokens = torch.randint(40, (4, 6))
    mask = torch.ones_like(tokens)
    mask[0, 3:] = 0
    data = [{"input_ids": tokens, "attention_mask": mask, "labels": tokens}]
    small = structurize(model, "low_rank(rank=2)")
    done = heal(small, data, model, loss=lambda output, batch: output.loss, steps=60, lr=3e-3, seed=0)
    assert done.losses[-1] < done.losses[0]
    taught = heal(small, data, model, steps=60, lr=3e-3, seed=0)
    assert taught.losses[-1] < 0.5 * taught.losses[0]
    plain = transformers.GPT2Model(model.config)  # has no logits
    assert heal(structurize(plain, "btt"), data[0:1], plain, steps=1, match="values", forward=hidden).losses[0] > 0


def hidden(model, batch):
    return model(input_ids=batch["input_ids"])


# -------------------------------------------------------------------------------------------------- what is left alone


def test_modes_and_frozen_parameters():
    dense = teacher().train()
    model = structurize(nn.Sequential(*teacher(), nn.Dropout(0.1), nn.Linear(5, 5)), "low_rank(rank=2)", select="2")
    model[0].requires_grad_(False)
    model.train()
    model[2].eval()
    before, theirs = copy.deepcopy(model.state_dict()), copy.deepcopy(dense.state_dict())
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    heal(model, batches(), dense, steps=3)
    assert [module.training for module in model.modules()] == modes
    assert all(module.training for module in dense.modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for net in (model, dense) for parameter in net.parameters())
    assert all(torch.equal(value, theirs[key]) for key, value in dense.state_dict().items())
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if not key.startswith("0.")}


def test_a_teacher_without_dropout_and_a_model_with():
    dense = nn.Sequential(nn.Dropout(0.5), nn.Linear(12, 5)).train()
    modes = []
    model = copy.deepcopy(dense).eval()
    dense[0].register_forward_hook(lambda module, args, output: modes.append(("teacher", module.training)))
    model[0].register_forward_hook(lambda module, args, output: modes.append(("model", module.training)))
    heal(model, batches(1), dense, steps=1)
    assert modes == [("model", True), ("teacher", False)]
    assert dense.training
    assert not model.training


def test_a_seed():
    dense = nn.Sequential(nn.Dropout(0.5), nn.Linear(12, 5))
    loader = torch.utils.data.DataLoader(torch.cat(batches()), batch_size=32, shuffle=True)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, second, other = (heal(copy.deepcopy(dense), loader, dense, steps=6, seed=s).losses for s in (1, 1, 2))
    assert first == second != other
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------------------- errors


def test_a_loss_that_is_no_number():
    model = teacher()
    data = [*batches(2), torch.full((32, 12), torch.nan)]
    with pytest.raises(so.EntryError, match=r"the loss of step 3 is nan; try a smaller lr \(it is 0\.001\)"):
        heal(model.eval(), data, Constant(torch.zeros(32, 5)), steps=3)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": None}, "give a teacher"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": True}, "got True"),
        ({"alpha": 1.5}, "shares from 0 to 1, got 1.5"),
        ({"warmup": -1}, "shares from 0 to 1"),
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"match": "hidden"}, "'logits' or 'values', got 'hidden'"),
        ({"schedule": "step"}, "'cosine' or 'linear', got 'step'"),
        ({"autocast": torch.float16}, "bfloat16"),
        ({"forward": lambda model, batch: (model(batch),)}, "got tuple; give forward="),
    ],
)
def test_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(so.StructureError, match=message):
        heal(teacher(), batches(), **{"teacher": teacher(), "steps": 2} | arguments)


def test_nothing_to_train():
    with pytest.raises(so.StructureError, match="no parameter of the model has requires_grad=True"):
        heal(teacher().requires_grad_(False), batches(), teacher(), steps=1)


def test_the_teacher_is_another_model():
    dense = teacher()
    same = structurize(dense, "low_rank(rank=2)", inplace=True)
    with pytest.raises(so.StructureError, match="without inplace=True leaves the dense model"):
        heal(same, batches(), dense, steps=1)


def test_outputs_that_do_not_fit():
    with pytest.raises(so.ShapeError, match=r"gives \(32, 5\), the teacher \(32, 4\)"):
        heal(teacher(), batches(), teacher(12, 16, 4), steps=1)
    with pytest.raises(so.ShapeError, match="give match='values' for a regression"):
        heal(teacher(12, 16, 1), batches(), teacher(12, 16, 1), steps=1)
