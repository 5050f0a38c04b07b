"""Stochastic depth in classes of other libraries, such as timm's DropPath: recognised by what they do, and tuned."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fxstn import hp
from fxstn.frontends.decompositions.registry import DECOMPOSITIONS, decomposes
from fxstn.frontends.decompositions.torchvision import RANDOM
from fxstn.ir.containers import INTERNAL
from fxstn.ir.graphs import forked_rng

Settings = tuple[tuple[str, str], ...]


_recognised: dict[type[nn.Module], set[Settings]] = {}


def recognise_stochastic_depth(model: nn.Module) -> None:
    """Enter a decomposition for each class of the model's modules that drops whole examples and scales the others.

    Such a module has no tensors, and one number p: an example becomes 0 with probability p, else x / (1 − p).
    """
    for module in model.modules():
        kind = type(module)
        others = kind in DECOMPOSITIONS and kind not in _recognised
        if others or kind.__module__.startswith("torch.") or list(module.children()):
            continue
        name, settings = _probability(module)
        known, tensors = _recognised.get(kind, set()), [*module.parameters(), *module.buffers()]
        if name and settings not in known and not tensors and _drops_examples(module, name):
            if not known:
                decomposes(kind)(_forward(kind.forward))
                RANDOM.add(kind)
            _recognised[kind] = known | {settings}


def _probability(module: nn.Module) -> tuple[str, Settings]:
    """(name of the one attribute that is a number, "" where there are more or none; the other attributes)."""
    own = {name: value for name, value in vars(module).items() if name not in INTERNAL}
    numbers = [name for name, value in own.items() if isinstance(value, (int, float)) and not isinstance(value, bool)]
    name = numbers[0] if len(numbers) == 1 else ""
    return name, tuple(sorted((key, repr(value)) for key, value in own.items() if key != name))


def _forward(original: Callable[..., object]) -> Callable[[nn.Module, Tensor], object]:
    """What stands for the forward of the modules of a class: of those with the settings that were tried; else the original."""

    def forward(module: nn.Module, x: Tensor) -> object:
        name, settings = _probability(module)
        if settings not in _recognised[type(module)]:
            return original(module, x)
        return hp.StochasticDepth.function(x, getattr(module, name)) if module.training else x

    return forward


def _drops_examples(module: nn.Module, name: str, p: float = 0.25) -> bool:
    """Whether a module at probability p is stochastic depth by example, in both modes, found by trying."""
    twin = copy.copy(module)
    x = torch.arange(1.0, 64 * 6 + 1).view(64, 3, 2)
    try:
        setattr(twin, name, p)
        with forked_rng(), torch.no_grad():
            torch.manual_seed(0)
            unchanged = twin.eval()(x.clone())
            dropped = twin.train()(x.clone()) / x
    except Exception:  # a module of another kind, which takes other inputs
        return False
    if not (isinstance(unchanged, Tensor) and isinstance(dropped, Tensor) and dropped.shape == x.shape):
        return False
    rows, whole = dropped[:, 0, 0], torch.tensor(1 / (1 - p))
    by_example = torch.allclose(dropped, rows[:, None, None].expand_as(x))
    values = bool(((rows == 0) | torch.isclose(rows, whole)).all()) and 0 < int((rows == 0).sum()) < 32
    return torch.equal(unchanged, x) and by_example and values
