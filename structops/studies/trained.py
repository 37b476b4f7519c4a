"""Settings that all studies of trainings share, and the trainings that they name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any

from structops.errors import StructureError
from structops.studies.data import Augment, Task
from structops.studies.lab.config import option
from structops.studies.lab.study import Study, Work
from structops.studies.models import GPT, MODELS, Model, ResidualMLP, ViT, width_for
from structops.studies.runs import Data, Recipe, Run

DATA = "digits, mnist5k, breast_cancer, wine, diabetes, pydoc, or cifar10, cifar100, images, hub, text, tokens:PATH."
ERRORS = ("train_error", "test_error", "train_loss", "test_loss")


@dataclass(frozen=True)
class Trained(Study):
    """Settings that all studies of trainings share.

    Attributes:
        model: A name of `MODELS`.
        data: As `structops.studies.data.load` takes it.
        structures: Specs of the layers that ``where`` chooses.
        widths: Of the dense networks.
        depth: Blocks.
        where: Layers that are structured; see `structops.studies.models.sizes.WHERE`.
        epochs: Passes over the data.
        steps: Steps in place of epochs, where not 0.
        batch: Examples per step.
        lr: Rate of the dense network of ``base_width``.
        base_width: Width at which ``lr`` is right.
        expansion: Width inside a feed-forward network, relative to the stream.
        weight_decay: That of AdamW for dense weights.
        clip: Largest norm of the gradient; 0 for none.
        warmup: Steps of linear warm-up.
        schedule: Of the rate.
        seed: First seed.
        seeds: Number of seeds.
        noise: Deviation of noise on inputs.
        crop: Pixels by which images are shifted.
        resized_crop: Least share of the area of random resized crops.
        flip: Whether images are mirrored.
        mixup: Parameter of MixUp.
        smoothing: Of labels.
        patch_size: Of the vision transformer.
        heads: Of the vision transformer.
        head_dim: Features of a head of the GPT.
        context: Tokens of the GPT.
        tokens: Tokens of a text.
        vocab_size: Of the tokens ``bpe``.
        weight_norm: Whether factors are capped.
        error: What is reported.
    """

    model: Annotated[str, option(help="mlp, vit or gpt.")] = "mlp"
    data: Annotated[str, option(help=DATA)] = "mnist5k"
    structures: Annotated[tuple[str, ...], option(help="Specs of the structured layers.")] = ("dense", "btt")
    widths: Annotated[tuple[int, ...], option(help="Widths of the dense networks.")] = (16, 32, 64, 128)
    depth: Annotated[int, option(min=0, help="Blocks of the network.")] = 3
    where: Annotated[str, option(help="Structured layers: all, all_but_head, hidden, attention or ffn.")] = (
        "all_but_head"
    )
    epochs: Annotated[int, option(min=1, help="Passes over the training data.")] = 15
    steps: Annotated[int, option(min=0, help="Steps, in place of epochs.")] = 0
    batch: Annotated[int, option(min=1, help="Examples per step.")] = 128
    lr: Annotated[float, option(min=0, help="Learning rate of the dense network of the base width.")] = 3e-3
    base_width: Annotated[int, option(min=1, help="Width at which the learning rate is right.")] = 64
    expansion: Annotated[int, option(min=1, help="Width inside a feed-forward network, relative to the stream.")] = 4
    weight_decay: Annotated[float, option(min=0, help="Of AdamW, for dense weights.")] = 0.0
    clip: Annotated[float, option(min=0, help="Largest norm of the gradient; 0 for none.")] = 0.0
    warmup: Annotated[int, option(min=0, help="Steps of linear warm-up.")] = 0
    schedule: Annotated[str, option(help="cosine or constant.")] = "cosine"
    seed: Annotated[int, option(min=0, help="First seed.")] = 0
    seeds: Annotated[int, option(min=1, help="Number of seeds.")] = 2
    noise: Annotated[float, option(min=0, help="Deviation of Gaussian noise on inputs that are no text.")] = 0.0
    crop: Annotated[int, option(min=0, help="Pixels by which images are shifted at random; of images only.")] = 3
    resized_crop: Annotated[
        float, option(min=0, max=1, help="Least share of the area of random resized crops; 0 for none; of images only.")
    ] = 0.0
    flip: Annotated[bool, option("--flip", help="Mirror images at random; of images only.")] = False
    mixup: Annotated[float, option(min=0, help="Parameter of MixUp.")] = 0.0
    smoothing: Annotated[float, option(min=0, help="Label smoothing.")] = 0.0
    patch_size: Annotated[int, option(min=1, help="Pixels of a patch of the ViT.")] = 7
    heads: Annotated[int, option(min=1, help="Heads of the ViT.")] = 4
    head_dim: Annotated[int, option(min=1, help="Features of a head of the GPT.")] = 16
    context: Annotated[int, option(min=2, help="Tokens of a sequence of the GPT.")] = 64
    tokens: Annotated[str, option(help="Of texts: char, bpe, or a tokenizer.json.")] = "char"
    vocab_size: Annotated[int, option(min=2, help="Tokens of bpe.")] = 512
    weight_norm: Annotated[bool, option("--weight-norm", help="Cap the factors (BTT in transformers).")] = False
    error: Annotated[str, option(help="What is reported: train_error, test_error, train_loss or test_loss.")] = (
        "train_error"
    )

    def __post_init__(self) -> None:
        """Check names."""
        if self.model not in MODELS:
            raise StructureError(f"model {self.model!r} not among {', '.join(MODELS)}")
        if self.error not in ERRORS:
            raise StructureError(f"error {self.error!r} not among {', '.join(ERRORS)}")

    def work(self) -> Work:
        """Train in torch."""
        from structops.studies.trainer import Job, forget, train

        return Work(train, describe, Job, forget, divisible=True)

    def facts(self) -> dict[str, Any]:
        """The data's source and checksums."""
        return {"name": self.data, **self.task.facts}

    @cached_property
    def source(self) -> Data:
        """The data with what is done to it."""
        language = self.model == "gpt"
        options: dict[str, Any] = {"context": self.context} if language else {}
        if language and not self.data.startswith("tokens:"):
            options |= {"tokens": self.tokens, "vocab_size": self.vocab_size}
        images = not language and len(Data(self.data).load().input_shape) == 3
        augment = Augment(
            noise=self.noise,
            crop=self.crop if images else 0,
            resized_crop=(self.resized_crop, 1.0) if images and self.resized_crop else None,
            flip=self.flip and images,
            mixup=self.mixup,
            smoothing=self.smoothing,
        )
        return Data(
            self.data,
            Augment() if language else augment,
            permute_pixels=self.model == "mlp" and images,
            options=tuple(options.items()),
        )

    @cached_property
    def task(self) -> Task:
        """The data.

        Raises:
            StructureError: The model cannot be trained on data of this kind.
        """
        task = self.source.load()
        suits = {
            "mlp": task.kind != "language",
            "vit": task.kind == "classification" and len(task.input_shape) == 3,
            "gpt": task.kind == "language",
        }
        if not suits[self.model]:
            takes = {"mlp": "images or a table", "vit": "images", "gpt": "a text"}[self.model]
            what = f"{task.kind} of shape {task.input_shape}"
            raise StructureError(f"model {self.model} takes {takes}, but {self.data} is {what}")
        return task

    @cached_property
    def recipe(self) -> Recipe:
        """How networks are trained."""
        return Recipe(
            lr=self.lr,
            base_width=self.base_width,
            epochs=self.epochs,
            steps=self.steps,
            batch=self.batch,
            warmup=self.warmup,
            schedule=self.schedule,
            weight_decay=self.weight_decay,
            clip=self.clip,
        )

    def network(self, structure: str, width: int, where: str = "", weight_norm: bool | None = None) -> Model:
        """The network of these settings for the data."""
        shape = self.task.input_shape
        common: dict[str, Any] = {"depth": self.depth, "expansion": self.expansion, "where": where or self.where}
        common |= {"weight_norm": self.weight_norm if weight_norm is None else weight_norm}
        if self.model == "mlp":
            size = math.prod(shape)
            return ResidualMLP(structure, width, in_features=size, classes=self.task.out_features, **common)
        if self.model == "gpt":
            vocab = self.task.vocab_size
            return GPT(structure, width, vocab=vocab, context=self.context, head_dim=self.head_dim, **common)
        channels, height, image_width = shape
        if height != image_width:
            raise StructureError(f"the ViT takes square images, got {height} x {image_width}")
        return ViT(
            structure,
            width,
            classes=self.task.out_features,
            channels=channels,
            image_size=height,
            patch_size=self.patch_size,
            heads=self.heads,
            **common,
        )

    def at_budget(self, structure: str, macs: int, **changes: Any) -> Model:
        """The network whose MACs are nearest to a budget."""
        start = self.network(structure, self.widths[0], **changes)
        return replace(start, width=width_for(start, macs))

    def run(self, model: Model, seed: int, recipe: Recipe | None = None) -> Run:
        """The training of a network."""
        return Run(self.model, model, self.source, recipe or self.recipe, seed)

    def of_all_seeds(self, model: Model, recipe: Recipe | None = None) -> Iterator[Run]:
        """The trainings of a network from every seed."""
        for seed in range(self.seed, self.seed + self.seeds):
            yield self.run(model, seed, recipe)


def describe(run: Run) -> str:
    """A few words on a training."""
    return f"{run.model.structure}, width {run.model.width}, seed {run.seed}"
