"""LayerDrop: loops that skip layers at random, as the encoders of transformers. Each layer becomes a random operation.

A skipped layer hands its input through, so that skipping drops what the layer adds to its input: y = x + mask · (layer(x) − x).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor, fx, nn

from fxstn import hp


@dataclass(frozen=True)
class LayerLoop:
    """How the modules of a class skip layers in train mode.

    holder: the attribute that has the rate, "config" say; "" for the module itself.
    rate: name of the rate, the probability that a layer is skipped.
    container: path of the list of layers.
    """

    holder: str
    rate: str
    container: str

    def holder_of(self, module: nn.Module) -> Any:
        return getattr(module, self.holder) if self.holder else module

    def rate_of(self, module: nn.Module) -> float:
        return float(getattr(self.holder_of(module), self.rate))

    def layers_of(self, module: nn.Module) -> list[nn.Module]:
        return list(module.get_submodule(self.container).children())

    def without_skips(self, module: nn.Module) -> Any:
        """A context in which the module skips no layer."""
        return mock.patch.object(self.holder_of(module), self.rate, 0.0)


LOOPS: dict[type[nn.Module], LayerLoop] = {}


def loops_of(model: nn.Module) -> dict[type[nn.Module], LayerLoop]:
    """The loops that classes of a model's modules have."""
    return {kind: LOOPS[kind] for kind in map(type, model.modules()) if kind in LOOPS}


@contextmanager
def no_layer_skipped(model: nn.Module) -> Iterator[None]:
    """Inside, loops of these classes run every layer in train mode, and `hp.LayerDrop` stands for the skips."""
    loops = [(module, LOOPS[type(module)]) for module in model.modules() if type(module) in LOOPS]
    rates = [loop.rate_of(module) for module, loop in loops]
    with ExitStack() as patches:
        for (module, loop), rate in zip(loops, rates, strict=True):
            if rate:
                patches.enter_context(loop.without_skips(module))
                for layer in loop.layers_of(module):
                    patches.enter_context(mock.patch.object(layer, "forward", _gated(layer.forward, module, rate)))
        yield


def _gated(forward: Callable[..., object], owner: nn.Module, rate: float) -> Callable[..., object]:
    @functools.wraps(forward)
    def gated(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        if not owner.training:
            return output
        return with_residual((args, kwargs), output, lambda change: hp.LayerDrop.function(change, rate))

    return gated


def with_residual(arguments: tuple[tuple, dict], output: Any, change: Callable[[Any], Any]) -> object:
    """A layer's output, where x + change(y − x) is in the place of y.

    arguments: of the layer: (args, kwargs), of which the first tensor is x.
    output: y, or a tuple or list that begins with y.
    """
    args, kwargs = arguments
    x: Any = next(value for value in (*args, *kwargs.values()) if isinstance(value, (Tensor, fx.Proxy)))
    if isinstance(output, (tuple, list)):
        return type(output)((with_residual(arguments, output[0], change), *output[1:]))
    return x + change(output - x)
