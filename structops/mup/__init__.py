"""Structure-aware muP: init and learning-rate scales from the sizes of factors.  Numbers only, no arrays."""

from structops.mup.rules import FAMILY as FAMILY
from structops.mup.rules import Scale as Scale
from structops.mup.rules import Scales as Scales
from structops.mup.rules import init_std as init_std
from structops.mup.rules import init_stds as init_stds
from structops.mup.rules import lr_multiplier as lr_multiplier
from structops.mup.rules import scales as scales
from structops.mup.rules import width_ratio as width_ratio
