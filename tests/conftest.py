"""One seed per test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_seed():
    torch.manual_seed(0)
