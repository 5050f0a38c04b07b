"""The benchmark that measures how much of a hypergradient is noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import controls
from benchmarks.tuning import TASKS


def test_a_recorder_averages_gradients_and_moves_nothing():
    x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    means: list[torch.Tensor] = []
    recorder = controls.Recorder([x], means)
    for gradient in ([1.0, 0.0], [3.0, -1.0]):
        x.grad = torch.tensor(gradient)
        recorder.step()
    torch.testing.assert_close(means, [torch.tensor([1.0, 0.0]), torch.tensor([1.2, -0.1])])
    assert x.tolist() == [1.0, 2.0]


def test_hypergradients_are_compared_with_those_of_controls():
    pytest.importorskip("sklearn", reason="the diabetes set comes with the extra fxstn[data]")
    task = replace(TASKS["diabetes-mlp"], epochs=6)
    found = controls.ratio(task, "low", 1e-2, 0, None)
    assert 0 < found < 1000
    assert "| diabetes-mlp, low start | 2.0 |" in " ".join(controls.table({"diabetes-mlp low 0.01": 2.0}).split())
