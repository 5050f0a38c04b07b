"""Dropout in classes of other libraries, such as timm's DropPath and DropBlock2d: recognised by what it does, and tuned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fxstn import hp
from fxstn.frontends.decompositions.registry import DECOMPOSITIONS, decomposes
from fxstn.frontends.decompositions.torchvision import RANDOM
from fxstn.ir.containers import INTERNAL
from fxstn.ir.generators import forked_rng, reseed
from fxstn.ops.drop_block import block_mask

Settings = tuple[str, tuple[tuple[str, str], ...]]  # (which attribute is the probability, the others)
StandIn = Callable[[Any, float], object]  # (x, p) → y, in train mode

RECOGNISED: dict[type[nn.Module], dict[Settings, StandIn]] = {}
P = 0.25  # the probability that modules are tried at
LARGEST_SIDE = 31  # of a block; a larger number of a module is no side, and no feature map is made for it
_LIKELY = {"p", "rate", "prob"}


def recognise_dropout(model: nn.Module) -> None:
    """Enter a decomposition for each class of the model's modules that drops something with a probability.

    Such a module has no tensors. One of its numbers is the probability p. In eval mode it hands its input through. In train
    mode it sets to 0, with probability p, single entries, whole channels, whole examples, the same entries at all times, or
    blocks of feature maps; the rest is scaled to keep the mean.
    """
    for module in model.modules():
        kind = type(module)
        others = kind in DECOMPOSITIONS and kind not in RECOGNISED
        parts = [*module.parameters(), *module.buffers(), *module.children()]
        if others or parts or kind.__module__.startswith("torch."):
            continue
        known = RECOGNISED.get(kind, {})
        if any(settings in known for settings in _possible_settings(module)):
            continue
        for settings in _possible_settings(module):
            if (stand_in := _stand_in(module, settings[0])) is not None:
                if not known:
                    decomposes(kind)(_forward(kind.forward))
                    RANDOM.add(kind)
                RECOGNISED[kind] = known | {settings: stand_in}
                break


def _possible_settings(module: nn.Module) -> list[Settings]:
    """The settings of a module for each of its numbers that may be the probability."""
    own = {name: value for name, value in vars(module).items() if name not in INTERNAL and name != "forward"}
    numbers = [name for name, value in own.items() if isinstance(value, (int, float)) and not isinstance(value, bool)]
    likely = [
        name for name in numbers if len(numbers) == 1 or isinstance(own[name], float) or _LIKELY & set(name.split("_"))
    ]
    return [(name, tuple(sorted((key, repr(value)) for key, value in own.items() if key != name))) for name in likely]


def _forward(original: Callable[..., object]) -> Callable[..., object]:
    """What stands for the forward of the modules of a class: of those with the settings that were tried; else the original."""

    def forward(module: nn.Module, x: Tensor, *args: object, **kwargs: object) -> object:
        known = RECOGNISED[type(module)]
        settings = next((settings for settings in _possible_settings(module) if settings in known), None)
        if settings is None or args or kwargs:
            return original(module, x, *args, **kwargs)
        if not module.training:
            return x
        result: Any = known[settings](x, getattr(module, settings[0]))
        return x.copy_(result) if getattr(module, "inplace", False) else result

    return forward


# Trials


def _stand_in(module: nn.Module, name: str) -> StandIn | None:
    """What does the same as a module whose attribute `name` is the probability, found by trying; None where nothing does."""
    with _disable_current_modes():  # on real numbers, also where tensors are fake
        for shape in ((64, 6, 5), (64, 6, 5, 5)):
            x = torch.arange(1.0, torch.Size(shape).numel() + 1).view(shape)
            y = _output(module, name, x)
            if y is not None and bool(((y == 0) | torch.isclose(y * (1 - P), x)).all()):
                return _by_pattern(y == 0)
        return _blocks(module, name)


def _output(module: nn.Module, name: str, x: Tensor) -> Tensor | None:
    """The output in train mode at probability P, for an x that eval mode hands through; None where it does something else."""
    twin = copy.copy(module)
    try:
        setattr(twin, name, P)
        with forked_rng(), torch.no_grad():
            reseed()
            unchanged = twin.eval()(x.clone())
            y = twin.train()(x.clone())
    except Exception:  # a module of another kind, which takes other inputs
        return None
    if not (isinstance(unchanged, Tensor) and isinstance(y, Tensor) and y.shape == x.shape):
        return None
    return y if torch.equal(unchanged, x) else None


def _by_pattern(dropped: Tensor) -> StandIn | None:
    """The operation that drops such entries.

    dropped: bool (examples, channels or times, ...).
    """
    stand_ins: dict[tuple[bool, ...], StandIn] = {
        (False, True, True): hp.StochasticDepth.function,
        (False, False, True): lambda x, p: torch.feature_dropout(x, p, True),
        (False, False, False): lambda x, p: F.dropout(x, p, True),
        (False, True, False): lambda x, p: hp.LockedDropout.function(x, p, axis=1),
        (True, False, False): lambda x, p: hp.LockedDropout.function(x, p, axis=0),
    }
    dropped = dropped.flatten(3) if dropped.dim() > 3 else dropped[..., None]
    constant = [bool((dropped == dropped.narrow(axis, 0, 1)).all()) for axis in range(4)]
    sizes = [1 if same else size for same, size in zip(constant, dropped.shape, strict=True)]
    draws = dropped[tuple(slice(size) for size in sizes)].float()
    spread = (P * (1 - P) / draws.numel()) ** 0.5
    neighbours = [
        draws.narrow(axis, 1, size - 1) == draws.narrow(axis, 0, size - 1)
        for axis, size in enumerate(sizes)
        if size > 1
    ]
    alone = all(abs(same.float().mean() - P**2 - (1 - P) ** 2) < 6 * spread for same in neighbours)
    if abs(draws.mean() - P) > 5 * spread or not alone:  # drawn with another probability, or not each by itself
        return None
    return stand_ins.get(tuple(constant[:3]))


def _blocks(module: nn.Module, name: str) -> StandIn | None:
    """DropBlock with the settings that a module's output shows."""
    numbers = [value for value in vars(module).values() if isinstance(value, int) and not isinstance(value, bool)]
    for side in (value for value in numbers if 1 < value <= LARGEST_SIDE):
        x = torch.ones(64, 3, *[2 * side + 10] * 2)
        y = _output(module, name, x)
        if y is None or len(values := y.unique()) != 2 or values[0] != 0:
            continue
        covered = (y == 0).float()
        coupled = bool((covered == covered[:, :1]).all())
        scaled = bool(torch.isclose(values[1] * (1 - covered.mean()), torch.ones(()), rtol=1e-3))
        inside = torch.equal(_covered_by_blocks(covered, side, 0.0), covered)
        if not (scaled or values[1] == 1) or not torch.equal(_covered_by_blocks(covered, side, 1.0), covered):
            continue
        gamma_scale = float(getattr(module, "gamma_scale", 1.0))
        settings = {"block_size": side, "gamma_scale": gamma_scale, "coupled": coupled, "inside": inside}
        with forked_rng():
            reseed()
            shares = [mask.flatten(1).mean(1) for mask in (covered, block_mask(x, P, **settings))]  # type: ignore[arg-type]
        if abs(shares[0].mean() - shares[1].mean()) < 5 * (shares[0].var() + shares[1].var()).div(64).sqrt():
            return lambda x, p: hp.DropBlock.function(x, p, scaled=scaled, **settings)
    return None


def _covered_by_blocks(covered: Tensor, side: int, outside: float) -> Tensor:
    """What blocks of this side cover that lie in a covered area (morphological opening). outside: whether that is covered."""
    area = F.pad(covered, [side - 1] * 4, value=outside)
    places = 1 - F.max_pool2d(1 - area, side, 1)
    return F.max_pool2d(F.pad(places, [side - 1] * 4), side, 1)[..., side - 1 : 1 - side, side - 1 : 1 - side]
