"""Structure-aware muP: init and learning-rate scales from the sizes of factors.  Numbers only, no arrays."""

from structops.mup.families import FAMILIES as FAMILIES
from structops.mup.families import FAMILY as FAMILY
from structops.mup.families import Family as Family
from structops.mup.families import Rule as Rule
from structops.mup.families import family as family
from structops.mup.plan import MupPlan as MupPlan
from structops.mup.plan import PlanRow as PlanRow
from structops.mup.plan import Weight as Weight
from structops.mup.plan import make_plan as make_plan
from structops.mup.rules import Scale as Scale
from structops.mup.rules import Scales as Scales
from structops.mup.rules import init_std as init_std
from structops.mup.rules import init_stds as init_stds
from structops.mup.rules import lr_multiplier as lr_multiplier
from structops.mup.rules import scales as scales
from structops.mup.rules import width_ratio as width_ratio
