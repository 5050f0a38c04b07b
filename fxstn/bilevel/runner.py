"""BilevelRunner: the alternation of Alg. 1 over data loaders, with everything that a training run needs around it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Unpack, overload

from torch import nn

from fxstn.bilevel import distributed
from fxstn.bilevel.arguments import check_loader, check_loaders
from fxstn.bilevel.best_model import Best, BestModel
from fxstn.bilevel.checkpoint_manager import CheckpointManager, Recovery
from fxstn.bilevel.checks import check_device, check_length, check_names, check_synced_norms
from fxstn.bilevel.clock import Clock
from fxstn.bilevel.evaluation import EpochTensors
from fxstn.bilevel.faults import BadLoss
from fxstn.bilevel.files import absolute
from fxstn.bilevel.history import History
from fxstn.bilevel.initial import checked_factory, without_state
from fxstn.bilevel.loaders import ResumableLoader
from fxstn.bilevel.losses import LossFunction
from fxstn.bilevel.network_problem import as_problem
from fxstn.bilevel.optimizers import OptimizerLike
from fxstn.bilevel.problem import BilevelProblem, LocalProblemState
from fxstn.bilevel.progress import EpochBar, progress_bar
from fxstn.bilevel.refit import Refittable, end_unevaluated_epoch
from fxstn.bilevel.run_parts import RunParts, operations_of
from fxstn.bilevel.run_settings import SettingsDict, positional, settings_of, text_of, with_settings_listed
from fxstn.bilevel.schedule import Schedule
from fxstn.bilevel.sources import unchanged_generators
from fxstn.bilevel.starts import StartWeights
from fxstn.bilevel.state import LocalState, Stateful
from fxstn.bilevel.stop import Stop
from fxstn.bilevel.training import TrainingLoop
from fxstn.bilevel.tuner import Tuner
from fxstn.bilevel.validation import validation_stream
from fxstn.network import SelfTuningNetwork


@with_settings_listed
class BilevelRunner(Refittable):
    """Trains w₀, Θ, λ and σ together (paper, Alg. 1).

    BilevelRunner(problem, train_loader, valid_loader, …) is for a problem of your own (`fxstn.BilevelProblem`).

    stn: from `fxstn.transform`.
    loss_fn: loss_fn(output, target) → scalar, the mean over the batch, or (sum, count). A loss function with a parameter
        `hparams` gets {name: (batch,) constrained values} in training, and None in the hyper step and in evaluation.
    train_loader, valid_loader: yield (inputs, target); a tuple of inputs is unpacked. valid_loader=None, with `schedule`:
        nothing is evaluated, and the model of the last epoch is kept.
    settings: keywords, listed at the end; "hyper.train_steps" is `train_steps` of the group `hyper`.

    Training runs in cycles. A cycle is hyper.train_steps inner steps of w₀, and then hyper.valid_steps hyper steps of λ and σ.
    Every response.every-th inner step brings a response step of Θ. A cycle may go on in the next epoch. As the rate of λ's
    optimizer falls, cycles become longer and response steps rarer (`fxstn.HyperSettings`, longest_cycle).

    Several processes (torchrun): give each its share of the examples (torch's DistributedSampler) and its device. The processes
    average their gradients and draw different noise. The first one writes the files (docs/guides/distributed.md).

    Raises ValueError for an empty loader, an optimizer with other parameters, or a number out of range. Raises TypeError for a
    setting of another kind. Warns when weight decay is tuned and also set in an optimizer, when validation data are training
    data, and when the history shows signs of trouble (`fxstn.bilevel.faults`).
    """

    @overload
    def __init__(self, stn: SelfTuningNetwork, loss_fn: LossFunction, train_loader: Iterable[object],
                 valid_loader: Iterable[object] | None, **settings: Unpack[SettingsDict]) -> None: ...  # fmt: skip
    @overload
    def __init__(self, problem: BilevelProblem, train_loader: Iterable[object], valid_loader: Iterable[object],
                 **settings: Unpack[SettingsDict]) -> None: ...  # fmt: skip
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        stn, loss_fn, train_loader, valid_loader = positional(arguments, settings)
        options = self._options = settings_of(settings)
        data = {"loss_fn": loss_fn, "train_loader": train_loader, "valid_loader": valid_loader}
        self.settings = {name: text_of(value) for name, value in data.items()} | options.texts()
        batches = check_loaders(train_loader, valid_loader, replays=options.schedule is not None)
        self.stn, self.problem, self._loss_fn = stn, as_problem(stn, loss_fn, options), loss_fn
        self.train_loader, self.valid_loader = train_loader, valid_loader
        device = options.execution.device
        self.device = next(stn.parameters()).device if device is None else check_device(device, "execution.device")
        self.metrics, self.columns = options.metrics or {}, options.columns or {}
        self.callbacks, self.progress = tuple(options.callbacks), options.progress
        self._stop, self._clock, self._stopped, self._length = Stop(), Clock(), False, 0  # the last: epochs of `fit`
        self._place_problem()
        network = stn if isinstance(stn, SelfTuningNetwork) else None
        self._train = ResumableLoader(train_loader, "train_loader", options.hyper.recalibrate)
        seed, in_order = distributed.common_seed(), network is None or options.initial_state is not None
        self._valid = validation_stream([] if valid_loader is None else valid_loader, seed, in_order)
        self._tuner = Tuner(self.problem, network, options, self.device, self._train, self._valid, seed)
        self._tuner.note_data(train_loader, valid_loader)
        self._tuner.stepper.replays = bool(options.execution.compile) and self.device.type == "cuda"
        self._loop = TrainingLoop(self._tuner, self._train, batches)
        self._starts = None if network is None or valid_loader is None else StartWeights(network.model, self.out_dir)
        self._build_parts()

    def _place_problem(self) -> None:
        """Move the problem to the device, and begin alike in all processes."""
        options, problem, execution = self._options, self.problem, self._options.execution
        problem.to(self.device)
        if execution.memory_format is not None:
            problem.to(memory_format=execution.memory_format)  # type: ignore[call-overload]
        compiler = execution.compile_options(self.device)
        if compiler is not None and isinstance(self.stn, SelfTuningNetwork):
            self.stn.compile(**compiler)
        distributed.join(problem, self.device, options.shared() | {"hyperparameters": list(problem.values())})
        check_synced_norms(self.stn)
        check_names(list(problem.values()), options.metrics, options.columns, options.schedule)
        files = options.checkpoints
        self.out_dir = distributed.in_first_process(lambda: absolute(files.out_dir, "checkpoints.out_dir"))

    def _build_parts(self) -> None:
        """What evaluates, watches and keeps the run."""
        problem, tuner, files, device = self.problem, self._tuner, self._options.checkpoints, self.device
        self.updates, self.optimizers, self.history = tuner.updates, tuner.updates.optimizers, tuner.history
        self._best = BestModel(device)
        self._epoch_tensors = EpochTensors(problem, tuner.averages)
        saving = (files.save_minutes, files.keep, files.rollbacks > 0)
        self._checkpoints = CheckpointManager(self._parts(), self._starts, device, self.out_dir, *saving)
        slowing = (self.updates, tuner.monitors, tuner.prepare, files.rollbacks)
        self._recovery = Recovery(self._checkpoints, problem, *slowing)

    def _parts(self) -> RunParts:
        """All parts with a state, in the order in which a checkpoint loads them."""
        tuner = self._tuner
        shared: dict[str, Stateful] = {"limit": tuner.limit, "backtracking": tuner.backtracking}
        shared |= {"averages": tuner.averages} if tuner.averages is not None else {}
        shared |= {"starts": self._starts} if self._starts is not None else {}
        shared |= {"losses": tuner.guard, "monitors": tuner.monitors, "stepper": tuner.stepper,
                   "statistics": tuner.evaluator.statistics}  # fmt: skip
        local: dict[str, LocalState] = {"train": self._train, "valid": self._valid, "means": tuner.means, "clock": self._clock,
            "problem": LocalProblemState(self.problem, self.device), "tensors": self._epoch_tensors}  # fmt: skip
        identity = {
            "hyperparameters": list(self.history.names),
            "method": getattr(self.stn, "method", type(self.problem).__name__),
            **self.updates.identity(),
            "averages (ema)": tuner.averages is not None,
            "replay of a schedule": tuner.schedule is not None,
        }
        settings = self._options.acting(self.settings["loss_fn"]) | operations_of(self.problem)
        own = (self.problem, self.updates, tuner.counters, self.history, self._best)
        return RunParts(*own, shared, local, identity, settings)

    # Training

    def fit(self, epochs: int, minutes: float | None = None) -> History:
        """Train until so many epochs are done in all; resumes from out_dir. Returns the history.

        epochs: ≥ 0, those done before included.
        minutes: > 0, by the clock, before a resume too; the epoch in which they are over is the last. None: no limit.

        Raises DivergedError when losses are no longer finite after `rollbacks` new attempts, ValueError where another run is
        using out_dir, or has gone on there since this one did. The best model so far is in `best` and in out_dir/best.pt.
        """
        check_length(epochs, minutes)
        self._stop.run(self.out_dir is not None, lambda: self._fit(epochs, minutes))
        return self.history

    def _fit(self, epochs: int, minutes: float | None) -> None:
        with self._clock.running(), self._checkpoints.locked():
            self._checkpoints.resume(begun=self._begun)
            self._begin_fit(epochs)
            what = "refit" if self.valid_loader is None else None
            with progress_bar(epochs, len(self.history), self.progress, what) as bar:
                while len(self.history) < epochs and not self._over(minutes):
                    try:
                        self._end_epoch(self._loop.epoch(lambda: self._pause(bar)))
                    except BadLoss as fault:
                        self._recovery.go_back(fault)
                        continue
                    bar.end_epoch(self.history, self.columns)

    @property
    def _begun(self) -> bool:
        return bool(len(self.history) or self._tuner.means.steps)

    def _begin_fit(self, epochs: int) -> None:
        self._stopped, self._length, anew = False, epochs, not self._begun
        self._checkpoints.begin(better=anew and self._evaluated_start())
        for callback in self.callbacks:
            if on_fit_start := getattr(callback, "on_fit_start", None):
                on_fit_start(self)

    def _evaluated_start(self) -> bool:
        """Evaluate the network before its first step, as its norms are. Whether it is kept, as epoch 0."""
        if self.valid_loader is None or self._starts is None or not self._length:
            return False
        self.history.start_loss = loss = self._tuner.evaluator.loss_before_training(self.valid_loader)
        return loss is not None and self._best.offer(0, loss, self.problem)

    def stop(self) -> None:
        """End `fit` after this epoch; for callbacks."""
        self._stopped = True

    def _over(self, minutes: float | None) -> bool:
        late = minutes is not None and len(self.history) > 0 and self._clock.seconds() >= 60 * minutes
        return distributed.any_process(self._stopped or late, self.device)

    def _end_epoch(self, losses: dict[str, float]) -> None:
        self._epoch_tensors.average()
        if self.valid_loader is None:
            if better := end_unevaluated_epoch(self._tuner, losses) >= self._length:
                with self._tuner.evaluator.evaluating():
                    self._best.keep(len(self.history), math.nan, self.problem)
        else:
            with self._tuner.evaluated_epoch(self.valid_loader, losses) as row:
                better = self._best.offer(int(row["epoch"]), row["valid_loss"], self.problem)
            tuned = self.hyper_steps and self._starts is not None and not distributed.rank()
            if tuned and len(self.history) >= self._length:
                self._tuner.monitors.read_end(self.history.rows, self.history.start_loss)
        self._train.close()
        self._checkpoints.finish()  # the files of the epoch before, which callbacks may read
        for callback in self.callbacks:
            callback(self)
        self._keep(better)
        if distributed.any_process(self._stop.signal is not None, self.device):
            self._stop.end()

    def _keep(self, better: bool = False) -> None:
        """Keep the state as it is; what came before is no longer under suspicion."""
        self._checkpoints.keep(better)
        self._tuner.prepare.check_finite = False

    def _pause(self, bar: EpochBar) -> None:
        """Save within an epoch when it is due, and at a signal, which then ends the run."""
        bar.move_to(self._loop.epochs)
        signalled = self._stop.signal is not None
        wishes = distributed.total({"end": signalled, "save": self._checkpoints.due()}, self.device)
        if any(wishes.values()):
            self._tuner.epoch_losses()  # a bad one must not be kept
            self._keep()
        if wishes["end"]:
            self._stop.end()

    # Results

    @property
    def schedule(self) -> Schedule | None:
        """The schedule that the run replays; None: λ is tuned."""
        return self._tuner.schedule

    @schedule.setter
    def schedule(self, schedule: Schedule | None) -> None:
        self._tuner.schedule = schedule

    @property
    def best(self) -> Best | None:
        """{"epoch", "valid_loss", "model": state_dict} of the lowest validation loss; epoch 0: before training. None before."""
        return self._best.record

    def evaluate(self, loader: Iterable[object] | None = None) -> dict[str, float]:
        """{'valid_loss', a key per metric} of the current network in eval mode.

        loader: None: that of the validation set.

        Several processes: all must call it, each with its share, which may be empty. Raises ValueError without data.
        """
        if loader is not None and distributed.processes() == 1:
            check_loader(loader, "loader")
        data, name = (self.valid_loader, "valid_loader") if loader is None else (loader, "loader")
        if data is None:
            raise ValueError("the run has no validation data; give evaluate a loader")
        with unchanged_generators(data), self._tuner.evaluator.evaluating():
            return self._tuner.evaluator.means(data, name)[0]

    def best_model(self) -> nn.Module:
        """A plain model of the original class with the best weights, in eval mode. Raises ValueError before any epoch."""
        if self.best is None:
            raise ValueError("no epoch is done yet; call fit first")
        model = self.problem.export()
        self._best.put(model)
        return model.eval()

    def _fresh_optimizer(self) -> OptimizerLike:
        optimizer, own = self._options.optimizer, self.optimizers["optimizer"]
        if optimizer is None or callable(optimizer):
            return optimizer and checked_factory(optimizer, own)
        return without_state(own, self.updates.records["optimizer"].initial["groups"])

    def _refit_run(self, train_loader: Iterable[object], settings: dict[str, Any]) -> nullcontext[BilevelRunner]:
        return nullcontext(BilevelRunner(self.stn, self._loss_fn, train_loader, None, **settings))

    def save(self, path: str | Path) -> None:
        """Write the whole run to path: networks, λ, σ, optimizers, schedulers, generators, places in loaders, history, best.

        Files of that name become last.1.pt and so on, `keep` in all. Several processes: all must call it. Raises OSError.
        """
        self._checkpoints.save(path)

    def load(self, path: str | Path) -> None:
        """Go on from a run that was saved to path.

        Raises ValueError, and changes nothing, where the file is no such run, is damaged, or tunes other hyperparameters.
        """
        self._checkpoints.load(path)
