"""Lets test files share helpers that lie beside them, and keeps what one test sets from the others."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _arithmetic_as_it_was():
    """Training on the CPU flushes denormal numbers and is deterministic; both hold for the whole process."""
    yield
    torch.set_flush_denormal(False)
    torch.use_deterministic_algorithms(False)
