"""The one place that imports plum: a private dispatcher for the verbs that structops defines."""

from __future__ import annotations

import inspect
from typing import Any

import plum

from structops.errors import PLUM_REPAIR


def is_colas_fork() -> bool:
    """Whether ``import plum`` gives cola-plum-dispatch; plum-dispatch owns the same import name and breaks CoLA."""
    return "cond" in inspect.signature(plum.Dispatcher.__call__).parameters


if not is_colas_fork():
    raise ImportError(
        f"expected the plum of cola-plum-dispatch, found the one of plum-dispatch ({plum.__file__}); "
        f"the two own the same import name and CoLA needs its own. Repair with:\n    {PLUM_REPAIR}"
    )

dispatch: Any = plum.Dispatcher()  # Any: a dispatched function also has `.dispatch`, to register further rules
