"""fxstn.verify: the emitted tangent against a central difference of the original model, in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from tabulate import tabulate
from torch import Tensor, nn

from fxstn.frontends.inputs import Inputs, as_inputs
from fxstn.frontends.preservation import Preservation
from fxstn.hp import Spec
from fxstn.ir.containers import mapped
from fxstn.ir.coverage import Coverage, shown
from fxstn.ir.errors import NoResponseError, TransformError
from fxstn.ir.generators import forked_rng, reseed
from fxstn.ir.input_errors import explained_errors
from fxstn.ir.weighted_l1 import l1_keeps_weight
from fxstn.network import SelfTuningNetwork
from fxstn.ops.recurrent import APART
from fxstn.passes.request import check_model
from fxstn.tools.doing import doing
from fxstn.tools.generic_point import generic_copy, randomize_response
from fxstn.tools.reference import Float64Mode, GraphReference, Reference, as_double, flat
from fxstn.transform import transform

STEPS = (1e-6, 3e-7, 1e-7, 3e-8, 1e-8, 1e-9, 1e-10)


@dataclass(frozen=True)
class Check:
    """One comparison at one point.

    mode: "train" or "eval".
    against: what the difference was taken of.
    seed: of the point.
    error: relative, ‖dy − difference‖ / ‖difference‖.
    """

    mode: str
    against: str
    seed: int
    error: float

    @property
    def comparison(self) -> tuple[str, str]:
        """What is compared, at whatever point."""
        return self.mode, self.against


@dataclass
class VerifyResult:
    """The comparisons that `verify` made. print() shows them in a table, and so does the prompt.

    tolerance: > 0, of the relative error.
    checks: in the order in which they were made. A comparison that fails is made again at another point, because a point
        may lie at a kink.
    frontend: how the forward was followed.
    coverage: which weights respond. Only the tangents of these are compared.
    """

    tolerance: float
    checks: list[Check] = field(default_factory=list)
    frontend: str = ""
    coverage: Coverage = field(default_factory=Coverage)

    @property
    def max_error(self) -> float:
        """The largest error of a comparison, each at its best point."""
        return max(min(c.error for c in self.checks if c.comparison == check.comparison) for check in self.checks)

    @property
    def ok(self) -> bool:
        """Whether every comparison is within the tolerance at one point at least."""
        return bool(self.checks) and self.max_error <= self.tolerance

    def passed(self, comparison: tuple[str, str]) -> bool:
        """Whether a comparison is within the tolerance at one point at least."""
        return any(check.comparison == comparison and check.error <= self.tolerance for check in self.checks)

    def _compare(self, one: Comparison, seed: int) -> None:
        """Add a comparison at a point, unless it has passed at another."""
        if not self.passed((one.mode, one.against)):
            error = relative_error(one.tangent(), one.function, self.tolerance)
            self.checks.append(Check(one.mode, one.against, seed, error))

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        if not self.checks:
            return "nothing was compared"
        rows = [
            (check.mode, check.against, check.seed, f"{check.error:.1e}", self._verdict(position))
            for position, check in enumerate(self.checks)
        ]
        table = tabulate(rows, headers=["mode", "central difference of", "seed", "relative error", ""])
        verdict = f"{'ok' if self.ok else 'NOT ok'}: largest error {self.max_error:.1e}, tolerance {self.tolerance:.0e}"
        coverage = f"{self.coverage}\n" if self.coverage.possible else ""
        return f"{table}\n{coverage}{verdict}, followed by trace={self.frontend!r}"

    def _verdict(self, position: int) -> str:
        check = self.checks[position]
        if check.error <= self.tolerance:
            return "ok"
        later = any(other.comparison == check.comparison for other in self.checks[position + 1 :])
        return "above the tolerance, repeated at another point" if later else "above the tolerance"


def central_difference(function: Callable[[float], object], step: float) -> Tensor:
    """(f(s) − f(−s)) / 2s, all float entries of the output in one vector."""
    with torch.no_grad():
        return (flat(function(step)) - flat(function(-step))) / (2 * step)


def relative_error(tangent: object, function: Callable[[float], object], tolerance: float) -> float:
    """The error of the first step that is within the tolerance, or the smallest.

    tangent: in the structure of the function's output.

    Several steps are tried, because too long a step crosses kinks and too short a step loses digits.
    """
    entries, errors = flat(tangent), list[float]()
    for step in STEPS:
        difference = central_difference(function, step)
        errors.append(((entries - difference).norm() / difference.norm().clamp_min(1e-12)).item())
        if errors[-1] <= tolerance:
            break
    return min(errors)


def _check(model: object, inputs: tuple[object, ...]) -> None:
    """Raises as `check_model`, and TypeError where there are no inputs."""
    check_model(model)
    if not inputs:
        raise TypeError(
            "verify(model, *inputs): give inputs as the model's forward takes them, a batch of two or more examples"
        )


def verify(
    model: nn.Module,
    *inputs: object,
    hparams: Sequence[Spec] | None = None,
    tolerance: float = 1e-6,
    seeds: int = 3,
    trace: str = "auto",
    example_inputs: object = None,
) -> VerifyResult:
    """Check the tangent that `transform` emits for this model, in train and in eval mode.

    inputs: as for the model, batch ≥ 2; they are converted to float64. Inputs by name are one dict, as for `transform`.
    hparams, trace, example_inputs: as for `transform`. example_inputs may be of other sizes; None for `inputs` themselves.
    tolerance: > 0, of the relative error.
    seeds: how many points are tried. A comparison that fails at one point is repeated at the next.

    The tangent is compared with a central difference of the *original* model along `best_response`. The original uses the
    random draws of the network. What it detaches or computes without gradients is a constant, as it is for autograd.

    Where hparams insert operations, the original model does not have them. Then two comparisons are made in train mode: the
    original with a network without the insertions, and the training graph of the network with a central difference of its own.

    The response is structured, with R drawn at random, so that every weight moves in a direction that no norm takes away; in
    train mode the default response, which scales weights and those of norms, is compared besides. An operation that asks for
    float32 gets float64 in both. The model and the inputs stay as they were. Raises what `transform` raises.
    """
    _check(model, inputs)
    result = VerifyResult(tolerance)
    by_name = len(inputs) == 1 and isinstance(inputs[0], Mapping)
    call: Inputs = mapped(_detached_double, as_inputs(inputs[0] if by_name else inputs, model))
    examples = call if example_inputs is None else mapped(_detached_double, as_inputs(example_inputs, model))
    with forked_rng(), _default_float64(), l1_keeps_weight(), doing("verify") as line, warnings.catch_warnings():
        warnings.filterwarnings("ignore", APART)  # weights that a difference has moved
        for seed in range(seeds):
            line.set_description_str(f"point {seed + 1} of at most {seeds}: following the forward")
            reseed(seed)
            with Float64Mode(), explained_errors((call, None), "inputs", model):
                original = generic_copy(model, call, seed)
            for structured, network in _networks(original, hparams, examples, trace):
                if structured:
                    result.frontend, result.coverage = network.frontend, network.coverage
                delta = randomize_response(network, seed)
                with Float64Mode():
                    for one in _comparisons(network, original, call, delta, seed, structured):
                        line.set_description_str(f"point {seed + 1} of at most {seeds}: {one}")
                        result._compare(one, seed)
            if result.ok:
                break
    return result


@contextmanager
def _default_float64() -> Iterator[None]:
    """Inside, a tensor whose type nobody names is float64, such as an initial state torch.zeros(layers, batch, n)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _detached_double(leaf: object) -> object:
    return as_double(leaf.detach()) if isinstance(leaf, Tensor) else leaf


def _networks(
    original: nn.Module, hparams: Sequence[Spec] | None, inputs: Inputs, trace: str
) -> Iterator[tuple[bool, SelfTuningNetwork]]:
    """(whether its response is structured, network): first that with the structured one, then with the default one, where
    scales of weights change anything."""
    for structured in (True, False):
        try:
            with shown():
                network = _transformed(original, hparams, inputs, trace, structured)
        except NoResponseError:
            if structured:
                raise
            return
        yield structured, network


def _transformed(
    original: nn.Module, hparams: Sequence[Spec] | None, inputs: Inputs, trace: str, structured: bool
) -> SelfTuningNetwork:
    """transform(original). A forward that runs as it is runs in float64 throughout, whatever types it asks for."""
    rejected, response = None, "structured" if structured else "scaled"
    if trace != "live":
        try:
            network = transform(original, hparams, example_inputs=inputs, trace=trace, response=response)
            if network.frontend != "live":
                return network
        except TransformError as error:
            if trace != "auto":
                raise
            rejected = error
    with Float64Mode():
        try:
            return transform(original, hparams, example_inputs=inputs, trace="live", response=response)
        except TransformError as error:
            raise rejected or error from None


@dataclass(frozen=True)
class Comparison:
    """A tangent and the function of a step whose derivative at 0 it should be.

    mode, against: as in `Check`.
    """

    mode: str
    against: str
    tangent: Callable[[], Tensor]
    function: Callable[[float], Tensor]

    def __str__(self) -> str:
        return f"{self.mode} mode against the {self.against}"


def _comparisons(
    network: SelfTuningNetwork, original: nn.Module, inputs: Inputs, delta: Tensor, seed: int, structured: bool
) -> list[Comparison]:
    """What is to be compared at one point; of a network whose weights are scaled, in train mode alone."""
    network.train()  # a module that the states below leave in eval mode would count as frozen
    recipe, binding = network.recipe, network.recipe.plan.binding
    inserts = bool(binding.dropped) or any(site.insert for site in binding.sites)
    plain = network
    if inserts:
        sites = tuple(site for site in binding.sites if not site.insert)
        plain = network.with_recipe(recipe.with_binding(replace(binding, sites=sites, dropped=())))

    preserved = Preservation(network.model, inputs)

    def tangent(of: SelfTuningNetwork, training: bool) -> Tensor:
        with preserved as values, torch.no_grad():
            reseed(seed)
            y, dy = of.train(training).pushforward(*values.args, delta=delta, **values.kwargs)
            flat(y)  # raises an error that names y where it has no float tensors
            return flat(dy)

    def of_original(training: bool, inserting: bool = False) -> Callable[[float], Tensor]:
        return Reference(original, network, inputs, delta, seed, training, inserting)

    if not structured:
        scaled = "original model, weights scaled"
        return [Comparison("train", scaled, partial(tangent, plain, True), of_original(True))]
    comparisons = [
        Comparison("eval", "original model", partial(tangent, network, False), of_original(False)),
        Comparison("train", "original model", partial(tangent, plain, True), of_original(True)),
    ]
    if inserts:
        of_graph = GraphReference(network, preserved, delta, seed)
        function = of_original(True, inserting=True) if network.frontend == "live" else of_graph
        comparisons.append(Comparison("train", "training graph", partial(tangent, network, True), function))
    return comparisons
