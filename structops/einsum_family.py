"""The family of all matrices of two factors: a point is seven exponents, which give its cost, sharing and rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple

from structops.errors import StructureError

ORDERS = ("cheapest", "a", "b")


class Exponents(NamedTuple):
    r"""Powers of the width d.

    Attributes:
        omega: Parameter sharing, \(\text{MACs} / \text{parameters} = d^\omega\).
        psi: Rank, \(\text{rank} = d^\psi\).
        nu: Compute intensity, \(\text{MACs} = d^{1 + \nu}\).
    """

    omega: float
    psi: float
    nu: float


@dataclass(frozen=True)
class Theta:
    r"""A point of the two-factor family.

    \[ y_{\phi\epsilon\delta} = \sum_{\alpha\beta\gamma\rho} A_{\phi\delta\rho\gamma\alpha}\,
    B_{\phi\epsilon\rho\gamma\beta}\, x_{\gamma\beta\alpha} \]

    Each index is named after its exponent: at width d, \(\alpha\) runs to \(d^\alpha\).

    Args:
        alpha: Input and A.
        beta: Input and B.
        gamma: Input, A and B.
        delta: A and output.
        epsilon: B and output.
        phi: A, B and output.
        rho: A and B, the rank.

    Raises:
        StructureError: An exponent is not in [0, 1], or those of the input or of the output do not sum to 1.

    **References.** Potapczynski et al. (arXiv 2410.02117), section 3.

    Example:
        >>> btt = POINTS["btt"]
        >>> btt.omega, btt.psi, btt.nu, btt.with_rank(1 / 4).nu
        (0.0, 1.0, 0.5, 0.75)
    """

    alpha: float
    beta: float
    gamma: float
    delta: float
    epsilon: float
    phi: float
    rho: float = 0.0

    def __post_init__(self) -> None:
        """Check the exponents."""
        values = tuple(self)
        if any(not isinstance(t, int | float) or not 0 <= t <= 1 for t in values):
            raise StructureError(f"theta must be 7 exponents in [0, 1], got {values}")
        if any(not math.isclose(sum(part), 1, abs_tol=1e-3) for part in (self.inputs, self.outputs)):
            raise StructureError(
                f"theta: (alpha, beta, gamma) and (delta, epsilon, phi) must each sum to 1, got {values}"
            )

    @classmethod
    def of(cls, values: Any) -> Theta:
        """The point of seven numbers, or the point itself.

        Raises:
            StructureError: They are not seven, or no point.
        """
        if isinstance(values, cls):
            return values
        if len(values := tuple(values)) != 7:
            raise StructureError(f"theta must be 7 exponents in [0, 1], got {values}")
        return cls(*values)

    def __iter__(self) -> Iterator[float]:
        """The exponents in the order (alpha, beta, gamma, delta, epsilon, phi, rho)."""
        return iter(astuple(self))

    @property
    def inputs(self) -> tuple[float, float, float]:
        """Exponents of the input."""
        return self.alpha, self.beta, self.gamma

    @property
    def outputs(self) -> tuple[float, float, float]:
        """Exponents of the output."""
        return self.delta, self.epsilon, self.phi

    # ------------------------------------------------------------------------------------------------------- exponents

    def exponents(self, order: str = "cheapest") -> Exponents:
        r"""Sharing, rank and compute of square matrices, when one factor is applied first.

        - A first: \(\nu = 1 + \rho - \min(\alpha, \epsilon)\); B first: \(\nu = 1 + \rho - \min(\beta, \delta)\).
        - \(\omega = \nu - (1 + \rho - \min(\alpha + \delta, \beta + \epsilon))\).
        - \(\psi = \min(1, 2 + \rho - \alpha - \epsilon, 2 + \rho - \beta - \delta)\).  The last entry is never the
          smallest where A first is the cheaper order, for which the paper states the formula without it.

        Args:
            order: ``"a"``, ``"b"``, or ``"cheapest"``: the smaller of the two \(\nu\).

        Raises:
            StructureError: The order is none of these.
        """
        check_order(order)
        first, second = min(self.alpha, self.epsilon), min(self.beta, self.delta)
        saved = {"a": first, "b": second, "cheapest": max(first, second)}[order]
        params = 1 + self.rho - min(self.alpha + self.delta, self.beta + self.epsilon)
        cuts = (2 + self.rho - self.alpha - self.epsilon, 2 + self.rho - self.beta - self.delta)
        nu = 1 + self.rho - saved
        return Exponents(float(nu - params), float(min(1, *cuts)), float(nu))

    @property
    def omega(self) -> float:
        """Parameter sharing in the cheaper order: MACs / parameters = width^omega."""
        return self.exponents().omega

    @property
    def psi(self) -> float:
        """Rank = width^psi."""
        return self.exponents().psi

    @property
    def nu(self) -> float:
        """Compute intensity in the cheaper order: MACs = width^(1 + nu)."""
        return self.exponents().nu

    @property
    def is_full_rank(self) -> bool:
        """Whether the rank grows like the width: psi = 1."""
        return self.psi >= 1 - _ROUNDING

    @property
    def is_shared(self) -> bool:
        """Whether parameters are used more and more often per vector as the width grows: omega > 0."""
        return self.omega > _ROUNDING

    @property
    def is_degenerate(self) -> bool:
        """Whether the rank is so large that the matrix costs more than a dense one: nu > 1.

        With A first that is ``rho > min(alpha, epsilon)``.
        """
        return self.nu > 1 + _ROUNDING

    @property
    def cheapest(self) -> str:
        """``"a"`` or ``"b"``: the factor to apply first; ``"a"`` if both cost the same."""
        return "a" if min(self.alpha, self.epsilon) >= min(self.beta, self.delta) else "b"

    # ------------------------------------------------------------------------------------------------------ neighbours

    def with_rank(self, rho: float) -> Theta:
        """The same indices with another rank."""
        return replace(self, rho=rho)

    def mirror(self) -> Theta:
        """The same matrices with A and B trading names."""
        return Theta(self.beta, self.alpha, self.gamma, self.epsilon, self.delta, self.phi, self.rho)

    def transpose(self) -> Theta:
        """The transposed matrices, with A and B trading names too, so that A first stays the cheaper order."""
        return Theta(self.epsilon, self.delta, self.phi, self.beta, self.alpha, self.gamma, self.rho)


_ROUNDING = 1e-9  # exponents are sums of a few


def check_order(order: str) -> None:
    """The factor that is applied first.

    Raises:
        StructureError: It is not one of `ORDERS`.
    """
    if order not in ORDERS:
        raise StructureError(f"order must be cheapest, a or b, got {order!r}")


POINTS: dict[str, Theta] = {
    "dense": Theta(0, 0, 1, 0, 0, 1),
    "low_rank": Theta(1, 0, 0, 0, 1, 0, 1 / 2),
    "kron": Theta(1 / 2, 1 / 2, 0, 1 / 2, 1 / 2, 0),
    "tt": Theta(1 / 2, 1 / 2, 0, 1 / 2, 1 / 2, 0, 1 / 4),
    "monarch": Theta(1 / 2, 0, 1 / 2, 0, 1 / 2, 1 / 2),
    "btt": Theta(1 / 2, 0, 1 / 2, 0, 1 / 2, 1 / 2),
    "low_rank_btt": Theta(4 / 5, 0, 1 / 5, 0, 4 / 5, 1 / 5, 1 / 10),
    "unbalanced_btt": Theta(1 / 3, 0, 2 / 3, 0, 2 / 3, 1 / 3),
    "generic": Theta(1 / 2, 1 / 4, 1 / 4, 1 / 4, 1 / 2, 1 / 4),
}
"""Named points.  Monarch with blocks of root d is BTT of rank 1; `Theta.with_rank` gives other ranks."""
