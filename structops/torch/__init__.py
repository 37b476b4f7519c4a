"""Layers and parameter groups for PyTorch; the only part of structops that imports torch."""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("structops.torch needs PyTorch: pip install 'structops[torch]'") from error

from structops.conversion.calibration import Calibration as Calibration
from structops.torch.calibration import calibrate as calibrate
from structops.torch.checkpoint import export_dense as export_dense
from structops.torch.checkpoint import load as load
from structops.torch.checkpoint import save_pretrained as save_pretrained
from structops.torch.chunks import Tuning as Tuning
from structops.torch.chunks import tuning as tuning
from structops.torch.convert import densify as densify
from structops.torch.convert import structurize as structurize
from structops.torch.coord_check import coord_check as coord_check
from structops.torch.coord_report import CoordReport as CoordReport
from structops.torch.groups import param_groups as param_groups
from structops.torch.groups import split as split
from structops.torch.heal import Healing as Healing
from structops.torch.heal import heal as heal
from structops.torch.init import init_ as init_
from structops.torch.layer import StructuredLinear as StructuredLinear
from structops.torch.linears import survey as survey
from structops.torch.muon import Muon as Muon
from structops.torch.probe import Probe as Probe
from structops.torch.probe import lint as lint
from structops.torch.probe import probe as probe
from structops.torch.routed import RoutedLinear as RoutedLinear
from structops.torch.routed import router_loss as router_loss
from structops.torch.schedule import guard as guard
from structops.torch.sequential import compress as compress
from structops.torch.weights import plan as plan
