"""Layers and gradient transformations for JAX; the only part of structops that imports jax."""

try:
    import jax as _jax  # noqa: F401
    from flax import nnx as _nnx  # noqa: F401
except ImportError as error:
    raise ImportError("structops.jax needs JAX and Flax: pip install 'structops[jax]'") from error

from structops.conversion.calibration import Calibration as Calibration
from structops.jax.calibration import calibrate as calibrate
from structops.jax.checkpoint import load as load
from structops.jax.checkpoint import save_pretrained as save_pretrained
from structops.jax.convert import Structured as Structured
from structops.jax.convert import densify as densify
from structops.jax.convert import structurize as structurize
from structops.jax.heal import Healing as Healing
from structops.jax.heal import heal as heal
from structops.jax.init import init as init
from structops.jax.layer import StructuredLinear as StructuredLinear
from structops.jax.layer import StructuredLinearGeneral as StructuredLinearGeneral
from structops.jax.linears import survey as survey
from structops.jax.linen import linen_interceptor as linen_interceptor
from structops.jax.optimizer import lr_scales as lr_scales
from structops.jax.optimizer import muon_dims as muon_dims
from structops.jax.optimizer import partition as partition
from structops.jax.optimizer import scale_by_mup as scale_by_mup
from structops.jax.routed import RoutedLinear as RoutedLinear
from structops.jax.routed import router_loss as router_loss
from structops.jax.sharding import shard as shard
from structops.jax.sharding import shardings as shardings
from structops.jax.weights import plan as plan
from structops.jax.weights import weights as weights
