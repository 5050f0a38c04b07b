"""The graphs of a live network: the original forward, run as it is, under a mode that carries what each one needs."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxstn.frontends.inputs import Inputs
from fxstn.frontends.interface import Root
from fxstn.frontends.live.calls import Call
from fxstn.frontends.live.duals import Duals, OperationNote
from fxstn.frontends.live.forward_mode import Derivatives, LinkTracer, both, float_leaves, linearized, with_tangents
from fxstn.frontends.live.located import LocatedDuals
from fxstn.frontends.live.owners import Locator, Unlocated
from fxstn.frontends.live.sites import RuntimeSites
from fxstn.frontends.live.temporary import swapped_tensors, temporary_memory
from fxstn.frontends.live.tracer import LiveTracer
from fxstn.frontends.preservation import Preservation
from fxstn.hp.space import HyperparameterSpace
from fxstn.ir.containers import attributes, mapped, reachable
from fxstn.ir.errors import TransformError
from fxstn.ir.generators import forked_rng
from fxstn.ir.graph_kind import GraphKind
from fxstn.ir.tangents import Scaled
from fxstn.ops.batch_axis import batch_size
from fxstn.ops.kernels import cast_tangent
from fxstn.ops.response import for_all_examples, parameter_changes, refused_places, responses_in, row_scales
from fxstn.rules.layers import dense

_WHERE = "a forward that runs as it is"


class _DenseGradient(torch.autograd.Function):
    """x itself, whose gradient is dense: that of a table may be sparse, and its response then gets it as a dense one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].to_dense()


class LiveGraph:
    """One graph of a live network, called as graph(*inputs, condition=None, delta=None).

    root: holds the children model, response and hparams.
    sites: where the forward reads λ in train mode.
    frozen: paths of the modules that stay in eval mode.
    derivatives: which derivatives the forward takes itself.

    There is one perturbation for the whole batch, condition and delta of shape (h,). Raises ValueError for one per example.
    """

    def __init__(
        self,
        root: Root,
        kind: GraphKind,
        sites: RuntimeSites,
        frozen: Collection[str],
        derivatives: Derivatives = Derivatives.NONE,
    ) -> None:
        self.root, self.kind, self.frozen, self.derivatives = root, kind, frozen, derivatives
        self.objective, self.training = kind.objective, kind.training
        self.sites = sites if self.training else RuntimeSites()
        self.locators: dict[int, Locator] = {}  # by the number of examples
        self.shared_strengths = set[int]()  # λ that a run has read once for all examples

    @property
    def model(self) -> nn.Module:
        return self.root.get_submodule("model")

    @property
    def graph(self) -> fx.Graph:
        """What can be said without running it: the inputs, whether a batch norm normalises by the batch, and whether the
        perturbation has to be for the whole batch."""
        graph = fx.Graph()
        stars: dict[object, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        parameters = inspect.signature(self.model.forward).parameters.values()
        inputs = [graph.placeholder(stars.get(p.kind, "") + p.name) for p in parameters]
        moved = [graph.placeholder(name, default_value=None) for name in ("condition", "delta")]
        norms = (name for name, module in self.model.named_modules() if isinstance(module, _BatchNorm))
        if self.training and any(name not in self.frozen for name in norms):
            graph.call_function(F.batch_norm, (inputs[0], None, None, None, None, True))
        if self.derivatives or self.objective not in ("pushforward", "linearized"):
            moved = [graph.call_function(for_all_examples, (value, 1, _WHERE)) for value in moved]
        graph.output(graph.call_function(self.__call__, (*inputs, *moved)))
        return graph

    def refused_places(self, inputs: Inputs) -> list[str]:
        """Where a run on these inputs refuses one perturbation per example, and why; the first such place."""
        if places := refused_places(self.graph):
            return places[:1]
        space = cast(HyperparameterSpace, self.root.get_submodule("hparams"))
        rows = space.unconstrained.new_zeros(batch_size(inputs), len(space))
        try:
            with Preservation(self.model, inputs) as stand_ins, torch.no_grad(), forked_rng():
                self.duals(stand_ins, rows if self.training else None, rows)
        except Unlocated as error:
            return [error.place]
        except TransformError as error:
            return [f"{problem.what} in module '{problem.where}'" for problem in error.problems[:1]]
        return []

    @property
    def code(self) -> str:
        """What runs: the source of the model's own forward. Raises OSError where Python does not have it."""
        return inspect.getsource(type(self.model).forward)

    def __repr__(self) -> str:
        beside = {
            "pushforward": ", tangents carried beside it",
            "linearized": ", tangents carried beside it and added",
            "at_rest": ", batch norms by the batch",
        }
        weights = ", at the weights that the response predicts" if self.objective in ("perturbed", "trained") else ""
        mode = "train" if self.training else "eval"
        called = f"{type(self.model).__name__}.forward in {mode} mode, run as it is"
        return f"LiveGraph({self.kind}: {called}{beside.get(self.objective, '')}{weights})"

    def forward(
        self, *inputs: object, condition: Tensor | None = None, delta: Tensor | None = None, **named: object
    ) -> object:
        call = Inputs(inputs, named)
        if self.objective in ("pushforward", "linearized"):
            return self.duals(call, condition, delta)
        replacements: dict[int, Tensor] = {}
        if self.objective in ("perturbed", "trained"):
            replacements = self._moved(delta)
        keep = self.objective not in ("perturbed", "at_rest")
        if not keep:
            call, copies = self._copies(call)
            replacements |= copies
        mode = LiveTracer(self.model, self.sites, self._strengths(condition))
        grad_mode = torch.enable_grad() if self.derivatives else nullcontext()
        with swapped_tensors(self.model, self.training, self.frozen, replacements, keep), grad_mode:
            if self.objective == "at_rest":
                self._normalise_by_batch()
            return mode.run(call)

    __call__ = forward

    def _copies(self, call: Inputs) -> tuple[Inputs, dict[int, Tensor]]:
        """The inputs, and all else that the forward may write into, as copies, {id of a tensor: its copy}."""
        outside = (x for _, x in (*attributes(self.model), *reachable(call, "")))
        copies = {id(x): x.detach().clone() for x in outside if not isinstance(x, nn.Parameter)}
        return mapped(lambda leaf: copies.get(id(leaf), leaf), call), copies

    def by_forward_mode(self, inputs: Inputs, condition: Tensor | None, delta: Tensor | None) -> object:
        """`duals` of a forward that takes derivatives itself."""
        strengths, links, outputs = self._strengths(condition), list[Call | None](), list[object]()
        tangents = {name: dense(tangent) for name, tangent in self._tangents(delta).items()}
        call, copies = self._copies(inputs)
        linear = self.objective == "linearized"

        def run(parameters: dict[int, Tensor]) -> list[Tensor]:
            with swapped_tensors(self.model, self.training, self.frozen, copies | parameters, keep=False):
                if linear and not self.training:
                    self._normalise_by_batch()
                mode = LinkTracer(self.model, self.sites, None if strengths is None else strengths.detach())
                outputs.append(mode.run(call))
                floats = float_leaves(outputs[0])
                links.extend(mode.links.get(leaf) if linear else None for leaf in floats)
                return [leaf if link is None else link.args[0] for leaf, link in zip(floats, links, strict=True)]

        pairs = with_tangents(self.model, tangents, self.derivatives, run)
        return linearized(outputs[0], pairs, links) if linear else both(outputs[0], pairs)

    def duals(
        self,
        inputs: Inputs,
        condition: Tensor | None,
        delta: Tensor | None,
        log: list[OperationNote] | None = None,
    ) -> object:
        """(y, dy), or y + dy for objective "linearized".

        log: as for `Duals`.
        """
        if self.derivatives:
            if log is not None:
                log.append(OperationNote("", "torch.autograd.forward_ad", "fallback"))
            return self.by_forward_mode(inputs, condition, delta)
        buffers = {id(buffer): buffer.clone() for buffer in self.model.buffers()}
        parameters, strengths = self._tangents(delta), self._strengths(condition)
        strengths = None if strengths is None else strengths.detach()
        with swapped_tensors(self.model, self.training, self.frozen, buffers, keep=False):
            if self.objective == "linearized" and not self.training:
                self._normalise_by_batch()
            mode = self._mode(inputs, parameters, strengths, log)
            outside = {id(x): x for _, x in (*reachable(inputs, ""), *attributes(self.model))}
            mode.add_constants(outside.values())
            with temporary_memory(outside.values()), torch.enable_grad():
                output = mode.run(inputs)
                mode.finish(output)
                result = (
                    mode.linearized(output) if self.objective == "linearized" else (output, mode.tangents_of(output))
                )
                return mapped(lambda leaf: leaf.data if id(leaf) in outside else leaf, result)

    def _mode(
        self, inputs: Inputs, parameters: dict[str, Scaled], strengths: Tensor | None, log: list[OperationNote] | None
    ) -> Duals:
        rows = [value for value in (strengths, *(t.scale for t in parameters.values())) if value is not None]
        count = max((len(value) for value in rows if value.dim() > 1), default=0)
        if not count:
            return Duals(self.model, parameters, self.sites, strengths, log)
        locator = self.locators.setdefault(count, Locator(count))
        parameters = {
            name: tangent if tangent.scale.dim() > 1 else replace(tangent, scale=tangent.scale.expand(count, -1))
            for name, tangent in parameters.items()
        }
        mode = LocatedDuals(self.model, parameters, locator, self.sites, strengths, log)
        mode.shared_strengths = self.shared_strengths
        mode.add_examples(inputs.args + tuple(inputs.kwargs.values()))
        return mode

    def _normalise_by_batch(self) -> None:
        """As the pass choose_statistics does it for an evaluation graph."""
        for name, module in self.model.named_modules():
            module.training = isinstance(module, _BatchNorm) and name not in self.frozen

    def _strengths(self, condition: Tensor | None) -> Tensor | None:
        return self.root.get_submodule("hparams")(condition) if self.training else None

    def _tangents(self, delta: Tensor | None) -> dict[str, Scaled]:
        if delta is None:
            raise TypeError(f"the graph '{self.kind}' takes delta, of shape (h,)")
        if self.derivatives:
            delta = for_all_examples(delta, 1, _WHERE)
        result, tree = {}, self.root.get_submodule("response")
        scales = row_scales(tree, delta)
        for name, response in responses_in(tree).items():
            parameter = self.model.get_parameter(name)
            direction = cast_tangent(response.direction(parameter), parameter)
            result[name] = Scaled(scales[name], direction, response.axis)
        return result

    def _moved(self, delta: Tensor | None) -> dict[int, Tensor]:
        """Weights w₀ + Θ·delta, by the id of w₀."""
        if delta is None:
            raise TypeError(f"the graph '{self.kind}' takes delta, of shape (h,)")
        delta = for_all_examples(delta, 1, _WHERE)
        changes = parameter_changes(self.root.get_submodule("response"), self.model, delta)
        parameters = dict(self.model.named_parameters())
        moved = {
            name: (parameters[name] + _DenseGradient.apply(change)).to(parameters[name])
            for name, change in changes.items()
        }
        return {id(parameters[name]): value for name, value in moved.items()}
