"""Which layers of a model get which structure, what that saves, and how it is written down, in every library."""

from structops.conversion.calibration import Calibration as Calibration
from structops.conversion.config import CheckpointConfig as CheckpointConfig
from structops.conversion.config import LayerConfig as LayerConfig
from structops.conversion.healing import Healing as Healing
from structops.conversion.report import Conversion as Conversion
from structops.conversion.report import Kept as Kept
from structops.conversion.report import Projection as Projection
from structops.conversion.report import Row as Row
from structops.conversion.report import row_of as row_of
from structops.conversion.selection import Choice as Choice
from structops.conversion.selection import Layer as Layer
from structops.conversion.selection import choose as choose
