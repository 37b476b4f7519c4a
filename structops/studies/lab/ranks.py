"""One study under ``torchrun``: all processes train together, and the first one keeps the results."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one network.

    Attributes:
        rank: Its number.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """The value of the first process, in all of them."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[no-any-return]


def current() -> Ranks:
    """What ``torchrun`` says in the environment; one process without it."""
    return Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


@contextmanager
def joined() -> Iterator[Ranks]:
    """The process group of ``torchrun`` while it lasts; nothing is set up for one process."""
    ranks = current()
    if ranks.size == 1:
        yield ranks
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
