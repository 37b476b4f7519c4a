"""The folder of a checkpoint: written whole or not at all, and refused for a reason that the message names."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from structops.conversion.config import CONFIG, DIGEST, WEIGHTS, CheckpointConfig
from structops.errors import CheckpointError

Folder = str | os.PathLike[str]
_UNFINISHED = ".structops-"
# What transformers loads as weights: one file, or shards and their index.
_DENSE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@contextmanager
def published(folder: Folder) -> Iterator[Path]:
    """A temporary folder; what is written there is moved into ``folder`` at the end, ``structops.json`` last.

    Raises:
        CheckpointError: ``folder`` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a checkpoint is a folder")
    folder.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=folder, prefix=_UNFINISHED))
    try:
        yield new
        names = sorted((path.name for path in new.iterdir()), key=lambda name: name == CONFIG)
        for name in names:
            with open(new / name, "rb") as file:
                os.fsync(file.fileno())
        # From here to the last line the folder has no structops.json, and `load` refuses it.
        (folder / CONFIG).unlink(missing_ok=True)
        for path in folder.iterdir():
            if _DENSE.fullmatch(path.name) and path.name not in names:
                path.unlink()  # shards of an older checkpoint, which transformers would mix with this one
        for name in names:
            os.replace(new / name, folder / name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def read_config(folder: Path) -> CheckpointConfig:
    """``structops.json``, or what the folder is instead.

    Raises:
        CheckpointError: There is none.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; load takes one that save_pretrained wrote")
    path = folder / CONFIG
    if path.exists():
        return CheckpointConfig.from_json(path.read_text(encoding="utf-8", errors="replace"), str(path))
    if any(folder.glob(f"{_UNFINISHED}*")):
        raise CheckpointError(f"saving to {folder} was interrupted: it has no {CONFIG}; save again")
    if (folder / WEIGHTS).exists():
        with opened(folder / WEIGHTS, "numpy") as file:  # names only, so that no library of arrays is needed
            if DIGEST in (file.metadata() or {}):
                raise CheckpointError(
                    f"{folder} lacks the {CONFIG} of its weights: saving was interrupted, or it was not copied along"
                )
            if any(re.search(r"(^|\.)factors\.0$", key) for key in file.keys()):  # noqa: SIM118
                raise CheckpointError(
                    f"{folder} has structured weights but no {CONFIG}, which says what they are: the save_pretrained "
                    f"of the model itself wrote it.  Structurize a model in the same way, load_state_dict the weights, "
                    f"and save it by structops.torch.save_pretrained"
                )
    if any(_DENSE.fullmatch(file.name) or file.name.startswith("pytorch_model") for file in folder.iterdir()):
        raise CheckpointError(
            f"{folder} holds a dense checkpoint: load it as ever, for example with from_pretrained of transformers, "
            f"and give its layers a structure by structops.torch.structurize"
        )
    raise CheckpointError(f"{folder} has no {CONFIG}, so it is no checkpoint of structops.torch.save_pretrained")


@contextmanager
def opened(path: Path, framework: str) -> Iterator[Any]:
    """A file of safetensors; ``framework`` is its name for the library whose arrays are read.

    Raises:
        CheckpointError: It does not exist, was cut off, or is something else.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist, so the checkpoint has no weights")
    try:
        opened = safe_open(path, framework=framework)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no file of safetensors, or was cut off: {error}") from error
    with opened as file:
        yield file
