"""Mixtures of structured experts, as sizes: what a rank axis costs whose entries each vector chooses for itself."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from structops.chain import Chain, Factor
from structops.errors import StructureError
from structops.mup import Weight, init_stds
from structops.spec import ChainPlan, Structure, check_sizes, parse, registry, structure

BALANCE, Z = 0.01, 0.1  # weights of the auxiliary loss, and of its second term (arXiv 2410.02117)


@dataclass(frozen=True)
class Routed:
    r"""A matrix of rank E is a sum of E members of rank 1; each vector takes the k members that its gate prefers.

    \[ y = \sum_{e \in \text{top-}k} g_e(x)\, M_e x, \qquad g = \text{softmax over the } k \text{ largest of } G x. \]

    With ``btt`` that is the BTT-MoE.  It is no linear map, so it is no structure and has no operator; the layers are
    `structops.torch.RoutedLinear` and `structops.jax.RoutedLinear`.

    Args:
        structure: The structure of one expert, or its text: a chain with a rank, that is with a label that all factors
            have and neither input nor output has.  ``btt`` and ``tt`` are of rank 1 unless they say more.
        experts: \(E\), at least 2.
        top_k: \(k\), from 1 to ``experts``.

    Raises:
        StructureError: The structure is unknown, or experts or top_k are no such numbers.

    **Cost.** ``num_params`` and ``macs``.

    **References.** Potapczynski et al., "Searching for Efficient Linear Layers over a Continuous Space of Structured
    Matrices" (arXiv 2410.02117), section 5.

    Example:
        >>> spec = Routed("btt", experts=8, top_k=2)
        >>> print(spec)
        routed(structure=btt, experts=8, top_k=2)
        >>> spec.num_params(1024, 1024), spec.macs(1024, 1024)
        (532480, 139264)
    """

    structure: str | Structure = "btt"
    experts: int = 8
    top_k: int = 2

    def __post_init__(self) -> None:
        """Check the arguments that no size is needed for."""
        object.__setattr__(self, "structure", str(structure(self.structure)))
        for name, least, most in (("experts", 2, None), ("top_k", 1, "experts")):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise StructureError(f"routed: {name} must be a whole number of at least {least}, got {value!r}")
            if most and value > self.experts:
                raise StructureError(f"routed: top_k={value} of experts={self.experts}; use top_k<={self.experts}")

    @classmethod
    def parse(cls, text: str) -> Routed:
        """The spec of a text such as ``routed(structure=btt(blocks=8), experts=8, top_k=2)``, as ``str`` writes it.

        Raises:
            StructureError: The text is none, has unknown arguments, or values that do not work.
        """
        name, given = parse(text, nested="structure")
        valid = [f.name for f in dataclasses.fields(cls)]
        if name != "routed":
            raise StructureError(f"expected a spec such as 'routed(structure=btt, experts=8, top_k=2)', got {text!r}")
        if unknown := [key for key in given if key not in valid]:
            raise StructureError(f"unknown argument(s) {', '.join(unknown)}: routed accepts {', '.join(valid)}")
        return cls(**given)

    def __str__(self) -> str:
        """The text that `parse` reads."""
        return f"routed(structure={self.structure}, experts={self.experts}, top_k={self.top_k})"

    # ----------------------------------------------------------------------------------------------------------- sizes

    def member(self, in_features: int, out_features: int) -> Chain:
        """The chain of one expert.

        Raises:
            StructureError: The structure cannot have these sizes, or has no rank label.
        """
        spec = structure(self.structure)
        check_sizes(spec, in_features, out_features)
        try:
            chain = spec.chain(in_features, out_features)
        except TypeError as error:
            raise StructureError(self._no_rank(f"{spec.name} is no chain")) from error
        if not rank_label(chain):
            why = f"no label of {chain.pattern!r} belongs to all factors and to nothing else"
            raise StructureError(self._no_rank(why))
        return chain

    def rank_label(self, in_features: int, out_features: int) -> str:
        """The label of `chain` whose entries are the experts: ``s`` of ``cd, sbcd, abcs -> ab``.

        Raises:
            StructureError: As for `member`.
        """
        return rank_label(self.member(in_features, out_features))

    def chain(self, in_features: int, out_features: int) -> Chain:
        """The structure that holds all experts: the member with its rank times ``experts``.

        Raises:
            StructureError: As for `member`.
        """
        return with_rank(self.member(in_features, out_features), self.experts)

    def num_params(self, in_features: int, out_features: int) -> int:
        """Parameters of all experts and of the gate: ``E * member + in_features * E``, without a bias."""
        return self.experts * (self.member(in_features, out_features).num_params + in_features)

    def macs(self, in_features: int, out_features: int) -> int:
        """Multiply-accumulates per vector, of k experts and the gate: ``k * member + in_features * E``.

        Computing all experts and multiplying by the gates, as ``dispatch="masked"`` does, takes E in place of k.
        """
        return self.top_k * self.member(in_features, out_features).macs + in_features * self.experts

    def expert_scales(self, in_features: int, out_features: int, zero_last: bool = False) -> tuple[float, ...]:
        """Standard deviation of every factor: of an expert by itself, so its fan-ins are not multiplied by E.

        Args:
            in_features: Input size.
            out_features: Output size.
            zero_last: As in `structops.mup.init_stds`.
        """
        return init_stds(self.member(in_features, out_features), zero_last)

    def weight_sizes(self, in_features: int, out_features: int, zero_last: bool = False) -> dict[str, Weight]:
        """The parameters of a layer as muP sees them, by their names in the layer.

        Factors have the sizes of one expert, and E times its blocks.  The gate starts at zero; like a readout it has
        few outputs at any width, and its learning rate is that of a dense layer.
        """
        member = self.member(in_features, out_features)
        count, found = len(member.factors), {}
        for k, factor in enumerate(member.factors):
            stacked = dataclasses.replace(
                factor, shape=(self.experts, *factor.stored_shape), blocks=self.experts * factor.blocks
            )
            sizes = (in_features, out_features, k, count, str(self), zero_last and k == count - 1)
            found[f"factors.{k}"] = Weight(f"factors.{k}", "", "hidden", stacked, *sizes)
        gate = Factor("gate", (self.experts, in_features), fan_in=in_features, fan_out=self.experts)
        found["gate"] = Weight("gate", "", "readout", gate, in_features, self.experts, zero=True)
        bias = Factor("vector", (out_features,), fan_in=1, fan_out=out_features)
        found["bias"] = Weight("bias", "", "vector", bias, 1, out_features)
        gains = Factor("gains", (count,), fan_in=1, fan_out=1)
        found["gains"] = Weight("gains", "", "scalar", gains, 1, 1)
        return found

    def _no_rank(self, why: str) -> str:
        return (
            f"{self}: {self.structure} has no rank axis to choose from ({why}); those that have: "
            f"{', '.join(name for name in registry() if name in WITH_RANK)}"
        )


WITH_RANK = ("low_rank", "tt", "btt", "blast", "einsum")  # of two cores, where there are cores


def rank_label(chain: Chain) -> str:
    """The first label that all factors have and neither input nor output has; empty if there is none.

    The matrix is a sum over its entries, and the factors of each term are slices of the factors.
    """
    outside = chain.terms[0] + chain.terms[-1]
    first, *others = chain.terms[1:-1]
    return next((c for c in first if c not in outside and all(c in term for term in others)), "")


def with_rank(chain: Chain, experts: int) -> Chain:
    """The chain with its rank label ``experts`` times as large."""
    label = rank_label(chain)
    sizes = dict(chain.sizes)
    return Chain(chain.pattern, {**sizes, label: experts * sizes[label]}, chain.in_features, chain.out_features)


@dataclass(frozen=True)
class Halves:
    """The chain of all experts, cut after its first factor, where the state is multiplied by the gates.

    Attributes:
        first: Input to state, its first label the expert.
        rest: State to output.
    """

    first: Chain
    rest: Chain


def halves(member: Chain, experts: int) -> Halves:
    """All experts as two chains, whose factors are those of `stored_halves`."""
    label = next(c for c in "xyzuvwpqmnolkjihgfedcba" if c not in member.pattern)
    source, *terms, output = member.terms
    first, *rest = terms
    step = member.factor_steps[0]
    state = label + step.batch + step.shared + step.emitted
    sizes = {**dict(member.sizes), label: experts}
    return Halves(
        Chain(f"{source}, {label}{first} -> {state}", sizes, in_features=member.in_features),
        Chain(
            ", ".join([state, *(label + term for term in rest)]) + f" -> {output}",
            sizes,
            out_features=member.out_features,
        ),
    )


def chain_plan(chain: Chain) -> ChainPlan:
    """The plan of a chain that has no operator class."""

    def build(chain: Chain, factors: Any) -> Any:
        raise StructureError(f"{chain} is part of a routed layer, which is no operator")

    return ChainPlan.of(chain, build)
