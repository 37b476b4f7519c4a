"""Gradients of CoLA's iterative algorithms, in either library: those of solves are implicit, others have none.

``x = A^-1 b`` has ``db = A^-H dx`` and ``dA = -db x^H``: the gradient is one more solve and one product, whatever the
number of iterations.  Krylov methods for functions and eigenvalues have no such formula here; differentiating them
raises an error that names what works.  An operator is passed as its arrays and the function that puts it together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from structops._array import Array, backend_of
from structops.errors import GradientError

Build = Callable[[Sequence[Array]], Any]  # from arrays to an operator
Solver = Callable[[Any, Array], Array]  # from an operator and right-hand sides to solutions


def solve(solver: Solver, build: Build, arrays: Sequence[Array], b: Array) -> Array:
    """``A^-1 b`` by a solver, with gradients of the arrays of A and of b.

    Args:
        solver: Gives the solution for an operator; also called for the adjoint.
        build: Puts A together from its arrays.
        arrays: The arrays of A.
        b: Right-hand sides, shape (n, k).
    """
    if backend_of(b) == "torch":
        return _torch_functions()[0].apply(solver, build, b, *arrays)
    jax = sys.modules["jax"]
    A = build(arrays)
    return jax.lax.custom_linear_solve(
        lambda x: A @ x,
        b,
        lambda _, rhs: solver(build(arrays), rhs),
        # The transpose of the map is asked for, and solvers take operators.
        lambda _, rhs: solver(build(arrays).T, rhs),
    )


def without_gradient(function: Callable[..., tuple[Array, ...]], what: str, *arrays: Array) -> tuple[Array, ...]:
    """``function(*arrays)``, whose gradient raises a `GradientError` that starts with ``what``."""
    if not arrays:
        return function()
    if backend_of(arrays[0]) == "torch":
        return _torch_functions()[1].apply(function, what, *arrays)
    jax = sys.modules["jax"]
    opaque = jax.custom_vjp(function)
    opaque.defvjp(lambda *inputs: (function(*inputs), None), lambda *_: _raise(what))
    return opaque(*arrays)


def _raise(what: str) -> Any:
    raise GradientError(
        f"{what} has no gradient; for small operators the dense algorithms have one (Eigh(), Eig(), LU(), Cholesky()), "
        f"and so have CG(), GMRES() and structures with a direct rule"
    )


@cache
def _torch_functions() -> tuple[Any, Any]:
    """The two autograd functions; made on first use, since torch may not be there."""
    torch = sys.modules["torch"]
    Function: Any = torch.autograd.Function

    class Solve(Function):
        @staticmethod
        def forward(solver: Solver, build: Build, b: Array, *arrays: Array) -> Array:
            return solver(build(arrays), b)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Array) -> None:
            ctx.solver, ctx.build, _, *arrays = inputs
            ctx.save_for_backward(output, *arrays)

        @staticmethod
        def backward(ctx: Any, grad: Array) -> tuple[Any, ...]:
            x, *arrays = ctx.saved_tensors
            db = solve(ctx.solver, lambda parts: ctx.build(parts).H, arrays, grad)
            differentiable = [k for k, array in enumerate(arrays) if array.is_floating_point() or array.is_complex()]

            def product(*parts: Array) -> Array:
                full = list(arrays)
                for k, part in zip(differentiable, parts, strict=True):
                    full[k] = part
                return ctx.build(full) @ x

            _, pull = torch.func.vjp(product, *(arrays[k] for k in differentiable))
            gradients: list[Any] = [None] * len(arrays)
            for k, gradient in zip(differentiable, pull(-db), strict=True):
                gradients[k] = gradient
            return None, None, db, *gradients

    class Opaque(Function):
        @staticmethod
        def forward(function: Callable[..., Any], what: str, *arrays: Array) -> Any:
            return function(*arrays)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.what = inputs[1]

        @staticmethod
        def backward(ctx: Any, *grads: Array) -> Any:
            return _raise(ctx.what)

    return Solve, Opaque
