"""Train the network of a run in torch: alone, or as one of the processes of ``torchrun``; resumed where it stopped."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from structops.errors import CheckpointError
from structops.studies.data import Task
from structops.studies.lab import ranks
from structops.studies.lab.checkpoint import load_state, path_of, save_state
from structops.studies.models.mlp import INPUT_RATE
from structops.studies.runs import Run
from structops.torch import RoutedLinear, param_groups, router_loss

LAST = 0.1  # share of the steps whose mean is the training error, as the paper's last epochs
KEPT = 50  # points of a stored curve
SAVE_EVERY = 20.0  # seconds between checkpoints


@dataclass(frozen=True)
class Job:
    """A run, and the folder of its checkpoint."""

    run: Run
    folder: Path | None = None


@dataclass
class History:
    """What every step gave: the loss, and the share of wrong answers; both of all processes together."""

    losses: list[float]
    errors: list[float]
    seconds: float = 0.0

    @property
    def step(self) -> int:
        """Steps that are done."""
        return len(self.losses)

    def last(self, values: list[float]) -> float:
        """Mean of the last steps."""
        tail = values[-max(1, round(LAST * len(values))) :]
        return sum(tail) / len(tail)


def train(job: Job) -> dict[str, Any]:
    """Train a network and say what came of it.

    Returns:
        ``train_loss`` and ``train_error``: means of the last tenth of the steps, as trained (with noise, MixUp, ...);
        the error of a classification is the share of wrong answers, that of a regression the mean square, and that of
        a language the loss in nats per token.  ``test_loss`` and ``test_error``: of the test data.  ``macs`` per
        example, ``num_params`` of the linear layers, ``activations`` that a backward pass keeps per example,
        ``seconds`` of training, ``steps``, and the ``curve`` of training losses.  A training whose loss is not finite
        ends at once, with infinite losses and errors.
    """
    run, path = job.run, path_of(job.folder, job.run) if job.folder else None
    training = Training(run)
    if path:
        training.resume(path)
    history, saved = training.history, time.perf_counter()
    while history.step < training.steps and (not history.losses or math.isfinite(history.losses[-1])):
        training.step()
        if path and training.group.leads and time.perf_counter() - saved > SAVE_EVERY:
            save_state(path, training.model, training.optimizer, vars(history))
            saved = time.perf_counter()
    ended = math.isfinite(history.losses[-1])
    test_loss, test_error = training.test() if ended else (math.inf, math.inf)
    every = max(1, training.steps // KEPT)
    return {
        "train_loss": history.last(history.losses) if ended else math.inf,
        "train_error": history.last(history.errors) if ended else math.inf,
        "test_loss": test_loss,
        "test_error": test_error,
        "macs": run.model.macs,
        "num_params": run.model.num_params,
        "activations": run.model.activations,
        "seconds": history.seconds,
        "steps": history.step,
        "curve": [float(np.mean(history.losses[k : k + every])) for k in range(0, history.step, every)],
    }


class Training:
    """A network on its way: from the seed of its run, by steps that depend on nothing but their number.

    Args:
        run: What to train.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.task, self.group = run, run.data.load(), ranks.current()
        self.steps = run.recipe.steps or run.recipe.epochs * self.task.steps_per_epoch(run.recipe.batch)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = run.model.build(generator=torch.Generator().manual_seed(run.seed)).to(self.device)
        self.optimizer = optimizer_of(self.model, run)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.routed = any(isinstance(module, RoutedLinear) for module in self.model.modules())
        parallel = nn.parallel.DistributedDataParallel
        self.network: nn.Module = parallel(self.model) if self.group.size > 1 else self.model
        self.history = History([], [])

    def resume(self, path: Path) -> None:
        """Go on where a checkpoint was written, if there is one."""
        if kept := load_state(path, self.model, self.optimizer):
            self.history = History(**kept)
        if self.history.step != self.group.share(self.history.step):
            raise CheckpointError(
                f"process {self.group.rank} does not see the same {path} as the first one; with torchrun, --out is a "
                f"folder on a disk that all processes share"
            )

    def step(self) -> None:
        """One step of the optimiser; its loss and error are those before it, of the batches of all processes."""
        start, recipe, number = time.perf_counter(), self.run.recipe, self.history.step
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * recipe.factor(number, self.steps)
        batch = self.task.batch(number, recipe.batch, self.run.seed, self.group.rank, self.group.size)
        x, y = (torch.from_numpy(part).to(self.device) for part in batch)
        with router_loss(self.network) if self.routed else nullcontext(lambda: torch.zeros(())) as balance:
            loss, errors = measures(self.network(x), y, self.task)
            self.optimizer.zero_grad()
            (loss + balance()).backward()
        if recipe.clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), recipe.clip)
        self.optimizer.step()
        found = torch.cat([loss.detach().double()[None], errors.double()])
        if self.group.size > 1:
            torch.distributed.all_reduce(found)
            found /= self.group.size
        loss_now, *errors_now = found.tolist()
        self.history.losses.append(loss_now)
        self.history.errors.append(min(errors_now))
        self.history.seconds += time.perf_counter() - start

    def test(self) -> tuple[float, float]:
        """Mean loss and error of the test data."""
        losses, errors, count = 0.0, 0.0, 0
        with torch.no_grad():
            for x, y in self.task.test_batches(self.run.recipe.batch):
                out = self.model(torch.from_numpy(x).to(self.device))
                loss, (error,) = measures(out, torch.from_numpy(y).to(self.device), self.task)
                losses, errors, count = losses + float(loss) * len(x), errors + float(error) * len(x), count + len(x)
        return losses / count, errors / count


def forget(run: Run, folder: Path) -> None:
    """Remove the checkpoint of a run whose result is kept."""
    path_of(folder, run).unlink(missing_ok=True)


def optimizer_of(model: nn.Module, run: Run) -> torch.optim.Optimizer:
    """AdamW whose rates follow the factors' shapes, and the width relative to the dense network of the base width."""
    recipe = run.recipe
    with torch.device("meta"):
        base = run.model.base(recipe.base_width).build()
    groups = param_groups(
        model,
        lr=recipe.lr,
        base=base,
        weight_decay=recipe.weight_decay,
        structure_aware=recipe.structure_aware,
    )
    return torch.optim.AdamW(_slower_input(model, groups, run.model.input_layers))


def _slower_input(model: nn.Module, groups: list[dict[str, Any]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The same groups, where the rate of some layers is `INPUT_RATE` times as large."""
    slow = {id(parameter) for name in names for parameter in model.get_submodule(name).parameters()}
    parts = []
    for group in groups:
        for factor, chosen in ((INPUT_RATE, True), (1.0, False)):
            if params := [p for p in group["params"] if (id(p) in slow) is chosen]:
                parts.append({**group, "params": params, "lr": group["lr"] * factor})
    return parts


def measures(out: Tensor, y: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """Loss and errors of the outputs.

    There is one error, and two for images that are mixed in pairs: with the larger part of the batch's pairs as labels,
    and with the smaller one.  As in the paper's code, the lower of them counts.
    """
    if task.kind == "regression":
        loss = functional.mse_loss(out.squeeze(-1), y)
        return loss, loss.detach()[None]
    if task.kind == "language":
        loss = functional.cross_entropy(out.flatten(0, -2), y.flatten())
        return loss, loss.detach()[None]
    loss = functional.cross_entropy(out, y)
    guess = out.detach().argmax(-1, keepdim=True)
    labels = y.topk(2).indices if y.ndim == 2 else y[:, None]
    return loss, (guess != labels).double().mean(0)
