"""Parameters, MACs, FLOPs and factors: against formulas written by hand, torch's own counter, and laws."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import structops as so
from structops import _cola
from structops.algebra.product import Product
from structops.algebra.sum import Sum
from structops.testing import CASES, Case, operator_cases, representatives, to_backend
from structops.testing.cases import leaves

pytestmark = pytest.mark.torch

PLAIN = operator_cases("chain")
# What is a chain, or made of chains by Kron and BlockDiag.
MULTIPLIED = [
    case
    for case in operator_cases()
    if not case.labels & {"fft", "exact"} and not any(name in str(case) for name in ("Permutation", "Toeplitz"))
]


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=str)


def rng_array(*shape: int, seed: int = 0) -> Any:
    return to_backend(np.random.default_rng(seed).standard_normal(shape), "torch")


# ------------------------------------------------------------------------------------------------ formulas by hand


def dense(A: tuple[int, ...]) -> tuple[int, int]:
    return math.prod(A), math.prod(A)


def low_rank(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, int]:
    (m, r), (_, n) = left, right
    return r * (m + n), r * (m + n)


def kron(*Ms: tuple[int, ...]) -> tuple[int, int]:
    m, n = zip(*Ms, strict=True)
    return sum(map(math.prod, Ms)), sum(math.prod(n[: t + 1]) * math.prod(m[t:]) for t in range(len(Ms)))


def tt(cores: list[tuple[int, ...]]) -> tuple[int, int]:
    before, m, n, after = zip(*cores, strict=True)
    macs = (before[t] * after[t] * math.prod(n[: t + 1]) * math.prod(m[t:]) for t in range(len(cores)))
    return sum(map(math.prod, cores)), sum(macs)


def btt(cores: list[tuple[int, ...]]) -> tuple[int, int]:
    return (sum(map(math.prod, cores)),) * 2


def monarch(left: tuple[int, ...], right: tuple[int, ...], **_: int) -> tuple[int, int]:
    (b, s, q), (_, _, p) = left, right
    return b * q * (p + s), b * q * (p + s)


def block_diag(*Ms: tuple[int, ...], multiplicities: tuple[int, ...] | None = None) -> tuple[int, int]:
    counts = multiplicities or (1,) * len(Ms)
    return sum(map(math.prod, Ms)), sum(math.prod(M) * count for M, count in zip(Ms, counts, strict=True))


def blast(left: tuple[int, ...], coupling: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, int]:
    (i, m, r), (j, n, _) = left, right
    return r * (i * m + j * n + i * j), r * (i * m + j * n + i * j)


def circulant(column: tuple[int]) -> tuple[int, int]:
    return column[0], by_fft(column[0])


def toeplitz(column: tuple[int], row: tuple[int]) -> tuple[int, int]:
    count = column[0] + row[0] - 1
    return count, by_fft(min(n for n in range(count, 2 * count + 1) if n in SMOOTH))


SMOOTH = {2**i * 3**j * 5**k for i in range(8) for j in range(5) for k in range(4)}


def by_fft(n: int) -> int:
    return 1 if n == 1 else math.ceil(2 * n * math.log2(n)) + 2 * n


def convolution(kernel: tuple[int, ...], spatial_shape: Any, padding: str = "valid") -> tuple[int, int]:
    spatial = (spatial_shape,) if isinstance(spatial_shape, int) else spatial_shape
    valid = [n - t + 1 for n, t in zip(spatial, kernel[2:], strict=True)]
    return math.prod(kernel), math.prod(kernel) * math.prod(valid if padding == "valid" else spatial)


def permutation(perm: Any) -> tuple[int, int]:
    return 0, 0


def diagonal(diag: tuple[int]) -> tuple[int, int]:
    return diag[0], diag[0]


def einsum(factors: list[tuple[int, ...]], pattern: str, sizes: Any = None) -> tuple[int, int]:
    """A factor meets every number of the state: the labels of both, as sets, are those of the product."""
    size = dict(sizes or {})
    state, *terms = pattern.replace(" ", "").partition("->")[0].split(",")
    names = [term for term in terms if "=" not in term]
    for name, shape in zip(names, factors, strict=True):
        size |= dict(zip(name, shape, strict=True))
    output, macs = pattern.replace(" ", "").partition("->")[2], 0
    for k, term in enumerate(terms):
        if "=" in term:
            state = term.partition("=")[2]
            continue
        macs += math.prod(size[label] for label in {*state, *term})
        later = "".join(terms[k + 1 :]).partition("=")[0] + (output if "=" not in "".join(terms[k + 1 :]) else "")
        state = "".join({*state, *term} & set(later))
    return sum(map(math.prod, factors)), macs


BY_HAND: dict[str, Callable[..., tuple[int, int]]] = {
    "Dense": dense,
    "LowRank": low_rank,
    "Kron": kron,
    "TT": tt,
    "BTT": btt,
    "Monarch": monarch,
    "BlockDiag": block_diag,
    "BLAST": blast,
    "Circulant": circulant,
    "Toeplitz": toeplitz,
    "Convolution": convolution,
    "Permutation": permutation,
    "Einsum": einsum,
    "Diagonal": diagonal,
}


def test_every_registered_structure_has_a_formula() -> None:
    assert set(BY_HAND) == set(so.OPERATORS)


@each([case for case in operator_cases() if "nested" not in case.tags])
def test_parameters_and_macs_are_those_of_the_formula(case: Case) -> None:
    A, _ = case.build("torch")
    params, macs = BY_HAND[case.structure.__name__](*case.arguments, **case.options)
    assert (so.num_params(A), so.macs(A), so.flops(A)) == (params, macs, 2 * macs)
    assert f"; {params:,} params" in repr(A)


@each([case for case in operator_cases() if "nested" in case.tags])
def test_operators_of_operators_have_the_parameters_of_their_parts(case: Case) -> None:
    A, _ = case.build("torch")
    assert so.num_params(A) == sum(map(so.num_params, A.Ms))


@each([case for case in operator_cases() if not case.labels & {"fft", "exact"} and "Perm" not in str(case)])
def test_parameters_are_the_numbers_in_the_arrays(case: Case) -> None:
    arguments = case.draw(np.random.default_rng(0), "torch")
    ignored = 1 if "Toeplitz" in str(case) else 0  # the head of its row
    assert so.num_params(case.operator(arguments)) == sum(leaf.numel() for leaf in leaves(arguments)) - ignored


# -------------------------------------------------------------------------------------------------- torch's counter


def counted(call: Callable[[], Any]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@each([case for case in MULTIPLIED if "elementwise" not in case.labels])  # torch counts matrix products alone
def test_torch_counts_the_same_flops(case: Case) -> None:
    A, M = case.build("torch", "float32")
    rows, cols = M.shape
    x, y = rng_array(cols).float(), rng_array(rows).float()
    assert counted(lambda: A @ x) == so.flops(A)
    assert counted(lambda: A.T @ y) == counted(lambda: y @ A) == so.flops(A.T)
    assert counted(lambda: A @ rng_array(cols, 3).float()) == 3 * so.flops(A)


# ------------------------------------------------------------------------------------------------------- transposes


@each([case for case in MULTIPLIED if case.structure.__name__ != "Convolution"])
def test_the_transpose_has_the_same_macs(case: Case) -> None:
    A, _ = case.build("torch")
    assert so.macs(A.T) == so.macs(A)


@each(PLAIN)
def test_the_transpose_has_the_factors_in_reverse_with_fans_exchanged(case: Case) -> None:
    A, _ = case.build("torch")
    expected = [(f.shape, f.fan_out, f.fan_in, f.blocks, f.sharing) for f in reversed(so.factors(A))]
    assert [(f.shape, f.fan_in, f.fan_out, f.blocks, f.sharing) for f in so.factors(A.T)] == expected
    assert so.factors(A.T.T) == so.factors(A)


@each(MULTIPLIED)
def test_factors_add_up(case: Case) -> None:
    A, _ = case.build("torch")
    assert sum(factor.macs for factor in so.factors(A)) == so.macs(A)
    assert sum(factor.num_params for factor in so.factors(A)) == so.num_params(A)


# -------------------------------------------------------------------------------------------------- CoLA's wrappers


class Parts:
    """Operators to compose: A 2 x 3, B 3 x 4, C 3 x 4 of rank 2, S 3 x 3, ..."""

    def __init__(self) -> None:
        self.A, self.B, self.S = (so.Dense(rng_array(*shape)) for shape in ((2, 3), (3, 4), (3, 3)))
        self.C = so.LowRank(rng_array(3, 2), rng_array(2, 4))  # 14 parameters
        self.stock, self.d = _cola.Dense(rng_array(3, 3)), rng_array(3)
        self.I = _cola.Identity((3, 3), self.d.dtype)

    def sparse(self) -> Any:
        import torch

        rows, cols = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 1, 1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: sparse tensors are in beta
            return _cola.Sparse(rng_array(4), rows, cols, shape=(3, 3))

    def fft(self) -> Any:
        import torch

        return _cola.FFT(8, dtype=torch.complex64)

    def permutation(self) -> Any:
        return _cola.Permutation(to_backend(np.array([1, 0, 2]), "torch"))


# An operator of CoLA, its parameters and its MACs.
EXPRESSIONS: dict[str, tuple[Callable[[Parts], Any], int, int]] = {
    "Dense": (lambda p: p.stock, 9, 9),
    "Product": (lambda p: p.A @ p.B, 18, 18),
    "Product of three": (lambda p: p.A @ p.S @ p.B, 6 + 9 + 12, 6 + 9 + 12),
    "Product of low rank": (lambda p: p.A @ p.S @ p.C, 2 * 2 + 2 * 4, 2 * 2 + 2 * 4),  # merged: 2 x 4 of rank 2
    "Sum": (lambda p: p.B + p.C, 26, 26),
    "Transpose": (lambda p: _cola.Transpose(p.A @ p.B), 18, 18),
    "Adjoint": (lambda p: _cola.Adjoint(p.A @ p.B), 18, 18),
    "ScalarMul": (lambda p: _cola.ScalarMul(2.0, (3, 3), p.d.dtype), 0, 3),
    "scaled": (lambda p: 2 * p.C, 14, 14),
    # CoLA applies A at the 4 inputs of B first, then B at the 2 outputs of A.
    "Kronecker": (lambda p: _cola.Kronecker(p.A, p.B), 18, 6 * 4 + 12 * 2),
    "Kronecker of three": (lambda p: _cola.Kronecker(p.A, p.B, p.S), 27, 6 * 4 * 3 + 12 * 2 * 3 + 9 * 2 * 3),
    "KronSum": (lambda p: _cola.KronSum(p.S, p.stock), 18, 9 * 3 + 9 * 3),
    "BlockDiag": (lambda p: _cola.BlockDiag(p.A, p.B, multiplicities=[2, 3]), 18, 6 * 2 + 12 * 3),
    "Diagonal": (lambda p: _cola.Diagonal(p.d), 3, 3),
    "Identity": (lambda p: p.I, 0, 0),
    "with identity": (lambda p: p.S + p.I, 9, 9),
    "Permutation": (Parts.permutation, 0, 0),
    "FFT": (Parts.fft, 0, 2 * 8 * 3),
    "Sliced": (lambda p: (p.S @ p.S)[:2, 1:], 9, 18),
    "Triangular": (lambda p: _cola.Triangular(rng_array(3, 3).tril()), 6, 9),
    "Tridiagonal": (lambda p: _cola.Tridiagonal(p.d[1:], p.d, p.d[:2]), 7, 7),
    "Sparse": (Parts.sparse, 4, 4),
    "Householder": (lambda p: _cola.Householder(p.d[:, None]), 3, 6),
    "Concatenated": (lambda p: _cola.Concatenated(p.A, so.Dense(rng_array(2, 3))), 12, 12),
    "nested": (lambda p: _cola.BlockDiag(_cola.Kronecker(p.A, p.S), 2 * (p.B + p.C).T), 6 + 9 + 26, 36 + 26),
}


def expression(name: str) -> Any:
    return EXPRESSIONS[name][0](Parts())


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions_of_cola(name: str) -> None:
    A, (_, params, macs) = expression(name), EXPRESSIONS[name]
    assert (so.num_params(A), so.macs(A), so.flops(A)) == (params, macs, 2 * macs)


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_transposed_expressions_of_cola(name: str) -> None:
    A = expression(name)
    assert so.num_params(A.T) == EXPRESSIONS[name][1]
    assert len(so.factors(A.T)) == len(so.factors(A))


@pytest.mark.parametrize(
    "name", ["Product", "Product of three", "Sum", "Kronecker", "Kronecker of three", "KronSum", "BlockDiag", "Sliced"]
)
def test_torch_counts_the_same_flops_in_expressions(name: str) -> None:
    A = expression(name)
    assert counted(lambda: A @ rng_array(A.shape[1], 1)) == so.flops(A)
    assert sum(factor.macs for factor in so.factors(A)) == so.macs(A)


@pytest.mark.parametrize("name", ["Transpose", "Adjoint"])
def test_factors_of_a_wrapper_are_those_of_the_transpose(name: str) -> None:
    A = expression(name)
    assert so.factors(A) == tuple(factor.T for factor in reversed(so.factors(A.A)))


def test_factors_of_a_product_are_in_order_of_application() -> None:
    A, B = so.Dense(rng_array(2, 3)), so.LowRank(rng_array(3, 1), rng_array(1, 4))
    assert so.factors(Product(A, B)) == (*so.factors(B), *so.factors(A))
    assert [(f.fan_in, f.fan_out) for f in so.factors(Product(A, B))] == [(4, 1), (1, 3), (3, 2)]
    assert [(f.fan_in, f.fan_out) for f in so.factors(A @ B)] == [(4, 1), (1, 2)]  # merged


@pytest.mark.parametrize("count", [so.num_params, so.macs, so.flops, so.factors])
def test_operators_of_functions_cannot_be_counted(count: Any) -> None:
    from cola.ops import Jacobian, Kernel

    x = rng_array(3, 2)
    functions = (
        Jacobian(lambda v: v**2, x[:, 0]),
        Kernel(x, x, lambda a, b: a @ b.T, block_size1=3, block_size2=3),
    )
    for A in functions:
        with pytest.raises(TypeError, match=rf"{type(A).__name__}.*register a rule.*dispatch"):
            count(A)
        with pytest.raises(TypeError, match="register a rule"):
            count(A @ so.Dense(rng_array(3, 3)))


# ------------------------------------------------------------------------------------------------------------ sharing


@each(representatives())
def test_shared_arrays_are_counted_once(case: Case) -> None:
    A, _ = case.build("torch", seed=0)
    B, _ = case.build("torch", seed=0)  # the same numbers in arrays of its own
    count = so.num_params(A)
    once = (Product(A.T, A), Sum(A, A), Product(A, A, A), so.Kron(A, A), so.BlockDiag(A, A), Product(Sum(A, A.T), A))
    twice = (Product(A, B), Sum(A, B), so.Kron(A, B), so.BlockDiag(A, B))
    assert [so.num_params(C) for C in once] == [count] * len(once)
    assert [so.num_params(C) for C in twice] == [2 * count] * len(twice)
    assert so.macs(Product(A, A)) == so.macs(Sum(A, A)) == 2 * so.macs(A)


@each(representatives())
def test_merged_results_have_their_own_counts(case: Case) -> None:
    A, _ = case.build("torch", seed=0)
    B, _ = case.build("torch", seed=1)
    for C in (A @ B, A + B, so.kron(A, B), A + A, 2 * A):
        if isinstance(C, Product | Sum | so.Kron) and not isinstance(A, so.Kron):
            assert so.num_params(C) == sum(map(so.num_params, C.Ms))
        else:
            numbers = 0 if isinstance(C, so.Permutation) else sum(array.numel() for array in C.arrays_flat())
            ignored = 1 if isinstance(C, so.Toeplitz) else 0  # the head of its row
            assert so.num_params(C) == numbers - ignored
        assert so.flops(C) == 2 * so.macs(C)


def test_sharing_survives_scaling() -> None:
    A, _ = CASES["LowRank"][1].build("torch")
    assert so.num_params(3 * so.BlockDiag(A, A, A)) == so.num_params(A)


def test_sharing_survives_copies() -> None:
    import copy

    A, _ = CASES["TT"][1].build("torch")
    assert so.num_params(copy.deepcopy(so.BlockDiag(A, A.T))) == so.num_params(A)


# ------------------------------------------------------------------------------------------------- patterns and rules


@each(PLAIN)
def test_patterns_are_counted_like_their_operators(case: Case) -> None:
    A, _ = case.build("torch")
    for count in (so.num_params, so.macs, so.flops, so.factors):
        assert count(A.chain) == count(A)


def test_plans_are_counted() -> None:
    plan = so.structure("convolution(kernel_size=3)").plan(8, 16)
    assert (so.num_params(plan), so.macs(plan), so.flops(plan)) == (6, 48, 96)
    assert [(f.fan_in, f.fan_out, f.sharing) for f in so.factors(plan)] == [(3, 2, 8)]


def test_other_packages_can_register_rules() -> None:
    class Hadamard(_cola.LinearOperator):
        """No parameters, n log2 n additions."""

        def _matmat(self, X: Any) -> Any:
            raise NotImplementedError

    @so.factors.dispatch
    def factors_hadamard(A: Hadamard) -> tuple:
        return ()

    import torch

    A = Hadamard(torch.float32, (4, 4))
    assert so.factors(A) == ()
    assert so.macs(A) == 0
    assert so.macs(A @ so.Dense(torch.ones(4, 4))) == 16
    with pytest.raises(TypeError, match="register a rule"):
        so.num_params(A)
