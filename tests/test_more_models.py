"""What models that nobody had tried before asked for."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")

from torch import nn  # noqa: E402

import structops as so  # noqa: E402
from structops.torch import calibrate, densify, save_pretrained, structurize  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("spec", ["btt(rank=2)", "blast(rank=4, blocks=4)", "tt(rank=2)", "low_rank(rank=2)"])
@pytest.mark.parametrize("vectors", [2, 5])
def test_moments_of_few_vectors(spec, vectors):
    """As of the pooler of BERT, which gets one vector a sentence: in float32 such moments are not positive."""
    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(32, 32))
        x = torch.randn(vectors, 32)
        inputs = calibrate(model, [x])
        assert torch.linalg.eigvalsh(inputs["0"].centred.double())[0] < 0, "the case is the one that is meant"
        small, plain = structurize(model, spec, calibration=inputs), structurize(model, spec)
        assert all(bool(p.isfinite().all()) for p in small.parameters())
        with torch.no_grad():
            error, without = (float((other(x) - model(x)).square().mean()) for other in (small, plain))
        assert error < without


def test_a_bias_of_two_layers_takes_no_mean():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].bias = model[0].bias
    small = structurize(model, "low_rank(rank=8)", calibration=calibrate(model, [torch.randn(64, 16) + 3]))
    assert small[0].bias is small[1].bias
    assert torch.equal(small[0].bias, model[0].bias)


def test_a_model_in_ddp_is_refused():
    """Its reducer knows the parameters that it was made with, and would not sum the gradients of others."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for function in (lambda m: structurize(m, "btt"), lambda m: structurize(m, "btt", inplace=True), densify):
            wrapped = nn.Sequential(nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(16, 16))))
            with pytest.raises(so.StructureError, match=r"0 is wrapped in DistributedDataParallel.*then wrap"):
                function(wrapped)
            assert structurize(wrapped, "btt", dry_run=True).converted
    finally:
        torch.distributed.destroy_process_group()


def test_numbers_that_safetensors_have_not(tmp_path):
    model = structurize(nn.Sequential(nn.Linear(16, 16, dtype=torch.complex128)), "kron")
    with pytest.raises(so.errors.CheckpointError, match=r"0\.\S+ is complex128, which safetensors do not have"):
        save_pretrained(model, tmp_path / "here")


@pytest.mark.parametrize("name", ["dt_proj", "shared_expert_gate"])
def test_projections_that_are_read_and_gates_stay(name):
    model = nn.ModuleDict({"up": nn.Linear(16, 16), name: nn.Linear(16, 1)})
    small = structurize(copy.deepcopy(model), "low_rank(rank=4)", init="mup")
    assert type(small[name]) is nn.Linear
    assert type(small["up"]) is not nn.Linear
