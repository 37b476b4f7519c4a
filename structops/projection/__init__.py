"""From a dense matrix to the nearest member of a structure, with the error and what is known about the optimum."""

from structops.projection.fit import METHODS as METHODS
from structops.projection.fit import Fit as Fit
from structops.projection.fit import fit as fit
from structops.projection.fit import project as project
from structops.projection.moments import Moments as Moments
from structops.projection.moments import bias_shift as bias_shift
