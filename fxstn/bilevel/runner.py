"""BilevelRunner: the alternation of Alg. 1 over data loaders, with everything a training run needs around it."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fxstn.bilevel.batches import part, placed
from fxstn.bilevel.checkpoint import (
    Cycle,
    loader_state,
    random_state,
    save_atomically,
    set_loader_state,
    set_random_state,
)
from fxstn.bilevel.history import SCALE, History
from fxstn.bilevel.objectives import (
    LossFunction,
    general_loss,
    hyper_loss,
    perturbation,
    response_loss,
    validation_loss,
)
from fxstn.bilevel.optimizers import OptimizerLike, SettlingAdam, adam, made, sgd
from fxstn.bilevel.sequences import Carried
from fxstn.network import SelfTuningNetwork, batch_size

FORMAT = 3
DEFAULT_RESPONSE_FRACTION, DEFAULT_RESPONSE_EVERY = 1.0, 4
_rmsprop = partial(torch.optim.RMSprop, lr=1e-2)
PAPER: dict[str, Any] = {
    "response_every": 1, "response_fraction": 1.0, "response_widening": 1.0, "tune_scale": True, "hyper_optimizer": _rmsprop,
    "inner_correction": 0.0,
}  # fmt: skip


class DivergedError(RuntimeError):
    """A loss became NaN or infinite. The best model so far is kept."""


def accuracy(output: Tensor, target: Tensor) -> float:
    """Share of examples whose largest logit is the target class; in [0, 1]. output: (batch, classes), target: (batch,)."""
    return (output.argmax(-1) == target).float().mean().item()


def _count(inputs: Any, target: Any) -> int:
    """What a mean loss is the mean over: examples, or the times of all of them."""
    return target.numel() if isinstance(target, Tensor) and target.dim() else batch_size(inputs)


def _length(loader: Any) -> int | None:
    """Number of batches, None where the loader does not know it (an IterableDataset)."""
    try:
        return len(loader)
    except TypeError:
        return None


class BilevelRunner:
    """Trains w₀, Θ, λ and σ together (paper, Alg. 1).

    stn: from `fxstn.transform`. loss_fn(output, target) → scalar, the mean over the batch; where it has a parameter
    `hparams` it gets {name: (batch,) constrained values} in training and None in the hyper step and in evaluation
    (valid_loss_fn replaces it there). Loaders yield (inputs, target); a tuple of inputs is unpacked.

    optimizer (default SGD, momentum 0.9, lr 1e-2), response_optimizer (Adam, lr 1e-2; of a structured response as the
    weights'), hyper_optimizer (Adam, whose rate falls from 0.2, and that moves λ only as far as its gradient's sign is
    certain: `fxstn.bilevel.optimizers.SettlingAdam`), scale_optimizer (RMSprop, lr 1e-2): a factory, or an optimizer that holds
    exactly those parameters. tune_scale: True learns σ, on a hyper step that is perturbed with it (Eq. 2.7); False keeps σ, and
    the hyper step takes the gradient at λ itself.
    train_steps, valid_steps: T_train, T_valid ≥ 1. warmup_epochs: epochs without hyper steps. entropy_weight: τ ≥ 0.
    inner_correction: c ≥ 0; the hypergradient is Θᵀ(∇L_V − c ∇L_T), ∇L_T the mean over the inner steps since the last hyper
    step. Where the weights are at their best ∇L_T is zero and c says nothing. Before that Θᵀ∇L_V also asks for what training
    does anyway, and c = 1 takes that out: to first order ∇L_V − ∇L_T is ∇L_V after a Newton step of the training loss, as
    long as both losses have about the same curvature. The paper: 0. Unused by method "stn".
    response_every ≥ 1: inner steps from one response step to the next; each is unbiased, Θ moves less often.
    response_widening: ≥ 1, how many σ at most the response step perturbs with near the ends of a range. response_fraction,
    hyper_fraction: part of each batch, in (0, 1], that the response and the hyper step see; unbiased but for batch statistics.
    compile: run the graphs through torch.compile; a dict gives its options. autocast: a dtype, such as torch.bfloat16, for
    the losses' forward; parameters stay as they are. memory_format: of weights and 4-d (5-d) inputs, such as
    torch.channels_last.
    perturb: "example" (one ε per example, the paper), "batch", or None: per example where the network allows.
    schedulers: {name of an optimizer argument: factory}, lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 30)
    say; stepped after each epoch, ReduceLROnPlateau with the validation loss. clip_norm: largest norm of a step's gradient of
    w₀, and of Θ; None: no bound.
    initial_state: of a network that carries a state, forward(*inputs, *state) → (output, state), from one window of its
    sequences to the next: initial_state(batch) → the first (`fxstn.Carried`). train_loader then yields windows in order, all
    with as many examples; the state begins anew with each epoch. The loss functions and metrics get the output alone.
    response_windows: ≥ 1, windows over which the response step keeps ε and goes on with the state of the perturbed network, so
    that the tangent reaches back over them; 1: each begins with the state of the general step, and a tangent of zero.
    metrics: {name: f(output, target) → number}, averaged over the validation set. columns: {name: f(row) → number}, further
    columns of the history, from those it has; shown in the progress bar. patience: stop after that many epochs
    without a better validation loss. out_dir: where history.csv, last.pt and best.pt go; a run that finds its last.pt
    there resumes. progress: None shows a bar on a terminal only.

    Raises ValueError for an empty loader, an optimizer with other parameters, or a number out of range. Warns when weight
    decay is tuned and also set in an optimizer.
    """

    def __init__(
        self,
        stn: SelfTuningNetwork,
        loss_fn: LossFunction,
        train_loader: Any,
        valid_loader: Any,
        *,
        valid_loss_fn: LossFunction | None = None,
        optimizer: OptimizerLike = None,
        response_optimizer: OptimizerLike = None,
        hyper_optimizer: OptimizerLike = None,
        scale_optimizer: OptimizerLike = None,
        tune_scale: bool = False,
        train_steps: int = 5,
        valid_steps: int = 1,
        warmup_epochs: int = 0,
        entropy_weight: float = 1e-3,
        response_fraction: float = DEFAULT_RESPONSE_FRACTION,
        response_every: int = DEFAULT_RESPONSE_EVERY,
        response_widening: float = 2.0,
        response_windows: int = 1,
        hyper_fraction: float = 1.0,
        inner_correction: float = 1.0,
        perturb: str | None = None,
        schedulers: dict[str, Callable[[torch.optim.Optimizer], Any]] | None = None,
        clip_norm: float | None = None,
        initial_state: Callable[[int], tuple[Tensor, ...]] | None = None,
        metrics: dict[str, Callable[[Any, Any], float]] | None = None,
        columns: dict[str, Callable[[dict[str, Any]], float]] | None = None,
        patience: int | None = None,
        device: torch.device | str | None = None,
        out_dir: str | Path | None = None,
        progress: bool | None = None,
        compile: bool | dict[str, Any] = False,
        autocast: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
    ) -> None:
        for name, loader in (("train_loader", train_loader), ("valid_loader", valid_loader)):
            if _length(loader) == 0:
                raise ValueError(
                    f"{name} is empty: it yields no batch (fewer examples than batch_size with drop_last?)"
                )
        counts = {"train_steps": train_steps, "valid_steps": valid_steps, "response_every": response_every,
                  "response_windows": response_windows}  # fmt: skip
        fractions = {"response_fraction": response_fraction, "hyper_fraction": hyper_fraction}
        wrong = [f"{name}={value} must be at least 1" for name, value in counts.items() if value < 1]
        wrong += [f"{name}={value} must be in (0, 1]" for name, value in fractions.items() if not 0 < value <= 1]
        wrong += [f"response_widening={response_widening} must be at least 1"] if not response_widening >= 1 else []
        floors = {
            "warmup_epochs": warmup_epochs,
            "entropy_weight": entropy_weight,
            "inner_correction": inner_correction,
        }
        wrong += [f"{name}={value} must not be negative" for name, value in floors.items() if value < 0]
        if response_windows > 1 and (initial_state is None or response_every > 1):
            wrong += [
                f"response_windows={response_windows} needs initial_state and response_every=1, a step at every window"
            ]
        wrong += [f"clip_norm={clip_norm} must be positive"] if clip_norm is not None and not clip_norm > 0 else []
        if wrong:
            raise ValueError("; ".join(wrong))
        self.device = torch.device(device) if device is not None else next(stn.parameters()).device
        self.stn = stn.to(self.device)
        self.autocast, self.memory_format = autocast, memory_format
        if memory_format is not None:
            self.stn.to(memory_format=memory_format)  # type: ignore[call-overload]
        if compile:
            self.stn.compile(**(compile if isinstance(compile, dict) else {}))
        self.valid_loss_fn, self.initial_state = valid_loss_fn or loss_fn, initial_state
        self._training = Carried(loss_fn, initial_state)
        self._perturbed = Carried(loss_fn, initial_state)
        self._validating = Carried(self.valid_loss_fn, initial_state)
        self._windows = 0  # that the response step has seen in this epoch
        self._epsilon: Tensor | None = None
        self.train_loader, self.valid_loader = train_loader, valid_loader
        self.train_steps, self.valid_steps, self.warmup_epochs = train_steps, valid_steps, warmup_epochs
        self.entropy_weight, self.perturb = entropy_weight, perturb
        self.response_fraction, self.response_every = response_fraction, response_every
        self.response_widening, self.hyper_fraction = response_widening, hyper_fraction
        self.response_windows = response_windows
        self.inner_correction = inner_correction
        self.metrics, self.columns, self.patience, self.progress = metrics or {}, columns or {}, patience, progress
        self.out_dir = Path(out_dir) if out_dir is not None else None
        general = [parameter for parameter in stn.general_parameters() if parameter.requires_grad]
        self.optimizers = {
            "optimizer": made(optimizer, sgd, general, "optimizer"),
            "response_optimizer": made(
                response_optimizer,
                sgd if stn.structured else adam,
                list(stn.response_parameters()),
                "response_optimizer",
            ),
            "hyper_optimizer": made(hyper_optimizer, SettlingAdam, [stn.hparams.unconstrained], "hyper_optimizer"),
        }
        if tune_scale:
            self.optimizers["scale_optimizer"] = made(
                scale_optimizer, _rmsprop, [stn.hparams.raw_scale], "scale_optimizer"
            )
        if unknown := sorted(set(schedulers or {}) - set(self.optimizers)):
            raise ValueError(f"schedulers names {unknown[0]!r}; this run has {', '.join(self.optimizers)}")
        self.schedulers = {name: make(self.optimizers[name]) for name, make in (schedulers or {}).items()}
        self.clip_norm = clip_norm
        for name in ("optimizer", "response_optimizer"):
            if stn.terms.penalties and any(group.get("weight_decay") for group in self.optimizers[name].param_groups):
                warnings.warn(
                    f"weight decay is tuned and also set in {name}: both act; set weight_decay=0 there", stacklevel=2
                )
        self.history = History(stn.hparams.names)
        self.best: dict[str, Any] | None = None
        self.steps = 0  # inner steps done; a cycle of train_steps may span epochs
        self._validation = Cycle(valid_loader)
        self._inner: list[Tensor] = []  # Θᵀ∇L_T of the inner steps since the last hyper step

    # Training

    def fit(self, epochs: int, minutes: float | None = None) -> History:
        """Train until `epochs` epochs are done in all, or the epoch in which `minutes` in all are over; resumes from out_dir.
        Returns the history.

        Raises DivergedError when a loss is no longer finite; what was best is kept in `best` and in out_dir/best.pt.
        """
        if self.out_dir and not len(self.history) and (self.out_dir / "last.pt").exists():
            self.load(self.out_dir / "last.pt")
        disable = None if self.progress is None else not self.progress
        with tqdm(total=epochs, initial=min(len(self.history), epochs), unit="epoch", disable=disable) as bar:
            while len(self.history) < epochs and not self._out_of_patience() and not self._out_of_time(minutes):
                self._epoch(bar)
                row = self.history.rows[-1]
                shown = {
                    "train": row["train_loss"],
                    "valid": row["valid_loss"],
                    **{name: row[name] for name in self.columns},
                }
                bar.set_postfix({name: f"{value:.4f}" for name, value in shown.items()}, refresh=False)
                bar.update()
        return self.history

    def _out_of_patience(self) -> bool:
        if self.patience is None or not len(self.history):
            return False
        return len(self.history) - self.history.best()["epoch"] >= self.patience

    def _out_of_time(self, minutes: float | None) -> bool:
        return minutes is not None and len(self.history) > 0 and sum(self.history["seconds"]) >= 60 * minutes

    def _epoch(self, bar: Any) -> None:
        start, number = time.perf_counter(), len(self.history) + 1
        self.stn.train()
        totals: dict[str, Tensor] = {}
        counts: Counter[str] = Counter()
        steps = 0
        self._training.reset()
        self._windows = 0
        for batch in self.train_loader:
            for name, loss in self._inner_step(self._placed(batch)).items():
                totals[name] = totals.get(name, torch.zeros((), device=self.device)) + loss
                counts[name] += 1
            steps += 1
            self.steps += 1
            if self.steps % self.train_steps == 0 or steps == 1:
                self._check_finite(totals, number, steps)
            if self.steps % self.train_steps == 0:
                for _ in range(self.valid_steps if number > self.warmup_epochs else 0):
                    self._hyper_step(number, steps)
                self._inner.clear()
        if not steps:
            raise ValueError("train_loader is empty: it yielded no batch")
        self._check_finite(totals, number, steps)
        losses = {name: (total / counts[name]).item() for name, total in totals.items()}
        if self.stn.method != "stn":
            losses.setdefault("response_loss", float("nan"))  # a short epoch without a response step
        row: dict[str, Any] = {"epoch": number, **losses, **self.evaluate()}
        self._check_finite({"valid_loss": torch.tensor(row["valid_loss"])}, number, steps)
        scales = self.stn.hparams.scale.tolist()
        row |= self.stn.hparams.values() | {SCALE + n: s for n, s in zip(self.stn.hparams.names, scales, strict=True)}
        row |= {name: float(column(row)) for name, column in self.columns.items()}
        row["seconds"] = round(time.perf_counter() - start, 3)
        for scheduler in self.schedulers.values():
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([row["valid_loss"]] if plateau else []))
        self.history.rows.append(row)
        if self.best is None or row["valid_loss"] < self.best["valid_loss"]:
            state = {name: value.clone() for name, value in self.stn.export().state_dict().items()}
            self.best = {"epoch": number, "valid_loss": row["valid_loss"], "model": state}
            if self.out_dir:
                save_atomically(self.best, self.out_dir / "best.pt")
        if self.out_dir:
            self.history.to_csv(self.out_dir / "history.csv")
            self.save(self.out_dir / "last.pt")

    def _inner_step(self, batch: tuple[Any, Any]) -> dict[str, Tensor]:
        """One step of w₀ and, when it is due, one of Θ on a training batch; of both at once for method "stn"."""
        (x, target), carried = batch, self._training
        inputs, before = carried.inputs(x), carried.state
        perturb = self.perturb if self.stn.method == "stn" else None
        with self._precision():
            loss = general_loss(self.stn, carried.loss, inputs, target, perturb=perturb)
        loss.backward()
        carried.advance()
        if self.stn.method == "stn":
            return {"train_loss": self._stepped(loss, "optimizer", "response_optimizer")}
        if self.inner_correction and len(self.history) >= self.warmup_epochs:
            self._inner.append(self.stn.hypergradient())
        losses = {"train_loss": self._stepped(loss, "optimizer")}
        if (self.steps + 1) % self.response_every == 0:
            loss = self._response_loss(x, target, before)
            loss.backward()
            losses["response_loss"] = self._stepped(loss, "response_optimizer")
        return losses

    def _response_loss(self, x: Any, target: Any, before: Any) -> Tensor:
        """L_T at λ + ε, from the state `before` the window or, while ε is kept, from that of the perturbed network."""
        carried = self._perturbed
        (x, before), target = part(((x, before), target), self.response_fraction)
        begins = self._windows % self.response_windows == 0
        if begins:
            carried.state = before
        inputs = carried.inputs(x)
        if self.response_windows > 1 and begins:
            self._epsilon = perturbation(self.stn, inputs, self.perturb).detach()
        with self._precision():
            perturb = self.perturb if self._epsilon is None else self._epsilon
            loss = response_loss(
                self.stn, carried.loss, inputs, target, perturb=perturb, widening=self.response_widening
            )
        carried.advance()
        self._windows += 1
        return loss

    def _hyper_step(self, epoch: int, step: int) -> None:
        batch, carried = self._placed(self._validation.next()), self._validating
        if batch_size(batch[0]) == 1:  # a rest of the set that has no batch statistics
            batch = self._placed(self._validation.next())
        if self._validation.restarted:
            carried.reset()
        inputs, target = part(batch, self.hyper_fraction)
        with self._precision():
            perturb = self.perturb if "scale_optimizer" in self.optimizers else "none"
            loss = hyper_loss(self.stn, carried.loss, carried.inputs(inputs), target, entropy_weight=self.entropy_weight,
                              perturb=perturb)  # fmt: skip
        carried.advance()
        self._check_finite({"hyper_loss": loss.detach()}, epoch, step)
        loss.backward()
        if self._inner:
            gradient = self.stn.hparams.unconstrained.grad
            assert gradient is not None
            gradient -= self.inner_correction * torch.stack(self._inner).mean(0)
        self._stepped(loss, "hyper_optimizer", *(["scale_optimizer"] if "scale_optimizer" in self.optimizers else []))

    def _precision(self) -> Any:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def _placed(self, batch: Any) -> tuple[Any, Any]:
        return placed(batch, self.device, self.memory_format)

    def _stepped(self, loss: Tensor, *names: str) -> Tensor:
        for name in names:  # gradients are freed at once: w₀'s and Θ's never take memory together
            if self.clip_norm is not None and name in ("optimizer", "response_optimizer"):
                groups = self.optimizers[name].param_groups
                nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], self.clip_norm)
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()
        return loss.detach()

    def _check_finite(self, losses: dict[str, Tensor], epoch: int, step: int) -> None:
        for name, loss in losses.items():
            if not torch.isfinite(loss):
                values = ", ".join(f"{key}={value:.4g}" for key, value in self.stn.hparams.values().items())
                where = f"in {self.out_dir / 'best.pt'}" if self.out_dir else "in runner.best"
                kept = (
                    f"the best model, of epoch {self.best['epoch']}, is {where}" if self.best else "no epoch was done"
                )
                raise DivergedError(
                    f"{name} became {loss.item()} in epoch {epoch}, step {step} (λ: {values}); {kept}; lower the learning "
                    "rate of the weights or of the response"
                )

    # Evaluation and results

    def evaluate(self, loader: Any = None) -> dict[str, float]:
        """{'valid_loss', a key per metric} of the current network in eval mode; loader: default the validation set."""
        totals: dict[str, float] = {}
        examples, carried = 0, Carried(self.valid_loss_fn, self.initial_state)
        for batch in loader if loader is not None else self.valid_loader:
            inputs, target = self._placed(batch)
            with self._precision():
                loss, result = validation_loss(self.stn, carried.loss, carried.inputs(inputs), target)
            carried.advance()
            output, count = carried.output(result), _count(inputs, target)
            values = {"valid_loss": loss.item()} | {name: float(f(output, target)) for name, f in self.metrics.items()}
            for name, value in values.items():
                totals[name] = totals.get(name, 0.0) + value * count
            examples += count
        if not examples:
            raise ValueError("valid_loader is empty: it yielded no batch")
        return {name: total / examples for name, total in totals.items()}

    def best_model(self) -> nn.Module:
        """A plain model of the original class with the weights of the epoch of the lowest validation loss."""
        if self.best is None:
            raise ValueError("no epoch is done yet; call fit first")
        model = self.stn.export()
        model.load_state_dict(self.best["model"])
        return model

    def save(self, path: str | Path) -> None:
        """Write the whole run: networks, λ, σ, optimizers, random generators, place in the loaders, history, best."""
        save_atomically(
            {
                "format": FORMAT,
                "names": list(self.stn.hparams.names),
                "method": self.stn.method,
                "steps": self.steps,
                "inner": self._inner,
                "stn": self.stn.state_dict(),
                "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
                "schedulers": {name: scheduler.state_dict() for name, scheduler in self.schedulers.items()},
                "state": self._validating.state,
                "random": random_state(),
                "train_loader": loader_state(self.train_loader),
                "valid_loader": loader_state(self.valid_loader),
                "validation": self._validation.state_dict(),
                "history": self.history.rows,
                "best": self.best,
            },
            path,
        )

    def load(self, path: str | Path) -> None:
        """Continue a saved run. Raises ValueError when the file is not such a run, or tunes other hyperparameters."""
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{path} is not a readable run ({type(error).__name__}); remove it to start anew"
            ) from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"{path} is not a run of this version of fxstn; remove it, or choose another out_dir")
        if state["names"] != list(self.stn.hparams.names):
            raise ValueError(
                f"{path} tunes {state['names']}, this run {list(self.stn.hparams.names)}; choose another out_dir"
            )
        if (state["method"], set(state["optimizers"])) != (self.stn.method, set(self.optimizers)):
            raise ValueError(f"{path} is a run of method {state['method']!r} with {sorted(state['optimizers'])}; this one "
                             f"is of {self.stn.method!r} with {sorted(self.optimizers)}; choose another out_dir")  # fmt: skip
        try:
            self.stn.load_state_dict(state["stn"])
        except RuntimeError as error:
            raise ValueError(f"{path} is a run of another model; choose another out_dir") from error
        self.steps, self._inner = state["steps"], state["inner"]
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        for name, scheduler in self.schedulers.items():
            if name in state["schedulers"]:
                scheduler.load_state_dict(state["schedulers"][name])
        self._validating.state = state["state"]
        self.history.rows, self.best = state["history"], state["best"]
        self._validation.load_state_dict(state["validation"])
        set_loader_state(self.train_loader, state["train_loader"])
        set_loader_state(self.valid_loader, state["valid_loader"])
        set_random_state(state["random"])
