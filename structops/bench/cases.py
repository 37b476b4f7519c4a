"""What is measured: sizes, structures, tokens, number formats and passes.  Pure data, no arrays."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass, field, replace

from structops.chain import Chain
from structops.errors import StructureError, StructureWarning
from structops.spec import Plan, structure

PASSES = ("forward", "train")
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
CONTESTANTS = ("dense", "structops", "einsum", "compiled einsum", "copying", "merged", "jax", "jax einsum")
OURS = "structops"
# Few blocks of full rank, few blocks of lower rank, root-d blocks, and the structures that have no choice of blocks.
STRUCTURES = ("monarch(blocks=8)", "btt(rank=4, blocks=16)", "btt", "kron", "tt(rank=4)", "low_rank(params=0.25)")


@dataclass(frozen=True)
class Settings:
    """What to measure, and how.

    Attributes:
        shapes: Pairs of in_features and out_features.
        structures: Specs.
        tokens: Numbers of vectors that are multiplied at once.
        dtypes: Names of number formats, of `BYTES`.
        passes: Of `PASSES`; ``train`` is forward and backward, with the gradient of the input.
        contestants: Of `CONTESTANTS`.
        device: Of torch, such as ``cpu`` or ``cuda:1``.
        repeats: Timings of every contestant.
        threads: Threads of torch, or None for as many as it would use.
        min_seconds: A timing repeats the computation until it lasts this long.
        seed: Of all numbers.
    """

    shapes: tuple[tuple[int, int], ...] = ((512, 512), (1024, 1024), (2048, 2048), (4096, 4096))
    structures: tuple[str, ...] = STRUCTURES
    tokens: tuple[int, ...] = (1024,)
    dtypes: tuple[str, ...] = ("float32",)
    passes: tuple[str, ...] = PASSES
    contestants: tuple[str, ...] = CONTESTANTS
    device: str = "cpu"
    repeats: int = 7
    threads: int | None = None
    min_seconds: float = 0.02
    seed: int = 0

    def quick(self) -> Settings:
        """The same on a small scale: what ends within a minute on two cores."""
        return replace(
            self,
            shapes=((256, 256), (512, 512)),
            structures=("monarch(blocks=4)", "btt"),
            tokens=(256,),
            contestants=tuple(name for name in self.contestants if name != "compiled einsum"),
            repeats=3,
            min_seconds=0.005,
        )


@dataclass(frozen=True)
class Case:
    """One thing to compute, which the contestants compute in different ways.

    Attributes:
        in_features: Size of the input.
        out_features: Size of the output.
        structure: The spec.
        tokens: Vectors that are multiplied at once.
        dtype: Number format.
        device: Of torch.
        run: The pass, of `PASSES`.
        plan: The structure at this size.
        warning: What the structure says of itself at this size, or nothing.
    """

    in_features: int
    out_features: int
    structure: str
    tokens: int
    dtype: str
    device: str
    run: str
    plan: Plan = field(repr=False, compare=False)
    warning: str = field(default="", compare=False)

    @property
    def shape(self) -> str:
        """The size as it is given on the command line."""
        return shape_name(self.in_features, self.out_features)

    @property
    def label(self) -> str:
        """All that tells cases apart, in one line."""
        return f"{self.structure} {self.shape}, {self.tokens} tokens, {self.dtype}, {self.run}"

    @property
    def chain(self) -> Chain | None:
        """The pattern, if the structure is a chain."""
        return getattr(self.plan, "chain", None)

    @property
    def is_square(self) -> bool:
        """Whether input and output have the same size."""
        return self.in_features == self.out_features

    @property
    def width(self) -> float:
        """The geometric mean of the sizes of input and output."""
        return math.sqrt(self.in_features * self.out_features)

    @property
    def mac_ratio(self) -> float:
        """MACs of the dense layer relative to those of the structure: the speed-up if only MACs counted."""
        return self.in_features * self.out_features / self.plan.macs


@dataclass(frozen=True)
class Skipped:
    """A structure that cannot have a size, and why."""

    shape: str
    structure: str
    reason: str


def shape_name(in_features: int, out_features: int) -> str:
    """``1024`` for a square matrix, ``4096x14336`` for input x output."""
    return str(in_features) if in_features == out_features else f"{in_features}x{out_features}"


def cases_of(settings: Settings) -> tuple[list[Case], list[Skipped]]:
    """All cases, and what was left out since the structure cannot have the size.

    Raises:
        StructureError: A spec is none, or there is no case left; the message has the reasons.
    """
    specs = [str(structure(spec)) for spec in settings.structures]
    cases: list[Case] = []
    skipped: list[Skipped] = []
    for (n, m), spec in itertools.product(settings.shapes, specs):
        try:
            plan, warning = _plan(spec, n, m)
        except StructureError as error:
            skipped.append(Skipped(shape_name(n, m), spec, str(error)))
            continue
        rest = itertools.product(settings.tokens, settings.dtypes, settings.passes)
        cases += [Case(n, m, spec, tokens, dtype, settings.device, run, plan, warning) for tokens, dtype, run in rest]
    if not cases:
        reasons = "\n".join(f"  {skip.shape}: {skip.reason}" for skip in skipped)
        raise StructureError(f"no structure can have any of the shapes:\n{reasons}")
    return cases, skipped


def _plan(spec: str, in_features: int, out_features: int) -> tuple[Plan, str]:
    """The plan, and the warnings that it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", StructureWarning)
        plan = structure(spec).plan(in_features, out_features)
    return plan, "; ".join(dict.fromkeys(str(warning.message) for warning in caught))
