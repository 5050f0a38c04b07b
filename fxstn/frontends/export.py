"""The frontend "export": torch.export follows what symbolic tracing cannot. nn.Module → the graph that `symbolic` makes.

Export runs the forward on fake tensors of the example inputs' shapes, so that Python may branch on sizes; the batch stays
symbolic. Its program (ATen operations, parameters as inputs) is rewritten to a graph under a root with the child `model`.
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from fxstn.frontends.export_operations import OperationMarker
from fxstn.frontends.export_rewrite import graph_of
from fxstn.frontends.guards import HOOKS, ProblemCollector, UnsupportedError, guarded_capture, same
from fxstn.frontends.inputs import Inputs, InputSpec, arguments_of, bound
from fxstn.frontends.interface import GraphFrontend
from fxstn.frontends.outputs import plain_output
from fxstn.ir.containers import mapped
from fxstn.ir.errors import TransformError
from fxstn.ir.graphs import forked_rng
from fxstn.ir.output_types import OutputTypes

_BOOKKEEPING = ("_tensor_constant", "__dict__", "_flat_weight")  # what export and nn.RNNBase assign for themselves
_OTHER_BATCHES = (*range(2, 34), 63, 64, 100, 127, 1000, 4096)


@dataclass(frozen=True)
class Export(GraphFrontend):
    """Follows a forward by torch.export.

    examples: example inputs. Later inputs must have the same sizes, except the batch (dimension 0).
    """

    examples: InputSpec
    name: ClassVar[str] = "export"
    needs_examples: ClassVar[bool] = True

    def capture(
        self, model: nn.Module, training: bool, frozen: Collection[str] = (), inputs: Inputs | None = None
    ) -> fx.GraphModule:
        """The forward in train or in eval mode, as symbolic tracing makes it but with ATen operations.

        frozen: modules that stay in eval mode in the training graph.

        The graph requires its inputs to have the examples' sizes, dimension 0 aside. Raises TransformError where the forward
        depends on data or on the batch size, or does something that the graph would drop or freeze without a word.
        """
        return _exported(model, training, frozen, self.examples.like(model))


def _exported(model: nn.Module, training: bool, frozen: Collection[str], inputs: Inputs) -> fx.GraphModule:
    """The model's forward on these inputs, exported and rewritten."""
    calls = _Calls(model)
    unsupported = ProblemCollector(calls.innermost)
    with guarded_capture(model, training, frozen, "torch.export", unsupported):
        arguments = dict(bound(model, inputs).arguments)
        for name, module in model.named_modules():
            if any(getattr(module, hooks) for hooks in HOOKS):
                unsupported.add("a hook, which a traced graph would lose,", "remove it before transform", name)
        with ExitStack() as stack:
            stack.enter_context(_quiet())
            stack.enter_context(calls.recorded())
            for norm in model.modules():
                if isinstance(norm, _BatchNorm) and norm.momentum is None:  # its average reads the counter's value
                    stack.enter_context(mock.patch.object(norm, "momentum", 0.0))
            batch = next(leaf.shape[0] for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.dim())
            sizes = tree_map(lambda x: {0: Dim.AUTO} if _is_batch(x, batch) else None, arguments)
            marker = stack.enter_context(OperationMarker())
            program = torch.export.export(model, inputs.args, inputs.kwargs, dynamic_shapes=sizes, strict=False)
        if unsupported.problems:
            raise TransformError(unsupported.problems)
        _require_any_batch(program, arguments, batch)
        return graph_of(program, model, arguments_of(model, inputs), calls.output_types, marker.calls)


@contextmanager
def _quiet() -> Iterator[None]:
    """Export logs, warns about and prints what is reported here as a problem."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
            forked_rng(),
            torch.enable_grad(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class _Calls:
    """The modules whose forwards run, outermost first; they stay there when a forward raises. Refuses their assignments.

    versions: of the tensors that each of these forwards takes, by id.
    output_types: of what the model itself has returned, whose leaves export gets.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[nn.Module] = []
        self.versions: list[dict[int, int]] = []
        self.own = vars(model)
        self.output_types: OutputTypes | None = None
        self.names = {id(vars(module)): name for name, module in model.named_modules()}  # export's stand-ins share vars

    def innermost(self) -> str:
        """Path of the module whose forward is running."""
        return self.name(self.modules[-1]) if self.modules else ""

    def name(self, module: nn.Module) -> str:
        """Path of a module."""
        return self.names.get(id(vars(module)), "")

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Inside, module calls are recorded, and a value that a module hands through gets an operation of its own."""

        def enter(module: nn.Module, args: tuple) -> None:
            self.modules.append(module)
            self.versions.append({id(leaf): leaf._version for leaf in tree_leaves(args) if isinstance(leaf, Tensor)})

        def leave(module: nn.Module, args: tuple, output: object) -> Any:
            self.modules.pop()
            before = self.versions.pop()

            def own(value: object) -> object:
                handed_through = isinstance(value, Tensor) and before.get(id(value)) == value._version
                return torch.ops.aten.alias.default(value) if handed_through else value

            output = mapped(own, output)
            if vars(module) is self.own:
                output, self.output_types = plain_output(output)
            return output

        set_attribute = nn.Module.__setattr__

        def assign(module: nn.Module, name: str, value: Tensor | nn.Module) -> None:
            of_model = self.modules and id(vars(module)) in self.names  # a forward may make a module, a loss say
            if of_model and not name.startswith(_BOOKKEEPING) and not same(getattr(module, name, None), value):
                what = f"the forward assigns {name!r}, which a traced graph would lose,"
                raise UnsupportedError(self.name(module), what, "return the value, or keep it outside of the model")
            set_attribute(module, name, value)

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            with mock.patch.object(nn.Module, "__setattr__", assign):
                yield
        finally:
            for handle in handles:
                handle.remove()


def _is_batch(leaf: object, batch: int) -> bool:
    """Whether a leaf of the inputs has one row per example."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch


def _require_any_batch(program: ExportedProgram, arguments: dict[str, Any], batch: int) -> None:
    """Raise UnsupportedError where the program holds for some batch sizes only."""
    remedy = "write the forward so that it does the same for every batch size"

    def holds(guard: str, size: int) -> bool:
        def resized(x: Tensor) -> Tensor:
            return torch.empty(size, *x.shape[1:], device="meta") if _is_batch(x, batch) else x.to("meta")

        return bool(eval(guard, {"L": tree_map_only(Tensor, resized, arguments), "math": math, "torch": torch}))

    for guard in program._guards_code:
        if size := next((size for size in _OTHER_BATCHES if not holds(guard, size)), None):
            raise UnsupportedError(
                "", f"the forward does something else for a batch of {size} ({guard} fails),", remedy
            )
