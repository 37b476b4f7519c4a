"""More than one process: DDP, FSDP2 and tensor parallelism beside one process, and runs that are killed.

The checks themselves are in ``tests/distributed``; processes talk by gloo on this machine, and every wait has an end.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")


from filelock import FileLock  # noqa: E402  (a dependency of torch)
from torch import nn  # noqa: E402

import structops as so  # noqa: E402
from structops.torch import StructuredLinear, param_groups  # noqa: E402

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
    *(
        "tensor_parallel_compiles",
        "tensor_parallel_scatters",
        "muon_communicates_little",
        "checkpoint",
        "random_state",
        "whole_run",
    ),
)
FOUR = ("two_axes",)


# ------------------------------------------------------------------------------------------------------------ processes


def environment() -> dict[str, str]:
    # torchrun starts workers again with the store of those that died, in which gloo finds their addresses.
    store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), **store}


def start(command: list[str], log: Path, seconds: float, **more: str) -> int:
    """Run a script with a limit, and kill it with all its children at the end; the exit code."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            env={**environment(), **more},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def run_checks(folder: Path, size: int, names: tuple[str, ...]) -> dict[str, str]:
    """The error of every check, or nothing: that of the first process that failed."""
    log = folder / f"{size}.log"
    start([str(SCRIPTS / "checks.py"), str(folder), str(size), *names], log, 150)
    results = []
    for rank in range(size):
        file = folder / f"{size}-{rank}.json"
        results.append(json.loads(file.read_text(encoding="utf-8")) if file.exists() else {})
    unfinished = f"not finished:\n{log.read_text(encoding='utf-8')[-4000:]}"
    return {
        name: next(filter(None, (found.get(name) for found in results)), "")
        or ("" if all(name in found for found in results) else unfinished)
        for name in names
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all workers of pytest-xdist, so that the checks run once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "distributed"
    folder.mkdir(exist_ok=True)
    return folder


def once(folder: Path, size: int, names: tuple[str, ...]) -> dict[str, str]:
    results = folder / f"{size}.json"
    with FileLock(folder / f"{size}.lock", timeout=300):
        if not results.exists():
            results.write_text(json.dumps(run_checks(folder, size, names)), encoding="utf-8")
    return json.loads(results.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def of_two(folder: Path) -> dict[str, str]:
    return once(folder, 2, TWO)


@pytest.fixture(scope="module")
def of_four(folder: Path, of_two: dict[str, str]) -> dict[str, str]:
    return once(folder, 4, FOUR)


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


@pytest.mark.slow
def test_a_run_that_is_killed_in_a_step_and_in_a_save_ends_as_if_nothing_had_happened(
    tmp_path: Path, folder: Path, of_two: dict[str, str]
) -> None:
    """Started by torchrun, as a user does it."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    command += [
        "--monitor-interval",
        "0.1",
        str(SCRIPTS / "killed_run.py"),
        str(tmp_path / "run"),
        str(tmp_path / "end"),
    ]
    code = start(command, tmp_path / "log", 150, KILLED_IN="step save")
    assert code == 0, (tmp_path / "log").read_text(encoding="utf-8")[-4000:]
    assert (tmp_path / "run" / "origins").read_text().split() == ["0", "4", "4"]

    assert not of_two["whole_run"]
    result, expected = torch.load(tmp_path / "end"), torch.load(folder / "whole.pt")
    assert result["losses"] == expected["losses"]  # bit for bit
    assert list(result["model"]) == list(expected["model"])
    assert all(torch.equal(result["model"][name], expected["model"][name]) for name in expected["model"])
    for run in (tmp_path / "run", folder / "whole"):
        left = sorted(path.name for path in run.glob("step-*"))
        assert left == ["step-0000000006", "step-0000000008"], "the last two, nothing unfinished"


# ---------------------------------------------------------------------------------------------- what needs one process

SPECS = {
    "dense": (1, 1),
    "low_rank(rank=6)": (1, 1),
    "kron": (1, 1),
    "tt(rank=2)": (1, 1),
    "tt(rank=2, num_cores=3)": (1, 1),
    "btt(rank=2)": (1, 2),
    "btt(blocks=8, rank=3)": (1, 2),
    "btt(num_cores=3)": (1, 0),
    "monarch(blocks=4)": (1, 2),
    "block_diag(blocks=4)": (1, 1),
    "blast(rank=3, blocks=4)": (2, 2),
}  # how many factors are cut, by output and by input; 0 if it cannot be


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("spec", SPECS)
def test_the_shares_of_a_chain_make_up_the_whole(spec: str, parts: int) -> None:
    """Slices of stored factors in the small chain: concatenated, or added up, they give the product."""
    from structops.torch.distributed import shard_chain

    structure_plan = so.structure(spec).plan(64, 256)
    generator = torch.Generator().manual_seed(0)
    shapes = structure_plan.stored_shapes
    factors = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    x = torch.randn(5, 64, dtype=torch.float64, generator=generator)
    dense = structure_plan.operator(factors).to_dense()
    for side, cut in zip(("output", "input"), SPECS[spec], strict=True):
        if not cut:
            with pytest.raises(so.StructureError, match="'d' is not the most significant one of 'cd'"):
                shard_chain(structure_plan.chain, parts, side)
            continue
        shard = shard_chain(structure_plan.chain, parts, side)
        assert sum(dim is not None for dim in shard.dims) == cut
        shares = []
        for rank in range(parts):
            mine = [f if dim is None else f.chunk(parts, dim)[rank] for f, dim in zip(factors, shard.dims, strict=True)]
            rows = x.chunk(parts, -1)[rank] if shard.cuts_input else x
            shares.append(so.contract(shard.chain, mine, rows))
        y = torch.cat(shares, -1) if shard.cuts_output else sum(shares)
        torch.testing.assert_close(y, x @ dense.T)


@pytest.mark.parametrize(
    ("spec", "sizes", "parts", "side", "text"),
    [
        ("btt", (64, 64), 3, "output", "'a', has size 8, which 3 processes do not divide; 2, 4, 8 would"),
        ("btt", (64, 64), 0, "output", "0 processes do not divide"),
        ("dense", (64, 61), 2, "output", "size 61, which 2 processes do not divide; 61 would"),
        ("monarch(blocks=3)", (36, 64), 2, "output", "output is padded from 64 to 66"),
        ("monarch(blocks=6)", (64, 36), 2, "input", "input is padded from 64 to 66"),
        ("monarch(blocks=4)", (24, 24), 2, "input", "'k' is re-read by kq=rl"),
        ("einsum(pattern='cd, cbd -> bc', sizes=(('c', 4), ('d', 2), ('b', 2)))", (8, 8), 2, "input", "not contiguous"),
    ],
)
def test_why_a_chain_cannot_be_cut(spec: str, sizes: tuple[int, int], parts: int, side: str, text: str) -> None:
    from structops.torch.distributed import shard_chain

    chain = so.structure(spec).chain(*sizes)
    with pytest.raises(so.StructureError, match=text):
        shard_chain(chain, parts, side)


def test_the_page_has_the_shares_of_the_code() -> None:
    from structops.torch.distributed import shard_chain

    page = (HERE.parent / "docs" / "distributed.md").read_text(encoding="utf-8")
    table = page.split("| structure | column-parallel: params, MACs |")[1].split("\n\n")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) == 7
    for name, *cells in rows:
        chain = so.structure(name.strip(" `")).chain(1024, 1024)
        for side, cell in zip(("output", "input"), cells, strict=True):
            share = shard_chain(chain, 4, side).chain
            assert cell.strip() == f"{share.num_params / chain.num_params:.2f}, {share.macs / chain.macs:.2f}", name


# Out of the model's factors of (blocks, fan_out, fan_in) and the number of processes: the axis.
@pytest.mark.parametrize(
    ("spec", "shards", "axes"),
    [
        ("btt(rank=2)", 4, [0, 0]),
        ("btt(rank=2)", 1, [0, 0]),
        ("btt(rank=2)", 16, [1, 2]),  # (8, 16, 8) and (8, 8, 16)
        ("low_rank(rank=6)", 4, [2, 1]),  # (1, 6, 64) and (1, 64, 6)
        ("kron", 8, [1, 1]),
        ("kron", 3, [None, None]),
        ("dense", 64, [1]),
    ],
)
def test_the_placement_names_an_axis_that_the_processes_divide(spec: str, shards: int, axes: list[int | None]) -> None:
    from structops.torch.distributed import shard_placement

    model = nn.Sequential(StructuredLinear(64, 64, spec), nn.Linear(64, 64))
    place = shard_placement(model, shards)
    assert [axis if axis is None else axis.dim for axis in map(place, model[0].factors)] == axes
    others = [model[0].bias, *model[1].parameters(), StructuredLinear(64, 64, spec).factors[0]]
    assert [place(parameter) for parameter in others] == [None] * 4


def test_the_placement_keeps_no_parameter_alive() -> None:
    from structops.torch.distributed import shard_placement

    layer = StructuredLinear(64, 64, "btt")
    place, alive = shard_placement(layer, 2), weakref.ref(layer.factors[0])
    del layer
    gc.collect()
    assert alive() is None
    assert callable(place)


def test_styles_by_glob() -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    from structops.torch.distributed import ColwiseStructured, RowwiseStructured, tensor_parallel_plan

    model = nn.ModuleDict({name: StructuredLinear(16, 16, "btt") for name in ("up", "down")})
    model["head"], model["norm"], model["odd"] = nn.Linear(16, 6), nn.LayerNorm(16), StructuredLinear(9, 9, "toeplitz")
    styles = tensor_parallel_plan(model, colwise=["u*", "head"], rowwise="d*", parts=2)
    assert {name: type(style) for name, style in styles.items()} == {
        "up": ColwiseStructured,
        "head": ColwiseParallel,
        "down": RowwiseStructured,
    }
    assert type(tensor_parallel_plan(model, rowwise="head")["head"]) is RowwiseParallel
    for globs, text in (
        ({"colwise": "norm"}, "colwise: 'norm' fits no linear layer; there are up, down, head, odd"),
        ({"colwise": "up", "rowwise": "*"}, "up is in colwise and in rowwise"),
        ({"colwise": "up", "parts": 3}, "^up: btt: Chain.*has size 4, which 3 processes do not divide; 2, 4 would"),
        ({"rowwise": "odd", "parts": 3}, "^odd: toeplitz is no chain of factors"),
    ):
        with pytest.raises(so.StructureError, match=text):
            tensor_parallel_plan(model, **globs)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """One process with gloo."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_what_a_tensor_parallel_layer_refuses(process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import parallelize_module

    from structops.torch.distributed import ColwiseStructured, RowwiseStructured

    mesh = init_device_mesh("cpu", (1,))
    layer = parallelize_module(StructuredLinear(16, 16, "btt"), mesh, ColwiseStructured())
    with pytest.raises(so.ShapeError, match=r"\(..., 16\), got \(3, 15\)"):
        layer(torch.zeros(3, 15))
    with pytest.raises(so.StructureError, match="no dense form"):
        layer.merge()
    with pytest.raises(so.StructureError, match=r"got Linear.*ColwiseParallel"):
        parallelize_module(nn.Linear(4, 4), mesh, ColwiseStructured())
    with pytest.raises(so.StructureError, match=r"an axis of tokens counted from the front, got .*-2"):
        parallelize_module(StructuredLinear(16, 16, "btt"), mesh, RowwiseStructured(output_layouts=Shard(-2)))
    frozen = parallelize_module(StructuredLinear(16, 16, "btt").requires_grad_(False), mesh, RowwiseStructured())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_what_the_placement_and_clipping_refuse() -> None:
    from structops.torch.distributed import clip_grad_norm_, shard_placement

    layer = StructuredLinear(16, 16, "btt")
    with pytest.raises(so.StructureError, match="needs a process group"):
        shard_placement(layer)
    for bad in (0, 2.0, True):
        with pytest.raises(so.StructureError, match="number of processes"):
            shard_placement(layer, bad)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        clip_grad_norm_(layer.parameters(), -1)
    assert clip_grad_norm_(layer.parameters(), 1.0) == 0  # no gradients


def test_clipping_is_that_of_torch_on_plain_tensors() -> None:
    from structops.torch.distributed import clip_grad_norm_

    ours, theirs = StructuredLinear(16, 16, "btt"), StructuredLinear(16, 16, "btt")
    theirs.load_state_dict(ours.state_dict())
    for norm_type in (2.0, 1.0, float("inf")):
        norms = []
        for layer, clip in ((ours, clip_grad_norm_), (theirs, nn.utils.clip_grad_norm_)):
            layer.zero_grad()
            layer(torch.ones(3, 16)).square().sum().backward()
            norms.append(clip(layer.parameters(), 0.1, norm_type))
        torch.testing.assert_close(*norms)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


# ------------------------------------------------------------------------------------------ checkpoints of one process


def test_checkpoints_are_replaced_and_kept(tmp_path: Path) -> None:
    from structops.torch.distributed import resume, save

    layer = StructuredLinear(16, 16, "btt")
    first = [factor.detach().clone() for factor in layer.factors]
    assert resume(tmp_path / "none", layer) is None
    (tmp_path / "step-0000000009.tmp").mkdir()  # of a run that was killed
    for step in (1, 2, 3):
        path = save(tmp_path, step, layer, extra={"text": "é", "list": [1, None, 0.5]}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000000002", "step-0000000003"]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    save(tmp_path, 3, layer)  # again
    found = resume(tmp_path, StructuredLinear(16, 16, "btt"))
    assert (found.step, found.extra, found.path) == (3, {}, path)
    with pytest.raises(so.StructureError, match="step-0000000003 is of a later step than 2; resume from it"):
        save(tmp_path, 2, layer)
    shutil.rmtree(path)
    assert resume(tmp_path, layer).extra == {"text": "é", "list": [1, None, 0.5]}
    assert all(torch.equal(a, b) for a, b in zip(layer.factors, first, strict=True))


def test_several_optimizers_go_on(tmp_path: Path) -> None:
    from structops.torch import Muon, plan, split
    from structops.torch.distributed import resume, save

    def run(layer: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        layer(torch.ones(3, 16)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()

    def made() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        layer = StructuredLinear(16, 16, "btt")
        matrices, rest = split(layer, plan(layer, "muon"), named=True)
        return layer, [Muon(matrices), torch.optim.AdamW(rest)]

    layer, optimizers = made()
    run(layer, optimizers)
    save(tmp_path, 1, layer, optimizers)
    run(layer, optimizers)
    other, others = made()
    resume(tmp_path, other, others)
    run(other, others)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters(), strict=True))


def test_what_checkpoints_refuse(tmp_path: Path) -> None:
    from structops.torch.distributed import checkpoint, resume, save

    layer = StructuredLinear(16, 16, "btt")
    for arguments, text in (
        ({"step": -1}, "step must be a whole number of at least 0, got -1"),
        ({"step": True}, "step must be"),
        ({"step": 1, "keep": 0}, "keep must be a whole number of at least 1, got 0"),
        ({"step": 1, "extra": {"x": torch.ones(2)}}, "extra must be what JSON keeps"),
        ({"step": 1, "extra": {"x": (1, 2)}}, "comes back from JSON as something else"),
    ):
        with pytest.raises(so.StructureError, match=text):
            save(tmp_path, model=layer, **arguments)
    assert not list(tmp_path.iterdir())

    save(tmp_path, 1, layer, torch.optim.AdamW(param_groups(layer, weight_decay=0.1)))
    with pytest.raises(so.StructureError, match=r"lr=.* for .*, which are in one parameter group here"):
        resume(tmp_path, layer, torch.optim.AdamW([{"params": layer.parameters(), "lr": 1.0, "lr_scale": 1.0}]))
    (path,) = tmp_path.glob("step-*")
    about = json.loads((path / checkpoint.ABOUT).read_text())
    (path / checkpoint.ABOUT).write_text(json.dumps({**about, "format": 2}))
    with pytest.raises(so.StructureError, match="has format 2"):
        resume(tmp_path, layer)


def test_importing_the_layers_does_not_import_what_is_slow() -> None:
    slow = {"torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint"}
    code = f"import sys, structops.torch; assert not {slow} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment())
