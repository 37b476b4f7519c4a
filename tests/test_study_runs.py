"""The trainings of the studies, their reports, and the commands as a user runs them."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from structops import cli
from structops.errors import CheckpointError, DataError, StructureError
from structops.studies import trainer
from structops.studies.commands import STUDIES
from structops.studies.compute_per_dimension import ComputePerDimension, Memory
from structops.studies.coordinate_check import CoordinateCheck
from structops.studies.data import Augment
from structops.studies.einsum_points import MIXTURE, EinsumPoints, largest_gap
from structops.studies.lab.checkpoint import path_of
from structops.studies.lab.config import read_config
from structops.studies.lab.frontier import Curve, Point
from structops.studies.lab.store import Store
from structops.studies.lab.study import Execution, Study, conduct
from structops.studies.lr_landscape import LrLandscape
from structops.studies.models import GPT, ResidualMLP, ViT
from structops.studies.placement import Placement
from structops.studies.runs import Data, Recipe, Run
from structops.studies.scaling_laws import ScalingLaws
from structops.studies.trained import Trained
from structops.studies.trainer import Job, Training, train
from structops.studies.weight_norm import WeightNorm

pytestmark = pytest.mark.torch
ROOT = Path(__file__).resolve().parent.parent
QUIET = Console(quiet=True)
PROGRAM = str(Path(sys.executable).with_name("structops"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}

MLP = ResidualMLP("btt", 16, 2, in_features=64)
QUICK = Recipe(steps=6, batch=32)
DIGITS = Data("digits", Augment(noise=0.3), permute_pixels=True)
RUNS = {
    "mlp": Run("mlp", MLP, DIGITS, QUICK),
    "mixture": Run("mlp", replace(MLP, structure=MIXTURE), DIGITS, QUICK),
    "vit": Run("vit", ViT("btt", 16, 1, image_size=8, patch_size=4, channels=1, heads=4), Data("digits"), QUICK),
    "mixup": Run("mlp", MLP, Data("digits", Augment(mixup=0.8, smoothing=0.1), permute_pixels=True), QUICK),
    "table": Run("mlp", replace(MLP, in_features=10, classes=1), Data("diabetes"), QUICK),
    "gpt": Run(
        "gpt",
        GPT("btt", 16, 1, head_dim=8, vocab=Data("pydoc").load().vocab_size, context=16),
        Data("pydoc", options=(("context", 16),)),
        replace(QUICK, warmup=3, schedule="constant", clip=1.0, weight_decay=0.1),
    ),
}


def rows(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder."""
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two results agree in all but the time."""
    return {**one, "seconds": 0} == {**other, "seconds": 0}


# ------------------------------------------------------------------------------------------------------------ trainings


@pytest.mark.parametrize("name", RUNS)
def test_a_training_follows_from_its_settings(name: str) -> None:
    run = RUNS[name]
    result = train(Job(run))
    assert same(result, train(Job(run)))
    assert result["steps"] == 6
    assert len(result["curve"]) == 6
    assert result["macs"] == run.model.macs
    assert all(math.isfinite(result[key]) for key in ("train_loss", "train_error", "test_loss", "test_error"))
    assert result["train_loss"] == result["curve"][-1]
    assert not same(result, train(Job(replace(run, seed=1))))


def test_training_lowers_the_loss() -> None:
    for name in ("mlp", "vit", "mixture"):
        run = replace(RUNS[name], recipe=replace(QUICK, steps=60))
        curve = train(Job(run))["curve"]
        assert np.mean(curve[-5:]) < 0.9 * curve[0], name


@pytest.mark.parametrize("name", ["mlp", "gpt", "mixture"])
def test_a_training_goes_on_where_it_was(name: str, tmp_path: Path) -> None:
    run, whole = RUNS[name], train(Job(RUNS[name]))
    training = Training(run)
    for _ in range(3):
        training.step()
    path = path_of(tmp_path, run)
    trainer.save_state(path, training.model, training.optimizer, vars(training.history))
    assert Training(run).history.step == 0
    again = Training(run)
    again.resume(path)
    assert again.history.step == 3
    assert same(train(Job(run, tmp_path)), whole)
    trainer.forget(run, tmp_path)
    assert not path.exists()


def test_checkpoints_are_written_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "SAVE_EVERY", 0.0)
    train(Job(RUNS["mlp"], tmp_path))
    (path,) = (tmp_path / "checkpoints").iterdir()
    training = Training(RUNS["mlp"])
    training.resume(path)
    assert training.history.step == 6


def test_mixed_images_count_as_in_the_paper() -> None:
    import torch

    task = RUNS["mlp"].data.load()
    y = torch.tensor([[0.6, 0.4, 0], [0.6, 0, 0.4], [0, 0.6, 0.4], [0.4, 0.6, 0]])
    # All guesses are the smaller part but one, which is wrong both ways.
    out = 9 * torch.eye(3)[torch.tensor([1, 2, 0, 0])]
    assert trainer.measures(out, y, task)[1].tolist() == [1, 0.25]
    assert trainer.measures(out, torch.tensor([1, 2, 0, 2]), task)[1].tolist() == [0.25]


def test_a_damaged_checkpoint_is_an_error(tmp_path: Path) -> None:
    path = path_of(tmp_path, RUNS["mlp"])
    path.parent.mkdir()
    path.write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(CheckpointError, match="remove it, and the training starts anew"):
        train(Job(RUNS["mlp"], tmp_path))
    other = Training(RUNS["gpt"])
    trainer.save_state(path, other.model, other.optimizer, vars(other.history))
    with pytest.raises(CheckpointError, match="is no state of this training"):
        train(Job(RUNS["mlp"], tmp_path))


def test_a_training_that_diverges_ends_and_says_so() -> None:
    table = RUNS["table"]
    result = train(Job(replace(table, recipe=replace(QUICK, lr=1e30, steps=50))))
    assert result["test_error"] == math.inf
    assert result["steps"] < 50


def test_the_naive_rule_has_the_rates_of_dense_layers() -> None:
    rates = {}
    for aware in (True, False):
        training = Training(replace(RUNS["mlp"], recipe=replace(QUICK, structure_aware=aware)))
        by_name = {id(p): name for name, p in training.model.named_parameters()}
        for group, rate in zip(training.optimizer.param_groups, training.rates, strict=True):
            for parameter in group["params"]:
                rates[aware, by_name[id(parameter)]] = rate
    up = "blocks.0.up.factors.0"
    assert rates[True, up] == pytest.approx(rates[False, up] * 2)  # 16 features in modes of 4: (16 / 4) / 2
    # The input layer is slower by a factor of ten (paper, section 4.1), and of 64 features at every width.
    assert rates[False, "embed.factors.0"] == pytest.approx(3e-4)


def test_recipes_refuse_what_cannot_be() -> None:
    with pytest.raises(StructureError, match="schedule 'linear' not among cosine, constant"):
        Recipe(schedule="linear")
    with pytest.raises(StructureError, match="positive rate"):
        Recipe(lr=0)
    assert [Recipe(warmup=2).factor(k, 10) for k in (0, 1)] == pytest.approx([0.5, 0.5 + 0.5 * math.cos(math.pi / 10)])


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """``torchrun`` with half of the batch each: the same losses."""
    arguments = [
        *("study", "scaling-laws", "--data", "digits", "--structures", "dense;btt", "--widths", "8;16"),
        *("--steps", "4", "--batch", "32", "--seeds", "1", "--crop", "1"),
    ]
    alone = [PROGRAM, *arguments, "--out", str(tmp_path / "one"), "--workers", "1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    together = [*launcher, "structops", *arguments, "--out", str(tmp_path / "two")]
    for command in (alone, together):
        ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    one, two = ({json.dumps(row["run"]): row["result"] for row in rows(tmp_path / name)} for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert len(one) == 4
    for run, result in one.items():
        np.testing.assert_allclose(result["curve"], two[run]["curve"], rtol=1e-4)
        assert result["train_error"] == pytest.approx(two[run]["train_error"], abs=1e-9)


# -------------------------------------------------------------------------------------------------------------- studies

SMALL: dict[str, Any] = {"data": "digits", "steps": 3, "batch": 32, "seeds": 1, "depth": 1, "crop": 1}
VIT: dict[str, Any] = {"patch_size": 4, "heads": 4}
STUDIED: dict[str, Study] = {
    "coordinate-check": CoordinateCheck(("btt",), ("adam", "muon"), ("paper", "naive"), (32, 64), steps=2, seeds=1),
    "lr-landscape": LrLandscape(("dense", "btt"), widths=(16, 32), lrs="-10:-6:2", seeds=1, epochs=1),
    "scaling-laws": ScalingLaws(**SMALL, widths=(16, 24, 32)),
    "compute-per-dimension": ComputePerDimension(**SMALL, widths=(32, 48, 64)),
    "memory": Memory(**SMALL, widths=(32, 48, 64)),
    "placement": Placement(**SMALL, **VIT, widths=(16,), lrs=(1e-3, 1e-2)),
    "weight-norm": WeightNorm(**{**SMALL, "data": "pydoc"}, widths=(16,), lrs=(1e-3, 1e-2), context=16),
    "einsum": EinsumPoints(**SMALL, widths=(32, 48, 64), points=("low_rank", "kron", "generic", "btt")),
}


def test_every_study_is_tried() -> None:
    assert set(STUDIED) == {study.name for study in STUDIES}


@pytest.mark.parametrize("name", STUDIED)
def test_a_study_runs_from_its_settings(name: str, tmp_path: Path) -> None:
    study = STUDIED[name]
    execution = Execution(out=tmp_path, workers=2)
    report = conduct(study, execution, QUIET)
    results = Store(tmp_path)
    assert all(results.get(run) for run in study.runs())
    assert not list((tmp_path / "checkpoints").glob("*")) if (tmp_path / "checkpoints").exists() else True
    assert report.findings
    for table in report.tables.values():
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.columns)}
        assert (tmp_path / "report.md").read_text().count(table.title) == 1
    for figure in report.figures:
        assert (tmp_path / f"{figure}.svg").read_text().startswith("<?xml")
    assert read_config(type(study), tmp_path / "config.yaml") == study


def test_structures_meet_the_macs_of_dense_networks() -> None:
    study = STUDIED["scaling-laws"]
    budgets = [study.network("dense", width).macs for width in study.widths]
    for run in study.runs():
        assert min(abs(run.model.macs / budget - 1) for budget in budgets) < 0.3, run.model


def test_a_network_suits_its_data() -> None:
    assert ScalingLaws(data="wine").network("dense", 8).in_features == 13
    assert ScalingLaws(data="diabetes").network("dense", 8).classes == 1
    vit = ScalingLaws(model="vit", data="mnist5k").network("dense", 8)
    assert (vit.image_size, vit.channels, vit.classes) == (28, 1, 10)
    gpt = ScalingLaws(model="gpt", data="pydoc", tokens="bpe", vocab_size=300, context=32).network("dense", 16)
    assert (gpt.vocab, gpt.context) == (300, 32)
    for wrong in ({"model": "rnn"}, {"error": "mse"}):
        with pytest.raises(StructureError, match="not among"):
            ScalingLaws(**wrong)
    for model, data in (("vit", "wine"), ("mlp", "pydoc"), ("gpt", "digits"), ("vit", "diabetes")):
        with pytest.raises((StructureError, DataError), match=f"{data}"):
            ScalingLaws(model=model, data=data).network("dense", 16)
    with pytest.raises(StructureError, match="an MLP has no attention"):
        ScalingLaws(where="attention").network("dense", 16)
    with pytest.raises(StructureError, match="one width"):
        Placement(widths=(16, 32))


# ------------------------------------------------------------------------------------------------------------- findings


def results_of(study: Study, error: Any) -> dict[Run, dict[str, Any]]:
    """Made-up results, of the runs of a study."""
    keys = ("train_error", "test_error", "train_loss", "test_loss")
    return {
        run: {**dict.fromkeys(keys, error(run)), "macs": run.model.macs, "num_params": run.model.num_params}
        | {"activations": run.model.activations, "seconds": run.model.macs / 1e6}
        for run in study.runs()
    }


def law(run: Run) -> float:
    """Errors as the paper found them: BTT falls faster than dense, Kronecker more slowly."""
    exponent = {"btt": 0.157, "kron": 0.039}.get(run.model.structure, 0.126)
    return 3 * run.model.macs**-exponent


def test_the_findings_of_the_paper_appear_where_its_laws_hold() -> None:
    study = STUDIED["scaling-laws"]
    findings = study.report(results_of(study, law)).findings
    appear = {finding.claim: finding.appears for finding in findings}
    assert appear["BTT has a larger exponent than dense"] is True
    assert appear["dense has a larger exponent than Kronecker"] is True
    assert appear["BTT needs fewer MACs than dense at equal error"] is True
    turned = study.report(results_of(study, lambda run: 1 / law(run))).findings
    assert {finding.appears for finding in turned if "exponent" in finding.claim} >= {False}
    # Scatter of the size of the difference leaves it open.
    scattered = study.report(results_of(study, lambda run: law(run) * (1.3 if run.model.width % 3 else 1))).findings
    assert None in {finding.appears for finding in scattered if "exponent" in finding.claim}


def test_the_table_has_the_exponents_and_the_costs() -> None:
    study = STUDIED["scaling-laws"]
    table = study.report(results_of(study, law)).tables["laws"]
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows["btt"]["α"] == pytest.approx(0.157)
    assert rows["dense"]["MACs"] == "1"
    # BTT starts below the lowest error of dense, so that the cost of its smallest network stands in.
    smallest = min(run.model.macs for run in study.runs() if run.model.structure == "btt")
    most = max(run.model.macs for run in study.runs() if run.model.structure == "dense")
    assert rows["btt"]["MACs"] == f"≤ {smallest / most:.3g}"


def test_a_diverged_network_is_no_point() -> None:
    study = STUDIED["scaling-laws"]
    results = results_of(study, lambda run: None if run.model.structure == "kron" else law(run))
    report = study.report(results)
    assert ("kron", None, None, None) in [row[:4] for row in report.tables["laws"].rows]


def test_the_largest_gap_is_at_equal_cost() -> None:
    dense = Curve.of("dense", [Point(c, e, e, e) for c, e in ((1, 1.0), (100, 0.01))])
    other = Curve.of("btt", [Point(c, e, e, e) for c, e in ((0.5, 9.0), (10, 0.11), (200, 9.0))])
    assert largest_gap(other, dense) == pytest.approx(0.1)
    assert largest_gap(Curve("none", ()), dense) is None


# ------------------------------------------------------------------------------------------------------------- commands


def structops(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False)


def test_a_command_goes_on_after_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "study"
    command = [
        *("study", "scaling-laws", "--data", "digits", "--structures", "dense;btt", "--widths", "8;16;32;64"),
        *("--seeds", "2", "--epochs", "6", "--crop", "1", "--workers", "1", "--out", str(out)),
    ]
    process = subprocess.Popen([PROGRAM, *command], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    file, limit = out / "results.jsonl", time.monotonic() + 120
    while (not file.exists() or file.read_text().count("\n") < 3) and time.monotonic() < limit:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = file.read_text().splitlines()[:3]
    ended = structops(*command)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "16 of 16 trainings are there" in ended.stdout
    assert file.read_text().splitlines()[:3] == kept
    again = structops(*command)
    assert "16 of 16 trainings are there, 0 were not" in again.stdout
    assert "BTT needs fewer MACs than dense at equal error" in again.stdout
    assert "report.md" in again.stdout


def test_a_file_of_settings_repeats_a_study(tmp_path: Path) -> None:
    first = structops(
        *("study", "memory", "--data", "digits", "--structures", "dense", "--widths", "8;12;16", "--steps", "2"),
        *("--batch", "16", "--seeds", "1", "--crop", "1", "--workers", "1", "--out", str(tmp_path / "a")),
    )
    assert first.returncode == 0, first.stdout + first.stderr
    again = structops(
        *("study", "memory", "--config", str(tmp_path / "a" / "config.yaml"), "--workers", "1"),
        *("--out", str(tmp_path / "b")),
    )
    assert again.returncode == 0, again.stdout + again.stderr
    one, two = (
        [{**row, "result": {**row["result"], "seconds": 0}} for row in rows(tmp_path / name)] for name in ("a", "b")
    )
    assert one == two


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("scaling-laws", "--model", "rnn"), "model 'rnn' not among mlp, vit, gpt"),
        (("scaling-laws", "--structures", "btt(rank=0)"), "rank"),
        (("scaling-laws", "--data", "imagenet"), "imagenet"),
        (("placement", "--places", "head"), "head not among"),
        (("einsum", "--points", "tucker"), "tucker not among"),
        (("memory", "--widths", "8;x"), "expected one or more of type int"),
        (("weight-norm", "--executor", "slurm", "--steps", "1"), "'slurm' not among local, ray"),
    ],
)
def test_a_command_refuses_what_it_does_not_know(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    ended = CliRunner().invoke(cli.app, ["study", *arguments, "--out", str(tmp_path / "out")])
    assert ended.exit_code == 2, ended.output
    assert said in " ".join(ended.output.replace("│", " ").split())
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_a_structure_of_ones_own_is_studied(tmp_path: Path) -> None:
    tmp_path.joinpath("mine.py").write_text(OWN)
    arguments = (
        *(
            "study",
            "memory",
            "--data",
            "digits",
            "--structures",
            "dense;squeezed",
            "--widths",
            "8;12;16",
            "--steps",
            "2",
        ),
        *("--batch", "16", "--seeds", "1", "--crop", "1", "--workers", "1", "--out", "out"),
    )
    for imports, code in ((("--import", "mine"), 0), (("--import", "none"), 2)):
        command = [PROGRAM, *arguments, *imports]
        ended = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ended.returncode == code, ended.stdout + ended.stderr
    assert sum(row["run"]["model"]["structure"] == "squeezed" for row in rows(tmp_path / "out")) == 3


OWN = """
from dataclasses import dataclass
from structops.chain import Chain
from structops.spec import Structure, register

@register
@dataclass(frozen=True)
class Squeezed(Structure):
    name = "squeezed"

    def chain(self, in_features, out_features):
        return Chain("j, sj, is -> i", {"j": in_features, "s": 2, "i": out_features})

    def build(self, chain, factors):
        raise NotImplementedError
"""


def test_a_study_on_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    ended = structops(
        *("study", "memory", "--data", "digits", "--structures", "dense", "--widths", "8;12;16", "--steps", "2"),
        *("--batch", "16", "--seeds", "1", "--crop", "1", "--executor", "ray", "--workers", "1"),
        *("--out", str(tmp_path)),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "3 of 3 trainings are there" in ended.stdout


def test_settings_that_a_study_fixes_are_no_options(tmp_path: Path) -> None:
    ended = CliRunner().invoke(cli.app, ["study", "weight-norm", "--lr", "1e-3", "--out", str(tmp_path / "out")])
    assert ended.exit_code == 2
    assert "No such option" in ended.output
    path = tmp_path / "settings.yaml"
    path.write_text("lr: 0.1\n")
    with pytest.raises(StructureError, match="lr not among"):
        read_config(WeightNorm, path)


def test_a_study_of_small_trainings_is_not_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StructureError, match="run it without torchrun"):
        conduct(STUDIED["lr-landscape"], Execution(out=tmp_path), QUIET)


def test_a_report_of_half_a_study(tmp_path: Path) -> None:
    for name in STUDIED:
        study, folder = STUDIED[name], tmp_path / name
        made = results_of(study, law) if isinstance(study, Trained) else {}
        store = Store(folder)
        for run in list(made)[: len(made) // 2]:
            store.add(run, made[run])
        conduct(study, Execution(out=folder, only_report=True), QUIET)
        assert (folder / "report.md").exists() is bool(made)


def test_help_does_not_wait_for_the_libraries_that_compute() -> None:
    code = "import sys, structops.studies.commands; print({'torch', 'jax', 'cola', 'matplotlib'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"
