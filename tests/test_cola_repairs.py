"""Every repair of CoLA: the fault in a process with stock CoLA, and its absence in one that imports structops.

Run as a program, this file is such a process: it prints what each probe found as JSON.  A probe that passes on stock
CoLA means that upstream has mended the fault, and its repair can go.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
import traceback
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ON_CPU = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
TWO_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", **ON_CPU}

PROBES: dict[str, Callable[[], Any]] = {}


def probe(check: Callable[[], Any]) -> Callable[[], Any]:
    """A check, named after the repair that it is for, that raises or returns False where the fault is."""
    PROBES[check.__name__] = check
    return check


# ------------------------------------------------------------------------ what the processes check, in this order


@probe
def _dtype_lookup() -> bool:
    """An operator of torch leaves JAX alone."""
    import cola
    import torch
    from jax._src import xla_bridge

    cola.ops.Dense(torch.eye(2))
    return not xla_bridge._backends


@probe
def _quiet_log() -> bool:
    """Nothing is said on the root logger."""
    import cola
    import torch

    lines: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = lines.append  # type: ignore[method-assign]
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    A = cola.ops.Diagonal(torch.ones(2))
    (A + A) @ (2 * A.T)
    root.removeHandler(handler)
    return not lines


@probe
def _declared_leaves() -> bool:
    """A first operator of a numpy array does not hide the arrays of later ones."""
    import cola
    import numpy as np
    import torch

    cola.ops.Triangular(np.eye(2))
    return len(cola.ops.Triangular(torch.eye(2)).flatten()[0]) == 1


@probe
def _faithful_types() -> bool:
    """The choice of a rule is remembered."""
    import cola
    import torch

    A = cola.ops.Dense(torch.eye(2))
    A @ A
    return len(cola.fns.dot._cache) > 0


@probe
def _identity_and_kronecker_rules() -> bool:
    """Products with the identity and Kronecker products of Kronecker products have one rule each."""
    import cola
    import torch

    A, I = cola.ops.Dense(torch.eye(2)), cola.ops.Identity((2, 2), torch.float32)  # noqa: E741
    K = cola.kron(A, A)
    return (
        (A @ I is A)
        and (I @ A is A)
        and (I @ I is I)
        and ((A @ A) @ I).shape == (2, 2)
        and len(cola.kron(K, K).Ms) == 4
    )


@probe
def _determinants() -> bool:
    """Signs of determinants, and the logarithm of that of c I."""
    import cola
    import torch

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        M = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        A, D = cola.ops.Dense(M), cola.ops.Diagonal(M[0])
        for operator, dense in ((A, M), (-2 * A, -2 * M), (-3 * D, -3 * M[0].diag())):
            if not all(map(torch.allclose, cola.linalg.slogdet(operator), torch.linalg.slogdet(dense))):
                return False
    small = cola.PSD(cola.ops.Dense(0.1 * torch.eye(3, dtype=torch.float64)))
    _, logarithm = cola.linalg.slogdet(small, cola.linalg.Lanczos(max_iters=3), cola.linalg.Exact())
    return bool(logarithm < 0)


@probe
def _scalar_products() -> bool:
    """A scalar that is an array has a gradient, and a complex one makes the product complex."""
    import cola
    import torch

    A, c = cola.ops.Dense(torch.eye(2)), torch.tensor(3.0, requires_grad=True)
    (slope,) = torch.autograd.grad(((c * A) @ torch.ones(2)).sum(), c)
    return float(slope) == 2 and (1j * A).to_dense().dtype == torch.complex64


@probe
def _torch_functions() -> bool:
    """The Kronecker product with a transpose can be written out."""
    import cola
    import torch

    A = cola.ops.Dense(torch.ones(2, 3))
    return cola.kron(cola.ops.Transpose(A), A).to_dense().shape == (6, 6)


@probe
def _least_squares() -> bool:
    """The pseudo-inverses of matrices of less than full rank.

    The stock one is wrong now and then: LAPACK is handed pivots that nobody has set, so it depends on what was in
    memory whether a matrix meets the fault.  Of many, some do.
    """
    import cola
    import torch

    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        left, right = torch.randint(10, (2, 4, 2), generator=generator, dtype=torch.float64)
        M = left @ right.T
        if not torch.allclose(cola.linalg.pinv(cola.ops.Dense(M)).to_dense(), torch.linalg.pinv(M)):
            return False
    return True


@probe
def _complex_lu() -> bool:
    """The inverse of a complex matrix gives no warning."""
    import cola
    import torch

    torch.set_warn_always(True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cola.linalg.inv(cola.ops.Dense(torch.eye(2, dtype=torch.complex128)))
    torch.set_warn_always(False)
    return not any("imaginary" in str(warning.message) for warning in caught)


@probe
def _gradients_of_solves() -> bool:
    """A solve by GMRES has the gradients of the matrix and of the right-hand side."""
    import cola
    import torch

    M = torch.tensor([[3.0, 1.0], [0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    ours = (cola.linalg.inv(cola.ops.Dense(M), cola.linalg.GMRES()) @ b).sum()
    theirs = torch.linalg.solve(M, b).sum()
    pairs = zip(torch.autograd.grad(ours, (M, b)), torch.autograd.grad(theirs, (M, b)), strict=True)
    return all(torch.allclose(mine, other, atol=1e-5) for mine, other in pairs)


@probe
def _gradients_of_krylov_methods() -> bool:
    """The gradient of a function by Lanczos says that there is none."""
    import cola
    import torch

    M = torch.eye(3, dtype=torch.float64, requires_grad=True)
    y = cola.linalg.sqrt(cola.PSD(cola.ops.Dense(2 * M)), cola.linalg.Lanczos(max_iters=3)) @ torch.ones(3).double()
    try:
        y.sum().backward()
    except NotImplementedError as error:
        return "Lanczos has no gradient" in str(error)
    return False


@probe
def _diagonal_lu() -> bool:
    """The factors of a negative diagonal."""
    import cola
    import torch

    P, L, U = cola.linalg.LU()(cola.ops.Diagonal(-torch.ones(2)))
    return torch.equal((P @ L @ U).to_dense(), -torch.eye(2))


@probe
def _transposes() -> bool:
    """The transpose of a complex Hermitian matrix."""
    import cola
    import torch

    M = torch.tensor([[1, 1j], [-1j, 1]])
    A = cola.SelfAdjoint(cola.ops.Triangular(M) + cola.ops.Triangular(0 * M))
    return torch.equal(A.T.to_dense(), M.T)


@probe
def _slices() -> bool:
    """A slice of a real operator, times a complex vector."""
    import cola
    import torch

    part = cola.ops.Diagonal(torch.ones(3))[:2, :]
    return bool((part @ torch.tensor([[1j], [2j], [3j]])).imag.sum() == 3)


@probe
def _sizes() -> bool:
    """A product of operators that do not fit is a ValueError."""
    import cola
    import torch

    try:
        cola.ops.Dense(torch.eye(2)) @ cola.ops.Dense(torch.eye(3))
    except ValueError:
        return True
    except AssertionError:
        return False
    return False


@probe
def _jax_functions() -> bool:
    """CoLA's ``clip`` works, and so does an operator where JAX has two devices."""
    import cola
    import jax
    import jax.numpy as jnp
    from cola.backends import jax_fns

    assert len(jax.local_devices()) == 2
    clipped = jax_fns.clip(jnp.arange(3.0), a_min=1.0)
    A = cola.ops.Dense(jnp.ones((2, 3)))
    y = jax.jit(lambda A, x: (A @ A.T) @ x)(A, jnp.ones(2))
    return float(clipped[0]) == 1 and y.shape == cola.ops.Identity((2, 2), jnp.float32).shape[:1]


@probe
def _order_of_any() -> bool:
    """Sums have one rule also where ``Any`` is below every type, as beartype from 0.23 on will have it.

    The pinned beartype does not, so that its comparison is turned round here.
    """
    import cola
    import plum
    import torch
    from beartype.door import TypeHint

    type(TypeHint(typing.Any)).is_subhint = lambda self, other: True  # type: ignore[method-assign]
    plum.clear_all_cache()
    A = cola.ops.Diagonal(torch.ones(2))
    return (A + A).shape == cola.kron(A, cola.ops.Dense(torch.ones(1, 1))).shape == (2, 2)


def our_operators_leave_jax_alone() -> bool:
    """Operators of torch, products and counts of them, do not initialise JAX."""
    import copy

    import torch
    from jax._src import xla_bridge

    import structops as so
    from structops.testing import representatives

    for case in representatives():
        A, _ = case.build("torch", "float32")
        (A @ A.T + 2 * A.H) @ torch.ones(4)
        so.kron(A, A).to_dense()
        so.num_params(copy.deepcopy(A)), so.macs(A.T), repr(A[1:, 2])
    return not xla_bridge._backends


def our_operators_say_nothing() -> bool:
    """Importing and using structops writes no line on the root logger."""
    import structops as so
    from structops.testing import representatives

    lines: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = lines.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    for case in representatives():
        A, _ = case.build("torch", "float32")
        (A @ A.T + 2 * A).to_dense(), so.macs(A @ A), so.kron(A, A)
    logging.getLogger().removeHandler(handler)
    return not lines


def our_operators_run_on_several_devices() -> bool:
    """Each operator on the second of two JAX devices, through ``jit``, and in CoLA's wrappers."""
    import jax

    from structops.testing import representatives
    from structops.testing.arrays import to_backend

    second = jax.local_devices()[1]
    for case in representatives()[::3]:
        A, M = case.build("jax", "float32")
        A = A.to(second)
        x = jax.device_put(to_backend(M[0].real, "jax", "float32"), second)
        results = [jax.jit(lambda A, x: A @ x)(A, x), (A @ A).T @ x, (A @ A.T + 2 * A) @ x, x @ A.H, A.to_dense()]
        if any(y.devices() != {second} for y in results):
            return False
    return True


def repairs_are_made_once() -> bool:
    """Rules that are registered twice would be ambiguous."""
    import cola
    import torch

    import structops._cola
    import structops._repairs

    importlib.reload(structops._repairs)
    importlib.reload(structops._cola)
    A, I = cola.ops.Dense(torch.eye(2)), cola.ops.Identity((2, 2), torch.float32)  # noqa: E741
    return (A @ I is A) and (I @ A is A)


OURS = (
    our_operators_leave_jax_alone,
    our_operators_say_nothing,
    our_operators_run_on_several_devices,
    repairs_are_made_once,
)


def main(which: str) -> None:
    """Run the probes and print their results."""
    warnings.simplefilter("ignore")
    checks = list(PROBES.values())
    if which == "repaired":
        import structops._cola  # noqa: F401

        checks = [*OURS[:2], *checks[:-1], *OURS[2:], checks[-1]]  # JAX starts late, and beartype breaks at the end
    results = {}
    for check in checks:
        try:
            results[check.__name__] = "sound" if check() else "at fault"
        except Exception:
            results[check.__name__] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
    sys.exit()

# ------------------------------------------------------------------------------------------------------- the tests

import pytest  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.jax]


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX", "XLA"))}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=clean | env, capture_output=True, text=True, timeout=120, check=False)


def found(which: str) -> dict[str, str]:
    process = run(str(HERE), which, **TWO_DEVICES)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_every_repair_has_a_probe() -> None:
    from structops import _repairs

    assert set(PROBES) == {repair.__name__ for repair in _repairs.REPAIRS}
    assert all(repair.__doc__ for repair in _repairs.REPAIRS)


def test_stock_cola_has_every_fault() -> None:
    mended = [name for name, result in found("stock").items() if result == "sound"]
    assert not mended, "upstream has mended this: drop the repair"


def test_structops_repairs_every_fault_and_causes_none() -> None:
    results = found("repaired")
    assert set(results) == {*PROBES, *(check.__name__ for check in OURS)}
    for name, result in results.items():
        assert result == "sound", f"{name}: {result}"


def test_the_wrong_plum_is_named_with_the_command_that_replaces_it(tmp_path: Path) -> None:
    package = tmp_path / "plum"
    package.mkdir()
    package.joinpath("__init__.py").write_text("class Dispatcher:\n    def __call__(self, method=None): ...\n")
    process = run("-c", "from structops import Dense", PYTHONPATH=str(tmp_path))
    assert process.returncode != 0
    assert "ImportError" in process.stderr
    assert "pip uninstall -y plum-dispatch" in process.stderr
    assert "cola-plum-dispatch==0.1.4" in process.stderr
    assert str(package) in process.stderr


ALONE = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == {absent!r} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without

import structops as so
from structops.testing import assert_operator_valid, installed_backends, representatives
assert installed_backends() == ({present!r},)
for case in representatives()[::6]:
    assert_operator_valid(*case.build({present!r}, "float32"))
A, _ = representatives()[0].build({present!r}, "float32")
assert (A @ A.T + 2 * A).shape == so.kron(A, A).Ms[0].shape
assert {absent!r} not in sys.modules
print("sound")
"""


@pytest.mark.parametrize(("present", "absent"), [("torch", "jax"), ("jax", "torch")])
def test_one_library_is_enough(present: str, absent: str) -> None:
    process = run(
        "-c", ALONE.format(present=present, absent=absent), JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="1"
    )
    assert process.stdout.strip() == "sound", process.stderr
