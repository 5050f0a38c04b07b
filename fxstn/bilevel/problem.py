"""What a BilevelRunner trains: a problem with the three objectives of Alg. 1, such as that of a transformed network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxstn.bilevel.batches import part
from fxstn.bilevel.lending import evaluating, lent
from fxstn.bilevel.objectives import (
    LossFunction,
    Perturb,
    as_tuple,
    evaluate_loss,
    general_loss,
    hyper_loss,
    perturbation,
    response_loss,
    validation_loss,
)
from fxstn.bilevel.recalibration import recalibrated
from fxstn.bilevel.sequences import Carried
from fxstn.network import SelfTuningNetwork
from fxstn.ops.batch_axis import batch_size


class BilevelProblem(nn.Module):
    """A bilevel problem of one's own, for `BilevelRunner(problem, None, train_loader, valid_loader)`: subclass it.

    It is a module, which holds its parameters and moves to a device; what is trained, on which objective, are the methods here.
    Needed: general_parameters, hyper_parameters, general_loss, hyper_loss, validation_loss. Each loss takes (inputs, target) as
    the loader gives them and returns a scalar; the runner calls .backward() on it and steps the optimizer of the parameters
    named like it, so gradients must reach these and no others: hold or detach the rest. The runner checks the first step of
    each kind. Example: examples/label_noise.py; in words: docs/own.md.
    """

    joint = False  # whether the general step moves the response parameters, too

    def general_parameters(self) -> Iterable[nn.Parameter]:
        """w₀, learned on general_loss."""
        raise NotImplementedError

    def response_parameters(self) -> Iterable[nn.Parameter]:
        """Θ, learned on response_loss. None, unless there are any."""
        return ()

    def hyper_parameters(self) -> Iterable[nn.Parameter]:
        """λ, learned on hyper_loss."""
        raise NotImplementedError

    def scale_parameters(self) -> Iterable[nn.Parameter]:
        """σ, learned on hyper_loss by an optimizer of its own. None, unless there are any."""
        return ()

    def general_loss(self, inputs: Any, target: Any) -> Tensor:
        """The training loss, a scalar."""
        raise NotImplementedError

    def response_loss(self, inputs: Any, target: Any) -> Tensor:
        """What response parameters learn from, a scalar, on the batch that general_loss saw last."""
        raise NotImplementedError

    def hyper_loss(self, inputs: Any, target: Any) -> Tensor:
        """The validation loss as λ sees it, a scalar."""
        raise NotImplementedError

    def validation_loss(self, inputs: Any, target: Any) -> tuple[Tensor, Any]:
        """(loss, output) as reported and selected on. The runner calls it without gradients and in eval mode."""
        raise NotImplementedError

    def values(self) -> dict[str, float]:
        """Hyperparameters by name: columns of the history."""
        return {}

    def ranges(self) -> dict[str, tuple[float, float]]:
        """The range of each of `values` that has one."""
        return {}

    def scales(self) -> dict[str, float]:
        """σ by name of the hyperparameter."""
        return {}

    def regularizing(self) -> Sequence[bool]:
        """For each number of the one λ, in order, whether a higher value is a stronger regularisation.

        The generalisation gap limits the steps of these (`fxstn.optim.set_gap`). Empty: nothing is known, and nothing limited.
        """
        return ()

    def positions(self, unconstrained: Tensor) -> Tensor:
        """Where in its range each number of λ is, in [0, 1] and in the shape of λ: torch.sigmoid(unconstrained) for logits.

        Near an end, steps towards it need more certainty (`fxstn.optim.SettlingAdam`). The default, 0.5: no number has ends.
        """
        return torch.full_like(unconstrained, 0.5)

    def training_hypergradient(self) -> Tensor | None:
        """The training loss's derivative in λ, from the gradients of w₀; None: nothing to correct (`inner_correction`)."""
        return None

    def begins(self, stream: str) -> None:
        """A pass over the "train" or "valid" loader begins."""

    def evaluation(self) -> Callable[[Any, Any], tuple[Tensor, Any]]:
        """validation_loss for one pass over a loader, without gradients and in eval mode."""

        def evaluate(inputs: Any, target: Any) -> tuple[Tensor, Any]:
            with evaluating(self):
                return self.validation_loss(inputs, target)

        return evaluate

    def recalibrated(self, batches: Iterable[tuple[Any, Any]]) -> AbstractContextManager[None]:
        """For an evaluation: statistics, such as those of batch norms, made anew from some training batches."""
        return nullcontext()

    def diagnostics(self, inputs: Any, target: Any, seed: int) -> dict[str, float]:
        """Further numbers, measured after each epoch on a validation batch: columns of the history."""
        return {}

    def local_state(self) -> dict[str, Any]:
        """What a process has besides parameters and buffers, for a checkpoint: tensors, numbers, strings, and lists, tuples and
        dicts of them."""
        return {}

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Take back what local_state gave, its tensors on the device of the run."""

    def export(self) -> nn.Module:
        """What is kept of the best epoch; `BilevelRunner.best_model` returns it."""
        return copy.deepcopy(self)


class NetworkProblem(BilevelProblem):
    """The problem of a network from `fxstn.transform`; the arguments are those of `BilevelRunner`."""

    def __init__(
        self,
        stn: SelfTuningNetwork,
        loss_fn: LossFunction,
        valid_loss_fn: LossFunction | None,
        *,
        initial_state: Callable[[int], tuple[Tensor, ...]] | None,
        entropy_weight: float,
        tune_scale: bool,
        perturb: Perturb,
        response_fraction: float,
        response_widening: float,
        response_windows: int,
        hyper_fraction: float,
    ) -> None:
        super().__init__()
        self.stn, self.joint = stn, stn.method == "stn"
        self.initial_state, self.valid_loss_fn = initial_state, valid_loss_fn or loss_fn
        self.training_windows, self.perturbed_windows = Carried(loss_fn, initial_state), Carried(loss_fn, initial_state)
        self.validation_windows = Carried(self.valid_loss_fn, initial_state)
        self.entropy_weight, self.tune_scale, self.perturb = entropy_weight, tune_scale, perturb
        self.response_fraction, self.response_widening = response_fraction, response_widening
        self.response_windows, self.hyper_fraction = response_windows, hyper_fraction
        self._windows = 0  # that the response step has seen in this pass
        self._epsilon: Tensor | None = None
        self._before: Any = None  # the state before the window that general_loss saw last

    def general_parameters(self) -> Iterable[nn.Parameter]:
        return [parameter for parameter in self.stn.general_parameters() if parameter.requires_grad]

    def response_parameters(self) -> Iterable[nn.Parameter]:
        return self.stn.response_parameters()

    def hyper_parameters(self) -> Iterable[nn.Parameter]:
        return [self.stn.hparams.unconstrained]

    def scale_parameters(self) -> Iterable[nn.Parameter]:
        return [self.stn.hparams.raw_scale] if self.tune_scale else []

    def general_loss(self, inputs: Any, target: Any) -> Tensor:
        carried = self.training_windows
        inputs = carried.inputs(inputs)
        self._before = carried.state
        loss = general_loss(self.stn, carried.loss, inputs, target, perturb=self.perturb if self.joint else None)
        carried.advance()
        return loss

    def response_loss(self, inputs: Any, target: Any) -> Tensor:
        """L_T at λ + ε, from the state before the window or, while ε is kept, from that of the perturbed network."""
        carried = self.perturbed_windows
        (inputs, before), target = part(((inputs, self._before), target), self.response_fraction)
        begins = self._windows % self.response_windows == 0
        if begins:
            carried.state = before
        inputs = carried.inputs(inputs)
        if self.response_windows > 1 and begins:
            self._epsilon = perturbation(self.stn, inputs, self.perturb).detach()
        perturb = self.perturb if self._epsilon is None else self._epsilon
        loss = response_loss(self.stn, carried.loss, inputs, target, perturb=perturb, widening=self.response_widening)
        carried.advance()
        self._windows += 1
        return loss

    def hyper_loss(self, inputs: Any, target: Any) -> Tensor:
        carried = self.validation_windows
        inputs, target = part((inputs, target), self.hyper_fraction)
        perturb = self.perturb if self.tune_scale else "none"
        loss = hyper_loss(
            self.stn, carried.loss, carried.inputs(inputs), target, entropy_weight=self.entropy_weight, perturb=perturb
        )
        carried.advance()
        return loss

    def validation_loss(self, inputs: Any, target: Any) -> tuple[Tensor, Any]:
        return self.evaluation()(inputs, target)

    def evaluation(self) -> Callable[[Any, Any], tuple[Tensor, Any]]:
        carried = Carried(self.valid_loss_fn, self.initial_state)

        def evaluate(inputs: Any, target: Any) -> tuple[Tensor, Any]:
            loss, result = validation_loss(self.stn, carried.loss, carried.inputs(inputs), target)
            carried.advance()
            return loss, carried.output(result)

        return evaluate

    def recalibrated(self, batches: Iterable[tuple[Any, Any]]) -> AbstractContextManager[None]:
        frozen = self.stn.recipe.plan.frozen
        norms = [m for n, m in self.stn.model.named_modules() if isinstance(m, _BatchNorm) and n not in frozen]
        norms = [norm for norm in norms if norm.running_mean is not None]
        return recalibrated(norms, partial(self._run, batches)) if norms else nullcontext()

    def _run(self, batches: Iterable[tuple[Any, Any]]) -> None:
        """The network in eval mode on each batch, for what it does on the way."""
        carried = Carried(self.valid_loss_fn, self.initial_state)
        with evaluating(self.stn):
            for inputs, _ in batches:
                carried.output(self.stn(*as_tuple(carried.inputs(inputs))))
                carried.advance()

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
        if stream == "valid":
            self.validation_windows.reset()
        else:
            self.training_windows.reset()
            self._windows = 0

    @torch.no_grad()
    def diagnostics(self, inputs: Any, target: Any, seed: int) -> dict[str, float]:
        """At one ε ~ N(0, σ²), the same for the batch: "response_norm", ‖Θε‖/‖w₀‖, and for method "delta"
        "linearization_error", |L_lin − L_true| / (|L_lin − L_0| + |L_true − L_0|) in [0, 1], of the validation losses of
        y + dy, of the network with the weights w₀ + Θε, and of that with w₀, all as the hyper step sees them."""
        stn, carried = self.stn, Carried(self.valid_loss_fn, self.initial_state)
        noise = torch.randn(len(stn.hparams), generator=torch.Generator().manual_seed(seed))
        epsilon = stn.hparams.scale.detach() * noise.to(stn.hparams.scale)
        moved, at_rest = stn.best_response(epsilon), stn.best_response(torch.zeros_like(epsilon))
        changes = torch.stack([(w - at_rest[n]).norm() for n, w in moved.items()])
        sizes = torch.stack([w.norm() for w in at_rest.values()])
        found = {"response_norm": (changes.norm() / sizes.norm()).item()}
        if stn.method != "delta" or stn.augments:
            return found
        inputs = as_tuple(carried.inputs(inputs))

        def loss(delta: Tensor) -> float:
            output, _ = stn.perturbed_output(*inputs, delta=delta, training=False)
            return evaluate_loss(carried.loss, output, target, batch_size(inputs), None).item()

        linearized, plain = loss(epsilon), loss(torch.zeros_like(epsilon))
        parameters = dict(stn.model.named_parameters())
        with lent([parameters[name] for name in moved], list(moved.values())):
            true = loss(torch.zeros_like(epsilon))
        change = abs(linearized - plain) + abs(true - plain)
        return found | {"linearization_error": abs(linearized - true) / change if change else 0.0}

    def local_state(self) -> dict[str, Any]:
        windows = (self.training_windows, self.perturbed_windows, self.validation_windows)
        return {"windows": self._windows, "epsilon": self._epsilon, "carried": [carried.state for carried in windows]}

    def load_local_state(self, state: dict[str, Any]) -> None:
        self._windows, self._epsilon = state["windows"], state["epsilon"]
        windows = (self.training_windows, self.perturbed_windows, self.validation_windows)
        for carried, saved in zip(windows, state["carried"], strict=True):
            carried.state = saved

    def export(self) -> nn.Module:
        return self.stn.export()
