"""A training run that can be killed and started again: ``torchrun ... killed_run.py FOLDER RESULT``.

KILLED_IN="step save" kills a process in a step when the script is started for the first time, and in a save the second.
"""

from __future__ import annotations

import datetime
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from models import VOCABULARY, Block, adam, batch, loss_of, net
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from structops.torch.distributed import checkpoint, resume, save, shard_placement

STEPS, EVERY = 9, 2


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, result: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=100))
    run(folder, result)
    dist.barrier()  # nobody leaves while another still works
    dist.destroy_process_group()


def run(folder: Path, result: Path) -> None:
    """From the last checkpoint to the end."""
    rank, size = dist.get_rank(), dist.get_world_size()
    folder.mkdir(exist_ok=True)
    starts = len(list(folder.glob(f"started-{rank}-*")))
    (folder / f"started-{rank}-{starts}").touch()
    killed_in = dict(enumerate(os.environ.get("KILLED_IN", "").split())).get(starts, "")

    model = net()
    for block in model.blocks:
        assert isinstance(block, Block)
        block.norm2 = nn.Sequential(block.norm2, nn.Dropout(0.2))  # so that the random state counts
    place, mesh = shard_placement(model), init_device_mesh("cpu", (size,))
    fully_shard(model, mesh=mesh, shard_placement_fn=place)
    optimizer = adam(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    torch.manual_seed(rank)

    found = resume(folder, model, optimizer)
    position, losses = 0, []
    if found:
        scheduler.load_state_dict(found.extra["scheduler"])
        position, losses = found.extra["position"], found.extra["losses"]
    if rank == 0:
        with (folder / "origins").open("a") as file:
            print(found.step if found else 0, file=file)
    for step in range(found.step if found else 0, STEPS):
        tokens = batch(position) if rank == 0 else (batch(position) + 1) % VOCABULARY
        position += 1
        loss = loss_of(model, tokens)
        optimizer.zero_grad()
        loss.backward()
        if killed_in == "step" and step == 5 and rank == 1:
            die()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if (step + 1) % EVERY == 0:
            if killed_in == "save" and step == 5 and rank == 0:
                checkpoint.os.replace = lambda *paths: die()  # written, not renamed
            extra = {"scheduler": scheduler.state_dict(), "position": position, "losses": losses}
            save(folder, step + 1, model, optimizer, extra=extra)
    whole = {name: parameter.full_tensor() for name, parameter in model.state_dict().items()}
    if rank == 0:
        torch.save({"model": whole, "losses": losses}, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
