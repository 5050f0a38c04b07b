"""The parameters of a model by name are those that it has now, whatever was changed since the last look."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxstn.ops.parameters import parameters_in


def model() -> nn.Sequential:
    result = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    result[2].tied = result[0]
    return result


def replace_module(m: Any) -> None:
    m[0] = nn.Linear(2, 4)


def delete_module(m: Any) -> None:
    del m[2]


def script_module(m: Any) -> None:
    m[2] = torch.jit.script(nn.Linear(3, 3))


def replace_parameter(m: Any) -> None:
    m[0].weight = nn.Parameter(torch.ones(3, 2))


def add_parameter(m: Any) -> None:
    m[1].register_parameter("scale", nn.Parameter(torch.ones(3)))


def rename_parameter(m: Any) -> None:
    m[0].other = m[0].weight
    del m[0].weight


def remove_parameter(m: Any) -> None:
    m[0].bias = None


def share_parameter(m: Any) -> None:
    m[2][0].weight = m[2][0].bias


def assign_state(m: Any) -> None:
    m.load_state_dict({name: value + 1 for name, value in m.state_dict().items()}, assign=True)


CHANGES = (replace_module, delete_module, script_module, replace_parameter, add_parameter, rename_parameter, remove_parameter,
           share_parameter, assign_state)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_parameters_are_those_after_a_change(change: Callable[[Any], None]) -> None:
    own = model()
    for act in (lambda _: None, lambda _: None, change, lambda _: None):
        act(own)
        found, expected = parameters_in(own), dict(own.named_parameters(remove_duplicate=False))
        assert found.keys() == expected.keys()
        assert all(found[name] is expected[name] for name in expected if "jit" not in type(expected[name]).__module__)


def test_a_model_that_its_modules_know_is_freed() -> None:
    own = model()
    own[1].parent = (own,)
    parameters_in(own)
    freed = weakref.ref(own)
    del own
    gc.collect()
    assert freed() is None
