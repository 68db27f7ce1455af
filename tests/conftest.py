"""Lets test files share helpers, tests the studies in research/, and keeps what one test sets from the others."""

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "research")]


@pytest.fixture(autouse=True)
def _arithmetic_as_it_was():
    """Training on the CPU flushes denormal numbers and is deterministic; both hold for the whole process."""
    yield
    torch.set_flush_denormal(False)
    torch.use_deterministic_algorithms(False)
