"""What a checkpoint says about the structured layers of a model, as JSON that torch and JAX share; no arrays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

from structops import __version__
from structops.errors import CheckpointError, StructureError
from structops.normalise import check_weight_norm
from structops.spec import Structure, structure

FORMAT = 1
"""The version of the format; raised when a reader of the one before could misread a file."""

CONFIG = "structops.json"
WEIGHTS = "model.safetensors"
DIGEST = "structops"
"""The key in the metadata of the weights under which they name the `CheckpointConfig` that they belong to."""


class Stored(NamedTuple):
    """An array of a layer, as it is stored.

    Attributes:
        shape: Its shape.
        dtype: The name of its dtype.
    """

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class LayerConfig:
    """A structured layer without its numbers.

    Attributes:
        structure: The spec.
        in_features: Input size.
        out_features: Output size.
        bias: Whether it has one.
        zero_init: As for the layers; weight normalisation caps by it.
        weight_norm: As for the layers.
        recompute: As for the layers.
        kind: The class of the dense layer that it replaces: ``"Linear"``, ``"Conv1D"``.
        dtype: The name of the dtype of its factors, such as ``"bfloat16"``.
    """

    structure: Structure
    in_features: int
    out_features: int
    bias: bool = True
    zero_init: bool = False
    weight_norm: bool | Literal["cap"] = False
    recompute: bool = False
    kind: str = "Linear"
    dtype: str = "float32"

    def stored(self) -> dict[str, Stored]:
        """The arrays of the layer by name: ``factors.0`` on, ``gains``, ``bias``.

        Raises:
            StructureError: The structure cannot have these sizes.
        """
        shapes = self.structure.plan(self.in_features, self.out_features).stored_shapes
        arrays = {f"factors.{k}": Stored(tuple(shape), self.dtype) for k, shape in enumerate(shapes)}
        if self.weight_norm is True:
            real = {"complex64": "float32", "complex128": "float64"}.get(self.dtype, self.dtype)
            arrays["gains"] = Stored((len(shapes),), real)
        return arrays | ({"bias": Stored((self.out_features,), self.dtype)} if self.bias else {})

    def to_data(self) -> dict[str, Any]:
        """Plain data, which JSON keeps."""
        data = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return data | {"structure": json.loads(self.structure.to_json())}

    @classmethod
    def from_data(cls, name: str, data: Any) -> LayerConfig:
        """The layer of this name from what JSON gave.

        Raises:
            CheckpointError: Entries are missing, unknown or of a wrong type.
            StructureError: The structure is unknown to this version, or cannot have these sizes.
        """
        _check_entries(f"layer {name!r}", data, _LAYER_TYPES)
        try:
            check_weight_norm(data["weight_norm"])
            layer = cls(**{**data, "structure": structure(data["structure"])})
            layer.stored()
        except StructureError as error:
            raise StructureError(f"layer {name!r} of the checkpoint: {error}") from error
        return layer


@dataclass(frozen=True)
class CheckpointConfig:
    """All that `load` needs besides the numbers.

    Attributes:
        framework: ``"torch"`` or ``"jax"``.
        layers: The structured layers by dotted name.
        model: What the model is: ``{"library": "transformers", "class": "GPT2LMHeadModel"}``, or nothing.
        tied: Names of arrays that are others, which the weights hold once: ``{"lm_head.weight": "wte.weight"}``.
        buffers: Dtypes of floating-point buffers that are not stored, by name.
        version: The version of structops that wrote it.
        format: The version of the format.
    """

    framework: Literal["torch", "jax"]
    layers: Mapping[str, LayerConfig]
    model: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    buffers: Mapping[str, str] = field(default_factory=dict)
    version: str = __version__
    format: int = FORMAT

    def to_data(self) -> dict[str, Any]:
        """Plain data, which JSON keeps."""
        return {
            "format": self.format,
            "version": self.version,
            "framework": self.framework,
            "model": dict(self.model),
            "layers": {name: layer.to_data() for name, layer in self.layers.items()},
            "tied": dict(self.tied),
            "buffers": dict(self.buffers),
        }

    def to_json(self) -> str:
        """The text of ``structops.json``; every layer has a line."""
        data = self.to_data()
        layers = ",\n".join(f"    {json.dumps(name)}: {json.dumps(layer)}" for name, layer in data["layers"].items())
        text = json.dumps({**data, "layers": None}, indent=2)
        return text.replace('"layers": null', f'"layers": {{\n{layers}\n  }}' if layers else '"layers": {}') + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = CONFIG) -> CheckpointConfig:
        """The checkpoint that a text describes; ``source`` names it in messages.

        Raises:
            CheckpointError: The text is no such JSON, is of a newer format, or entries are missing, unknown or wrong.
            StructureError: A structure is unknown to this version, or cannot have the sizes of its layer.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"{source} is no JSON, or was cut off: {error}") from error
        format = data.get("format") if isinstance(data, dict) else None
        if isinstance(format, int) and format > FORMAT:
            raise CheckpointError(
                f"{source} has format {format}, written by structops {data.get('version')}; structops "
                f"{__version__} reads formats up to {FORMAT}: upgrade structops"
            )
        if isinstance(data, dict) and {"step", "processes"} <= data.keys():
            raise CheckpointError(
                f"{source} is that of a training run: read it with structops.torch.distributed.resume"
            )
        _check_entries(source, data, _TYPES)
        if data["framework"] not in ("torch", "jax"):
            raise CheckpointError(f"{source}: framework is 'torch' or 'jax', got {data['framework']!r}")
        for name in ("model", "tied", "buffers"):
            if not all(isinstance(value, str) for value in data[name].values()):
                raise CheckpointError(f"{source}: expected names in {name}, got {data[name]}")
        layers = {name: LayerConfig.from_data(name, layer) for name, layer in data["layers"].items()}
        return cls(**{**data, "layers": layers})

    def digest(self) -> str:
        """A number for layers and ties, in hexadecimal; the weights have it in their metadata."""
        data = self.to_data()
        text = json.dumps([data["layers"], data["tied"]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def check_weights(self, metadata: Mapping[str, str] | None, source: str = WEIGHTS) -> None:
        """The weights were written with this config.

        Raises:
            CheckpointError: They were not; the message says what they are.
        """
        found = (metadata or {}).get(DIGEST)
        if found is None:
            raise CheckpointError(f"{source} was not written by structops: its metadata do not say which layers it has")
        if found != self.digest():
            raise CheckpointError(
                f"{source} does not belong to the {CONFIG} beside it: one of them was replaced or changed by hand, or "
                f"saving was interrupted; save again, or take both from one place"
            )

    def cast(self, dtype: str) -> CheckpointConfig:
        """The same with all layers of another dtype, and buffers as the model makes them."""
        layers = {name: replace(layer, dtype=dtype) for name, layer in self.layers.items()}
        return replace(self, layers=layers, buffers={})


_TYPES = {
    "format": int,
    "version": str,
    "framework": str,
    "model": dict,
    "layers": dict,
    "tied": dict,
    "buffers": dict,
}
_LAYER_TYPES = {
    "structure": dict,
    "in_features": int,
    "out_features": int,
    "bias": bool,
    "zero_init": bool,
    "weight_norm": (bool, str),
    "recompute": bool,
    "kind": str,
    "dtype": str,
}


def _check_entries(where: str, data: Any, types: Mapping[str, Any]) -> None:
    """Data are a mapping with these entries of these types, and no others.

    Raises:
        CheckpointError: They are not.
    """
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: expected entries {', '.join(types)}, got {data!r}")
    missing, unknown = types.keys() - data.keys(), data.keys() - types.keys()
    if missing or unknown:
        odd = [*(f"no {name!r}" for name in sorted(missing)), *(f"an unknown {name!r}" for name in sorted(unknown))]
        raise CheckpointError(f"{where} has {', '.join(odd)}: it is no file of structops, or was changed by hand")
    for name, kind in types.items():
        value = data[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CheckpointError(f"{where}: {name} is {value!r}, which is of the wrong type")


def check_tensors(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Model and checkpoint have the same tensors, at the same sizes.

    Raises:
        CheckpointError: They have not.
    """
    if missing := [name for name in expected if name not in found]:
        raise CheckpointError(f"the checkpoint lacks {some(missing)}, which the model has: is it another model?")
    if unknown := [name for name in found if name not in expected]:
        raise CheckpointError(f"the model lacks {some(unknown)}, which the checkpoint has: is it another model?")
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(f"{name} is {shape} in the model and {found[name]} in the checkpoint")


def some(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f", and {len(names) - 5} more" if len(names) > 5 else "")
