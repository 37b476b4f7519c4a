"""Tests of the Triton kernels: `make test-triton` interprets them on the CPU; without Triton they are not collected.

On a GPU, with the Triton of PyTorch, `pytest tests/on_triton` runs them there.  The folder is not called triton,
because then ``import triton`` would find it beside the other tests.
"""

from __future__ import annotations

import os

import pytest
import torch

from structops.torch.triton_pair import available

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if available() and (INTERPRETED or torch.cuda.is_available()) else ["test_*.py"]


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cpu" if INTERPRETED else "cuda")
