"""The studies: sizes at equal MACs, trainings that repeat, tables and plots."""

import json

import numpy as np
import pytest

from structops import report
from structops.algebra.closure import ROWS
from structops.algebra.counting import macs
from structops.power_law import fit
from structops.studies import algebra, closure
from structops.studies import demo as study
from structops.studies.mlp import MLP, width_for
from structops.studies.training import Recipe, Result, epochs

pytest.importorskip("sklearn", reason="needs scikit-learn")

from structops.studies.data import digits


def trainer(backend):
    pytest.importorskip(backend, reason=f"needs {backend}")
    if backend == "torch":
        from structops.studies.torch_mlp import train
    else:
        from structops.studies.jax_mlp import train
    return train


def test_digits_are_real_split_once_and_normalised():
    data = digits()
    assert data.train_x.shape == (1437, 64)
    assert data.test_x.shape == (360, 64)
    assert data.train_x.mean() == pytest.approx(0, abs=1e-4)
    assert data.train_x.std() == pytest.approx(1, abs=1e-4)
    assert set(data.test_y) == set(range(10))
    both = np.concatenate([data.train_x, data.test_x])
    assert len(np.unique(both, axis=0)) == 1797, "an image is in both sets"


def test_macs_of_the_dense_network():
    """64 w + 2 (4 w^2 + 4 w^2) + 10 w."""
    for width in (16, 64):
        sizes = MLP("dense", width)
        assert sizes.macs == sizes.num_params == 74 * width + 16 * width**2


@pytest.mark.parametrize("spec", study.STRUCTURES)
def test_widths_meet_the_budget(spec):
    for budget in (70_000, 300_000):
        width = width_for(spec, budget)
        assert MLP(spec, width).macs == pytest.approx(budget, rel=0.15)


def test_low_rank_keeps_the_input_layer_dense():
    for spec, first in (("low_rank", "dense"), ("btt", "btt")):
        embed = next(MLP(spec, 64).layers())
        assert (embed.name, embed.structure) == ("embed", first)


def test_batches_depend_on_the_seed_alone():
    data, recipe = digits(), Recipe(epochs=2)
    first, again, other = (list(epochs(data, recipe, seed)) for seed in (0, 0, 1))
    assert all((a[0] == b[0]).all() and (a[1] == b[1]).all() for a, b in zip(first, again, strict=True))
    assert (first[0][0] != other[0][0]).any()
    assert (first[0][0] != first[1][0]).any(), "the noise is drawn anew"
    assert first[0][0].shape == (11, 120, 64)
    assert first[0][0].dtype == np.float32


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_training_learns_and_repeats(backend):
    train, data, recipe = trainer(backend), digits(), Recipe(epochs=4)
    (first, other), (again, _) = (train(MLP("btt", 64), recipe, data, seeds=(3, 4)) for _ in range(2))
    assert first == again
    assert first != other
    assert first.losses[0] > 1.5, "the head starts at zero: all digits are equally likely at first"
    assert first.train_loss < first.losses[0]
    assert first.accuracy > 0.8


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_the_naive_learning_rate_spoils_btt(backend):
    train, data = trainer(backend), digits()
    (aware,), (naive,) = (
        train(MLP("btt", 144), Recipe(epochs=6, structure_aware=flag), data, seeds=(0,)) for flag in (True, False)
    )
    assert aware.train_loss < 0.8 * naive.train_loss


def fake_runs():
    jobs = study.jobs("torch", width=32, epochs=3, seeds=(0, 1))
    return jobs, [study.Run(job, [Result([2.0, 1.0, 0.5 + seed], 0.9) for seed in job.seeds], 1.5) for job in jobs]


def test_jobs_compare_all_structures_at_every_budget():
    jobs, _ = fake_runs()
    labels = [*study.STRUCTURES, *(f"{spec}, naive LR" for spec in study.NAIVE)]
    assert len(jobs) == len(study.SIZES) * len(labels)
    for budget in {job.budget for job in jobs}:
        assert {job.label for job in jobs if job.budget == budget} == set(labels)


def test_summary_is_the_mean_over_seeds():
    _, runs = fake_runs()
    summaries = study.summarise(runs)
    assert len(summaries) == len(runs)
    assert all(row.seeds == 2 for row in summaries)
    losses = [np.mean([2.0, 1.0, 0.5]), np.mean([2.0, 1.0, 1.5])]
    assert summaries[0].train_loss == pytest.approx(np.mean(losses))
    assert summaries[0].train_loss_std == pytest.approx(np.std(losses, ddof=1))


def test_files_are_whole_or_absent(tmp_path):
    data = {"a": [{"x": 1, "y": [1, 2]}, {"x": None}], "b": {}, "c": "text", "d": []}
    report.write_json(tmp_path / "b.json", data)
    text = (tmp_path / "b.json").read_text()
    assert json.loads(text) == data
    assert '{"x": 1, "y": [1, 2]},\n' in text
    report.write_json(tmp_path / "new" / "a.json", {"x": 1})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"x": 1}
    with pytest.raises(TypeError):
        report.write_json(tmp_path / "new" / "a.json", {"x": object()})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"x": 1}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"], "a temporary file was left"


def test_plots_are_written(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    _, runs = fake_runs()
    report.write_figure(tmp_path / "a.png", study.curves(runs))
    report.write_figure(tmp_path / "b.png", study.error_versus_macs(study.summarise(runs)))
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------------------- algebra


def test_abbreviations_of_structures_differ():
    assert len({closure.short(name) for name in ROWS} | {closure.LAZY}) == len(ROWS) + 1


def test_a_power_of_n_is_found_and_noise_widens_its_error():
    sizes = [2**k for k in range(4, 12)]
    exact = fit(sizes, [3e-9 * n**1.5 for n in sizes])
    assert exact.exponent == pytest.approx(1.5)
    assert exact.error == pytest.approx(0, abs=1e-9)
    noise = [1.3, 0.8, 1.1, 0.7, 1.2, 0.9, 1.4, 0.8]
    noisy = fit(sizes, [3e-9 * n**1.5 * factor for n, factor in zip(sizes, noise, strict=True)])
    slope, covariance = np.polyfit(np.log(sizes), np.log(sizes) * 1.5 + np.log(noise), 1, cov=True)
    assert noisy.exponent == pytest.approx(slope[0])
    assert noisy.error == pytest.approx(covariance[0, 0] ** 0.5)
    with pytest.raises(ValueError, match="two sizes"):
        fit([16, 16], [1.0, 2.0])


def test_what_a_call_costs_is_taken_off_and_small_sizes_are_left_out():
    sizes = [4**k for k in range(3, 11)]
    row = algebra.Growth("A @ x", "diagonal", "n", sizes, [1e-4 + 4e-9 * n for n in sizes])
    found = algebra._fitted(row)
    assert found.fitted == 3, "those above 2e-4 s"
    assert found.exponent == pytest.approx(1, abs=1e-2)
    assert found.stated == pytest.approx(1)
    flat = algebra._fitted(algebra.Growth("A @ x", "diagonal", "n", sizes, [1e-4] * len(sizes)))
    assert (flat.fitted, flat.exponent) == (0, None)


PRODUCTS = [case for case in algebra.CASES if case.verb == "A @ x" and case.operands[0] != "permutation"]


@pytest.mark.torch
@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.operands[0])
def test_the_stated_cost_of_a_product_is_that_of_its_count(case):
    pytest.importorskip("torch", reason="needs PyTorch")
    sizes = [root**2 for root in (32, 64)]
    counted = [macs(algebra.Library("torch").operand(case.operands[0], round(n**0.5))) for n in sizes]
    stated = [algebra.COSTS[case.cost](n) for n in sizes]
    assert fit(sizes, counted).exponent == pytest.approx(fit(sizes, stated).exponent, abs=0.07)


def test_costs_are_those_that_there_are():
    assert {case.cost for case in algebra.CASES} <= set(algebra.COSTS)
    assert {case.verb for case in algebra.CASES} == set(algebra.VERBS)
