"""One thread per worker, one seed per test, slow tests first."""

import os
import signal

import pytest
import torch

from benchmarks.fake_cuda import OldTorch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts `script &`; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
LACKS = {  # {a part of a test's name: what torch 2.9 cannot do in it}; tests pass with 2.14
    "test_a_compiled_loss_knows_what_it_is_a_mean_over": "compile a loss whose divisor has a symbolic size",
    "test_the_graphs_with_asides_compile": "compile a group norm's backward pass for batches of any size",
    "kwargs[shift-export]": "export a call with a gap among its inputs by name",
    "difference[160-fxstn.ir.grouped.grouped_product]": "read numbers inside of torch.func.jvp",
    "where_a_case_says_so[Tensor.to_dense]": "refuse the forward derivative, which is zero",
    "then_in_the_direction[F.cdist0]": "differentiate cdist twice",
    "then_in_the_direction[F.grid_sample0]": "differentiate grid_sample twice",
}
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
    """Skip what an old torch lacks. A slow test that starts last keeps one worker busy while the others have nothing to do."""
    for item in items if TORCH < (2, 14) else ():
        for lacking in (what for part, what in LACKS.items() if part in item.nodeid):
            item.add_marker(pytest.mark.skip(f"torch 2.9 cannot {lacking}"))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
