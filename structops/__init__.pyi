# The public names; structops/__init__.py loads each on first use.

from . import mup as mup
from . import projection as projection
from .algebra.counting import factors as factors
from .algebra.counting import flops as flops
from .algebra.counting import macs as macs
from .algebra.counting import num_params as num_params
from .algebra.rounding import compress as compress
from .algebra.svd import svd as svd
from .chain import Chain as Chain
from .chain import Factor as Factor
from .contract import contract as contract
from .einsum_family import POINTS as POINTS
from .einsum_family import Theta as Theta
from .errors import BackendError as BackendError
from .errors import CheckpointError as CheckpointError
from .errors import DataError as DataError
from .errors import DensifyWarning as DensifyWarning
from .errors import EntryError as EntryError
from .errors import GradientError as GradientError
from .errors import PatternError as PatternError
from .errors import ShapeError as ShapeError
from .errors import StructureError as StructureError
from .errors import StructureWarning as StructureWarning
from .operators import BLAST as BLAST
from .operators import BTT as BTT
from .operators import OPERATORS as OPERATORS
from .operators import TT as TT
from .operators import BlockDiag as BlockDiag
from .operators import Circulant as Circulant
from .operators import Convolution as Convolution
from .operators import Dense as Dense
from .operators import Diagonal as Diagonal
from .operators import Einsum as Einsum
from .operators import Identity as Identity
from .operators import Kron as Kron
from .operators import LowRank as LowRank
from .operators import Monarch as Monarch
from .operators import Permutation as Permutation
from .operators import Toeplitz as Toeplitz
from .operators import Zero as Zero
from .operators.kron import kron as kron
from .projection import project as project
from .routed import Routed as Routed
from .sampling import random as random
from .spec import Structure as Structure
from .spec import structure as structure

__version__: str
__all__: list[str]
