"""Moments of the inputs of the layers of a model by name: what `calibrate` gives, in every library."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from structops import _array
from structops._array import Array
from structops._files import replacing
from structops.conversion.report import aligned
from structops.errors import BackendError, EntryError, StructureError, StructureWarning
from structops.projection import Moments

LAYERS = "structops.calibration"  # the entry of the metadata that says which layer has which moments
FRAMEWORKS = {"torch": "pt", "jax": "flax"}  # what safetensors call them
STEPS = 20  # of the power method for the largest variance


class Calibration(Mapping[str, Moments]):
    """Moments of the input of every layer by name; prints as a table.

    In PyTorch the layers come in the order in which they ran, and those that get the very same inputs, such as the
    projections of query, key and value, share one `Moments`.  In JAX they come in the order of `survey`, and each has
    its own.  The sum of two is the calibration on the data of both, for the ranks of a distributed run.

    Args:
        moments: By the name of the layer; those that are one object stay shared.

    Example:
        >>> import torch
        >>> from structops.torch import calibrate
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> found = calibrate(model, [torch.tensor([[1., 0.], [3., 0.]])])
        >>> found
        Calibration(2 layers, 2 different inputs, 88 bytes)
        >>> print(found.table().splitlines()[1])
        0          2        2             1.0  100.0%        80.0%
    """

    def __init__(self, moments: Mapping[str, Moments]) -> None:
        self._moments = dict(moments)

    def __getitem__(self, name: str) -> Moments:
        """The moments of a layer.

        Raises:
            KeyError: It was not calibrated.
        """
        return self._moments[name]

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._moments)

    def __len__(self) -> int:
        """Number of layers."""
        return len(self._moments)

    def groups(self) -> list[list[str]]:
        """The names of the layers that share moments, in the order of the layers."""
        groups: dict[int, list[str]] = {}
        for name, moments in self.items():
            groups.setdefault(id(moments), []).append(name)
        return list(groups.values())

    @property
    def nbytes(self) -> int:
        """Memory of the moments; shared ones count once."""
        distinct = {id(moments): moments for moments in self.values()}.values()
        return sum(array.nbytes for moments in distinct for array in moments.arrays().values())

    def __add__(self, other: Calibration) -> Calibration:
        """The moments of the data of both; a layer that one of them lacks has those of the other."""
        if not isinstance(other, Calibration):
            return NotImplemented
        sums: dict[tuple[int, int], Moments] = {}
        found = {}
        for name in dict.fromkeys([*self, *other]):
            ours, theirs = self.get(name), other.get(name)
            if ours is None or theirs is None:
                found[name] = self[name] if theirs is None else theirs
            else:
                pair = id(ours), id(theirs)
                if pair not in sums:
                    sums[pair] = ours + theirs
                found[name] = sums[pair]
        return Calibration(found)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write a safetensors file; `load` reads it, also into the other library.  It appears whole or not at all."""
        from safetensors.numpy import save

        groups = self.groups()
        arrays = {
            f"{k}.{key}": _on_host(array)
            for k, group in enumerate(groups)
            for key, array in self[group[0]].arrays().items()
        }
        order = {name: k for k, group in enumerate(groups) for name in group}
        layers = json.dumps({name: order[name] for name in self})
        with replacing(file) as stream:
            stream.write(save(arrays, metadata={"format": "pt", LAYERS: layers}))

    @classmethod
    def load(
        cls, file: str | os.PathLike[str], device: Any = None, *, framework: Literal["torch", "jax"] = "torch"
    ) -> Calibration:
        """What `save` wrote.

        Args:
            file: The file.
            device: Where the moments are to be: of torch, the CPU by default; of JAX, a ``jax.Device``, the default one
                by default.
            framework: The library that is to hold them.

        Raises:
            EntryError: The file is no calibration, or has numbers of 64 bits while JAX has them switched off.
            BackendError: ``framework`` is another library.
        """
        from safetensors import safe_open

        if framework not in FRAMEWORKS:
            raise BackendError(f"framework is 'torch' or 'jax', got {framework!r}")
        place = {"device": str(device)} if framework == "torch" and device is not None else {}
        with safe_open(file, FRAMEWORKS[framework], **place) as stored:
            layers = (stored.metadata() or {}).get(LAYERS)
            if layers is None:
                raise EntryError(f"{file} is no calibration; Calibration.save writes one")
            arrays: dict[str, dict[str, Array]] = {}
            for key in stored.keys():  # noqa: SIM118  (no mapping)
                group, name = key.split(".")
                array = stored.get_tensor(key)
                # Of the count, JAX keeps what it can; see Moments.
                if name != "count" and stored.get_slice(key).get_dtype() == "F64" and array.dtype.itemsize < 8:
                    raise EntryError(
                        f"{file} has numbers of 64 bits, which JAX would cut to {array.dtype}; set "
                        f'jax.config.update("jax_enable_x64", True) before'
                    )
                moved = framework == "jax" and device is not None
                arrays.setdefault(group, {})[name] = _array.move(array, device) if moved else array
        moments = {group: Moments.from_arrays(found) for group, found in arrays.items()}
        return cls({name: moments[str(k)] for name, k in json.loads(layers).items()})

    def table(self) -> str:
        """One line a layer.

        - *vectors*: the sum of their weights; with fewer than inputs the moments are singular.
        - *effective rank*: ``(sum of variances)^2 / sum of squared variances`` along the principal axes, at most the
          number of inputs: how much there is to gain over a projection without calibration.
        - *top*: share of the largest of these variances in their sum.
        - *mean*: share of the mean in the second moments, which a bias takes over.
        """
        head = ("layer", "inputs", "vectors", "effective rank", "top", "mean")
        body = []
        for group in self.groups():
            moments = self[group[0]]
            rank, top, mean = _spectrum(moments)
            cells = (f"{moments.features}", f"{float(moments.count):,.7g}", f"{rank:.1f}", f"{top:.1%}", f"{mean:.1%}")
            body += [(name or "(the model)", *cells) for name in group]
        return "\n".join(aligned(head, body, right=(1, 2, 3, 4, 5)))

    __str__ = table

    def __repr__(self) -> str:
        """Counts and memory."""
        return f"Calibration({len(self)} layers, {len(self.groups())} different inputs, {bytes_text(self.nbytes)})"


def _on_host(array: Array) -> np.ndarray:
    """An array of numpy, row by row: safetensors write memory as it lies."""
    return np.asarray(array.detach().cpu() if hasattr(array, "detach") else array, order="C")


def _spectrum(moments: Moments) -> tuple[float, float, float]:
    """Effective rank, share of the largest variance, and share of the mean in the second moments."""
    spread, mean = moments.centred, moments.mean
    xp, wide = _array.namespace(spread), _array.wide(_array.real_part(mean))
    variances = _array.cast(_array.real_part(spread.diagonal()), wide)
    trace, square = float(variances.sum()), float((_array.cast(xp.abs(mean), wide) ** 2).sum())
    if trace <= 0:
        return 0.0, 0.0, 1.0 if square else 0.0
    shares = spread / trace  # numbers whose squares are in range
    rows = _array.cast(xp.linalg.vector_norm(shares, axis=1), wide)
    v = shares[:, int(variances.argmax())]
    for _ in range(STEPS):
        v = shares @ (v / xp.linalg.vector_norm(v))
    return 1 / float((rows**2).sum()), float(xp.linalg.vector_norm(v)), square / (square + trace)


def bytes_text(count: int) -> str:
    """A number of bytes, to be read."""
    power = min(3, max(0, count.bit_length() - 1) // 10)
    return f"{count} bytes" if power == 0 else f"{count / 1024**power:.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"


def finished(moments: Mapping[str, Moments], names: Sequence[str], batches: int) -> Calibration:
    """The moments of all layers that were reached.

    Args:
        moments: Of the layers that were called, by their names.
        names: All that were selected.
        batches: How many there were.

    Raises:
        StructureError: There was no batch, or no layer was reached.
        EntryError: Inputs were not finite.
    """
    if not batches:
        raise StructureError("calibrate: there is no batch; an iterator that was gone through before is empty")
    found = {name: one for name, one in moments.items() if float(one.count) > 0}
    missing = ", ".join(name or "the model" for name in names if name not in found)
    if not found:
        raise StructureError(f"calibrate: no vector came to {missing}; does the model's forward call them?")
    if missing:
        warnings.warn(f"calibrate: no vector came to {missing}; left out", StructureWarning, stacklevel=3)
    bad = [name for name, one in found.items() if not _is_finite(one.centred.diagonal())]
    if bad:
        raise EntryError(
            f"calibrate: inputs of {', '.join(bad[:5])} are not finite; look at the data, or run the model in bfloat16 "
            f"or float32"
        )
    return Calibration(found)


def _is_finite(array: Array) -> bool:
    return bool(_array.namespace(array).isfinite(array).all())
