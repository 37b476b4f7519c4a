"""The structures, one file each; adding one is a file and a line here.

The order is that of tables, and it matters where two structures meet: a rule for a pair lives in the later one's file.
"""
# isort: skip_file

from structops.algebra.scalar import Identity as Identity  # from here, so that whoever has one has all rules, too
from structops.algebra.scalar import Zero as Zero
from structops.operator import StructuredOperator
from structops.operators.dense import Dense as Dense
from structops.operators.permutation import Permutation as Permutation
from structops.operators.diagonal import Diagonal as Diagonal
from structops.operators.low_rank import LowRank as LowRank
from structops.operators.kron import Kron as Kron
from structops.operators.tt import TT as TT
from structops.operators.btt import BTT as BTT
from structops.operators.monarch import Monarch as Monarch
from structops.operators.block_diag import BlockDiag as BlockDiag
from structops.operators.blast import BLAST as BLAST
from structops.operators.einsum import Einsum as Einsum
from structops.operators.circulant import Circulant as Circulant
from structops.operators.toeplitz import Toeplitz as Toeplitz
from structops.operators.convolution import Convolution as Convolution

OPERATORS: dict[str, type[StructuredOperator]] = {
    name: value
    for name, value in list(globals().items())
    if isinstance(value, type) and issubclass(value, StructuredOperator) and value.__module__.startswith(__name__)
}
