"""Checkpoints that training resumes from, after a crash as well, on torch's distributed checkpoints (DCP)."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from structops.errors import StructureError

ABOUT = "structops.json"
_NAME = re.compile(r"step-\d{10}")
# Every parameter keeps the settings of its group by name, so that another partition of the parameters can read them.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
_PARAM_NAMES = ".param_names"


@dataclass(frozen=True)
class Resumed:
    """What `resume` found beside the state of model and optimiser.

    Attributes:
        step: The step of the checkpoint.
        extra: What was given to `save`.
        path: The folder of the checkpoint.
    """

    step: int
    extra: dict[str, Any]
    path: Path


def save(
    folder: str | os.PathLike[str],
    step: int,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] = (),
    *,
    extra: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Write a checkpoint of a training run; all processes call it.

    The checkpoint is written to a temporary folder, which is renamed when every process has finished: a crash at any
    moment leaves the checkpoints before it as they were.  It holds the model, the optimisers by names of parameters,
    and torch's random state of every process (CPU, and the current CUDA device).  It does not depend on how the model
    is sharded: `resume` reads it into another number of processes, and into a plain model.

    Args:
        folder: Where checkpoints go, one subfolder each; all processes see the same file system.
        step: The number of steps taken.
        model: The model; also DDP, FSDP2, tensor-parallel.
        optimizer: Its optimiser, or several.
        extra: Anything that JSON keeps: the position in the data, ``scheduler.state_dict()``.  That of rank 0 counts.
        keep: How many checkpoints to keep; older ones are deleted after the new one is complete.

    Returns:
        The folder of the checkpoint.

    Raises:
        StructureError: ``step`` is no whole number from 0 on, ``keep`` is less than 1, JSON does not keep ``extra``, or
            the folder has a checkpoint of a later step.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(folder, 3, nn.Linear(2, 2), extra={"position": 96})
        ...     resume(folder, nn.Linear(2, 2)).extra
        {'position': 96}
    """
    for name, value, least in (("step", step, 0), ("keep", keep, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise StructureError(f"save: {name} must be a whole number of at least {least}, got {value!r}")
    about = {"format": 1, "step": step, "processes": _size(), "extra": dict(extra or {})}
    text = _json(about)
    folder = Path(folder)
    path = folder / f"step-{step:010d}"
    unfinished = path.with_suffix(".tmp")
    if (newest := _newest(folder)) and newest.name > path.name:
        raise StructureError(f"{newest} is of a later step than {step}; resume from it, or use another folder")
    if _rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for rest in folder.glob("step-*.tmp"):  # of a run that was killed
            shutil.rmtree(rest)
    _wait()
    state = _state(model, optimizer) | {"random": {str(_rank()): _random()}}
    with _quiet():
        dcp.save(state, checkpoint_id=unfinished, no_dist=not dist.is_initialized())
    if _rank() == 0:
        with open(unfinished / ABOUT, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():  # the last step was saved before
            path.rename(path.with_suffix(".old.tmp"))
        os.replace(unfinished, path)
        for old in [*_found(folder)[:-keep], *folder.glob("step-*.tmp")]:
            shutil.rmtree(old)
    _wait()
    return path


def resume(
    folder: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] = ()
) -> Resumed | None:
    """Load the last complete checkpoint of a folder in place, or do nothing if there is none; all processes call it.

    Model and optimisers take the values in the sharding they have now.  The random state is restored if there are as
    many processes as wrote it; otherwise it stays as it is, and random numbers are not those of the run before.

    Args:
        folder: What `save` was given.
        model: The model, with memory of its own.
        optimizer: Its optimisers, as in `save`: or none, to load the model alone.

    Returns:
        The step and the extra, or None where there is no checkpoint.

    Raises:
        StructureError: The checkpoint is of another version of structops, or parameters that had different settings,
            such as weight decay, are in one group of the optimiser.
        torch.distributed.checkpoint.api.CheckpointException: It is of another model or optimiser.
    """
    path = _newest(Path(folder))
    if path is None:
        return None
    about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
    if about["format"] != 1:
        raise StructureError(f"{path} has format {about['format']}; this version of structops reads format 1")
    state = _state(model, optimizer)
    same = about["processes"] == _size()
    if same:
        state["random"] = {str(_rank()): _random()}
    with _quiet():
        dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    moments = state.get("optimizer", {})
    _fit_groups(model, optimizer, moments)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=moments, options=_OPTIONS)
    if same:
        _set_random(state["random"][str(_rank())])
    return Resumed(about["step"], about["extra"], path)


def _state(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer]) -> dict[str, Any]:
    values, moments = get_state_dict(model, optimizer, options=_OPTIONS)
    moments = {key: value for key, value in moments.items() if not key.endswith(_PARAM_NAMES)}
    return {"model": values, "optimizer": moments} if moments else {"model": values}


def _fit_groups(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], moments: dict[str, Any]) -> None:
    """Check that the settings read for the parameters of a group agree, and add the names the group has now."""
    now: dict[str, Any] = get_state_dict(model, optimizer)[1]
    for group in now.get("param_groups", ()):
        first, *others = names = group["params"]
        for setting in [key for key in group if key not in ("params", "param_names")]:
            keys = {name: f"param_groups.{name}.{setting}" for name in names}
            if odd := [name for name in others if moments[keys[name]] != moments[keys[first]]]:
                raise StructureError(
                    f"the checkpoint has {setting}={moments[keys[first]]!r} for {first} and "
                    f"{moments[keys[odd[0]]]!r} for {odd[0]}, which are in one parameter group here; "
                    f"make the groups as for the run that was saved"
                )
        if "param_names" in group:
            moments |= {f"param_groups.{name}{_PARAM_NAMES}": group["param_names"] for name in names}


def _found(folder: Path) -> list[Path]:
    """The complete checkpoints, the oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def _newest(folder: Path) -> Path | None:
    """The last complete checkpoint, as rank 0 sees it."""
    newest: list[Any] = [next(reversed(_found(folder)), None)]
    if dist.is_initialized():
        dist.broadcast_object_list(newest, src=0)
    return newest[0]


def _json(about: dict[str, Any]) -> str:
    try:
        text = json.dumps(about)
    except (TypeError, ValueError) as error:
        raise StructureError(f"save: extra must be what JSON keeps (numbers, text, lists, dicts): {error}") from error
    if json.loads(text) != about:
        raise StructureError("save: extra comes back from JSON as something else; use lists for tuples, text for keys")
    return text


def _random() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def _set_random(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns of its own use of deprecated names of torch, and where there is one process, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()
