"""Modules of torchvision: random ones, which specs take over, and others of `torchvision.transforms.v2`.

The functions of torchvision (`stochastic_depth`, `shifted_window_attention`) are in `decompositions.attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from unittest import mock

from torch import Tensor, nn
from torchvision import ops
from torchvision.transforms import v2

from fxstn import hp
from fxstn.frontends.decompositions import DECOMPOSITIONS, decomposes
from fxstn.frontends.decompositions.attention import row_dropout
from fxstn.ops.color import convert, normalize_channels

# Modules that are not run themselves, but by `Operation.call`; and those of them that are random in eval mode too.
RANDOM: set[type[nn.Module]] = {v2.Compose, ops.StochasticDepth, ops.DropBlock2d, ops.DropBlock3d}
AUGMENTING: set[type[nn.Module]] = {v2.Compose}
OWNERS: dict[type[nn.Module], type[hp.Operation]] = {}  # the operation that takes a class over


def register_operation(operation: type[hp.Operation], *modules: type[nn.Module]) -> None:
    """Let a spec take over modules of these classes. `hparams=None` tunes each of them, from the module's own strengths.

    operation: what is drawn in place of the module's forward, with the strengths and settings that `operation.read(module)`
        returns. In eval mode it does nothing.

    A class may be registered again for an operation of the same name, as a cell of a notebook does that is run again: the later
    one counts.

    Raises ValueError for a class that has a decomposition or another operation already, and for an `hp.Mixing`, which is
    inserted only: a module of the model would mix inputs without their targets. Raises TypeError for what is no operation or
    no class of modules.
    """
    if not (isinstance(operation, type) and issubclass(operation, hp.Operation)):
        raise TypeError(
            f"register_operation takes a subclass of hp.Operation, and then classes of modules; got {operation!r}"
        )
    if wrong := [module for module in modules if not (isinstance(module, type) and issubclass(module, nn.Module))]:
        raise TypeError(f"register_operation: {wrong[0]!r} must be a class of modules, a subclass of nn.Module")
    if issubclass(operation, hp.Mixing):
        raise ValueError(
            f"hp.{operation.__name__} mixes targets, too, and cannot stand for a module; insert it by a spec"
        )
    for module in modules:
        owner = OWNERS.get(module)
        if owner is not None and (owner.__module__, owner.__qualname__) != (
            operation.__module__,
            operation.__qualname__,
        ):
            raise ValueError(
                f"{module.__name__} is taken over by hp.{owner.__name__} already; register a class of your own, a subclass say"
            )
        if owner is None and module in DECOMPOSITIONS:
            raise ValueError(
                f"{module.__name__} has a decomposition already, {DECOMPOSITIONS[module]}; register a class of your own"
            )
        decomposes(module)(_forward_of(operation))
        OWNERS[module] = operation
        RANDOM.add(module)
        AUGMENTING.add(module)


@contextmanager
def random_modules(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, those of the modules that are in RANDOM run as operations. What no operation can do runs as it is."""

    def forward(kind: type[nn.Module]) -> Callable[..., object]:
        original = kind.forward

        def taken_over(module: nn.Module, *inputs: object) -> object:
            try:
                return DECOMPOSITIONS[kind](module, *inputs)
            except NotImplementedError:
                return original(module, *inputs)

        return taken_over

    with ExitStack() as patches:
        for kind in {type(module) for module in modules} & RANDOM:
            patches.enter_context(mock.patch.object(kind, "forward", forward(kind)))
        yield


def _forward_of(operation: type[hp.Operation]) -> Any:
    return lambda module, *inputs: operation.call(module, *inputs)


register_operation(hp.ColorJitter, v2.ColorJitter)
register_operation(hp.Affine, v2.RandomAffine)
register_operation(hp.Rotation, v2.RandomRotation)
register_operation(hp.Erasing, v2.RandomErasing)
register_operation(hp.Flip, v2.RandomHorizontalFlip)
register_operation(hp.VerticalFlip, v2.RandomVerticalFlip)
register_operation(hp.Grayscale, v2.RandomGrayscale)
register_operation(hp.GaussianNoise, v2.GaussianNoise)
register_operation(hp.GaussianBlur, v2.GaussianBlur)


@decomposes(ops.StochasticDepth)
def stochastic_depth(module: ops.StochasticDepth, input: Tensor) -> object:
    """By example it can be tuned; for the whole batch it stays as it is."""
    if module.mode == "batch":
        return row_dropout(input, module.p, "batch", module.training)
    return hp.StochasticDepth.call(module, input)


@decomposes(ops.DropBlock2d, ops.DropBlock3d)
def drop_block(module: ops.DropBlock2d, input: Tensor) -> Tensor:
    """Whole blocks, those of each channel by themselves."""
    if module.block_size % 2 == 0:
        raise ValueError(f"block_size={module.block_size} of torchvision's DropBlock must be odd")
    result = cast(Tensor, hp.DropBlock.call(module, input))
    return input.copy_(result) if module.inplace and module.training else result


@decomposes(v2.Compose)
def compose(module: v2.Compose, x: Tensor) -> Tensor:
    """v2.Compose, whose transforms are no submodules: they follow its mode."""
    for transform in module.transforms:
        if type(transform) not in DECOMPOSITIONS:
            raise NotImplementedError(f"{type(transform).__name__} inside v2.Compose; put it into nn.Sequential")
        transform.training = module.training
        x = DECOMPOSITIONS[type(transform)](transform, x)
    return x


@decomposes(v2.Normalize)
def normalize(module: v2.Normalize, x: Tensor) -> Tensor:
    """(x − mean) / std per channel, in both modes."""
    return normalize_channels(x, tuple(map(float, module.mean)), tuple(map(float, module.std)))


@decomposes(v2.ToDtype)
def to_dtype(module: v2.ToDtype, x: Tensor) -> Tensor:
    """Another type, and with scale=True its range of values, in both modes."""
    if isinstance(module.dtype, dict):
        raise NotImplementedError("v2.ToDtype with a type per type of input")
    return convert(x, module.dtype, module.scale)
