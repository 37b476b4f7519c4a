"""The models of the paper as sizes, and the torch modules built from them.

A model is a frozen dataclass of sizes.  It lists its linear layers with their structures, counts their MACs, parameters
and activations without any library, and builds the torch module when asked.  The studies compare structures, not
libraries, so only torch builds all of them; the demonstration trains the MLP in JAX, too.
"""

from structops.studies.models.gpt import GPT
from structops.studies.models.mlp import ResidualMLP
from structops.studies.models.sizes import LayerSize, Model
from structops.studies.models.vit import ViT
from structops.studies.models.widths import width_for

MODELS: dict[str, type[Model]] = {"mlp": ResidualMLP, "vit": ViT, "gpt": GPT}

__all__ = ["GPT", "MODELS", "LayerSize", "Model", "ResidualMLP", "ViT", "width_for"]
