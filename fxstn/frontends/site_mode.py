"""What of a user's module draws at λ: the random operations that it owns, and the mode that draws them in a call of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverloadPacket
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from fxstn.frontends.decompositions import DECOMPOSITIONS
from fxstn.frontends.decompositions.layer_drop import LayerLoop
from fxstn.hp.operation import Operation
from fxstn.ir.containers import mapped
from fxstn.ir.errors import operation_name
from fxstn.ir.signatures import Spelled
from fxstn.ir.spelling import Unspellable, respell
from fxstn.ir.vocabulary import ALPHA, DROPOUTS, SPATIAL
from fxstn.ops.noise import Strengths, alpha_dropout_coefficients, dropout_mask


def _spellings() -> dict[Any, Spelled]:
    """{function of torch: a call of it in the canonical spelling}, of all that are dropout."""
    names = {name for module in (torch, F) for name in dir(module) if "dropout" in name and not name.startswith("_")}
    functions = [
        getattr(module, name) for module in (torch, F, torch.ops.aten) for name in names if hasattr(module, name)
    ]
    functions += [packet.default for packet in functions if isinstance(packet, OpOverloadPacket)]
    spelled = {function: respell(function, (torch.empty(0), 0.5, True), {}) for function in functions}
    return {function: spelling for function, spelling in spelled.items() if spelling.function in DROPOUTS}


_SPELLINGS = _spellings()


@dataclass(frozen=True)
class Draw:
    """A random operation at λ.

    indices: which numbers of λ its strengths are.
    function: of an `hp.Operation`: (x, *strengths, **settings) → y. None: dropout.
    """

    indices: tuple[int, ...]
    function: Callable[..., Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def after(self, value: object, strengths: Strengths) -> object:
        """A structure of values with this operation after each; what is not floating point stays as it is."""

        def leaf(x: object) -> object:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            own = [strengths[index] for index in self.indices]
            if self.function is not None:
                return self.function(x, *own, **self.settings)
            return x * dropout_mask(x, own[0], keep_rate=strengths.keep_rate(self.indices[0]))

        return mapped(leaf, value)


@dataclass
class ModuleSites:
    """What a module owns.

    dropouts: {which of its dropouts, in the order of calls: index into λ}.
    count: number of its dropouts. A call that has more, as a loop of more steps, goes on as with the last one.
    results: {(operation, which of its calls): what is drawn after it}, in the order in which it acts.
    lookups: {(operation, which of its calls): what is drawn from its arguments}.
    whole: the module itself is this operation.
    residual: what is drawn on what the module adds to its input.
    loop: how the module skips layers at random; it skips none, because their residuals are drawn.
    root: whether this is the model itself.
    inputs: {name of an argument: what is drawn after it}, of the model itself.
    exits: what is drawn after the output, by leaf; None for all leaves.
    exits_of_calls: for each of its calls in a forward of the model, what is drawn after the output of that call alone. Further
        calls are as the last one. Empty where nothing is.
    counts: whether the calls of modules are counted, in a forward of the model itself.
    """

    dropouts: dict[int, int] = field(default_factory=dict)
    count: int = 0
    results: dict[tuple[str, int], list[Draw]] = field(default_factory=dict)
    lookups: dict[tuple[Any, int], tuple[type[Operation], Draw]] = field(default_factory=dict)
    whole: Draw | None = None
    residual: Draw | None = None
    loop: LayerLoop | None = None
    root: bool = False
    inputs: dict[str, list[Draw]] = field(default_factory=dict)
    exits: list[tuple[int | None, Draw]] = field(default_factory=list)
    exits_of_calls: list[list[tuple[int | None, Draw]]] = field(default_factory=list)
    counts: bool = False

    @property
    def inside(self) -> bool:
        """Whether operations within the forward read λ, or the number of a call."""
        return bool(self.dropouts or self.results or self.lookups or self.counts)


class SiteMode(TorchFunctionMode):
    """Draws the random operations of one call of a module at λ."""

    def __init__(self, sites: ModuleSites, strengths: Strengths) -> None:
        super().__init__()
        self.sites, self.strengths = sites, strengths
        self.dropouts = self.depth = 0
        self.counts: Counter[Any] = Counter()

    def copy(self) -> SiteMode:
        """One that goes on from here."""
        mode = SiteMode(self.sites, self.strengths)
        mode.dropouts, mode.depth, mode.counts = self.dropouts, self.depth, self.counts.copy()
        return mode

    @contextmanager
    def own_calls(self) -> Iterator[None]:
        """Inside, `depth` is the number of module calls under way within the one whose operations these are.

        A module that the model does not hold, as one made in the forward, is part of the forward that calls it.
        """

        def change(by: int) -> Callable[..., None]:
            def hook(module: nn.Module, *values: object) -> None:
                if id(module) in self.strengths.modules:
                    self.depth += by

            return hook

        handles = (
            register_module_forward_pre_hook(change(1)),
            register_module_forward_hook(change(-1), always_call=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self,
        original: Callable[..., Any],
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.depth:
            return original(*args, **kwargs)
        if original in _SPELLINGS:
            return self.drop(original, args, kwargs)
        if original in DECOMPOSITIONS:
            with self:
                result = DECOMPOSITIONS[original](*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = original(*args, **kwargs)
        return self.after(original, args, kwargs, result) if self.sites.results or self.sites.lookups else result

    def drop(self, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """A dropout of the model, at λ where it has a site."""
        x = args[0] if args else kwargs["input"]
        training = args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))
        if not training:
            return original(*args, **kwargs)
        index = self.sites.dropouts.get(min(self.dropouts, self.sites.count - 1))
        self.dropouts += 1
        if index is None:
            return original(*args, **kwargs)
        spelled = _SPELLINGS[original]
        in_place = spelled.in_place or (args[3] if len(args) > 3 else kwargs.get("inplace", False))
        return dropped(x, self.strengths, index, spelled.function, in_place)

    def after(self, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any], result: Any) -> Any:
        """The result of another operation, with what is drawn after it."""
        try:
            spelled = respell(original, args, kwargs)
        except Unspellable:
            return result
        name = operation_name(spelled.function)
        number = self.counts[name]
        self.counts[name] += 1
        if (lookup := self.sites.lookups.get((name, number))) is not None:
            operation, draw = lookup
            strengths = [self.strengths[index] for index in draw.indices]
            noise = operation.draw(tuple(spelled.args), *strengths, **draw.settings)
            result = operation.apply(result, noise)
        for draw in self.sites.results.get((name, number), ()):
            result = draw.after(result, self.strengths)
        return result


def resume(run: Callable[..., object]) -> Callable[..., object]:
    """The same function, which draws at λ from where this call is whenever it runs, also when the modes of now are over."""
    modes = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, SiteMode)]
    places = [(mode.copy(), mode.strengths.calls.copy()) for mode in modes]

    def run_again(*args: object, **kwargs: object) -> object:
        active = _get_current_function_mode_stack()
        with ExitStack() as stack:
            for place, calls in places if not any(mode in active for mode in modes) else ():
                stack.enter_context(mode := place.copy())
                stack.enter_context(mode.own_calls())
                place.strengths.calls = calls.copy()
            return run(*args, **kwargs)

    return run_again


def dropped(x: Tensor, strengths: Strengths, index: int, kind: Callable[..., Any], in_place: bool) -> Tensor:
    """Dropout of one kind, at strengths[index], as the network's graphs compute it: from explicit noise.

    kind: one of `DROPOUTS`.
    """
    p, spatial = strengths[index], SPATIAL.get(kind, 0)
    if kind in ALPHA:
        multiplier, shift = alpha_dropout_coefficients(x, p, spatial)
        return x.mul_(multiplier).add_(shift) if in_place else x * multiplier + shift
    mask = dropout_mask(x, p, spatial, keep_rate=strengths.keep_rate(index))
    return x.mul_(mask) if in_place else x * mask
