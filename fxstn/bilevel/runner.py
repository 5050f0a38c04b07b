"""BilevelRunner: the alternation of Alg. 1 over data loaders, with everything a training run needs around it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fxstn.bilevel import distributed
from fxstn.bilevel.batches import BatchPreparer
from fxstn.bilevel.evaluation import Evaluator
from fxstn.bilevel.faults import BadLoss, LossGuard, Monitors, Stop
from fxstn.bilevel.history import SCALE, History
from fxstn.bilevel.keeper import CheckpointManager
from fxstn.bilevel.objectives import LossFunction
from fxstn.bilevel.optim import SettlingAdam, generalisation_gap
from fxstn.bilevel.optimizers import OptimizerLike, adam, made, sgd
from fxstn.bilevel.problem import BilevelProblem, NetworkProblem
from fxstn.bilevel.schedule import Schedule
from fxstn.bilevel.settings import (
    OF_NETWORKS,
    check_device,
    check_length,
    check_loader,
    check_loss,
    check_settings,
    check_synced_norms,
    described,
    shared,
)
from fxstn.bilevel.steps import GapLimit, Stepper
from fxstn.bilevel.streams import ResumableLoader
from fxstn.bilevel.tally import RunningMeans, one_number
from fxstn.bilevel.updates import Averaged, SchedulerFactories, Updates
from fxstn.network import SelfTuningNetwork
from fxstn.ops.batch_axis import batch_size

DEFAULT_RESPONSE_FRACTION, DEFAULT_RESPONSE_EVERY = 1.0, 4
_rmsprop = partial(torch.optim.RMSprop, lr=1e-2)
PAPER: dict[str, Any] = {
    "response_every": 1, "response_fraction": 1.0, "response_widening": 1.0, "tune_scale": True, "hyper_optimizer": _rmsprop,
    "inner_correction": 0.0,
}  # fmt: skip


class BilevelRunner:
    """Trains w₀, Θ, λ and σ together (paper, Alg. 1).

    stn: from `fxstn.transform`. loss_fn(output, target) → scalar, the mean over the batch; where it has a parameter
    `hparams` it gets {name: (batch,) constrained values} in training and None in the hyper step and in evaluation
    (valid_loss_fn replaces it there). Loaders yield (inputs, target); a tuple of inputs is unpacked.

    optimizer (default SGD, momentum 0.9, lr 1e-2), response_optimizer (Adam, lr 1e-2; of a structured response as the
    weights'), hyper_optimizer (Adam, whose rate falls from 0.4, and that moves λ only as far as its gradient's sign is
    certain: `fxstn.optim.SettlingAdam`), scale_optimizer (RMSprop, lr 1e-2): a factory, or an optimizer that holds
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
    accumulate: ≥ 1, batches whose gradients one inner step averages. ema: None, or the decay in (0, 1) of averages of the
    network that evaluation, best.pt and best_model then use. recalibrate: ≥ 0, training batches, those of the last steps, on
    which evaluation, best.pt and best_model estimate the statistics of batch norms anew, in eval mode
    (`fxstn.bilevel.recalibration`), and whose loss, evaluated so, says how far the network overfits, by which λ is limited
    (`fxstn.optim.set_gap`); 0: the statistics that training keeps, and no limits. step_schedulers: as schedulers, stepped with
    their optimizer.
    schedule: train on a schedule (`History.schedule()`, a file) and take no step of Θ, λ or σ.
    unpack: batch → (inputs, target), for loaders that yield anything else than such pairs.
    metrics: {name: f(output, target) → number}, averaged over the validation set. columns: {name: f(row) → number}, further
    columns of the history, from those it has; shown in the progress bar. callbacks: functions of the runner, called after
    each epoch, such as `fxstn.TensorBoard(folder)`; `runner.stop()` ends the run there. patience: stop after that many epochs
    without a better validation loss.
    out_dir: where history.csv, last.pt and best.pt go; a run that finds its last.pt there resumes, and ends as if it had never
    been cut. save_minutes: also save within an epoch, when so many minutes passed; as at SIGTERM and Ctrl-C. keep: ≥ 1,
    checkpoints kept: last.pt, last.1.pt, … A folder that cannot be written is a warning; training goes on.
    rollbacks: ≥ 0; when a loss becomes NaN, infinite or 10⁴ times what it was, the run goes back to what was saved last,
    halves the learning rate of that loss's parameters and goes on, checking every batch; at most so often. Without out_dir
    that needs a copy of the run in the main memory; 0 makes none.
    progress: None shows a bar on a terminal only.

    Several processes (torchrun): give each its share of the examples (torch's DistributedSampler) and device; gradients are
    averaged, noise differs, the first one writes, to its out_dir (docs/distributed.md).
    A problem of one's own in place of stn, with loss_fn None: see `fxstn.BilevelProblem`.

    Raises ValueError for an empty loader, an optimizer with other parameters, or a number out of range. Warns when weight
    decay is tuned and also set in an optimizer, and of what `fxstn.bilevel.faults.Monitors` sees.
    """

    def __init__(
        self,
        stn: SelfTuningNetwork | BilevelProblem,
        loss_fn: LossFunction | None,
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
        schedule: Schedule | None = None,
        schedulers: SchedulerFactories = None,
        step_schedulers: SchedulerFactories = None,
        clip_norm: float | None = None,
        accumulate: int = 1,
        ema: float | None = None,
        recalibrate: int = 10,
        initial_state: Callable[[int], tuple[Tensor, ...]] | None = None,
        unpack: Callable[[Any], tuple[Any, Any]] | None = None,
        metrics: dict[str, Callable[[Any, Any], float]] | None = None,
        columns: dict[str, Callable[[dict[str, Any]], float]] | None = None,
        callbacks: Sequence[Callable[[BilevelRunner], None]] = (),
        patience: int | None = None,
        device: torch.device | str | None = None,
        out_dir: str | Path | None = None,
        save_minutes: float = 30.0,
        keep: int = 2,
        rollbacks: int = 2,
        progress: bool | None = None,
        compile: bool | dict[str, Any] = False,
        autocast: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
    ) -> None:
        settings = dict(locals()) | {"metrics": metrics or {}, "columns": columns or {}}
        check_settings(settings)
        self.settings = described(settings)  # as texts, for reports
        batches = check_loader(train_loader, "train_loader")
        check_loader(valid_loader, "valid_loader")
        if isinstance(stn, SelfTuningNetwork):
            check_loss(loss_fn, "loss_fn")
            check_loss(valid_loss_fn or loss_fn, "valid_loss_fn")
            self.problem: BilevelProblem = NetworkProblem(
                stn, loss_fn, # type: ignore[arg-type]
                valid_loss_fn, initial_state=initial_state, entropy_weight=entropy_weight,
                tune_scale=tune_scale, perturb=perturb, response_fraction=response_fraction,
                response_widening=response_widening, response_windows=response_windows, hyper_fraction=hyper_fraction,
            )  # fmt: skip
            structured = stn.structured
        elif isinstance(stn, BilevelProblem):
            if loss_fn is not None:
                raise TypeError("a BilevelProblem has its losses itself: pass None as loss_fn")
            if unused := [name for name in OF_NETWORKS if settings[name]]:
                raise TypeError(
                    f"{', '.join(unused)}: only for a network from fxstn.transform, not for a BilevelProblem"
                )
            self.problem, structured = stn, False
        else:
            raise TypeError(
                f"the first argument must come from fxstn.transform(model, hparams), got {type(stn).__name__}"
            )
        self.stn: Any = stn
        self.device = check_device(device) if device is not None else next(stn.parameters()).device
        self.problem.to(self.device)
        if memory_format is not None:
            self.problem.to(memory_format=memory_format)  # type: ignore[call-overload]
        if compile:
            self.stn.compile(**(compile if isinstance(compile, dict) else {}))
        distributed.join(self.problem, self.device, shared(settings) | {"hyperparameters": list(self.problem.values())})
        check_synced_norms(stn)
        out_dir = distributed.of_first(lambda: out_dir)
        self._uneven = distributed.uneven(train_loader)
        self.train_loader, self.valid_loader = train_loader, valid_loader
        self._length = math.ceil(batches / accumulate) if batches else None
        self.train_steps, self.valid_steps, self.warmup_epochs = train_steps, valid_steps, warmup_epochs
        self.response_every, self.accumulate = response_every, accumulate
        self.metrics, self.columns, self.callbacks = metrics or {}, columns or {}, tuple(callbacks)
        self.patience, self.progress, self.schedule = patience, progress, schedule
        self.out_dir = Path(out_dir) if out_dir is not None else None
        problem = self.problem
        kinds: dict[str, tuple[OptimizerLike, Any, Any]] = {
            "optimizer": (optimizer, sgd, problem.general_parameters()),
            "response_optimizer": (response_optimizer, sgd if structured else adam, problem.response_parameters()),
            "hyper_optimizer": (hyper_optimizer, SettlingAdam, problem.hyper_parameters()),
            "scale_optimizer": (scale_optimizer, _rmsprop, problem.scale_parameters()),
        }
        self.optimizers = {
            name: made(given, default, held, name)
            for name, (given, default, parameters) in kinds.items() if (held := list(parameters))
        }  # fmt: skip
        scaler = torch.amp.GradScaler(self.device.type, enabled=autocast is torch.float16)
        self.updates = Updates(
            self.optimizers, schedulers, step_schedulers, clip_norm, scaler, check=self.problem is stn
        )
        averaged = (*problem.general_parameters(), *problem.response_parameters(), *problem.buffers())
        self._averaged = Averaged(averaged, ema) if ema is not None else None
        for name in ("optimizer", "response_optimizer"):
            groups = self.optimizers[name].param_groups if name in self.optimizers else []
            if (
                isinstance(stn, SelfTuningNetwork)
                and stn.terms.penalties
                and any(g.get("weight_decay") for g in groups)
            ):
                warnings.warn(
                    f"weight decay is tuned and also set in {name}: both act; set weight_decay=0 there", stacklevel=2
                )
        self.history = History(tuple(problem.values()), start=problem.values())
        if schedule is not None and set(schedule.values) != set(problem.values()):
            raise ValueError(f"schedule is of {', '.join(schedule.values)}, the network has {', '.join(problem.values())}; "
                             "give one of the same hyperparameters")  # fmt: skip
        self.best: dict[str, Any] | None = None
        self.steps = 0  # inner steps done; a cycle of train_steps may span epochs
        self.response_steps = self.hyper_steps = 0  # done, those along with inner steps (method "stn") not counted
        self._train = ResumableLoader(train_loader, "train_loader", recalibrate)
        self._valid = ResumableLoader(valid_loader, "valid_loader")
        self._watch, self._monitors, self._stop = LossGuard(), Monitors(problem.ranges()), Stop()
        self._place = BatchPreparer(self.device, memory_format, unpack, wary=lambda: self._keeper.retries > 0)
        self._precision = partial(torch.autocast, self.device.type, autocast, enabled=autocast is not None)
        self._stepper = Stepper(problem, self.updates, self._watch, self._place, inner_correction, self._precision)
        self._evaluator = Evaluator(problem, self._train, self._averaged, self.metrics, self._place, self._precision)
        self._tally: RunningMeans | None = None  # of the epoch that is under way
        measured = recalibrate > 0 and schedule is None
        self._limit = GapLimit(self.optimizers.get("hyper_optimizer"), problem, measured)
        self.rollbacks_done, self._stopped = 0, False
        self._keeper = CheckpointManager(self, self.out_dir, save_minutes, keep, rollbacks)

    # Training

    def fit(self, epochs: int, minutes: float | None = None) -> History:
        """Train until `epochs` epochs are done in all, or the epoch in which `minutes` in all are over; resumes from out_dir.
        Returns the history.

        Raises DivergedError when losses are no longer finite after `rollbacks` new attempts; what was best is kept in `best`
        and in out_dir/best.pt.
        """
        check_length(epochs, minutes)
        if self.out_dir is not None and not len(self.history) and self._tally is None:
            self._keeper.resume()
        self._stopped = False
        self._keeper.begin()
        hidden = True if distributed.rank() else None if self.progress is None else not self.progress
        bar = tqdm(total=epochs, initial=min(len(self.history), epochs), unit="epoch", disable=hidden)
        with bar, self._stop.on_signals(self.out_dir is not None):
            while len(self.history) < epochs and not self._over(minutes):
                try:
                    self._epoch()
                except BadLoss as fault:
                    self._keeper.go_back(fault)
                    continue
                row = self.history.rows[-1]
                bar.set_postfix(self._shown(row), refresh=False)
                bar.update()
        return self.history

    def stop(self) -> None:
        """End `fit` after this epoch; for callbacks."""
        self._stopped = True

    def _over(self, minutes: float | None) -> bool:
        done = len(self.history)
        late = minutes is not None and done and sum(self.history["seconds"]) >= 60 * minutes
        hopeless = self.patience is not None and done and done - self.history.best()["epoch"] >= self.patience
        return distributed.any_of(bool(self._stopped or late or hopeless), self.device)

    def _shown(self, row: dict[str, Any]) -> dict[str, str]:
        """Losses, columns and a few λ, for the progress bar."""
        few = [(name.rpartition(".")[0] or name, row[name]) for name in self.history.names[:3]]
        shown = [("train", row["train_loss"]), ("valid", row["valid_loss"]), *((n, row[n]) for n in self.columns), *few]
        return {name: f"{value:.4g}" for name, value in shown}

    def _epoch(self) -> None:
        number = len(self.history) + 1
        if self._tally is None:
            self._tally = RunningMeans()
            self.problem.begins("train")
            self._train.begin()
        tally = self._tally
        self.problem.train()
        while batches := self._next_batches():
            time = f"epoch {number}, step {tally.steps + 1}"
            if self.schedule:
                self._replay(self.schedule, tally.steps)
            tally.add(self._inner_step([self._place(b, "train_loader", time) for b in batches]))
            cycle_over = self.steps % self.train_steps == 0
            if cycle_over or tally.steps == 1:
                self._watch.check(tally.means(self.device), time)
            if cycle_over:
                for _ in range(self.valid_steps if self._tunes else 0):
                    self._hyper_step(time)
                self._stepper.along.clear()
            if cycle_over or distributed.processes() == 1:
                self._pause()
        if not tally.steps:
            self._tally = None
            raise ValueError("train_loader is empty: it yielded no batch")
        losses = tally.means(self.device)
        self._watch.check(losses, f"epoch {number}, step {tally.steps}")
        self._end_epoch(number, losses, tally)

    def _end_epoch(self, number: int, losses: dict[str, float], tally: RunningMeans) -> None:
        problem = self.problem
        distributed.average(self.local_tensors(), constants=True)
        if self._responds:
            losses.setdefault("response_loss", float("nan"))  # a short epoch without a response step
        with self._evaluator.evaluating():
            found, sample = self._evaluator.means(self.valid_loader, "valid_loader")
            self._watch.check({"valid_loss": found["valid_loss"]}, f"epoch {number}")
            if self._limit.on:
                losses["clean_train_loss"] = self._evaluator.clean_train_loss()
                self._limit.set(generalisation_gap(losses["clean_train_loss"], found["valid_loss"]))
            row: dict[str, Any] = {"epoch": number, **losses, **found}
            row |= problem.values() | {SCALE + name: scale for name, scale in problem.scales().items()}
            if not self.schedule and not distributed.any_of(not sample, self.device):
                with self._precision():
                    row |= distributed.mean(problem.diagnostics(sample[0], sample[1], number), self.device)
            row |= {name: one_number(f(row), f"columns[{name!r}]") for name, f in self.columns.items()}
            row |= distributed.mean({"seconds": tally.elapsed()}, self.device)
            row["seconds"] = round(row["seconds"], 3)
            self.updates.epoch_done(row["valid_loss"])
            self.history.rows.append(row)
            if better := self.best is None or row["valid_loss"] < self.best["valid_loss"]:
                state = {name: value.clone() for name, value in problem.export().state_dict().items()}
                self.best = {"epoch": number, "valid_loss": row["valid_loss"], "model": state}
        self._tally = None
        if not distributed.rank():
            self._monitors.read(self.history.rows)
        for callback in self.callbacks:
            callback(self)
        self._keeper.keep(better)
        if distributed.any_of(self._stop.signal is not None, self.device):
            self._stop.end()

    def local_tensors(self) -> list[Tensor]:
        """What differs between processes within an epoch, batch norms' statistics say: evaluated and saved as the mean."""
        buffers = [buffer for buffer in self.problem.buffers() if buffer.is_floating_point()]
        return buffers + (self._averaged.of(buffers) if self._averaged else [])

    @property
    def _tunes(self) -> bool:
        """Whether λ moves in this epoch."""
        return self.schedule is None and len(self.history) >= self.warmup_epochs

    @property
    def _responds(self) -> bool:
        """Whether there are steps of Θ alone."""
        return "response_optimizer" in self.optimizers and not self.problem.joint and self.schedule is None

    def _replay(self, schedule: Schedule, step: int) -> None:
        length = self._length or step + 1  # of a loader that does not know it: the values at the end of the epoch
        self.stn.hparams.set(schedule.at(len(self.history) + (step + 1) / length))

    def _next_batches(self) -> list[Any]:
        """Of the next inner step; none, in all processes, where one of them has none left."""
        batches = self._train.take(self.accumulate)
        if self._uneven and distributed.any_of(not batches, self.device):
            self._train.close()
            return []
        return batches

    def _inner_step(self, batches: list[tuple[Any, Any]]) -> dict[str, Tensor]:
        """One step of w₀ and, when it is due, one of Θ on training batches; of both at once for a joint problem."""
        losses = {"train_loss": self._stepper.inner(batches, self._tunes)}
        if self._responds and (self.steps + 1) % self.response_every == 0:
            losses["response_loss"] = self._stepper.response(batches)
            self.response_steps += 1
        if self._averaged:
            self._averaged.update()
        self.steps += 1
        return losses

    def _hyper_step(self, time: str) -> None:
        for _ in range(2):
            batch, first = self._valid.next()
            if first:
                self.problem.begins("valid")
            pair = self._place(batch, "valid_loader", time)
            if batch_size(pair[0]) > 1:  # else a rest of the set that has no batch statistics
                break
        self._stepper.hyper(pair)
        self.hyper_steps += 1

    # Faults

    def _pause(self) -> None:
        """Save within an epoch when it is due, and at a signal, which then ends the run."""
        asked = self._stop.signal is not None
        wishes = distributed.total({"end": asked, "save": self._keeper.late()}, self.device)
        if any(wishes.values()):
            self._keeper.keep()
        if wishes["end"]:
            self._stop.end()

    @property
    def warnings(self) -> list[tuple[int, str]]:
        """(epoch, text) of the signs of trouble seen so far and of every time the run went back, before a resume too."""
        return list(self._monitors.told)

    # Evaluation and results

    def evaluate(self, loader: Any = None) -> dict[str, float]:
        """{'valid_loss', a key per metric} of the current network in eval mode; loader: default the validation set.

        Several processes: all must call it, each with its share, which may be empty.
        """
        if loader is not None and distributed.processes() == 1:
            check_loader(loader, "loader")
        with self._evaluator.evaluating():
            where = (self.valid_loader, "valid_loader") if loader is None else (loader, "loader")
            return self._evaluator.means(*where)[0]

    def best_model(self) -> nn.Module:
        """A plain model of the original class with the weights of the epoch of the lowest validation loss."""
        if self.best is None:
            raise ValueError("no epoch is done yet; call fit first")
        model = self.problem.export()
        model.load_state_dict(self.best["model"])
        return model

    def save(self, path: str | Path) -> None:
        """Write the whole run: networks, λ, σ, optimizers, schedulers, random generators, places in the loaders, history, best.

        Files of that name become last.1.pt and so on, `keep` in all. Several processes: all must call it. Raises OSError.
        """
        self._keeper.save(path)

    def load(self, path: str | Path) -> None:
        """Continue a saved run. Raises ValueError when the file is no such run, is damaged, or tunes other hyperparameters."""
        self._keeper.load(path)
