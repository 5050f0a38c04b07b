"""A graph and what a step does with its output, compiled as one function."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from traceback import FrameSummary
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map_only

from fxstn.ir.errors import LIBRARY, module_path
from fxstn.ir.input_errors import first_line
from fxstn.ir.staging import functions_in_graph, with_breaks

Finish = Callable[[Any], Any]  # what a graph returns → what a step needs
_EXPLANATION = re.compile(r"Explanation: (.*)")  # in torch's messages
_numbers = itertools.count()


def unchanged(result: Any) -> Any:
    """What a graph returns, as it is."""
    return result


def without_auxiliary(output: Any) -> tuple[Any, tuple]:
    """An output as a pair, as a graph with auxiliary values returns it."""
    return output, ()


class CompiledRegion:
    """A graph and what follows it, through torch.compile as one function.

    graph: emitted.
    options: of torch.compile. Without "fullgraph", or where a part of the graph cannot be compiled, the graph alone is
        compiled, with breaks.
    """

    def __init__(self, graph: fx.GraphModule, options: dict[str, Any]) -> None:
        # whether results lie where the next call writes: CUDA graphs
        self.replays = options.get("mode") in ("reduce-overhead", "max-autotune") or "options" in options
        self.graph, broken = graph, with_breaks(graph)
        self.whole = broken is None and options["fullgraph"]
        self._compiled = _compiled(graph if broken is None else broken, options | {"fullgraph": self.whole})

    def __call__(self, args: tuple, kwargs: dict[str, Any], finish: Finish) -> Any:
        """finish(what the graph returns).

        Raises what the two raise where they are not compiled, and ValueError where only torch.compile cannot follow them.
        """
        if not self.whole:
            return finish(self._compiled(args, kwargs, unchanged))
        try:
            with torch._dynamo.config.patch(allow_rnn=True):  # a graph reads their weights, and does not call them
                result = self._compiled(args, kwargs, finish)
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
                raise
            finish(self.graph.forward(*args, **kwargs))  # what it raises says more
            if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
            raise ValueError(_refusal(self.graph, error)) from error
        return tree_map_only(Tensor, _lasting, result) if self.replays else result


def _compiled(run: fx.GraphModule, options: dict[str, Any]) -> Callable[..., Any]:
    """region(args, kwargs, finish) → finish(run(*args, **kwargs)), through torch.compile.

    torch.compile counts recompilations, and learns which sizes change, by the code of a function. So each region has code of
    its own.
    """

    def region(args: tuple, kwargs: dict[str, Any], finish: Finish) -> Any:
        return finish(run(*args, **kwargs))

    for function in functions_in_graph():
        torch.compiler.allow_in_graph(function)
    code = region.__code__.replace(co_name=f"region_{next(_numbers)}")
    own = FunctionType(code, region.__globals__, code.co_name, None, region.__closure__)
    return torch.compile(own, **options)


def _lasting(result: Tensor) -> Tensor:
    """A result that outlives the step: a copy, unless a backward pass reads it."""
    return result if result.requires_grad else result.clone()


def _refusal(graph: fx.GraphModule, error: Exception) -> str:
    """Which part of a step torch.compile cannot follow, and what to do."""
    frames = list[FrameSummary](getattr(error, "real_stack", None) or ())
    user = next((frame for frame in reversed(frames) if not LIBRARY.search(frame.filename)), None)
    calls = {str(node): module_path(node) for node in graph.graph.nodes if node.op != "output"}
    names = [(frame.line or "").partition(" = ")[0].strip() for frame in frames]
    module = next((calls[name] for name in names if name in calls), None)
    place = f" in module {module!r}" if module else ""
    source = f", {user.filename}:{user.lineno}: {user.line}" if user else ""
    reason = _EXPLANATION.search(str(error))
    said = reason[1].rstrip(".") if reason else first_line(error)
    return (f"torch.compile cannot follow this step{place}{source}: {said}; write it in torch operations, or give "
            "compile={'fullgraph': False}, which compiles the network alone and breaks it there")  # fmt: skip


def let_batch_vary(batch: int, *values: Any) -> None:
    """Tell torch.compile that the number of examples of a batch is another one now and then.

    batch: this number, here. A batch of one example is compiled on its own in any case.
    values: structures of tensors; those with `batch` entries along dimension 0 are meant.
    """
    if batch > 1:
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch:
                torch._dynamo.maybe_mark_dynamic(leaf, 0)
