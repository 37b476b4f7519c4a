"""A training that goes on where it was stopped: tensors and their history in one safetensors file, no pickles."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from structops._files import replacing
from structops.errors import CheckpointError


def path_of(folder: Path, run: Any) -> Path:
    """Where the state of a run, a dataclass, is kept while it lasts."""
    digest = hashlib.sha256(json.dumps(asdict(run), sort_keys=True).encode()).hexdigest()[:16]
    return folder / "checkpoints" / f"{digest}.safetensors"


def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    """Keep parameters, buffers and the optimiser's state, and ``progress`` as JSON; whole or not at all."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(save(whole, metadata={"progress": json.dumps(progress)}))


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Put a kept state into a model and its optimiser and return the progress; None if there is no file.

    Raises:
        CheckpointError: The file is damaged, or of another network.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            progress: dict[str, Any] = json.loads(file.metadata()["progress"])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = tensor
        model.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        message = f"{path} is no state of this training ({error}); remove it, and the training starts anew"
        raise CheckpointError(message) from error
    return progress
