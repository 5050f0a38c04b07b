"""Shared fixtures: one seed per test, few threads, and the folder of the full data sets where there is one."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_seed():
    torch.manual_seed(0)


@pytest.fixture
def data_root() -> Path:
    """The folder named by FXSTN_DATA, or a skip."""
    root = os.environ.get("FXSTN_DATA")
    if not root:
        pytest.skip("needs the full data sets: set FXSTN_DATA to their folder")
    return Path(root)
