"""Which loops of a model skip layers at random, found by trying; and what else a forward calls in some runs only."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxstn.frontends.decompositions.layer_drop import LOOPS, LayerLoop, no_layer_skipped
from fxstn.frontends.guards import frozen_modules, mode_of
from fxstn.frontends.inputs import Inputs
from fxstn.frontends.original import run_once
from fxstn.frontends.preservation import Preservation
from fxstn.ir.containers import leaves
from fxstn.ir.generators import forked_rng

_OF_CONFIG = re.compile(r"layer_?drop", re.IGNORECASE)
_FIRST, _LAST = 2**-24, 1 - 2**-24  # the smallest above 0 that torch.rand gives, and the largest below 1


def recognise_layer_drop(model: nn.Module, inputs: Inputs | None) -> None:
    """Enter a loop for each class of the model's modules that skips layers with a probability that an attribute says.

    At a rate of 1 the module calls none of the layers in one of its lists, at 0 each once; a layer's output is shaped like its
    input. Without example inputs nothing is tried.
    """
    if inputs is None:
        return
    for path, module in model.named_modules():
        if type(module) in LOOPS:
            continue
        for holder, rate in _candidates(module):
            containers = _skipped_containers(model, path, module, LayerLoop(holder, rate, ""), inputs)
            if len(containers) == 1:
                LOOPS[type(module)] = LayerLoop(holder, rate, containers[0])
                break


def _candidates(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(holder, name) of numbers that may be the rate of a loop over layers."""
    lists = [child for child in module.children() if isinstance(child, (nn.ModuleList, nn.Sequential))]
    if not any(map(len, lists)):
        return
    for holder, owner in (("", module), ("config", getattr(module, "config", None))):
        for name, value in vars(owner).items() if hasattr(owner, "__dict__") else ():
            likely = "drop" in name.lower() if not holder else _OF_CONFIG.search(name)
            if likely and isinstance(value, float) and 0 < value <= 1:
                yield holder, name


def _skipped_containers(model: nn.Module, path: str, module: nn.Module, loop: LayerLoop, inputs: Inputs) -> list[str]:
    """Paths, in the module, of the lists whose layers it calls at rate 0 only."""
    try:
        calls = []
        for rate in (0.0, 1.0):
            with mock.patch.object(loop.holder_of(module), loop.rate, rate):
                calls.append(module_calls(model, inputs))
    except Exception:  # a number of another kind
        return []
    result = []
    for name, child in module.named_children():
        layers = [f"{path}.{name}.{key}".lstrip(".") for key, _ in child.named_children()]
        every, none = calls
        if layers and all(every.get(layer) == (1, True) for layer in layers) and none.keys().isdisjoint(layers):
            result.append(name)
    return result


def varying_modules(model: nn.Module, inputs: Inputs) -> list[str]:
    """Modules that a forward in train mode calls for some random draws and not for others; of nested ones the outermost."""
    with no_layer_skipped(model):
        low, high = (set(module_calls(model, inputs, share)) for share in (_FIRST, _LAST))
    varying = [name for name, _ in model.named_modules() if name in low ^ high]
    return [name for name in varying if not any(name.startswith(f"{other}.") for other in varying)]


def module_calls(model: nn.Module, inputs: Inputs, share: float = 0.5) -> dict[str, tuple[int, bool]]:
    """{path: (number of calls, whether the first output is always shaped like the first input)} of one run in train mode.

    share: single random numbers are at this share of their range.

    The model, the inputs and all random generators are left as they were.
    """
    names = {module: name for name, module in model.named_modules()}
    calls: dict[str, tuple[int, bool]] = {}
    run = nn.Module.__call__

    def noted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = run(module, *args, **kwargs)
        if (name := names.get(module)) is not None:
            x, y = (
                next((leaf for leaf in leaves(v) if isinstance(leaf, Tensor)), None) for v in ((args, kwargs), output)
            )
            alike = x is not None and y is not None and x.shape == y.shape and x.dtype == y.dtype
            count, before = calls.get(name, (0, True))
            calls[name] = (count + 1, before and alike)
        return output

    patch, frozen = mock.patch.object(nn.Module, "__call__", noted), frozen_modules(model)
    with Preservation(model, inputs) as stand_ins, mode_of(model, True, frozen), _single_draws_at(share), patch:
        run_once(model, stand_ins)
    return calls


@contextmanager
def _single_draws_at(share: float) -> Iterator[None]:
    """Inside, single uniform numbers of torch, NumPy and Python are at a share of their range. No generator moves."""

    def at(low: float = 0.0, high: float = 1.0) -> float:
        return low + share * (high - low)

    def of_numpy(original: Callable[..., Any]) -> Callable[..., Any]:
        def draw(*args: Any, **kwargs: Any) -> Any:
            value = original(*args, **kwargs)
            bounds = args[:2] if original is numpy.random.uniform else ()
            return at(*bounds) if isinstance(value, float) else value

        return draw

    with ExitStack() as patches:
        patches.enter_context(forked_rng())
        for name in ("rand", "random", "random_sample", "uniform"):
            patches.enter_context(mock.patch.object(numpy.random, name, of_numpy(getattr(numpy.random, name))))
        patches.enter_context(mock.patch.object(random, "random", at))
        patches.enter_context(mock.patch.object(random, "uniform", at))
        patches.enter_context(_SingleDraws(share))
        yield


class _SingleDraws(TorchFunctionMode):
    """torch.rand of one entry gives `share`."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        single = function is torch.rand and result.numel() == 1
        return result.fill_(self.share) if single else result
