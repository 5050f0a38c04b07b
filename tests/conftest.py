"""One thread per worker, one seed per test, slow tests first."""

import os

import pytest
import torch

from benchmarks.fake_cuda import OldTorch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_seed():
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    """Skip, with the reason, what an old torch cannot rehearse."""
    try:
        return (yield)
    except OldTorch as error:
        pytest.skip(str(error))


def pytest_collection_modifyitems(items):
    """A slow test that starts last keeps one worker busy while the others have nothing left to do."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
