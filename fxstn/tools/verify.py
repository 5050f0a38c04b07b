"""fxstn.verify: the emitted tangent against a central difference of the original model, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import FunctionType
from typing import Any, cast
from unittest import mock

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from fxstn.frontends.decompositions import DECOMPOSITIONS
from fxstn.frontends.decompositions.torchvision import RANDOM
from fxstn.frontends.live.containers import leaves, mapped
from fxstn.frontends.live.frontend import Live
from fxstn.frontends.live.graph import located
from fxstn.frontends.live.reference_run import Float64Mode, ReferenceRun
from fxstn.frontends.live.tracer import Sites, inlined
from fxstn.frontends.original import plain_copy
from fxstn.hp import OPERATIONS, Operation, Spec
from fxstn.ir.errors import TransformError
from fxstn.ir.graphs import forked_rng
from fxstn.ir.input_errors import explained_errors
from fxstn.ir.vocabulary import DROPOUTS, SPATIAL
from fxstn.network import SelfTuningNetwork
from fxstn.ops.noise import alpha_dropout_coefficients, dropout_mask
from fxstn.ops.response import Response
from fxstn.transform import transform

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
STEPS = (1e-6, 3e-7, 1e-7, 3e-8, 1e-8, 1e-9, 1e-10)


class ReplayedDropout(TorchFunctionMode):
    """Runs an original model with the draws that an emitted graph makes from the same seed, at the given rates.

    rates: one per dropout call, in execution order; the model's own where None, and beyond the last.
    """

    def __init__(self, rates: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.rates = iter(rates)

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if function in DECOMPOSITIONS:
            with self:
                return DECOMPOSITIONS[function](*args, **kwargs)
        composite = isinstance(function, FunctionType) and function.__module__ == F.__name__
        if composite and function not in DROPOUTS and (body := inlined(function)):
            with self:  # attention, say, which drops inside
                return body(*args, **kwargs)
        settings = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
        if function not in DROPOUTS or not settings.get("training", True):
            return function(*args, **kwargs)
        rate = next(self.rates, None)
        x, p = settings["input"], settings.get("p", 0.5) if rate is None else rate
        draw: Any = alpha_dropout_coefficients if "alpha" in function.__name__ else dropout_mask
        drawn = draw(x, p, SPATIAL.get(function, 0))
        multiplier, shift = drawn if isinstance(drawn, tuple) else (drawn, 0)
        return x.mul_(multiplier).add_(shift) if settings.get("inplace") else x * multiplier + shift

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                   dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
                   enable_gqa: bool = False) -> Tensor:  # fmt: skip
        """Attention that draws its dropout inside; torch's own otherwise."""
        settings: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        if not dropout_p:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, **settings)
        eye = torch.eye(key.shape[-2], dtype=value.dtype).expand(*value.shape[:-1], key.shape[-2])
        weights = F.scaled_dot_product_attention(query, key, eye, attn_mask, 0.0, **settings)
        rate = next(self.rates, None)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3) if enable_gqa else value
        return (weights * dropout_mask(weights, dropout_p if rate is None else rate)) @ value


@contextmanager
def replayed_operations(strengths: Sequence[tuple | None]) -> Iterator[None]:
    """The same for modules that are random operations: they draw what an emitted graph draws.

    strengths: those of one call each, in execution order; the module's own where None.
    """
    remaining = iter(strengths)

    def call(operation: type[Operation], module: Any, x: Any) -> Any:
        starts, settings = operation.read(module)
        taken = next(remaining, None) if module.training else ()
        given: Any = [starts.get(name, 0.0) for name in operation.numbers] if taken is None else taken
        if not any(map(float, given)):  # such a call is no part of a graph
            return x
        return operation.function(x, *given, **{**operation.defaults, **settings})

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Operation, "call", classmethod(call)))
        for kind in RANDOM:
            stack.enter_context(mock.patch.object(kind, "forward", DECOMPOSITIONS[kind]))
        yield


@dataclass(frozen=True)
class Check:
    """One comparison. error: relative, ‖dy − difference‖ / ‖difference‖. against: what the difference was taken of."""

    mode: str
    against: str
    seed: int
    error: float


@dataclass
class VerifyResult:
    """What `verify` found. ok: every mode has a point with relative error ≤ tolerance. frontend: how the forward was followed.
    print() shows a table."""

    tolerance: float
    checks: list[Check] = field(default_factory=list)
    frontend: str = ""

    @property
    def max_error(self) -> float:
        """The largest over modes of the smallest error over seeds: kinks are met by choosing the point."""
        kinds = {(check.mode, check.against) for check in self.checks}
        return max(min(c.error for c in self.checks if (c.mode, c.against) == kind) for kind in kinds)

    @property
    def ok(self) -> bool:
        return bool(self.checks) and self.max_error <= self.tolerance

    def __str__(self) -> str:
        rows = [(check.mode, check.against, check.seed, f"{check.error:.1e}") for check in self.checks]
        table = tabulate(rows, headers=["mode", "central difference of", "seed", "relative error"])
        return f"{table}\n{'ok' if self.ok else 'NOT ok'}: largest error {self.max_error:.1e}, tolerance {self.tolerance:.0e}"


def _flat(output: Any) -> Tensor:
    floats = [leaf for leaf in leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.cat([leaf.flatten() for leaf in floats])


def central_difference(function: Callable[[float], Any], step: float) -> Tensor:
    """(f(s) − f(−s)) / 2s, flattened."""
    with torch.no_grad():
        return (_flat(function(step)) - _flat(function(-step))) / (2 * step)


def relative_error(tangent: Any, function: Callable[[float], Any], tolerance: float) -> float:
    """The error of the first step that is within the tolerance, or the smallest: too long a step crosses kinks, too short
    a one loses digits."""
    flat, errors = _flat(tangent), []
    for step in STEPS:
        difference = central_difference(function, step)
        errors.append(((flat - difference).norm() / difference.norm().clamp_min(1e-12)).item())
        if errors[-1] <= tolerance:
            break
    return min(errors)


def _copies(inputs: tuple) -> tuple:
    """Inputs for one run, which may write into them."""
    return mapped(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)


def _prepare(model: nn.Module, inputs: tuple, seed: int) -> nn.Module:
    """A float64 copy at a generic point: constant parameters shifted a little, running statistics those of one forward.

    After the first seed, biases of norms are shifted by three standard deviations too, up or down: then few of the values
    that a ReLU after them gets are near its kink.
    """
    model = plain_copy(model).double()
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    momenta = [module.momentum for module in norms]
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        for module in model.modules() if seed else ():
            if isinstance(module, NORMS) and module.bias is not None:
                module.bias.add_(3 * torch.randn(module.bias.shape, generator=generator, dtype=torch.float64).sign())
        for parameter in model.parameters():
            if (parameter == parameter.flatten()[0]).all():  # norm affines, a head that starts at zero
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for module in norms:
            module.momentum = 1.0
        model.train()(*_copies(inputs))
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum
    for child, mode in zip(model.modules(), modes, strict=True):
        child.training = mode
    return model


def _randomize(stn: SelfTuningNetwork, seed: int) -> Tensor:
    """Random response parameters and a random delta of unit length."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in stn.response.modules():
            if isinstance(module, Response):
                module.U.copy_(0.05 * torch.randn(module.U.shape, generator=generator))
    delta = torch.randn(len(stn.hparams), generator=generator).to(stn.hparams.unconstrained)
    return delta / delta.norm()


def _strengths(stn: SelfTuningNetwork) -> tuple[list[Tensor | None], list[tuple | None]]:
    """Rates of the dropout calls, and strengths of the other random operations, of the original model, in execution order:
    tuned ones at λ₀, None for others."""
    strengths = stn.hparams()
    taken = {s.node: tuple(strengths[i] for i in s.indices) for s in stn.recipe.plan.binding.sites if not s.insert}
    nodes = [node for node in stn.canonical(True).graph.nodes if node.op == "call_function"]
    rates = [taken.get(node.name, (None,))[0] for node in nodes if node.target in DROPOUTS]
    return rates, [taken.get(node.name) for node in nodes if node.target in OPERATIONS]


def verify(
    model: nn.Module,
    *inputs: Any,
    hparams: Sequence[Spec] | None = None,
    tolerance: float = 1e-6,
    seeds: int = 3,
    trace: str = "auto",
) -> VerifyResult:
    """Check the tangent that `transform` emits for this model, in train and in eval mode.

    inputs: as for the model, batch ≥ 2; converted to float64. trace: as for `transform`. The response is a structured one,
    with R drawn at random, so that every weight moves in a direction that no norm takes away. The witness is a central
    difference of the *original* model along `best_response`; where hparams insert an operation, which the original does not
    have, the emitted training graph is compared with its own difference besides, and the original with a transform
    without the insertions. Where the forward runs as it is (trace="live"), what it detaches or computes without gradients
    is a constant of the difference, as it is for autograd. What asks for float32 gets float64 on both sides. Points are
    drawn from `seeds` seeds until one passes. The model is left as it was. Raises what `transform` raises.
    """
    report = VerifyResult(tolerance)
    inputs = mapped(lambda x: x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)
    passed: set[tuple[str, str]] = set()
    with forked_rng():
        for seed in range(seeds):
            torch.manual_seed(seed)
            with Float64Mode(), explained_errors((inputs, None), "inputs", model):
                original = _prepare(model, inputs, seed)
            stn = _transformed(original, hparams, inputs, trace)
            report.frontend = stn.frontend
            delta = _randomize(stn, seed)
            with Float64Mode():
                for mode, against, error in _comparisons(stn, original, inputs, delta, seed, passed, tolerance):
                    report.checks.append(Check(mode, against, seed, error))
                    if error <= tolerance:
                        passed.add((mode, against))
            if report.ok:
                break
    return report


def _transformed(original: nn.Module, hparams: Sequence[Spec] | None, inputs: tuple, trace: str) -> SelfTuningNetwork:
    """transform(original); a forward that runs as it is runs in float64 throughout, whatever types it asks for."""
    refused = None
    if trace != "live":
        try:
            network = transform(original, hparams, example_inputs=inputs, trace=trace, response="structured")
            if network.frontend != "live":
                return network
        except TransformError as error:
            if trace != "auto":
                raise
            refused = error
    with Float64Mode():
        try:
            return transform(original, hparams, example_inputs=inputs, trace="live", response="structured")
        except TransformError as error:
            raise refused or error from None


def _comparisons(
    stn: SelfTuningNetwork,
    original: nn.Module,
    inputs: tuple,
    delta: Tensor,
    seed: int,
    passed: set[tuple[str, str]],
    tolerance: float,
) -> Any:
    """(mode, against, error) of every comparison that has not passed yet."""
    error, witness = partial(relative_error, tolerance=tolerance), copy.deepcopy(original)
    recipe = stn.recipe
    binding, frozen = recipe.plan.binding, recipe.plan.frozen
    live = stn.frontend == "live"
    rates, operations = ([], []) if live else _strengths(stn)
    inserts = bool(binding.dropped) or any(site.insert for site in binding.sites)

    constants: dict[tuple[bool, bool], list[Tensor]] = {}

    def of_live(step: float, training: bool, inserting: bool) -> Any:
        if (training, inserting) not in constants:
            constants[training, inserting] = []
            of_live(0.0, training, inserting)
        module = copy.deepcopy(original).train(training).requires_grad_(False)
        for name in frozen:
            module.get_submodule(name).training = False
        module.load_state_dict(stn.best_response(step * delta), strict=False)
        chosen = replace(binding, sites=tuple(site for site in binding.sites if inserting or not site.insert))
        sites = located(chosen, *cast(Live, recipe.frontend).places) if training else Sites()
        witness = ReferenceRun(module, sites, stn.hparams(), constants[training, inserting] if step else None)
        torch.manual_seed(seed)
        output = witness.run_constant(_copies(inputs))
        if not step:
            constants[training, inserting] = witness.kept
        return output

    def of_original(step: float, training: bool) -> Any:
        if live:
            return of_live(step, training, False)
        torch.manual_seed(seed)
        witness.train(training)
        for name in frozen:
            witness.get_submodule(name).training = False
        buffers = {name: buffer.clone() for name, buffer in original.named_buffers()}
        with ReplayedDropout(rates if training else []), replayed_operations(operations):
            return functional_call(witness, buffers | stn.best_response(step * delta), _copies(inputs))

    def of_graph(step: float) -> Any:
        if live:
            return of_live(step, True, True)
        torch.manual_seed(seed)
        graph = cast(nn.Module, stn.graph("train"))
        state = {name: buffer.clone() for name, buffer in stn.model.named_buffers()} | stn.best_response(step * delta)
        return functional_call(graph, {f"model.{name}": value for name, value in state.items()}, _copies(inputs))

    def tangent(network: SelfTuningNetwork, training: bool) -> Any:
        torch.manual_seed(seed)
        with torch.no_grad():
            return network.train(training).pushforward(*_copies(inputs), delta=delta)[1]

    def without_insertions() -> SelfTuningNetwork:
        sites = tuple(site for site in binding.sites if not site.insert)
        return stn.with_recipe(recipe.with_binding(replace(binding, sites=sites, dropped=())))

    if ("eval", "original model") not in passed:
        yield "eval", "original model", error(tangent(stn, False), lambda step: of_original(step, False))
    if ("train", "original model") not in passed:
        network = without_insertions() if inserts else stn
        yield "train", "original model", error(tangent(network, True), lambda step: of_original(step, True))
    if inserts and ("train", "training graph") not in passed:
        yield "train", "training graph", error(tangent(stn, True), of_graph)
