"""The frontend "export": torch.export follows what symbolic tracing cannot. nn.Module → the graph that `symbolic` makes.

Export runs the forward on fake tensors of the example inputs' shapes. Their sizes are symbols: where Python branches on one,
export notes what it has taken for true. Its program (ATen operations, parameters as inputs) is rewritten to a graph
under a root with the child `model`.
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental import _config as shape_settings
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fxstn.frontends.export_modes import modes_agree, without_dropout
from fxstn.frontends.export_operations import OperationMarker
from fxstn.frontends.export_rewrite import graph_of
from fxstn.frontends.guards import HOOKS, ProblemCollector, UnsupportedError, guarded_capture
from fxstn.frontends.inputs import Inputs, InputSpec, arguments_of, bound
from fxstn.frontends.interface import GraphFrontend
from fxstn.frontends.module_state import same
from fxstn.frontends.outputs import plain_output
from fxstn.frontends.recurrent_shapes import recurrent_shapes
from fxstn.frontends.sizes import unmet_requirement
from fxstn.ir.containers import mapped
from fxstn.ir.errors import TransformError
from fxstn.ir.generators import forked_torch_rng
from fxstn.ir.output_types import OutputTypes
from fxstn.ops.batch_axis import batch_size

_BOOKKEEPING = ("_tensor_constant", "__dict__", "_flat_weight")  # what export and nn.RNNBase assign for themselves
_OTHER_BATCHES = (*range(2, 34), 63, 64, 100, 127, 1000, 4096)


@dataclass(frozen=True)
class Export(GraphFrontend):
    """Follows a forward by torch.export.

    examples: example inputs. Their sizes are symbols, as far as the forward allows, and the batch in any case.
    exact: whether the graph must hold for these sizes, and may hold for them alone, the batch included.
    """

    examples: InputSpec
    exact: bool = False
    name: ClassVar[str] = "export"
    needs_examples: ClassVar[bool] = True

    def for_sizes(self, examples: InputSpec) -> Self:
        return replace(self, examples=examples, exact=True)

    def capture(
        self, model: nn.Module, training: bool, frozen: Collection[str] = (), inputs: Inputs | None = None
    ) -> fx.GraphModule:
        """The forward in train or in eval mode, as symbolic tracing makes it but with ATen operations.

        frozen: modules that stay in eval mode in the training graph.

        The graph requires of its inputs what export has taken for true of their sizes. Raises TransformError where the forward
        depends on data or on the batch size, or does something that the graph would drop or freeze without a word.
        """
        if not training and self._modes_agree(model, frozen):
            return without_dropout(self._captured(model, True, frozen))
        return self._captured(model, training, frozen)

    def captures(
        self, model: nn.Module, frozen: Collection[str] = (), inputs: Inputs | None = None
    ) -> list[fx.GraphModule]:
        """The same in both modes; one export, which takes most of the time, serves both where they agree."""
        train = self._captured(model, True, frozen)
        agree = self._modes_agree(model, frozen)
        return [train, without_dropout(train) if agree else self._captured(model, False, frozen)]

    def _modes_agree(self, model: nn.Module, frozen: Collection[str]) -> bool:
        with _quiet():
            return modes_agree(model, frozen, self.examples.like(model, exact=self.exact)[0])

    def _captured(self, model: nn.Module, training: bool, frozen: Collection[str]) -> fx.GraphModule:
        """One export; see `capture`."""
        error, unmet = None, ""
        for examples, every, exact in self._attempts(model):
            if unmet and not exact:
                continue
            try:
                graph = _exported(model, training, frozen, examples, every, exact)
            except TransformError as raised:
                error = raised
                if not (self.exact or _sizes_may_be_why(raised)):
                    raise
                continue
            if self.exact:
                unmet = unmet_requirement(graph.graph, arguments_of(model, self.examples.inputs))
            if not unmet:
                return graph
        raise error or AssertionError(f"a graph for the examples' own sizes does not hold for them: {unmet}")

    def _attempts(self, model: nn.Module) -> Iterator[tuple[Inputs, bool, bool]]:
        """(inputs, whether all sizes are symbols, whether the graph may hold for one batch size), the most general first."""
        general = self.examples.like(model, exact=False)
        yield from ((inputs, True, False) for inputs in general)
        yield general[0], False, False
        if self.exact:
            (inputs,) = self.examples.like(model, exact=True)
            yield inputs, True, True
            yield inputs, False, True


def _exported(
    model: nn.Module, training: bool, frozen: Collection[str], inputs: Inputs, every: bool, exact: bool
) -> fx.GraphModule:
    """The model's forward on these inputs, exported and rewritten.

    every: whether all sizes are symbols; else the batch alone.
    exact: as in `Export`.
    """
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
            stack.enter_context(recurrent_shapes())
            # Else export takes it for true, without a guard, that no size is 1.
            stack.enter_context(shape_settings.patch(backed_size_oblivious=True))  # type: ignore[attr-defined]
            for norm in model.modules():
                if isinstance(norm, _BatchNorm) and norm.momentum is None:  # its average reads the counter's value
                    stack.enter_context(mock.patch.object(norm, "momentum", 0.0))
            sizes = tree_map(partial(_dynamic, every=every, batch=batch_size(arguments)), arguments)
            marker = stack.enter_context(OperationMarker(model.parameters()))
            program = torch.export.export(model, inputs.args, inputs.kwargs, dynamic_shapes=sizes, strict=False)
        if unsupported.problems:
            raise TransformError(unsupported.problems)
        if not exact:
            _require_any_batch(program, arguments)
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
            forked_torch_rng(),
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


def _dynamic(value: object, every: bool, batch: int) -> dict[int, Any] | None:
    """What torch.export is told of the sizes of one input: which are symbols, as far as the forward lets them.

    every: whether all are; else only the batch, dimension 0 of that size.
    """
    if not isinstance(value, Tensor):
        return None
    return {i: Dim.AUTO for i, size in enumerate(value.shape) if every or (i == 0 and size == batch)}


def _sizes_may_be_why(error: TransformError) -> bool:
    """Whether a capture may have failed because sizes were symbols: not where the forward does what no graph can hold."""
    return error.__cause__ is not None and not isinstance(error.__cause__, GuardOnDataDependentSymNode)


def _require_any_batch(program: ExportedProgram, arguments: dict[str, Any]) -> None:
    """Raise UnsupportedError where the program holds for some batch sizes only. A batch of one may have a graph of its own."""
    remedy = "write the forward so that it does the same for every batch size"
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    values = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    leaves, structure = tree_flatten(arguments)
    pairs = [(leaf, values[name]) for leaf, name in zip(leaves, names, strict=True)]
    rows, batch = next((len(leaf), value.shape[0]) for leaf, value in pairs if isinstance(leaf, Tensor) and leaf.dim())
    unique = all(rows not in leaf.shape[1:] for leaf in leaves if isinstance(leaf, Tensor))

    def resized(size: int, dim: int | torch.SymInt, actual: int) -> int:
        if isinstance(dim, int) or isinstance(batch, int):
            return size if isinstance(dim, int) and dim == batch else actual
        expression = dim.node.expr.subs(batch.node.expr, size)
        return int(expression) if expression.is_number else actual

    def with_batch(size: int, leaf: object, value: Any) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        shape = [resized(size, dim, actual) for dim, actual in zip(value.shape, leaf.shape, strict=True)]
        if unique and shape and len(leaf) == rows:  # also where export has not found out that it is the same size
            shape[0] = size
        return torch.empty(shape, device="meta")

    def holds(guard: str, size: int) -> bool:
        others = [with_batch(size, *pair) for pair in pairs]
        return bool(eval(guard, {"L": tree_unflatten(others, structure), "math": math, "torch": torch}))

    for guard in program._guards_code:
        if size := next((size for size in _OTHER_BATCHES if not holds(guard, size)), None):
            raise UnsupportedError(
                "", f"the forward does something else for a batch of {size} ({guard} fails),", remedy
            )
