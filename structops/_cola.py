"""The names of CoLA that structops uses, from the one place that imports them, after the repairs of `_repairs`."""

from __future__ import annotations

from typing import Any

from structops import _repairs  # isort: skip  first, because it imports CoLA with care
from structops._repairs import backend_functions  # isort: skip

from cola import PSD, SelfAdjoint, Stiefel, Unitary, kron, lazify
from cola.fns import add, adjoint, dot, mul, transpose
from cola.linalg import (
    LU,
    Algorithm,
    Arnoldi,
    Auto,
    Cholesky,
    Eig,
    Eigh,
    Lanczos,
    apply_unary,
    diag,
    eig,
    exp,
    inv,
    pinv,
    pow,
    slogdet,
    trace,
)
from cola.ops import (
    FFT,
    Adjoint,
    BlockDiag,
    Concatenated,
    Dense,
    Diagonal,
    Householder,
    Identity,
    Kronecker,
    KronSum,
    LinearOperator,
    Permutation,
    Product,
    ScalarMul,
    Sliced,
    Sparse,
    Sum,
    Transpose,
    Triangular,
    Tridiagonal,
)

__all__ = [
    "FFT",
    "LU",
    "PSD",
    "Adjoint",
    "Algorithm",
    "Arnoldi",
    "Auto",
    "BlockDiag",
    "Cholesky",
    "Concatenated",
    "Dense",
    "Diagonal",
    "Eig",
    "Eigh",
    "Householder",
    "Identity",
    "KronSum",
    "Kronecker",
    "Lanczos",
    "LinearOperator",
    "Permutation",
    "Product",
    "ScalarMul",
    "SelfAdjoint",
    "Sliced",
    "Sparse",
    "Stiefel",
    "Sum",
    "Transpose",
    "Triangular",
    "Tridiagonal",
    "Unitary",
    "add",
    "adjoint",
    "apply_unary",
    "backend_functions",
    "diag",
    "dot",
    "eig",
    "exp",
    "inv",
    "kron",
    "lazify",
    "mul",
    "pinv",
    "pow",
    "rules",
    "slogdet",
    "trace",
    "transpose",
]


_repairs.repair()


def rules(verb: Any) -> Any:
    """The plum function behind a verb of CoLA, to register rules on and to ask for the rule of given types."""
    return verb if hasattr(verb, "dispatch") else verb.__wrapped__
