"""What was measured, and the numbers that follow from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from structops.bench.cases import BYTES, OURS, Case, Settings, Skipped
from structops.bench.clock import Timing, ratio
from structops.bench.roofline import Ceilings, Crossover, crossover, dense_work, work

# Other ways to compute the structure in torch; JAX and the dense layer are compared, but are not alternatives.
ALTERNATIVES = ("einsum", "compiled einsum", "copying")


@dataclass(frozen=True)
class Result:
    """A case that was measured.

    Attributes:
        case: What was computed.
        ceilings: Of the device and number format.
        timings: Of every contestant.
        errors: Largest relative difference of every contestant to another one.
        memory: Bytes of a step of every contestant, by kind: ``saved`` by autograd, ``peak`` on a CUDA device.
        absent: Contestants that could not take part, and why.
    """

    case: Case
    ceilings: Ceilings
    timings: dict[str, Timing]
    errors: dict[str, float]
    memory: dict[str, dict[str, float]]
    absent: dict[str, str]

    @property
    def ours(self) -> Timing:
        """The times of our layer."""
        return self.timings[OURS]

    def speedup(self, name: str | None) -> float | None:
        """How many times faster our layer is than a contestant, or None without it."""
        return ratio(self.timings[name], self.ours) if name in self.timings else None

    @property
    def rival(self) -> str | None:
        """The fastest other way to compute the structure."""
        present = {name: ratio(self.timings[name], self.ours) for name in ALTERNATIVES if name in self.timings}
        return min(present, key=lambda name: present[name], default=None)

    @property
    def best_rival_speedup(self) -> float | None:
        """How many times faster our fastest round is than the fastest of any other way to compute the structure."""
        return min(
            (self.timings[name].best / self.ours.best for name in ALTERNATIVES if name in self.timings), default=None
        )

    @property
    def bound(self) -> float:
        """Seconds that our layer needs at least: the roofline of products without copies."""
        return work(self.case).bound(self.ceilings)

    @property
    def of_bound(self) -> float:
        """Share of the roofline that our layer reaches."""
        return self.bound / self.ours.median

    @property
    def of_matmul(self) -> float:
        """Share of the measured rate of matrix products."""
        return work(self.case).flops / self.ours.median / self.ceilings.flops

    @property
    def of_bandwidth(self) -> float:
        """Share of the measured bandwidth."""
        return work(self.case).traffic / self.ours.median / self.ceilings.bandwidth

    @property
    def mac_share(self) -> float | None:
        """Share of the ratio of MACs that became a speed-up over the dense layer."""
        speedup = self.speedup("dense")
        return None if speedup is None else speedup / self.case.mac_ratio

    @property
    def predicted_saved(self) -> int | None:
        """Numbers a token that the chain says are saved for the backward pass."""
        return self.case.chain.saved_activations if self.case.chain and self.case.run == "train" else None

    def saved(self, name: str) -> float | None:
        """Numbers a token that a contestant saves for the backward pass."""
        saved = self.memory.get(name, {}).get("saved")
        return None if saved is None else saved / (self.case.tokens * BYTES[self.case.dtype])

    def data(self) -> dict[str, Any]:
        """Everything, for JSON."""
        case = self.case
        return {
            "in_features": case.in_features,
            "out_features": case.out_features,
            "structure": case.structure,
            "tokens": case.tokens,
            "dtype": case.dtype,
            "device": case.device,
            "pass": case.run,
            "chain": repr(case.chain) if case.chain else None,
            "num_params": case.plan.num_params,
            "macs": case.plan.macs,
            "mac_ratio": case.mac_ratio,
            "warning": case.warning,
            "contestants": {name: self._contestant(name) for name in self.timings},
            "absent": self.absent,
            "rival": self.rival,
            "rival_ratio": self.speedup(self.rival),
            "rival_ratio_of_best": self.best_rival_speedup,
            "work": asdict(work(case)),
            "bound": self.bound,
            "dense_bound": dense_work(case).bound(self.ceilings),
            "of_bound": self.of_bound,
            "of_matmul": self.of_matmul,
            "of_bandwidth": self.of_bandwidth,
            "mac_share": self.mac_share,
            "predicted_saved_per_token": self.predicted_saved,
        }

    def _contestant(self, name: str) -> dict[str, Any]:
        timing = self.timings[name]
        return {
            "median": timing.median,
            "best": timing.best,
            "ratio": self.speedup(name),
            "ratio_of_best": timing.best / self.ours.best,
            "difference": self.errors[name],
            "saved_per_token": self.saved(name),
            "bytes": self.memory.get(name, {}),
            "calls": timing.calls,
            "seconds": timing.seconds,
        }


@dataclass
class Report:
    """All that a run gives; it grows with every case.

    Attributes:
        settings: What was asked for.
        machine: Where the numbers come from.
        total: Number of cases.
        skipped: Structures that cannot have a size.
        notes: What else a reader has to know.
        ceilings: What the device reaches with every number format.
        results: The cases that were measured.
    """

    settings: Settings
    machine: dict[str, Any]
    total: int
    skipped: list[Skipped]
    notes: list[str] = field(default_factory=list)
    ceilings: dict[str, Ceilings] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)

    def data(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "machine": self.machine,
            "settings": asdict(self.settings),
            "finished": f"{len(self.results)} of {self.total}",
            "notes": self.notes,
            "skipped": [asdict(skip) for skip in self.skipped],
            "ceilings": {dtype: asdict(ceilings) for dtype, ceilings in self.ceilings.items()},
            "crossovers": [
                {**group, "over": over, "against": against, "size": found.size, "text": str(found)}
                for over, against, found, group in crossovers(self.results)
            ],
            "results": [result.data() for result in self.results],
        }


def crossovers(results: Sequence[Result]) -> Iterator[tuple[str, str, Crossover, dict[str, Any]]]:
    """Where our layer overtakes another: over what, whom, from where on, and for which cases.

    Over widths the dense layer (square shapes only), over tokens the merged one; each from two sizes upwards.
    """
    for over, against, group, members in _groups(results):
        speedups = [result.speedup(against) for result in members]
        sizes = [result.case.width if over == "width" else result.case.tokens for result in members]
        yield over, against, crossover(sizes, [value for value in speedups if value is not None]), group


def _groups(results: Sequence[Result]) -> Iterator[tuple[str, str, dict[str, Any], list[Result]]]:
    """Results that differ in one size only."""
    for over, against, names in (
        ("width", "dense", ("structure", "dtype", "device", "run", "tokens")),
        ("tokens", "merged", ("structure", "dtype", "device", "run", "shape")),
    ):
        present = [r for r in results if against in r.timings and (over == "tokens" or r.case.is_square)]

        def key(result: Result, names: tuple[str, ...] = names) -> tuple[Any, ...]:
            return tuple(getattr(result.case, name) for name in names)

        for values, members in groupby(sorted(present, key=key), key):
            listed = list(members)
            if len(listed) > 1:
                yield over, against, dict(zip(names, values, strict=True)), listed
