"""What fxstn bench runs: a setup, and the steps of tuning on one batch, by the three objectives or in a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxstn
from fxstn import hp
from fxstn.bilevel.batches import to_device
from fxstn.bilevel.objectives import general_loss, hyper_loss, response_loss
from fxstn.bilevel.optimizers import sgd
from fxstn.bilevel.perturbation import PerturbMode
from fxstn.tools.models import build_model
from fxstn.transform import transform

TRAIN_STEPS = 5
Factory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Setup:
    """What is measured: a model, its input, and how it is run.

    model: a name, as for `build_model`.
    tuned: "dropout" (hparams=None), "weight-decay" (one per layer), or a number of hyperparameters that only the loss could
        read, which cost what any hyperparameter costs in the response.
    compile, bf16, channels_last: for every variant, plain training too.
    recompute: activation checkpointing in the response and hyper steps.
    """

    model: str
    batch_size: int = 64
    image_size: int = 32
    classes: int = 10
    device: str = "cpu"
    tuned: str | int = "dropout"
    compile: bool = False
    bf16: bool = False
    channels_last: bool = False
    recompute: bool = False

    def hparams(self) -> list[hp.Spec] | None:
        if self.tuned == "weight-decay":
            return [hp.WeightDecay("*")]
        return None if self.tuned == "dropout" else [hp.Scalar(f"s{i}", 0.5, 0, 1) for i in range(int(self.tuned))]

    def build(self) -> tuple[nn.Module, Tensor, Tensor]:
        """(model in train mode, a batch of images, its classes)."""
        torch.manual_seed(0)
        model = build_model(self.model, self.classes).to(self.device).train()
        x = torch.randn(self.batch_size, 3, self.image_size, self.image_size)
        target = torch.randint(self.classes, (self.batch_size,))
        layout = torch.channels_last if self.channels_last else None
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        return model, *to_device((x, target), torch.device(self.device), layout)

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)


class Stepper:
    """One optimizer's step on any loss."""

    def __init__(self, setup: Setup, optimizer: torch.optim.Optimizer) -> None:
        self.setup, self.optimizer = setup, optimizer

    def __call__(self, loss_of: Callable[[], Tensor], before: Callable[[], object] | None = None) -> None:
        """before: runs between the backward pass and the optimizer's step."""
        with self.setup.precision():
            loss = loss_of()
        loss.backward()
        if before is not None:
            before()
        self.optimizer.step()
        self.optimizer.zero_grad()


class TunedTraining:
    """The steps of tuning a network on one batch, which serves for training and validation.

    response: as for `transform`.
    response_optimizer: a factory.
    """

    def __init__(
        self, setup: Setup, model: nn.Module, x: Tensor, target: Tensor, response: str, response_optimizer: Factory
    ) -> None:
        self.x, self.target = x, target
        self.stn = transform(model, setup.hparams(), response=response, recompute=setup.recompute).train()
        if setup.compile:
            self.stn.compile()
        hparams = list(self.stn.hparams.parameters())
        self.step_general = Stepper(setup, sgd(list(self.stn.general_parameters())))
        self.step_response = Stepper(setup, response_optimizer(list(self.stn.response_parameters())))
        self.step_hyper = Stepper(setup, torch.optim.RMSprop(hparams, lr=1e-3))

    def general(self, corrected: bool = False) -> None:
        loss = partial(general_loss, self.stn, F.cross_entropy, self.x, self.target)
        self.step_general(loss, before=self.stn.hypergradient if corrected else None)

    def response(self) -> None:
        self.step_response(partial(response_loss, self.stn, F.cross_entropy, self.x, self.target))

    def hyper(self, perturb: PerturbMode) -> None:
        self.step_hyper(partial(hyper_loss, self.stn, F.cross_entropy, self.x, self.target, perturb=perturb))

    def cycle(self, steps: int, responses: int, hypers: int, perturb: PerturbMode, corrected: bool) -> None:
        """Some inner steps, and response and hyper steps at equal intervals between them.

        steps, responses, hypers: the number of each.
        perturb: of the hyper step.
        corrected: whether the training hypergradient is subtracted.
        """
        for number in range(1, steps + 1):
            self.general(corrected)
            if number * responses // steps > (number - 1) * responses // steps:
                self.response()
            if number * hypers // steps > (number - 1) * hypers // steps:
                self.hyper(perturb)


class TunedLoop:
    """A step of a loop of one's own with `fxstn.tune` in front of it, on one batch, without evaluations."""

    def __init__(self, setup: Setup) -> None:
        self.model, x, target = setup.build()
        self.batch, self.optimizer = (x, target), sgd(list(self.model.parameters()))
        self.step = Stepper(setup, self.optimizer)
        self.tuner = fxstn.tune(self.model, self.optimizer, F.cross_entropy, None, [self.batch], setup.hparams())

    def cycle(self, steps: int) -> None:
        x, target = self.batch
        for _ in range(steps):
            self.step(lambda: F.cross_entropy(self.model(x), target))
            self.tuner.step(self.batch)
