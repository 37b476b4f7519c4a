"""``structops bench``: numbers by hand, contestants against a dense matrix, and the command as a user runs it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import signal

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from structops import cli
from structops import structure as spec
from structops.bench import cases, clock, contestant, equations, report, results, roofline
from structops.contract import unstore
from structops.errors import StructureError
from structops.testing import references

torch = pytest.importorskip("torch", reason="needs PyTorch")

from structops.bench import ceilings, contestants, run  # noqa: E402

pytestmark = pytest.mark.torch


def case_of(structure, size, tokens=8, dtype="float64", which="train", out=None):
    plan = spec(structure).plan(size, out or size)
    return cases.Case(size, out or size, structure, tokens, dtype, "cpu", which, plan)


# --------------------------------------------------------------------------------------------------------------- cases


def test_cases_are_all_combinations_that_exist():
    settings = cases.Settings(
        shapes=((64, 64), (30, 64)), structures=("kron", "btt(blocks=4, rank=1)"), tokens=(8, 16), dtypes=("float32",)
    )
    found, skipped = cases.cases_of(settings)
    assert len(found) == (2 + 1) * 2 * 2
    assert {case.label for case in found if case.in_features == 30} == {
        f"kron 30x64, {tokens} tokens, float32, {which}" for tokens in (8, 16) for which in ("forward", "train")
    }
    assert [(skip.shape, skip.structure) for skip in skipped] == [("30x64", "btt(rank=1, blocks=4)")]
    assert "4 blocks do not divide" in skipped[0].reason
    assert "cap the rank" in next(case.warning for case in found if case.structure.startswith("btt"))


def test_no_case_left_is_an_error_with_the_reasons():
    with pytest.raises(
        StructureError, match=r"no structure can have any of the shapes:\n  30: .*7 blocks do not divide"
    ):
        cases.cases_of(cases.Settings(shapes=((30, 30),), structures=("btt(blocks=7)",)))
    with pytest.raises(StructureError, match="unknown structure 'bttt'"):
        cases.cases_of(cases.Settings(structures=("bttt", "kron")))


# ------------------------------------------------------------------------------------------------------------ roofline


def test_work_is_that_of_the_table():
    """With 16-bit numbers 4d + 4h bytes a token, 12d + 12h in training, dense 4d and 12d, and the parameters."""
    d, tokens = 4096, 16384
    for which, times in (("forward", 1), ("train", 3)):
        case = case_of("btt(rank=4)", d, tokens, "bfloat16", which)
        h, params = 4 * d, 2 * 4 * d * 64
        assert roofline.work(case) == roofline.Work(
            times * 2 * params * tokens, times * (tokens * (4 * d + 4 * h) + 2 * params)
        )
        assert roofline.dense_work(case) == roofline.Work(
            times * 2 * d * d * tokens, times * (tokens * 4 * d + 2 * d * d)
        )


@pytest.mark.parametrize(
    ("structure", "shape", "milliseconds"),
    [
        ("btt(rank=1)", (1024, 1024), 0.031),
        ("monarch(blocks=8)", (4096, 4096), 0.174),
        ("btt(rank=4)", (4096, 4096), 0.313),
        ("monarch(blocks=16)", (8192, 8192), 0.348),
    ],
)
def test_bounds_of_an_h200(structure, shape, milliseconds):
    h200 = roofline.Ceilings(790e12, 4.3e12)
    case = case_of(structure, shape[0], 16384, "bfloat16", "forward", out=shape[1])
    assert roofline.work(case).bound(h200) == pytest.approx(1e-3 * milliseconds, rel=0.02)


def test_a_structure_that_is_no_chain_has_a_bound_too():
    case = case_of("toeplitz", 64, 10, "float32", "forward")
    assert case.chain is None
    assert roofline.work(case).traffic == 4 * (10 * 128 + 127)


@pytest.mark.parametrize(
    ("speedups", "size", "text"),
    [
        ([0.25, 0.5, 2.0], 2048, "2,048"),
        ([0.5, 2.0, 2.0], 512, "512"),
        ([2.0, 0.5, 2.0], 2048, "2,048"),  # faster for good only from here on
        ([0.2, 0.3, 0.9], None, "> 4,096"),
        ([1.0, 2.0, 3.0], 256, "≤ 256"),
    ],
)
def test_crossover(speedups, size, text):
    found = roofline.crossover([256, 1024, 4096], speedups)
    assert found.size == (None if size is None else pytest.approx(size))
    assert str(found) == text
    backwards = roofline.crossover([4096, 1024, 256], speedups[::-1])
    assert backwards == found
    with pytest.raises(ValueError, match="at least one"):
        roofline.crossover([], [])


# --------------------------------------------------------------------------------------------------------------- clock


def test_every_round_has_another_order_and_every_run_the_same():
    def orders():
        order = []
        contestants = {name: (lambda name=name: order.append(name)) for name in "abcde"}
        ticks = iter(range(10**6))
        clock.alternate(contestants, repeats=20, min_seconds=1, clock=lambda: float(next(ticks)))
        return ["".join(order[-5 * k : len(order) - 5 * k + 5]) for k in range(1, 21)]

    found = orders()
    assert all(sorted(each) == list("abcde") for each in found)
    followers = {pair for each in found for pair in itertools.pairwise(each)}
    assert len(followers) == 20, "somebody never comes right after another"
    assert found == orders()


def test_contestants_alternate_and_are_called_until_a_timing_is_long_enough():
    now, order = [0.0], []

    def takes(name, seconds):
        def call():
            now[0] += seconds
            order.append(name)

        return call

    timings = clock.alternate(
        {"fast": takes("fast", 0.25), "slow": takes("slow", 2.0)}, repeats=3, min_seconds=1, clock=lambda: now[0]
    )
    assert timings["fast"] == clock.Timing(4, (0.25,) * 3)
    assert timings["slow"] == clock.Timing(1, (2.0,) * 3)
    assert sorted(order[-15:]) == ["fast"] * 12 + ["slow"] * 3
    assert clock.ratio(timings["slow"], timings["fast"]) == 8


def test_ratios_are_those_within_a_round():
    drifting, ours = clock.Timing(1, (2.0, 20.0, 6.0)), clock.Timing(1, (1.0, 10.0, 2.0))
    assert clock.ratio(drifting, ours) == 2.0
    assert (drifting.median, drifting.best) == (6.0, 2.0)


# --------------------------------------------------------------------------------------------------------- contestants


def test_equations_are_the_textbook_ones():
    (first, second) = equations.equations(spec("btt(rank=2)").chain(64, 64), 5)
    assert (first.text, first.shape) == ("Zcd,ebcd->Zceb", (5, 8, 8))
    assert (second.text, second.shape) == ("Zceb,abce->Zab", (5, 8, 2, 8))
    regrouped = equations.equations(spec("monarch(blocks=3)").chain(30, 30), 5)
    assert [step.has_factor for step in regrouped].count(True) == 2
    assert equations.why_no_copies(spec("monarch(blocks=3)").chain(30, 30)) == "the chain has a regroup"
    assert equations.why_no_copies(spec("monarch(blocks=4)").chain(15, 14)) == "the chain is padded"
    assert equations.why_no_copies(spec("kron").chain(16, 16)) == ""


def matrix_of(case, factors):
    """The dense matrix from stored factors, by loops over all indices."""
    chain = case.chain
    arrays = [array.numpy() for array in unstore(chain, [torch.as_tensor(factor) for factor in factors])]
    padded = references.einsum(arrays, chain.pattern, dict(chain.sizes))
    return padded[: case.out_features, : case.in_features]


def names_for(case):
    jax_there = importlib.util.find_spec("jax") is not None
    names = [name for name in cases.CONTESTANTS if name != "compiled einsum" and (jax_there or "jax" not in name)]
    return [name for name in names if name != "merged" or case.run == "forward"]


def check(case, names):
    """Values and gradients against a dense matrix; a factor's gradient by the product in a random direction.

    The matrix is linear in every factor: <gradient, direction> = <dy x^T, matrix with the direction in its place>.
    """
    problem = contestants.Problem.of(case, seed=3)
    x, dy, *factors = problem.numbers()
    W = matrix_of(case, factors)
    rng = np.random.default_rng(0)
    found = {name: run._contestant(name, problem).results() for name in names}
    for name, got in found.items():
        trains = case.run == "train"
        expected = {"y", "dx"} | {f"d{k}" for k in range(len(factors)) if name != "dense"} if trains else {"y"}
        assert set(got) == expected, name
        np.testing.assert_allclose(got["y"], (x @ W.T).ravel(), atol=1e-12, err_msg=name)
        if trains:
            np.testing.assert_allclose(got["dx"], (dy @ W).ravel(), atol=1e-12, err_msg=name)
    for k, factor in enumerate(factors):
        direction = rng.standard_normal(factor.shape)
        moved = matrix_of(case, [*factors[:k], direction, *factors[k + 1 :]])
        for name in names:
            if f"d{k}" in found[name]:
                slope = found[name][f"d{k}"] @ direction.ravel()
                assert slope == pytest.approx(np.sum((dy.T @ x) * moved)), (name, k)


CHAINS = [
    ("btt(rank=2)", 9, 16),
    ("btt(rank=2, blocks=4)", 12, 8),
    ("tt(rank=2)", 9, 16),
    ("kron", 12, 6),
    ("low_rank(rank=3)", 7, 6),
    ("monarch(blocks=2)", 8, 8),
    ("btt(num_cores=3)", 8, 8),
    ("blast(rank=2, blocks=2)", 8, 6),
]


@pytest.mark.filterwarnings("ignore::structops.StructureWarning")
@pytest.mark.parametrize("which", cases.PASSES)
@pytest.mark.parametrize(("structure", "n", "m"), CHAINS)
def test_every_contestant_computes_the_structure_and_its_gradients(structure, n, m, which):
    case = case_of(structure, n, 5, which=which, out=m)
    check(case, names_for(case))


@pytest.mark.filterwarnings("ignore::structops.StructureWarning")
@pytest.mark.parametrize("structure", ["monarch(blocks=3)", "monarch(blocks=4)"])
def test_what_is_regrouped_or_padded_has_no_copying_schedule(structure):
    case = case_of(structure, 10, 5, out=14)
    with pytest.raises(contestant.Absent, match=r"the chain has a regroup|the chain is padded"):
        contestants.torch_contestant("copying", contestants.Problem.of(case, 0))
    check(case, [name for name in names_for(case) if name != "copying"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("which", cases.PASSES)
def test_the_compiled_einsum_computes_it_too(which):
    case = case_of("btt(rank=2)", 9, 5, which=which, out=16)
    try:
        check(case, ["compiled einsum"])
    except contestant.Absent as reason:
        pytest.skip(str(reason))


def test_what_cannot_take_part_is_named(monkeypatch):
    settings = cases.Settings()
    monkeypatch.setattr(run, "find_spec", lambda name: None)

    def no_compiler(*args, **kwargs):
        raise RuntimeError("no g++\nand more")

    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: no_compiler)
    present, absent = run._contestants(case_of("btt", 16), settings)
    assert [c.name for c in present] == ["structops", "dense", "einsum", "copying"]
    assert absent == {
        "compiled einsum": "torch.compile failed: RuntimeError: no g++",
        "jax": "JAX is not installed, or Flax is not",
        "jax einsum": "JAX is not installed, or Flax is not",
    }
    present, absent = run._contestants(case_of("toeplitz", 16, which="forward"), settings)
    assert [c.name for c in present] == ["structops", "dense", "merged"]
    assert absent["copying"] == absent["einsum"] == "the structure is no chain of factors"


def test_a_contestant_that_computes_something_else_is_an_error():
    def one(name, **found):
        return contestant.Contestant(name, lambda: None, lambda: found, dict)

    right = one("einsum", y=np.ones(4), dx=np.ones(4))
    assert contestant.check_agreement([one("dense", y=np.ones(4) + 1e-6), right], "float32")["einsum"] == 0
    for wrong, what in ((np.arange(4.0), "y"), (np.full(4, np.nan), "y"), (np.ones(5), "the shape of y")):
        with pytest.raises(contestant.DisagreementError, match=f"wrong and einsum differ in {what}"):
            contestant.check_agreement([right, one("wrong", y=wrong)], "float32")


def test_large_results_are_compared_at_entries_of_all_columns():
    size = 3 * 4096 * 2048
    assert len({index % 4096 for index in range(*contestant.sample(size).indices(size))}) == 4096
    assert contestant.sample(1000) == slice(None, None, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_that_autograd_keeps_is_what_the_chain_predicts(dtype):
    case = case_of("btt(rank=2)", 64, 32, dtype)
    made = {name: contestants.torch_contestant(name, contestants.Problem.of(case, 0)) for name in ("dense", "copying")}
    kept = {name: c.memory()["saved"] / 32 / cases.BYTES[dtype] for name, c in made.items()}
    assert kept["dense"] == 64
    assert kept["copying"] == case.chain.saved_activations == 64 + 128


# -------------------------------------------------------------------------------------------------------------- report


def report_of(**timings):
    """A report of two cases with the times of every contestant in milliseconds."""
    limits = roofline.Ceilings(1e9, 1e9)
    settings = cases.Settings(repeats=1)
    machine = {"cpu": "a processor", "device": "cpu", "threads": 2, "instructions": "AVX2", "versions": {"torch": "2"}}
    skipped = [cases.Skipped("30", "btt(blocks=7)", "7 blocks do not divide 30")]
    made = report.Report(settings, machine, 3, skipped, ["A note."], {"float32": limits})
    for k, size in enumerate((16, 64)):
        case = dataclasses.replace(case_of("btt", size, 10, "float32", "forward"), warning="btt: a warning")
        times = {name: clock.Timing(1, (1e-3 * values[k],)) for name, values in timings.items()}
        errors = dict.fromkeys(times, 0.0)
        made.results.append(results.Result(case, limits, times, errors, {"structops": {}}, {"jax": "no JAX"}))
    return made


def test_numbers_of_a_report():
    made = report_of(structops=(1.0, 2.0), dense=(0.5, 8.0), einsum=(1.5, 3.0), copying=(2.0, 2.5), merged=(0.5, 8.0))
    small, large = made.results
    assert (small.speedup("dense"), large.speedup("dense")) == (0.5, 4.0)
    assert (small.rival, large.rival) == ("einsum", "copying")
    assert large.case.mac_ratio == 4.0
    assert large.mac_share == 1.0
    assert large.bound == 2 * 1024 * 10 / 1e9
    assert large.of_bound == large.of_matmul == pytest.approx(0.01024)
    assert large.of_bandwidth == pytest.approx(4 * (10 * 4 * 64 + 1024) / 1e9 / 2e-3)
    data = json.loads(json.dumps(made.data()))
    assert data["finished"] == "2 of 3"
    assert data["results"][1]["contestants"]["copying"]["ratio"] == 1.25
    assert data["results"][1]["rival_ratio"] == data["results"][1]["rival_ratio_of_best"] == 1.25
    (group,) = data["crossovers"]
    assert (group["over"], group["against"], group["structure"], group["tokens"]) == ("width", "dense", "btt", 10)
    assert group["size"] == pytest.approx(16 * 4 ** (1 / 3))  # a third of the way in the logarithm


def test_markdown():
    made = report_of(structops=(1.0, 2.0), dense=(0.5, 8.0), einsum=(1.5, 3.0), copying=(2.0, 2.5))
    text = report.markdown(made)
    assert "- a processor (AVX2, 2 threads of torch); torch 2.\n- 2 of 3 cases, 1 rounds each.\n" in text
    assert "- Ceilings in float32: 1 GFLOP/s of a large matrix product, 1.0 GB/s of a large copy.\n- A note.\n" in text
    assert "- Skipped: 30, 7 blocks do not divide 30.\n" in text
    assert "- Without jax: no JAX (btt 16, 10 tokens, float32, forward and 1 more).\n" in text
    assert text.count("btt: a warning") == 1
    assert (
        "| structure | shape | tokens | ms | dense | best other | of bound | MAC share |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|\n"
        "| btt | 16 | 10 | 1 | 0.5 | 1.5 einsum | 0% | 25% |\n"
        "| btt | 64 | 10 | 2 | 4 | 1.25 copying | 1% | 100% |\n"
    ) in text
    assert "| best other | 1.38 (1.25 to 1.5) |\n| best other, fastest round | 1.38 (1.25 to 1.5) |\n" in text
    assert "| dense | 2.25 (0.5 to 4) |" in text
    assert "| btt | 64 | 10 | 8 / 8 | 2 / 2 | 3 / 3 | 2.5 / 2.5 |" in text
    assert "| btt | forward, float32 | dense | 10 tokens | width 25 |" in text


def test_the_plot_has_a_panel_a_pass_and_token_count():
    made = report_of(structops=(1.0, 2.0), dense=(0.5, 8.0))
    made.results += [
        dataclasses.replace(r, case=dataclasses.replace(r.case, run="train", tokens=20)) for r in made.results
    ]
    axes = report.figure(made).axes
    drawn = [axis.get_title() for axis in axes if len(axis.lines) > 1]
    assert len(axes) == 4
    assert drawn == ["forward, float32, 10 tokens", "train, float32, 20 tokens"]
    measured = axes[0].lines[1]
    assert list(measured.get_xdata()) == [16, 64]
    assert list(measured.get_ydata()) == [0.5, 4.0]
    empty = report_of(structops=(1.0, 2.0))  # without dense there is nothing to draw
    assert not [axis for axis in report.figure(empty).axes if axis.lines]


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Run ``structops bench`` with small ceilings; the result and the numbers."""
    monkeypatch.setattr(ceilings, "SIZES", {"cpu": (64,)})
    monkeypatch.setattr(ceilings, "COPIED", {"cpu": 2**16})
    monkeypatch.setattr(cli, "console", Console(width=120))

    def invoke(*options):
        done = CliRunner().invoke(cli.app, ["bench", "--out", str(tmp_path), *options])
        path = tmp_path / "bench.json"
        return done, json.loads(path.read_text()) if path.exists() else None

    return invoke


TINY = ("--shapes", "16;36;16x64", "--structures", "btt(rank=2)", "--tokens", "4;8")
FAST = ("--repeats", "2", "--contestants", "dense;einsum;copying;merged;jax")


def test_the_command_writes_tables_numbers_and_a_plot(command, tmp_path):
    threads = torch.get_num_threads()
    done, data = command(*TINY, *FAST, "--threads", "1", "--seed", "5")
    assert done.exit_code == 0, done.output
    assert torch.get_num_threads() == threads
    assert data["machine"]["threads"] == 1
    assert {"cpu", "load", "cores", "python", "versions"} <= set(data["machine"])
    assert data["settings"]["seed"] == 5
    assert data["finished"] == "12 of 12"
    assert set(data["ceilings"]) == {"float32"}
    for row in data["results"]:
        names = {"structops", "dense", "einsum", "copying"} | ({"merged"} if row["pass"] == "forward" else set())
        assert set(row["contestants"]) - {"jax"} == names
        assert row["contestants"]["structops"]["ratio"] == 1
        for timing in row["contestants"].values():
            assert 0 < timing["best"] <= timing["median"]
            assert len(timing["seconds"]) == 2
            assert timing["difference"] < 1e-5
        assert row["rival"] in ("einsum", "copying")
        saved = row["contestants"]["copying"]["saved_per_token"]
        assert saved == row["predicted_saved_per_token"] == (None if row["pass"] == "forward" else saved)
    over = {(group["over"], group["against"]) for group in data["crossovers"]}
    assert over == {("width", "dense"), ("tokens", "merged")}
    assert "best other" in done.output
    assert (tmp_path / "bench.md").read_text().startswith("# How fast")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.md", "bench.png"]


def test_quick_ends_soon_and_options_change_it(command, monkeypatch):
    monkeypatch.setattr(cases.Settings, "quick", lambda self: dataclasses.replace(self, shapes=((8, 8),), repeats=1))
    done, data = command("--quick", "--structures", "kron", "--passes", "forward", "--contestants", "dense")
    assert done.exit_code == 0, done.output
    assert [row["structure"] for row in data["results"]] == ["kron"]
    assert data["settings"]["repeats"] == 1
    assert data["settings"]["shapes"] == [[8, 8]]


def test_an_interrupt_keeps_what_was_finished(command, monkeypatch, tmp_path):
    measured, real = [], run.run_case

    def interrupted(case, *rest):
        if measured:
            raise KeyboardInterrupt
        measured.append(case)
        return real(case, *rest)

    monkeypatch.setattr(run, "run_case", interrupted)
    done, data = command(*TINY, *FAST)
    assert done.exit_code == 130
    assert "interrupted" in done.output
    assert data["finished"] == "1 of 12"
    assert len(data["results"]) == 1
    assert (tmp_path / "bench.md").exists()


def test_an_interrupt_that_a_library_swallows_ends_the_run_after_the_case(command, monkeypatch):
    real = run.run_case

    def swallowing(case, *rest):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        return real(case, *rest)

    monkeypatch.setattr(run, "run_case", swallowing)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore interrupts
    try:
        done, data = command(*TINY, *FAST)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.exit_code == 130
    assert data["finished"] == "1 of 12"


def test_a_wrong_contestant_ends_the_command(command, monkeypatch):
    monkeypatch.setattr(contestants, "copying_product", lambda chain, tokens: lambda x, *factors: 2 * x @ torch.eye(16))
    done, data = command("--shapes", "16", "--structures", "btt", "--passes", "forward", *FAST)
    assert done.exit_code == 1
    assert "copying and structops differ in y" in done.output
    assert data is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shapes", "12x"), "expected sizes such as 1024 or 4096x14336"),
        (("--shapes", "0"), "expected sizes such as 1024"),
        (("--shapes", "30", "--structures", "btt(blocks=7)"), "no structure can have any of the shapes"),
        (("--structures", "bttt"), "did you mean 'btt'"),
        (("--tokens", "many"), "expected 1 or more positive whole numbers"),
        (("--dtype", "int8"), "int8 not among float64; float32; bfloat16; float16"),
        (("--passes", "backward"), "backward not among forward; train"),
        (("--contestants", "cublas"), "cublas not among dense; structops"),
        (("--device", "meta"), "expected"),
        (("--device", "nonsense"), "cannot compute on device 'nonsense'"),
        (("--repeats", "0"), "greater than or equal to 1"),
    ],
)
def test_bad_options_are_refused_with_what_was_expected(command, options, message):
    done, data = command(*options)
    assert done.exit_code == 2, done.output
    words = " ".join(done.output.replace("│", " ").split())
    assert message in words
    assert data is None
