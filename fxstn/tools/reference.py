"""Runs the original model with the random draws of a network made from it, to compare the two.

The original runs its own forward and torch's own kernels, so the comparison does not depend on fxstn's graphs and rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxstn.frontends.decompositions import DECOMPOSITIONS
from fxstn.frontends.guards import mode_of
from fxstn.frontends.inputs import Inputs
from fxstn.frontends.live.calls import Call, inlined, mutated
from fxstn.frontends.live.frontend import Live
from fxstn.frontends.live.sites import RuntimeSites, runtime_sites
from fxstn.frontends.live.tracer import LiveTracer
from fxstn.frontends.preservation import Preservation
from fxstn.hp import OPERATIONS
from fxstn.ir.containers import arguments_mapped, leaves
from fxstn.ir.copies import deep_copy
from fxstn.ir.generators import forked_rng, reseed
from fxstn.ir.graph_kind import GraphKind
from fxstn.ir.input_errors import described
from fxstn.ir.vocabulary import DROPOUTS, dropout_settings
from fxstn.network import SelfTuningNetwork
from fxstn.rules import RULES

Value = TypeVar("Value")


DOUBLES = {torch.float32: torch.float64, torch.complex64: torch.complex128}
_METHODS = vars(torch._C.TensorBase)
WIDER = {_METHODS[name]: _METHODS[wider] for name, wider in (("float", "double"), ("cfloat", "cdouble"))}


def as_double(tensor: Tensor) -> Tensor:
    """A tensor of real or complex numbers in double precision; of integers as it is."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


class Float64Mode(TorchFunctionMode):
    """Operations asked for float32 keep float64: differences need its digits, and some models ask for float32 everywhere."""

    def __torch_function__(
        self, function: Callable[..., object], types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        function = WIDER.get(function, function)
        return function(*_in_float64(args), **{name: _in_float64(value) for name, value in (kwargs or {}).items()})


def _in_float64(value: Value) -> Value:
    """An argument of an operation with float64 in place of float32. A dict is the memo of a copy, and stays the same object."""
    if isinstance(value, list):
        return cast(Value, [_in_float64(entry) for entry in value])
    if isinstance(value, tuple) and type(value) is tuple:
        return cast(Value, tuple(_in_float64(entry) for entry in value))
    return cast(Value, DOUBLES.get(value, value)) if isinstance(value, torch.dtype) else value


@dataclass(frozen=True)
class Strengths:
    """Which λ the random operations of the original read, so that they draw what the network draws from the same seed.

    sites: by address, for a network that runs the forward as it is.
    dropouts: an index into λ for each dropout call in the order of execution, for a network of graphs; None there means the
        call's own rate, as do calls beyond the last. None as a whole: `sites` decides.
    operations: the same for each random operation, of which one may read several λ.
    """

    sites: RuntimeSites = field(default_factory=RuntimeSites)
    dropouts: tuple[int | None, ...] | None = None
    operations: tuple[tuple[int, ...] | None, ...] = ()


def strengths_of(network: SelfTuningNetwork, training: bool, inserting: bool = False) -> Strengths:
    """What the original reads to draw what the network draws. In eval mode no λ is read.

    inserting: whether dropouts that the specs insert take part (frontend "live" only).
    """
    binding = network.recipe.plan.binding
    live = network.frontend == "live"
    if not training:
        return Strengths(dropouts=None if live else ())
    if live:
        sites = tuple(site for site in binding.sites if inserting or not site.insert)
        addresses = cast(Live, network.recipe.frontend).addresses
        return Strengths(runtime_sites(replace(binding, sites=sites), addresses))
    read = {site.node: site.indices for site in binding.sites if not site.insert}
    nodes = [node for node in network.canonical(True).graph.nodes if node.op == "call_function"]
    dropouts = [read.get(node.name) for node in nodes if node.target in DROPOUTS]
    operations = tuple(read.get(node.name) for node in nodes if node.target in OPERATIONS)
    return Strengths(RuntimeSites(), tuple(None if indices is None else indices[0] for indices in dropouts), operations)


class ReferenceRun(LiveTracer):
    """One run of the original forward. It knows no tangent and no rule for tangents.

    strengths: which λ the random operations read.
    values: λ itself, (h,).
    constants: values of everything that autograd takes for constant, results of detach and of regions without gradients, in
        order of execution; None for the first run, which collects them in `collected`.
    """

    def __init__(
        self, model: nn.Module, strengths: Strengths, values: Tensor, constants: Sequence[Tensor] | None = None
    ) -> None:
        super().__init__(model, strengths.sites, values)
        self.collected: list[Tensor] = []
        self.constants: Iterator[Tensor] | None = None if constants is None else iter(constants)
        self.operations = iter(strengths.operations)
        self.dropouts: Iterator[int | None] | None = None if strengths.dropouts is None else iter(strengths.dropouts)

    def output(self, inputs: Inputs) -> object:
        """The model's output, with grad mode on as in training. The model's parameters should not require gradients."""
        with torch.enable_grad():
            return self.run(inputs)

    def body_of(self, call: Call) -> Callable[..., object] | None:
        """A kernel that draws nothing runs as it is, so that a decomposition is never its own witness."""
        decomposed = call.spelled is not None and call.spelled.function in DECOMPOSITIONS
        return None if decomposed and not _draws(call) else super().body_of(call)

    def drop(self, call: Call, index: int | None) -> object:
        assert call.spelled is not None
        if self.dropouts is not None and dropout_settings(call.spelled)[1]:
            index = next(self.dropouts, None)
        return super().drop(call, index)

    def operate(self, call: Call, indices: tuple[int, ...] | None) -> object:
        return super().operate(call, indices if self.dropouts is None else next(self.operations, None))

    def apply(self, call: Call) -> object:
        if (body := _body_that_draws(call.original)) is not None:
            self.inside_operation = True
            try:
                with self:
                    return body(*call.args, **call.kwargs)
            finally:
                self.inside_operation = False
        changed, result = mutated(call), call.run()
        if not (self.disabled() or call.function is torch.detach):
            return result
        for x in changed:
            constant = self._constant(x)
            if constant is not x:
                x.copy_(constant)
        return arguments_mapped(lambda y: y if any(y is x for x in changed) else self._constant(y), result)

    def _constant(self, x: Tensor) -> Tensor:
        """The value that x had in the first run: x itself where it is equal, because later writes into x reach its memory."""
        if not x.is_floating_point():
            return x
        if self.constants is None:
            self.collected.append(x.detach().clone())
            return x
        constant = next(self.constants)
        return x if torch.equal(x, constant) else constant.clone()


def _body_that_draws(function: Callable[..., object]) -> Callable[..., object] | None:
    """The body of a function of Python that draws and has a rule, as F.gumbel_softmax has, which detaches within; else None."""
    rule = RULES.get(function)
    return inlined(function) if rule is not None and rule.random and isinstance(function, FunctionType) else None


def _draws(call: Call) -> bool:
    """Whether an operation draws random numbers with these arguments."""
    with forked_rng():
        before = _generator_states()
        call.run()
        return not all(map(torch.equal, before, _generator_states()))


def _generator_states() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]


def flat(output: object) -> Tensor:
    """The float entries of an output, copied into one vector. Raises ValueError where there are none."""
    floats = [leaf for leaf in leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not floats:
        raise ValueError(f"the model returns {described(output)}, without a float tensor that a tangent could be compared on; "
                         "let the forward return float tensors, for example the logits")  # fmt: skip
    return torch.cat([leaf.flatten() for leaf in floats])


class Reference:
    """The output of the original model as a function of a step along `delta`: at weights `network.best_response(step · delta)`.

    The draws are those that the network makes from `seed`. What autograd takes for constant has its value at step 0.
    """

    def __init__(
        self,
        original: nn.Module,
        network: SelfTuningNetwork,
        inputs: Inputs,
        delta: Tensor,
        seed: int,
        training: bool,
        inserting: bool = False,
    ) -> None:
        self.model = deep_copy(original).requires_grad_(False)
        self.network, self.delta, self.seed, self.training = network, delta, seed, training
        self.strengths = strengths_of(network, training, inserting)
        self.constants: list[Tensor] | None = None
        self.preserved = Preservation(self.model, inputs, but=self.model.parameters())

    def __call__(self, step: float) -> Tensor:
        if step and self.constants is None:
            try:
                self(0.0)
            except RuntimeError:
                if next(self.model.parameters()).requires_grad:
                    raise
                self.model.requires_grad_(True)  # the forward takes derivatives in them itself
                self(0.0)
        frozen = self.network.recipe.plan.frozen
        with self.preserved as inputs, mode_of(self.model, self.training, frozen):
            move_weights(self.model, self.network, step * self.delta)
            run = ReferenceRun(
                self.model, self.strengths, self.network.hparams().detach(), self.constants if step else None
            )
            reseed(self.seed)
            output = flat(run.output(inputs)).detach()
        if not step:
            self.constants = run.collected
        return output


class GraphReference:
    """The output of a network's training graph as a function of a step along `delta`; what it detaches has its value at step 0.

    preserved: of the network's model and the inputs.
    """

    def __init__(self, network: SelfTuningNetwork, preserved: Preservation, delta: Tensor, seed: int) -> None:
        self.network, self.preserved, self.delta, self.seed = network, preserved, delta, seed
        self.constants: list[Tensor] | None = None

    def __call__(self, step: float) -> Tensor:
        if step and self.constants is None:
            self(0.0)
        with self.preserved as values, _Detached(self.constants if step else None) as detached:
            move_weights(self.network.model, self.network, step * self.delta)
            reseed(self.seed)
            output = flat(self.network.run(GraphKind("plain", True), values))
        if not step:
            self.constants = detached.collected
        return output


class _Detached(TorchFunctionMode):
    """Inside, torch.detach returns these constants, one after the other. None: what it returns is collected."""

    def __init__(self, constants: Sequence[Tensor] | None) -> None:
        super().__init__()
        self.constants = None if constants is None else iter(constants)
        self.collected: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if (body := _body_that_draws(func)) is not None:
            with self:
                return body(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func not in (torch.detach, Tensor.detach):
            return result
        self.collected.append(result.clone())
        return result if self.constants is None else next(self.constants).clone()


def move_weights(model: nn.Module, network: SelfTuningNetwork, delta: Tensor) -> None:
    """Write the weights that the network's response predicts into a model, also where one parameter has several names."""
    weights = network.best_response(delta)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
