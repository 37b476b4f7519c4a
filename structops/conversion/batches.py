"""What a batch is, whatever the library: how a model is given it, and what of it is padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from structops.errors import StructureError


@dataclass(frozen=True)
class Batches:
    """Batches of the arrays of one library.

    Attributes:
        arrays: The types of these arrays.
        array: What messages call one: ``"a tensor"``.
        source: What several batches may be given as: ``"a list"``.
    """

    arrays: tuple[Any, ...]
    array: str
    source: str

    def call(self, model: Any, batch: Any) -> Any:
        """The output of a model for a batch.

        A mapping is given as keyword arguments, a pair of a tuple and a mapping as ``model(*args, **kwargs)``; of any
        other tuple or list the first element is the input and the others are labels; an array is the input.

        Raises:
            StructureError: The batch is of another kind.
        """
        if isinstance(batch, Mapping):
            return model(**batch)
        if _is_call(batch):
            return model(*batch[0], **batch[1])
        if isinstance(batch, tuple | list) and batch:
            return self.call(model, batch[0])
        if isinstance(batch, self.arrays):
            return model(batch)
        raise StructureError(
            f"a batch is {self.array}, a tuple (x, labels), a mapping of keyword arguments, or (args, kwargs), got "
            f"{type(batch).__name__}; give forward=lambda model, batch: ... for anything else"
        )

    def mask_of(self, batch: Any) -> Any:
        """The ``attention_mask`` of a batch of tokens, shape (sequences, length); None if it has none."""
        if _is_call(batch):
            batch = batch[1]
        elif isinstance(batch, tuple | list) and batch:
            batch = batch[0]
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        return mask if isinstance(mask, self.arrays) and mask.ndim == 2 else None

    def checked(self, batches: Iterable[Any]) -> Iterable[Any]:
        """What was given as the batches, if it is several.

        Raises:
            StructureError: It is one batch, or nothing that can be gone through.
        """
        if isinstance(batches, (*self.arrays, Mapping, str)) or not isinstance(batches, Iterable):
            raise StructureError(
                f"expected an iterable of batches, such as {self.source}, got a {type(batches).__name__}; "
                f"give [batch] for a single one"
            )
        return batches

    def again(self, data: Iterable[Any], steps: int) -> Iterator[Any]:
        """As many batches as `heal` has steps; data are gone through as often as needed.

        Raises:
            StructureError: There is none, or an iterator ends early.
        """
        given = 0
        while given < steps:
            before = given
            for batch in data:
                yield batch
                given += 1
                if given == steps:
                    return
            if given == before:
                raise StructureError(
                    f"heal: there is no batch after {given} of {steps} steps; give data that can be gone through "
                    f"again, such as {self.source}"
                )


def _is_call(batch: Any) -> bool:
    """Whether a batch is a pair (args, kwargs)."""
    is_pair = isinstance(batch, tuple | list) and len(batch) == 2
    return is_pair and isinstance(batch[0], tuple | list) and isinstance(batch[1], Mapping)
