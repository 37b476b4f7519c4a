"""Data of the studies: real images, tables and texts, in batches that follow from a seed and a step; numpy only."""

from structops.studies.data.augment import PAPER, Augment
from structops.studies.data.built_in import Split, digits
from structops.studies.data.loading import load, names
from structops.studies.data.task import Task

__all__ = ["PAPER", "Augment", "Split", "Task", "digits", "load", "names"]
