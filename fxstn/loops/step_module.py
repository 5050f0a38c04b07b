"""Which module a training step calls, where only the step is known; attributes for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(eq=False)
class _Call:
    """A call of a module, and the calls in it."""

    module: nn.Module
    inputs: tuple[Any, ...]
    output: Any = None
    calls: list[_Call] = field(default_factory=list)

    @property
    def passes_on(self) -> bool:
        """Whether the module hands its inputs to one other, and returns what that one does."""
        inner = self.calls[0] if len(self.calls) == 1 else self
        same_inputs = list(map(id, inner.inputs)) == list(map(id, self.inputs))
        return inner is not self and same_inputs and inner.output is self.output


def module_of_step(owner: nn.Module, step: Callable[[], object]) -> nn.Module:
    """The module with weights to train that a step of a module calls; not the owner where its forward only passes everything
    on to one of its modules.

    Raises ValueError where the step calls none, or several.
    """
    calls = _calls(owner, step)
    distinct = list(dict.fromkeys(call.module for call in calls))
    if len(distinct) != 1:
        names = {module: name or type(module).__name__ for name, module in owner.named_modules()}
        text = ", ".join(names[module] for module in distinct) or "no module with weights"
        raise ValueError(
            f"training_step calls {text}, and a tuner follows one module: let training_step call the LightningModule "
            "itself, self(x), with all of them in its forward; or give TuneCallback module= and loss_fn="
        )
    passes_on = distinct[0] is owner and calls[0].passes_on
    return calls[0].calls[0].module if passes_on else distinct[0]


def _calls(owner: nn.Module, step: Callable[[], object]) -> list[_Call]:
    """The calls of modules with weights to train in a step. Buffers stay as they are."""
    stack = [_Call(owner, ())]

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        stack[-1].calls.append(call := _Call(module, (*args, *kwargs.values())))
        stack.append(call)

    def leave(module: nn.Module, args: object, output: object) -> None:
        stack.pop().output = output

    trained = [m for m in owner.modules() if any(p.requires_grad for p in m.parameters())]
    buffers = [(buffer, buffer.clone()) for buffer in owner.buffers()]
    with ExitStack() as hooks:
        for module in trained:
            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        try:
            step()
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
    return stack[0].calls


@contextmanager
def attributes(owner: object, **values: object) -> Iterator[None]:
    """A context in which an object has attributes of its own."""
    own = vars(owner)
    before = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            own.pop(name, None)
        own.update(before)
