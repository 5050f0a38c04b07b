"""A user's own model whose random operations draw at the strengths λ while it trains. Its forward stays the user's.

The modules that own such operations get a forward of their own, an attribute of the instance. In eval mode, and where the
network's graphs are made, the original runs.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from types import CodeType
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from fxstn.frontends.checkpoints import reruns
from fxstn.frontends.decompositions import DECOMPOSITIONS
from fxstn.frontends.decompositions.layer_drop import with_residual
from fxstn.frontends.site_mode import Draw, ModuleSites, SiteMode, resume
from fxstn.ir.containers import mapped
from fxstn.ops.noise import Strengths


class ConditionedForward:
    """The forward of a module that owns random operations.

    original: its forward before.
    strengths: what these operations read.
    autocast: the type that autocast lowered the last training forward of the model itself to; None: it was off.
    trained: whether the last forward of the model itself that can be differentiated was in train mode. None: there was none.
    forwards: how many there were in train mode.
    calls: how many forwards there were of the model itself, in any mode; of compiled code only some are counted.
    owner: who moves λ. None in a copy, whose λ nobody moves.
    """

    def __init__(self, module: nn.Module, sites: ModuleSites, strengths: Strengths) -> None:
        self.module, self.sites, self.strengths = module, sites, strengths
        self.autocast: torch.dtype | None = None
        self.trained: bool | None = None
        self.forwards = self.calls = 0
        self.owner: ref[object] | None = None
        self.original = self.__wrapped__ = module.forward  # inspect.signature looks at __wrapped__
        self.own = vars(module).get("forward")

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"owner": None}

    @property
    def __code__(self) -> CodeType:
        """Of the forward itself, for torch.export."""
        return self.original.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, sites = self.module, self.sites
        if sites.root and not torch.compiler.is_compiling():
            self.calls += 1
        if sites.root and torch.is_grad_enabled() and not torch.compiler.is_exporting():
            self.trained = module.training
            if not torch.compiler.is_compiling():
                self.forwards += module.training
        if not module.training:
            return self.original(*args, **kwargs)
        if sites.whole is not None:
            x = args[0] if args else next(iter(kwargs.values()))
            return sites.whole.after(x, self.strengths)
        if sites.root:
            device = self.strengths.values.device.type
            self.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            self.strengths.calls = Counter()
            if not torch.compiler.is_compiling() and not self.strengths.modules:
                self.strengths.modules = set(map(id, module.modules()))
        if sites.inputs:
            args, kwargs = self._drawn_inputs(args, kwargs)
        if sites.loop is None:
            output = self._original_output(args, kwargs)
        else:
            with sites.loop.without_skips(module):
                output = self._original_output(args, kwargs)
        if (draw := sites.residual) is not None:
            output = with_residual((args, kwargs), output, partial(draw.after, strengths=self.strengths))
        for leaf, draw in (*sites.exits, *self._exits_of_call()):
            output = self._drawn_output(output, leaf, draw)
        return output

    def _exits_of_call(self) -> Sequence[tuple[int | None, Draw]]:
        """What is drawn after this call alone."""
        if not self.sites.exits_of_calls:
            return ()
        calls, name = self.strengths.calls, id(self.sites)
        calls[name] += 1
        return self.sites.exits_of_calls[: calls[name]][-1]

    def _original_output(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not self.sites.inside:
            return self.original(*args, **kwargs)
        packed = any(isinstance(value, PackedSequence) for value in (*args, *kwargs.values()))
        run = None if packed else DECOMPOSITIONS.get(type(self.module))  # there torch.lstm and the like are decomposed
        with ExitStack() as stack:
            stack.enter_context(mode := SiteMode(self.sites, self.strengths))
            if not torch.compiler.is_compiling():  # there a region's second forward is part of the graph
                stack.enter_context(reruns(resume))
                stack.enter_context(mode.own_calls())
            return self.original(*args, **kwargs) if run is None else run(self.module, *args, **kwargs)

    def _drawn_inputs(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        bound = inspect.signature(self.original).bind(*args, **kwargs)
        for name, draws in self.sites.inputs.items():
            if name in bound.arguments:
                for draw in draws:
                    bound.arguments[name] = draw.after(bound.arguments[name], self.strengths)
        return bound.args, bound.kwargs

    def _drawn_output(self, output: object, leaf: int | None, draw: Draw) -> object:
        numbers = itertools.count()

        def drawn(x: object) -> object:
            return draw.after(x, self.strengths) if leaf in (None, next(numbers)) else x

        return mapped(drawn, output)
