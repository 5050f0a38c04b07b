"""The benchmark that measures how much of a hypergradient is noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import controls
from benchmarks.tuning import TASKS
from fxstn import hp


def test_a_recorder_averages_gradients_and_moves_nothing():
    x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    means: list[torch.Tensor] = []
    recorder = controls.Recorder([x], means)
    for gradient in ([1.0, 0.0], [3.0, -1.0]):
        x.grad = torch.tensor(gradient)
        recorder.step()
    torch.testing.assert_close(means, [torch.tensor([1.0, 0.0]), torch.tensor([1.2, -0.1])])
    assert x.tolist() == [1.0, 2.0]


def test_what_nothing_reads_has_the_size_of_controls():
    pytest.importorskip("sklearn", reason="the diabetes set comes with the extra fxstn[data]")
    unread = [hp.Scalar(f"unread {i}", init=0.5, low=0.0, high=1.0) for i in range(controls.CONTROLS)]
    found = controls.ratio(replace(TASKS["diabetes-mlp"], epochs=20, specs=lambda start: unread), "low", 1e-2, 0, None)
    assert 1 / 3 < found < 3
    assert "| diabetes-mlp, low start | 2.0 |" in " ".join(controls.table({"diabetes-mlp low 0.01": 2.0}).split())
