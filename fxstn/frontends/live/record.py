"""One run of the original forward, recorded as a canonical graph for the passes that decide: bind, responses, explain."""

from __future__ import annotations

import operator
import traceback
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fxstn.frontends.guards import mode_of, refuse_scripted
from fxstn.frontends.inputs import Inputs
from fxstn.frontends.live.calls import Call, RunningCall, mutated, named_values
from fxstn.frontends.live.constant_guard import ConstantGuard, user_frame
from fxstn.frontends.live.forward_mode import Derivatives, derivatives_in
from fxstn.frontends.live.tangent_table import differentiable
from fxstn.frontends.preservation import Preservation
from fxstn.hp.moving import moves_so_far
from fxstn.ir.containers import arguments_mapped, attributes, leaves, reachable, tensors_in
from fxstn.ir.errors import Diagnostic, TransformError, innermost_user_frame, operation_name
from fxstn.ir.generators import forked_rng
from fxstn.ir.graphs import rename
from fxstn.ir.node_info import ModuleCall, annotate, copy_facts, info_of
from fxstn.ir.spelling import Spelled
from fxstn.ir.vocabulary import dropout_settings


class Recording(nn.Module):
    """What passes read of a recorded forward: `graph`, and the child `model`. It is never run: its constants stand inline.

    derivatives: which derivatives the forward takes itself.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, derivatives: Derivatives) -> None:
        super().__init__()
        self.model, self.graph, self.derivatives = model, graph, derivatives


class Tape(ConstantGuard):
    """Appends every operation, in the canonical spelling, to `graph`.

    Nodes carry a `NodeInfo` with scope and exits, as those of `fxstn.frontends.symbolic`, and with two facts more.
    positions: {number of a call whose output the node is: position among the leaves of that output}.
    address: ("argument", name), ("exit", module path, position among the leaves of its output), or ("operation", module
        path, operation, order within its call, number of the module's call, element of the result or None).
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__(model)
        self.operations_to_count, self.problems = None, list[Diagnostic]()
        self.derivatives = Derivatives.NONE
        self.graph = fx.Graph()
        self.nodes = WeakTensorKeyDictionary()
        self.inputs_of_calls: dict[int, set[fx.Node]] = {}
        for name, optional, value in named_values(model, inputs):
            for i, (_, leaf) in enumerate(reachable(value, name)):
                node = self.graph.create_node("placeholder", name if not i else f"{name}_{i}", (None,) * optional)
                annotate(node, address=("argument", name))
                self.nodes[leaf] = node
        self.attribute_targets, self.constants = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        for name, tensor in attributes(model):
            self.attribute_targets.setdefault(tensor, f"model.{name}")

    def is_known(self, x: Tensor) -> bool:
        return x in self.nodes or x in self.attribute_targets or x in self.constants

    def add_constants(self, tensors: Iterable[Tensor]) -> None:
        self.constants.update(dict.fromkeys(x for x in tensors if not self.is_known(x)))

    def node_of(self, x: Tensor) -> fx.Node | Tensor:
        if self.derivatives and not self.is_known(x) and is_functorch_wrapped_tensor(x):
            return self.node_of(get_unwrapped(x))
        if x in self.nodes:
            return self.nodes[x]
        if x not in self.attribute_targets:
            return self.derivative_node(x) if self.derivatives and differentiable(x) else x
        node = self.graph.get_attr(self.attribute_targets[x])
        annotate(node, scope=self.scope())
        return node

    def derivative_node(self, x: Tensor) -> fx.Node:
        """A node for a value that torch made out of sight where the forward takes derivatives: it may depend on the inputs."""
        inputs = self.graph.find_nodes(op="placeholder", sort=True)
        self.nodes[x] = self.graph.call_function(torch.autograd.grad, tuple(inputs))
        annotate(self.nodes[x], scope=self.scope())
        return self.nodes[x]

    def apply(self, call: Call) -> object:
        self.derivatives = max(self.derivatives, derivatives_in(call))
        self._refuse_nested((call.args, call.kwargs))
        return self.observe(call) if self.derivatives else super().apply(call)

    def _refuse_nested(self, values: object) -> None:
        if any(x.is_nested for x in tensors_in(values)):
            what = "a nested tensor, whose rows have sizes of their own, which no tangent is carried through,"
            raise self.refuse(what, "pad the batch, and mask what is padded")

    def scope(self) -> tuple[ModuleCall, ...]:
        return tuple(ModuleCall(call.number, call.path, call.kind) for call in self.calls if call.path)

    def node(self, function: Callable[..., object], args: tuple, kwargs: dict) -> fx.Node:
        """Append one operation. Its tensors are replaced by their nodes."""

        def argument(value: object) -> Any:
            if isinstance(value, Spelled):
                return self.node(value.function, value.args, value.kwargs)
            return arguments_mapped(self.node_of, value)

        kwargs = {name: argument(value) for name, value in kwargs.items()}
        node = self.graph.call_function(function, tuple(argument(value) for value in args), kwargs)
        node.meta = {"stack_trace": user_frame()}
        annotate(node, scope=self.scope())
        return node

    def observe(self, call: Call) -> object:
        spelled = call.spelled or Spelled(call.original, call.args, call.kwargs)
        targets, result = mutated(call), call.run()
        self._refuse_nested(result)
        if targets or next(tensors_in(result), None) is not None:  # what only reads a size is no use of a value
            node = self.node(spelled.function, spelled.args, spelled.kwargs)
            self.enter_result(call, node, result)
            for x in targets:
                self.nodes[x] = node
        return result

    def enter_result(self, call: Call, node: fx.Node, result: object) -> None:
        """Make `node` stand for what an operation returned."""
        address = (self.path, operation_name(call.function), call.order, self.calls[-1].occurrence)
        if isinstance(result, Tensor):
            annotate(node, address=("operation", *address, None))
            self.nodes[result] = node
        elif isinstance(result, (tuple, list)):
            for i, entry in enumerate(result):
                if isinstance(entry, Tensor):
                    element = self.graph.call_function(operator.getitem, (node, i))
                    copy_facts(element, node)
                    annotate(element, address=("operation", *address, i))
                    self.nodes[entry] = element

    def drop(self, call: Call, index: int | None) -> object:
        assert call.spelled is not None
        p, training = dropout_settings(call.spelled)
        if not training:
            return call.spelled.args[0]
        node = self.node(call.function, (call.spelled.args[0], p, True), {})
        result = call.run()
        self.enter_result(call, node, result)
        return result

    def operate(self, call: Call, indices: tuple[int, ...] | None) -> object:
        node = self.node(call.function, call.args, call.kwargs)
        with torch._C.DisableTorchFunction():
            result = call.run()
        for move in moves_so_far():  # the forward may move targets alike
            self.add_constants(tensors_in(move.drawn))
        self.enter_result(call, node, result)
        return result

    def enter(self, call: RunningCall, inputs: object) -> None:
        self.inputs_of_calls[call.number] = {
            self.nodes[x] for x in leaves(inputs) if isinstance(x, Tensor) and x in self.nodes
        }

    def leave(self, call: RunningCall, output: object) -> None:
        inputs = self.inputs_of_calls.pop(call.number)
        for position, leaf in enumerate(leaves(output)):
            node = self.nodes.get(leaf) if isinstance(leaf, Tensor) and call.path else None
            if node is None:
                continue
            if node in inputs:  # handed through, as nn.Identity does: its output needs a node of its own
                node = self.node(torch.clone, (leaf,), {})
                annotate(node, handed_through=True, address=("exit", call.path, position))
                self.nodes[leaf] = node
            if node.op == "call_function" and not info_of(node).exits:
                rename(node, call.path.replace(".", "_"))
            info = info_of(node)
            exits = (*info.exits, ModuleCall(call.number, call.path, call.kind))
            annotate(node, exits=exits, positions={**info.positions, call.number: position})

    def finish(self, output: object) -> Recording:
        """Close the graph. Raises TransformError when the output holds a float tensor that was not seen being made."""
        if not self.derivatives:
            self.check_known("the output", leaves(output))
        self.graph.output(tuple(self.node_of(leaf) for leaf in leaves(output) if isinstance(leaf, Tensor)))
        return Recording(self.model, self.graph, self.derivatives)


def record(model: nn.Module, training: bool, frozen: Collection[str], inputs: Inputs) -> Recording:
    """Run the model once on its inputs, in train or in eval mode and return its canonical graph.

    Parameters, buffers, attributes, inputs and random generators are left as they were. Raises TransformError where the forward
    fails or computes with a tensor that cannot be followed.
    """
    refuse_scripted(model)
    with Preservation(model, inputs) as inputs:
        tape = Tape(model, inputs)
        try:
            with mode_of(model, training, frozen), forked_rng(), torch.enable_grad():
                with tape.active():
                    output = model(*inputs.args, **inputs.kwargs)
                return tape.finish(output)
        except TransformError:
            raise
        except Exception as error:
            source = innermost_user_frame(traceback.format_exc())
            what = f"the forward fails on the example inputs ({type(error).__name__}: {error})"
            remedy = "give example_inputs as the model takes them when it trains; it has to run on them as it is"
            raise TransformError([*tape.problems, Diagnostic(tape.path, what, source, remedy)]) from error
