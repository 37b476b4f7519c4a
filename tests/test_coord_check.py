"""The coordinate check and the sweep over learning rates: what they measure, fit and conclude."""

import json
import math
import warnings

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs PyTorch")

import torch
from torch import nn

from structops.errors import StructureError, StructureWarning
from structops.mup import Rule
from structops.studies.lr_sweep import Point, SweepReport, append, load, lr_sweep
from structops.torch import StructuredLinear, coord_check, param_groups
from structops.torch.coord_check import measure, spectral_norms
from structops.torch.coord_report import CoordReport, Forecast, Record, fit

WIDTHS = (64, 256, 1024)


class Residual(nn.Module):
    """A dense input layer that is not trained, one structured block whose end starts at zero, and a head."""

    def __init__(self, structure, width):
        super().__init__()
        self.embed = nn.Linear(16, width, bias=False).requires_grad_(False)
        self.up = StructuredLinear(width, width, structure, bias=False)
        self.down = StructuredLinear(width, width, structure, bias=False, zero_init=True)
        self.head = StructuredLinear(width, 4, "dense", bias=False, zero_init=True)

    def forward(self, x):
        h = self.embed(x)
        return self.head(h + self.down(torch.relu(self.up(h))))


def build(structure):
    def make(width):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StructureWarning)
            return Residual(structure, width)

    return make


def batches():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator)
    return [(x, (x @ torch.randn(16, 4, generator=generator)).argmax(-1))]


def check(structure, rule=None, steps=6, widths=WIDTHS, seeds=(0, 1), rate=3e-3):
    rule = rule or Rule("adam")

    def optimizer(model):
        with torch.device("meta"):
            base = build("dense")(64)
        groups = param_groups(model, optimizer=rule, base=base, lr=rate)
        return torch.optim.Adam(groups, eps=1e-15) if rule.optimizer == "adam" else torch.optim.SGD(groups)

    return coord_check(
        build(structure), widths, batches(), nn.functional.cross_entropy, optimizer, steps, seeds, rule=rule
    )


# ------------------------------------------------------------------------------------------------------------ verdicts


@pytest.fixture(scope="module")
def aware():
    return check("btt")


@pytest.fixture(scope="module")
def naive():
    return check("btt", Rule("adam", structure_aware=False))


def test_the_rule_is_flat_and_passes(aware):
    assert aware.ok
    assert aware.culprit == ""
    assert [row.layer for row in aware.hidden] == ["embed", "up", "down"]
    for name in ("up", "down"):
        assert abs(aware[name].feature.value) < 0.15
        assert aware[name].predicted == pytest.approx(0)
    assert aware["embed"].verdict == "not trained"
    aware.assert_flat()
    with pytest.raises(AssertionError, match="drift with width"):
        aware.assert_flat(tolerance=1e-6)


def test_the_naive_rule_drifts_as_the_rates_predict(naive):
    assert not naive.ok
    assert naive.culprit in ("up", "down")
    for name in ("up", "down"):
        assert naive[name].verdict.startswith("drift")
        assert naive[name].predicted == pytest.approx(-0.5, abs=1e-6)
        assert naive[name].own.value < -0.3
    assert "verdict: drift; look at" in naive.table()
    with pytest.raises(AssertionError, match="drift"):
        naive.assert_flat()


def test_sgd_without_the_count_of_blocks_is_predicted_to_fall():
    for count, power in ((False, -0.5), (True, 0.0)):
        report = check("btt", Rule("sgd", block_count=count), widths=(64, 256), steps=2, seeds=(0,), rate=0.1)
        assert report["up"].predicted == pytest.approx(power, abs=1e-6)


def test_low_rank_starts_small_by_design():
    report = check("low_rank", steps=1, seeds=(0, 1, 2))
    row = report["up"]
    assert row.start_predicted == pytest.approx(-0.25)
    assert row.start.value == pytest.approx(-0.25, abs=0.1)
    assert math.isnan(report["down"].start_predicted), "it starts at zero"


def test_the_culprit_is_the_layer_whose_own_weight_drifts():
    """The second layer moves because of the first, the first because of itself."""
    records, forecasts = [], []
    for width in (64, 256):
        own = {"first": width**-0.5, "second": 1.0}
        for layer, value in own.items():
            records.append(Record(width, 0, layer, "", 1.0, 1.0, width**-0.5, value))
            forecasts.append(Forecast(width, layer, "", "hidden", "btt", 1.0, 1.0))
    report = CoordReport(tuple(reversed(records)), tuple(forecasts), 5)
    assert report.culprit == "first"
    assert [report[name].verdict for name in ("first", "second")] == ["drift", "drift"]


def test_a_training_that_diverges_is_no_pass():
    report = check("dense", steps=8, widths=(64, 128), seeds=(0,), rate=1e30)
    assert not report.ok
    assert "diverged" in report.table()
    assert "NaN" not in report.to_json()
    again = CoordReport.from_json(report.to_json())
    assert [row.verdict for row in again] == [row.verdict for row in report]


# ---------------------------------------------------------------------------------------------------------- measurement


def test_changes_are_those_of_the_formulas():
    (batch,) = batches()
    x, _ = batch
    model = build("btt")(64)
    torch.manual_seed(3)
    old = build("btt")(64)

    def optimizer(made):
        model.load_state_dict(made.state_dict())
        return torch.optim.SGD(made.parameters(), lr=0.5)

    held = []

    def kept(width):
        held.append(build("btt")(width))
        return held[0]

    records, _ = measure(kept, 64, 3, [batch], nn.functional.cross_entropy, optimizer, steps=3)
    assert all((a == b).all() for a, b in zip(model.state_dict().values(), old.state_dict().values(), strict=True))
    new = held[0]
    found = {record.factor or record.layer: record for record in records}
    with torch.no_grad():
        h = new.embed(x)
        up = found["up"]
        assert up.output == pytest.approx(float(new.up(h).square().mean().sqrt()), rel=1e-5)
        assert up.feature == pytest.approx(float((new.up(h) - old.up(h)).square().mean().sqrt()), rel=1e-4)
        inside = torch.relu(new.up(h))
        assert found["down"].own == pytest.approx(
            float((new.down(inside) - old.down(inside)).square().mean().sqrt()), rel=1e-5
        )
        factor, change = new.up.factors[0], new.up.factors[0] - old.up.factors[0]
        record = found["up.factors.0"]
        assert record.norm == pytest.approx(float(torch.linalg.matrix_norm(factor, ord=2).mean()), rel=0.05)
        assert record.change == pytest.approx(float(torch.linalg.matrix_norm(change, ord=2).mean()), rel=0.05)
        only = torch.func.functional_call(new.up, {"factors.0": old.up.factors[0]}, (h,))
        assert record.own == pytest.approx(float((new.up(h) - only).square().mean().sqrt()), rel=1e-4)
    assert not new.up._forward_hooks, "a hook was left"
    assert new.training


def test_the_check_leaves_the_random_numbers_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    check("dense", widths=(8, 16), steps=1, seeds=(0,))
    assert (torch.rand(3) == expected).all()


def test_spectral_norms_are_largest_singular_values():
    generator = torch.Generator().manual_seed(0)
    for shape in ((5, 8, 8), (3, 4, 16), (1, 64, 32)):
        blocks = torch.randn(shape, generator=generator)
        for scale in (1.0, 1e-25):
            values = spectral_norms(scale * blocks, 200)
            assert torch.allclose(values / scale, torch.linalg.matrix_norm(blocks, ord=2), rtol=2e-2)
    assert spectral_norms(torch.zeros(2, 3, 4)).tolist() == [0, 0]


def test_a_power_is_fitted_with_its_band():
    widths = [64, 64, 128, 128, 256, 256]
    exact = fit((w, 3 * w**-0.5) for w in widths)
    assert (exact.value, exact.band) == (pytest.approx(-0.5), pytest.approx(0, abs=1e-6))
    noise = [1.1, 0.9, 1.3, 0.8, 1.0, 0.95]
    noisy = fit((w, 3 * w**-0.5 * n) for w, n in zip(widths, noise, strict=True))
    slope, covariance = np.polyfit(
        np.log(widths), np.log([3 * w**-0.5 * n for w, n in zip(widths, noise, strict=True)]), 1, cov=True
    )
    assert noisy.value == pytest.approx(slope[0])
    assert noisy.band == pytest.approx(2.776 * covariance[0, 0] ** 0.5, rel=1e-3)
    assert math.isnan(fit([(64, 1.0), (128, 0.0)]).value), "zero has no logarithm"
    assert fit([(64, 1.0), (128, 2.0)]).band == math.inf


def test_reports_are_tables_data_and_plots(naive, tmp_path):
    lines = naive.table().splitlines()
    assert lines[0] == "powers of width after 6 steps; widths 64, 256, 1024; 2 seed(s)"
    assert [line.split()[0] for line in lines[2:-1] if not line.startswith(" ")] == ["embed", "up", "down", "head"]
    data = json.loads(naive.to_json())
    assert data["ok"] is False
    assert data["culprit"] == naive.culprit
    assert len(data["rows"]) == len(naive)
    again = CoordReport.from_json(naive.to_json())
    assert again == naive
    figure = pytest.importorskip("matplotlib.figure", reason="needs matplotlib").Figure()
    naive.plot(figure).savefig(tmp_path / "check.png")
    assert [len(panel.lines) for panel in figure.axes] == [2, 2], "the input layer is not trained"
    with pytest.raises(KeyError, match="nothing"):
        naive["nothing"]
    with pytest.raises(StructureError, match="not a report"):
        CoordReport.from_json("{}")


def test_arguments_that_say_nothing_are_refused():
    with pytest.raises(StructureError, match="two widths"):
        check("dense", widths=(64, 64))
    with pytest.raises(StructureError, match="a step"):
        check("dense", steps=0)
    with pytest.raises(StructureError, match="no layer"):
        coord_check(lambda width: nn.LayerNorm(width), (4, 8), batches(), None, lambda model: [])


# ---------------------------------------------------------------------------------------------------------------- sweep

RATES = [2.0**k for k in range(-10, -1)]


def bowl(drift=0.0, sharp=1.0):
    return lambda width, lr, seed: 1 + sharp * (math.log2(lr) + 6 - drift * math.log2(width / 64)) ** 2


def test_the_best_rate_and_its_drift_are_found():
    still = lr_sweep(bowl(), (64, 128, 256), RATES)
    assert still.verdict == "transfers"
    assert [o.log2_lr for o in still.optima] == pytest.approx([-6, -6, -6])
    assert still.penalty == pytest.approx(1)
    moving = lr_sweep(bowl(0.6), (64, 128, 256), RATES)
    assert moving.verdict == "drift"
    assert moving.drift == pytest.approx(0.6)
    assert moving.penalty > 1.9
    assert "+0.60 octaves a doubling" in moving.table()


def test_a_basin_wider_than_the_drift_says_nothing():
    flat = lr_sweep(bowl(0.6, sharp=0.02), (64, 128, 256), [2.0**k for k in range(-12, 4)])
    assert flat.verdict == "flat"
    assert min(o.flatness for o in flat.optima) > 2.4


def test_an_optimum_at_the_end_of_the_grid_is_named():
    report = lr_sweep(bowl(), (64, 128), [2.0**k for k in range(-5, 0)])
    assert report.verdict == "edge"
    assert "end of the grid" in report.table()


def test_trainings_that_diverge_are_above_the_best_rate():
    def train(width, lr, seed):
        return bowl()(width, lr, seed) if lr < 2**-4 else math.inf

    report = lr_sweep(train, (64, 128), RATES)
    assert report.verdict == "transfers"
    assert json.dumps(report.to_data(), allow_nan=False).count("null") == 6
    nothing = SweepReport((Point(64, 0.1, 0, math.nan),))
    assert nothing.optima == ()
    assert nothing.verdict == "edge"


def test_a_sweep_goes_on_where_it_stopped(tmp_path):
    path, calls = tmp_path / "new" / "sweep.jsonl", []

    def train(width, lr, seed):
        calls.append((width, lr, seed))
        if len(calls) == 8:
            raise KeyboardInterrupt
        return bowl()(width, lr, seed)

    with pytest.raises(KeyboardInterrupt):
        lr_sweep(train, (64, 128), RATES, path=path)
    assert len(list(load(path))) == 7
    with open(path, "a") as file:  # as a process that was killed in the middle of a line
        file.write('{"width": 64, "lr": 0.0')
    assert len(list(load(path))) == 7
    report = lr_sweep(train, (64, 128), RATES, path=path)
    assert len(calls) == 8 + 2 * len(RATES) - 7
    assert report.verdict == "transfers"
    assert lr_sweep(train, (64, 128), RATES, path=path) == report
    assert len(calls) == 8 + 2 * len(RATES) - 7, "a finished point was run again"
    lr_sweep(train, (64,), RATES, path=path, label="another")
    assert len(calls) == 8 + 3 * len(RATES) - 7, "results of another sweep were taken"


def test_files_that_are_no_sweep_are_named(tmp_path):
    path = tmp_path / "sweep.jsonl"
    append(path, Point(64, 0.1, 0, math.inf))
    assert math.isnan(next(load(path)).loss)
    path.write_text("nonsense\n")
    with pytest.raises(StructureError, match="line 1: not a result"):
        list(load(path))
    with pytest.raises(StructureError, match="three positive"):
        lr_sweep(bowl(), (64,), [0.1, 0.2])


def test_the_plot_of_a_sweep_is_written(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    lr_sweep(bowl(), (64, 128), RATES).plot(tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
