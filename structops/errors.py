"""The errors and warnings that structops raises; each says what was expected, what came, and what would work."""

from __future__ import annotations

# The command that gives CoLA the plum it needs; see structops/_plum.py.
PLUM_REPAIR = "pip uninstall -y plum-dispatch && pip install --force-reinstall --no-deps cola-plum-dispatch==0.1.4"


class PatternError(ValueError):
    """An index pattern that is not a chain: a label summed away, repeated, or never emitted."""


class ShapeError(ValueError):
    """Sizes that do not fit: a factor, an input, or the two sides of a product."""


class StructureError(ValueError):
    """A structure that is unknown, has unknown arguments, or cannot have the requested size."""


class BackendError(TypeError):
    """An array of a library, or a mixture of libraries or dtypes, that structops does not compute with."""


class EntryError(ValueError):
    """Numbers that a method cannot work with: infinite, none at all, or without a property that they must have."""


class CheckpointError(ValueError):
    """A folder that holds no checkpoint, a broken one, or that of another model."""


class DataError(ValueError):
    """Data of a study that are missing, unknown or broken; the message names the file and what was expected there."""


class GradientError(NotImplementedError):
    """The gradient of an algorithm that has none; the message names those that have."""


class StructureWarning(UserWarning):
    """A structure that works but wastes parameters or caps the rank below what its shape allows."""


class DensifyWarning(UserWarning):
    """A rule had to build a dense matrix.  The test run turns it into an error."""
