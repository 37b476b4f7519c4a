"""Tests for operators, one's own as well as those of structops.

    from structops.testing import Case, assert_operator_valid

    assert_operator_valid(MyOperator(a, b), dense)                  # all laws, against a matrix built in another way
    case = Case(MyOperator, ((4, 2), (2, 3)), reference=my_matrix)  # the same with drawn arrays, in any dtype
    assert_operator_valid(*case.build("torch", "complex64", seed=1))

`operator_cases` gives every registered structure at sizes that differ in kind.  The hypothesis strategies are in
``structops.testing.strategies``, which alone needs hypothesis.
"""

from structops.testing.arrays import BACKENDS as BACKENDS
from structops.testing.arrays import DTYPES as DTYPES
from structops.testing.arrays import TOLERANCES as TOLERANCES
from structops.testing.arrays import assert_close as assert_close
from structops.testing.arrays import installed_backends as installed_backends
from structops.testing.arrays import to_backend as to_backend
from structops.testing.arrays import to_numpy as to_numpy
from structops.testing.arrays import tolerance as tolerance
from structops.testing.cases import CASES as CASES
from structops.testing.cases import Case as Case
from structops.testing.cases import Indices as Indices
from structops.testing.cases import operator_cases as operator_cases
from structops.testing.cases import representatives as representatives
from structops.testing.cases import scalar_cases as scalar_cases
from structops.testing.checks import CHECKS as CHECKS
from structops.testing.checks import assert_operator_valid as assert_operator_valid
from structops.testing.checks import dot_test as dot_test
from structops.testing.references import REFERENCES as REFERENCES
