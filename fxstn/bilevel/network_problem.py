"""The bilevel problem of a network from `fxstn.transform`: λ moves the weights through the response Θ."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxstn.bilevel import distributed
from fxstn.bilevel.arguments import check_loss
from fxstn.bilevel.batches import Batch, first_part
from fxstn.bilevel.counts import Loss, LossValue
from fxstn.bilevel.faults import warn_caller
from fxstn.bilevel.losses import (
    LossFunction,
    evaluate_loss,
    general_loss,
    hyper_loss,
    response_loss,
    takes_hparams,
    validation_loss,
)
from fxstn.bilevel.norm_statistics import recalibrated_norms, value_counts
from fxstn.bilevel.perturbation import Perturb, inputs_of, joins_examples, perturbation
from fxstn.bilevel.problem import BilevelProblem, Evaluation
from fxstn.bilevel.run_settings import OF_NETWORKS, Settings
from fxstn.bilevel.sequences import CarriedState
from fxstn.bilevel.state import State
from fxstn.bilevel.temporary import eval_mode, swapped_tensors
from fxstn.network import SelfTuningNetwork
from fxstn.ops.batch_axis import batch_size
from fxstn.ops.penalty import add_decay
from fxstn.ops.precision import inexact


class NetworkProblem(BilevelProblem):
    """The problem of a network: Θ learns how w₀ responds to λ, and λ moves by what the response says of the validation loss.

    loss_fn, settings: of `BilevelRunner`.
    """

    def __init__(self, stn: SelfTuningNetwork, loss_fn: LossFunction, settings: Settings) -> None:
        super().__init__()
        self.stn, self.joint, self.draws_in_python = stn, stn.method == "stn", stn.frontend == "live"
        self.initial_state, self.valid_loss_fn = settings.initial_state, settings.valid_loss_fn or loss_fn
        self.training_windows, self.perturbed_windows = (CarriedState(loss_fn, self.initial_state) for _ in range(2))
        self.validation_windows = CarriedState(self.valid_loss_fn, settings.initial_state)
        self.tune_scale = settings.hyper.tune_scale
        self.entropy_weight = settings.hyper.entropy_weight if self.tune_scale else 0.0  # else a constant
        self.perturb: Perturb = settings.response.perturb
        if self.perturb == "example" and not stn.recipe.frontend.rewritable:
            raise ValueError(
                f"response.perturb='example' needs a graph, and this network is followed by trace={stn.frontend!r}, with "
                "one perturbation per batch: give perturb='auto', also instead of fxstn.PAPER's; stn.rejected says why"
            )
        self.response_fraction, self.response_widening = settings.response.fraction, settings.response.widening
        self.response_windows = settings.response.windows
        self._least = 2 if self._norms_of_batch() else 1  # examples of a part of a batch
        self._windows = self._seed = 0  # windows that the response step has seen in this pass; seed of the step
        self._epsilon: Tensor | None = None
        self._generator: torch.Generator | None = None  # of ε, the same in all processes
        self._gap: float | None = 0.0
        self._before: tuple[Tensor, ...] | None = None  # the state before the window that general_loss saw last
        self._decay: Tensor | None = None  # the strengths that general_loss has left to add_decay

    def general_parameters(self) -> Iterable[nn.Parameter]:
        return [parameter for parameter in self.stn.general_parameters() if parameter.requires_grad]

    def response_parameters(self) -> Iterable[nn.Parameter]:
        return self.stn.response_parameters()

    def hyper_parameters(self) -> Iterable[nn.Parameter]:
        return [self.stn.hparams.unconstrained]

    def scale_parameters(self) -> Iterable[nn.Parameter]:
        return [self.stn.hparams.raw_scale] if self.tune_scale else []

    def general_loss(self, inputs: Any, target: Any) -> Loss:
        carried = self.training_windows
        inputs = carried.inputs(inputs)
        self._before = carried.state
        with self.stn.hparams.at_rest():
            loss = general_loss(self.stn, carried.loss, inputs, target, perturb=self.perturb, decays=self.joint)
            self._decay = self.stn.hparams() if self.stn.terms.penalties and not self.joint else None
        carried.advance()
        return loss

    def add_decay(self) -> None:
        if self._decay is not None:
            add_decay(self.stn.terms.penalties, self.stn.named_weights, self._decay)

    def response_loss(self, inputs: Any, target: Any) -> Loss:
        """L_T at λ + ε, from the state before the window or, while ε stays, from that of the perturbed network."""
        carried = self.perturbed_windows
        (inputs, before), target = first_part(((inputs, self._before), target), self.response_fraction, self._least)
        begins = self._windows % self.response_windows == 0
        if begins:
            carried.state = before
        inputs = carried.inputs(inputs)
        if begins or self.response_windows == 1:
            self._epsilon = self._draw(inputs)
        assert self._epsilon is not None
        widening = self.response_widening
        with self.stn.hparams.at_rest():
            loss = response_loss(self.stn, carried.loss, inputs, target, perturb=self._epsilon, widening=widening)
        carried.advance()
        self._windows += 1
        return loss

    def _draw(self, inputs: Any) -> Tensor:
        """ε of a response step.

        Where a batch norm joins the examples, an ε each teaches fast but with a bias, one for all is right but noisy: drawn as
        often as four times the gap's share says (docs/results/hypergradient.md, From usual starts). Both have a row for each.
        """
        inputs = inputs_of(self.stn, inputs)
        draw = partial(perturbation, self.stn, inputs, generator=self._generator)
        if self.perturb != "auto" or not self.stn.per_example(*inputs.args, **inputs.kwargs) or self._gap is None:
            return draw(self.perturb).detach()
        if not joins_examples(self.stn):
            return draw("example").detach()
        joined = random.Random(self._seed).random() < 4 * self._gap
        return draw("batch" if joined else "example").detach().expand(batch_size(inputs), -1).contiguous()

    def follow_gap(self, gap: float | None) -> None:
        self._gap = gap

    def hyper_loss(self, inputs: Any, target: Any) -> Loss:
        carried = self.validation_windows
        inputs = carried.inputs(inputs)
        perturb: Perturb = perturbation(self.stn, inputs, self.perturb, self._generator) if self.tune_scale else "off"
        loss = hyper_loss(self.stn, carried.loss, inputs, target, entropy_weight=self.entropy_weight, perturb=perturb)
        carried.advance()
        self.stn.hparams.forget()  # the step to come may write into the `.data` of λ
        return loss

    def validation_loss(self, inputs: Any, target: Any) -> tuple[LossValue, Any]:
        return self.evaluation()(inputs, target)

    def evaluation_module(self) -> nn.Module:
        return self.stn

    def evaluation(self) -> Evaluation:
        carried = CarriedState(self.valid_loss_fn, self.initial_state)

        def evaluate(inputs: object, target: object) -> tuple[Loss, object]:
            loss, result = validation_loss(self.stn, carried.loss, carried.inputs(inputs), target)
            carried.advance()
            return loss, carried.output(result)

        return evaluate

    def _norms(self) -> dict[str, _BatchNorm]:
        """{module path: batch norm with running statistics}, without those that stay in eval mode."""
        frozen = self.stn.recipe.plan.frozen
        norms = {n: m for n, m in self.stn.model.named_modules() if isinstance(m, _BatchNorm) and n not in frozen}
        return {name: norm for name, norm in norms.items() if norm.running_mean is not None}

    def _norms_of_batch(self) -> dict[str, _BatchNorm]:
        """Those of `_norms` that normalise by the batch of this process in the hyper step."""
        if self.stn.method != "delta" or self.stn.recipe.plan.statistics != "batch":
            return {}
        alone = distributed.processes() == 1
        return {name: norm for name, norm in self._norms().items() if alone or not isinstance(norm, nn.SyncBatchNorm)}

    def norm_without_statistics(self, inputs: Any) -> str:
        norms = self._norms_of_batch()
        if not norms or batch_size(inputs) > 1:
            return ""
        sizes = value_counts(list(norms.values()), self._forwards([(inputs, None)]))
        return next((name for name, size in zip(norms, sizes, strict=True) if size == 1), "")

    def recalibrated(self, batches: Iterable[Batch]) -> AbstractContextManager[None]:
        return recalibrated_norms(list(self._norms().values()), self._forwards(batches))

    def _forwards(self, batches: Iterable[Batch]) -> Iterator[None]:
        """Call the network in eval mode on one batch after the other, for what its norms see."""
        carried = CarriedState(self.valid_loss_fn, self.initial_state)
        with eval_mode(self.stn):
            for inputs, _ in batches:
                args, kwargs = inputs_of(self.stn, carried.inputs(inputs))
                carried.output(self.stn(*args, **kwargs))
                carried.advance()
                yield

    def values(self) -> dict[str, float]:
        return self.stn.hparams.values()

    def ranges(self) -> dict[str, tuple[float, float]]:
        return {p.name: (p.low, p.high) for p in self.stn.hparams.hyperparameters}

    def scales(self) -> dict[str, float]:
        return dict(zip(self.stn.hparams.names, self.stn.hparams.scale.tolist(), strict=True))

    def regularizing(self) -> list[bool]:
        return [p.regularizes for p in self.stn.hparams.hyperparameters]

    def positions(self, unconstrained: Tensor) -> Tensor:
        return self.stn.hparams.bijection.position(unconstrained)

    def training_hypergradient(self) -> Tensor | None:
        return None if self.joint else self.stn.hypergradient()

    def begins(self, stream: str) -> None:
        self.stn.hparams.forget()
        if stream == "valid":
            self.validation_windows.reset()
        else:
            self.training_windows.reset()
            self._windows = 0

    def begins_step(self, seed: int) -> None:
        self._seed = seed
        self._generator = torch.Generator(self.stn.hparams.raw_scale.device).manual_seed(seed)

    @torch.no_grad()
    def diagnostics(self, inputs: Any, target: Any, seed: int) -> dict[str, float]:
        """How far one ε ~ N(0, σ²), the same for the batch, moves the network.

        "response_norm": ‖Θε‖/‖w₀‖.
        "linearization_error", for method "delta": |L_lin − L_true| / (|L_lin − L_0| + |L_true − L_0|) in [0, 1], of the
            validation losses of y + dy, of the network with weights w₀ + Θε, and with w₀, as the hyper step sees them.
        """
        stn, carried = self.stn, CarriedState(self.valid_loss_fn, self.initial_state)
        noise = torch.randn(len(stn.hparams), generator=torch.Generator().manual_seed(seed))
        epsilon = stn.hparams.scale.detach() * noise.to(stn.hparams.scale)
        moved, at_rest = stn.wide_response(epsilon), stn.wide_response(torch.zeros_like(epsilon))
        weights = {name: weight for name, weight in at_rest.items() if inexact(weight)}
        changes = torch.stack([(moved[name] - weight).norm() for name, weight in weights.items()])
        sizes = torch.stack([weight.norm() for weight in weights.values()])
        result = {"response_norm": (changes.norm() / sizes.norm()).item()}
        if stn.method != "delta" or stn.augments:
            return result
        inputs = inputs_of(stn, carried.inputs(inputs))

        def loss(delta: Tensor) -> float:
            output, _ = stn.perturbed_output(*inputs.args, delta=delta, training=False, **inputs.kwargs)
            return evaluate_loss(carried.loss, output, inputs, target).data.item()

        linearized, plain = loss(epsilon), loss(torch.zeros_like(epsilon))
        parameters = dict(stn.model.named_parameters())
        with swapped_tensors([parameters[name] for name in moved], list(moved.values())):
            true = loss(torch.zeros_like(epsilon))
        change = abs(linearized - plain) + abs(true - plain)
        return result | {"linearization_error": abs(linearized - true) / change if change else 0.0}

    def local_state(self) -> State:
        windows = (self.training_windows, self.perturbed_windows, self.validation_windows)
        epsilon = self._epsilon if self.response_windows > 1 else None
        return {"windows": self._windows, "epsilon": epsilon, "carried": [carried.state for carried in windows]}

    def load_local_state(self, state: State) -> None:
        self._windows = state["windows"]
        self._epsilon = state["epsilon"] if self.response_windows > 1 else None
        windows = (self.training_windows, self.perturbed_windows, self.validation_windows)
        for carried, saved in zip(windows, state["carried"], strict=True):
            carried.state = saved

    def export(self) -> nn.Module:
        return self.stn.export()


def _warn_of_unread(stn: SelfTuningNetwork, loss_fn: LossFunction) -> None:
    """Warn of hyperparameters that only a loss function could read, where it does not."""
    uses = zip(stn.hparams.names, stn.recipe.plan.binding.uses(), strict=True)
    unread = [name for name, own in uses if not own]
    if unread and not takes_hparams(loss_fn):
        better = "fxstn.cross_entropy reads label_smoothing; " if "label_smoothing" in unread else ""
        warn_caller(f"nothing reads {', '.join(unread)}: loss_fn has no parameter hparams; {better}give a function (output, "
                    "target, hparams), where hparams is {name: values} in training and None else", UserWarning)  # fmt: skip


def as_problem(
    stn: SelfTuningNetwork | BilevelProblem, loss_fn: LossFunction | None, settings: Settings
) -> BilevelProblem:
    """The problem that a runner's arguments mean. Raises TypeError where they are of another kind, or do not go together.

    loss_fn: None for a problem of the user's own.

    Warns of hyperparameters that nothing reads.
    """
    if isinstance(stn, SelfTuningNetwork):
        check_loss(loss_fn, "loss_fn")
        check_loss(settings.valid_loss_fn or loss_fn, "valid_loss_fn")
        assert loss_fn is not None
        _warn_of_unread(stn, loss_fn)
        return NetworkProblem(stn, loss_fn, settings)
    if not isinstance(stn, BilevelProblem):
        raise TypeError(f"the first argument must come from fxstn.transform(model, hparams), got {type(stn).__name__}")
    if unused := settings.changed(OF_NETWORKS):
        raise TypeError(f"{', '.join(unused)}: only for a network from fxstn.transform, not for a BilevelProblem")
    return stn
