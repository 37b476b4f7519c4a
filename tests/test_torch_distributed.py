"""More than one process: DDP, FSDP2 and tensor parallelism beside one process, and runs that are killed.

The checks themselves are in ``tests/distributed``; processes talk by gloo on this machine, and every wait has an end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")


from structops.torch import param_groups  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="PyTorch was built without gloo"),
]

HERE = Path(__file__).parent
SCRIPTS = HERE / "distributed"
sys.path.insert(0, str(SCRIPTS))

TWO = (
    *("ddp", "fsdp", "fsdp_holds_its_share", "fsdp_from_meta", "fsdp_mixed_precision", "fsdp_muon"),
    *("tensor_parallel_layers", "tensor_parallel_layouts", "tensor_parallel", "tensor_parallel_init_and_muon"),
    *("tensor_parallel_compiles", "muon_communicates_little", "checkpoint", "random_state"),
)
FOUR = ("two_axes",)


# ------------------------------------------------------------------------------------------------------------ processes


def environment() -> dict[str, str]:
    # torchrun starts workers again with the store of those that died, in which gloo finds their addresses.
    store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), **store}


def end(processes: list[subprocess.Popen[str]]) -> None:
    """Kill what is left, with children."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_checks(folder: Path, size: int, names: tuple[str, ...], seconds: float = 80) -> dict[str, str]:
    """The error of every check, or nothing: that of the first process that failed."""
    logs = [folder / f"{size}-{rank}.log" for rank in range(size)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, str(SCRIPTS / "checks.py"), str(folder), str(rank), str(size), *names]
            with log.open("w") as output:
                processes.append(
                    subprocess.Popen(
                        command, stdout=output, stderr=output, text=True, env=environment(), start_new_session=True
                    )
                )
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.poll() for process in processes):
                deadline = min(deadline, time.monotonic() + 5)  # the others wait for the one that failed
            time.sleep(0.05)
    finally:
        end(processes)
    results = []
    for rank, log in enumerate(logs):
        file = folder / f"{size}-{rank}.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        results.append({name: found.get(name, f"not finished:\n{log.read_text()[-2000:]}") for name in names})
    return {name: next((result[name] for result in results if result[name]), "") for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def of_two(folder: Path) -> dict[str, str]:
    return run_checks(folder, 2, TWO)


@pytest.fixture(scope="module")
def of_four(folder: Path, of_two: dict[str, str]) -> dict[str, str]:
    return run_checks(folder, 4, FOUR)


def test_no_check_is_left_out() -> None:
    text = (SCRIPTS / "checks.py").read_text()
    assert {line.split("(")[0][10:] for line in text.splitlines() if line.startswith("def check_")} == {*TWO, *FOUR}


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_two_processes(name: str, of_two: dict[str, str]) -> None:
    assert not of_two[name], of_two[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_processes(name: str, of_four: dict[str, str]) -> None:
    assert not of_four[name], of_four[name]


@pytest.mark.slow
@pytest.mark.parametrize("written", ["fsdp", "tensor_parallel"])
def test_one_process_goes_on_from_what_two_wrote(written: str, folder: Path, of_two: dict[str, str]) -> None:
    from models import adam, net, train

    from structops.torch.distributed import resume

    assert not of_two["checkpoint"]
    model = net().requires_grad_()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizer = adam(model, param_groups(model, lr=1.0, weight_decay=0.3, named=True))
    found = resume(folder / written, model, optimizer)
    reference = net()
    theirs = adam(reference)
    train(reference, [theirs], steps=found.step)
    for ours, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-10)
    losses = train(model, [optimizer], start=found.step)
    torch.testing.assert_close(losses, train(reference, [theirs], start=found.step), rtol=1e-10, atol=1e-10)
    if written == "fsdp":
        torch.testing.assert_close(losses, torch.load(folder / "losses.pt"), rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------------ kill and resume


def torchrun(folder: Path, result: Path, killed_in: str = "") -> tuple[dict[str, object], list[int]]:
    """Start the script as a user does: what it ends with, and the steps from which it started."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "2", "--monitor-interval", "0.1", str(SCRIPTS / "train.py"), str(folder), str(result)]
    log = folder.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env={**environment(), "KILLED_IN": killed_in},
            stdout=output,
            stderr=output,
            text=True,
            start_new_session=True,
        )
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            pass
        finally:
            end([process])
    assert process.returncode == 0, log.read_text()[-4000:]
    return torch.load(result), [int(line) for line in (folder / "origins").read_text().split()]


@pytest.mark.slow
def test_a_run_that_is_killed_in_a_step_and_in_a_save_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    expected, origins = torchrun(tmp_path / "whole", tmp_path / "whole.pt")
    assert origins == [0]
    result, origins = torchrun(tmp_path / "killed", tmp_path / "killed.pt", "step save")
    assert origins == [0, 4, 4]
    assert result["losses"] == expected["losses"]  # bit for bit
    assert list(result["model"]) == list(expected["model"])
    assert all(torch.equal(result["model"][name], expected["model"][name]) for name in expected["model"])
    for run in ("whole", "killed"):
        left = sorted(path.name for path in (tmp_path / run).glob("step-*"))
        assert left == ["step-0000000006", "step-0000000008"], "the last two, nothing unfinished"
