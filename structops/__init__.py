"""structops: structured matrices as composable linear operators, on torch and JAX.

    import structops as so

    A = so.Kron(B, C)                        # operators: LowRank, Kron, TT, BTT, Monarch, Circulant, ...
    A @ x, A.T, A @ A.T, 2 * A + B           # CoLA's algebra
    so.num_params(A), so.macs(A)             # counts of any expression
    spec = so.structure("btt(rank=2)")       # a structure without a size
    so.mup.scales(spec.chain(1024, 4096))    # init and learning rate of every factor

Layers are in ``structops.torch`` and ``structops.jax``.
"""

from structops import mup as mup
from structops._cola import kron as kron
from structops.algebra.counting import factors as factors
from structops.algebra.counting import flops as flops
from structops.algebra.counting import macs as macs
from structops.algebra.counting import num_params as num_params
from structops.chain import Chain as Chain
from structops.chain import Factor as Factor
from structops.contract import contract as contract
from structops.errors import BackendError as BackendError
from structops.errors import DensifyWarning as DensifyWarning
from structops.errors import PatternError as PatternError
from structops.errors import ShapeError as ShapeError
from structops.errors import StructureError as StructureError
from structops.errors import StructureWarning as StructureWarning
from structops.operators import BLAST as BLAST
from structops.operators import BTT as BTT
from structops.operators import OPERATORS as OPERATORS
from structops.operators import TT as TT
from structops.operators import BlockDiag as BlockDiag
from structops.operators import Circulant as Circulant
from structops.operators import Convolution as Convolution
from structops.operators import Dense as Dense
from structops.operators import Einsum as Einsum
from structops.operators import Kron as Kron
from structops.operators import LowRank as LowRank
from structops.operators import Monarch as Monarch
from structops.operators import Permutation as Permutation
from structops.operators import Toeplitz as Toeplitz
from structops.sampling import random as random
from structops.spec import Structure as Structure
from structops.spec import structure as structure

__version__ = "0.1.0"
