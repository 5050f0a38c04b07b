"""BilevelRunner: the alternation of Alg. 1 over data loaders, with everything a training run needs around it."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm

from fxstn.bilevel.checkpoint import (
    Cycle,
    loader_state,
    random_state,
    save_atomically,
    set_loader_state,
    set_random_state,
)
from fxstn.bilevel.history import SCALE, History
from fxstn.bilevel.objectives import LossFunction, general_loss, hyper_loss, response_loss, validation_loss
from fxstn.network import SelfTuningNetwork, batch_size

OptimizerLike = torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None
FORMAT = 1
DEFAULT_RESPONSE_FRACTION = 1.0  # the paper's
_sgd = partial(torch.optim.SGD, lr=1e-2, momentum=0.9)
_rmsprop = partial(torch.optim.RMSprop, lr=1e-2)


class DivergedError(RuntimeError):
    """A loss became NaN or infinite. The best model so far is kept."""


def accuracy(output: Tensor, target: Tensor) -> float:
    """Share of examples whose largest logit is the target class; in [0, 1]. output: (batch, classes), target: (batch,)."""
    return (output.argmax(-1) == target).float().mean().item()


def _optimizer(given: OptimizerLike, default: Any, parameters: Sequence[nn.Parameter], name: str) -> Any:
    """An optimizer over exactly `parameters`: the one given, or made by the factory given, or the default."""
    if isinstance(given, torch.optim.Optimizer):
        made = given
    elif given is None or callable(given):
        made = (given or default)(parameters)
    else:
        raise TypeError(
            f"{name} must be an optimizer or a factory such as lambda params: torch.optim.SGD(params, lr=0.1)"
        )
    held = {id(parameter) for group in made.param_groups for parameter in group["params"]}
    wanted = {id(parameter) for parameter in parameters}
    if held != wanted:
        raise ValueError(
            f"{name} holds {len(held - wanted)} parameters that are not its own and lacks {len(wanted - held)} of its "
            f"{len(wanted)}; pass a factory, lambda params: torch.optim.SGD(params, lr=0.1)"
        )
    return made


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

    optimizer, response_optimizer (default SGD, momentum 0.9, lr 1e-2), hyper_optimizer, scale_optimizer (default RMSprop,
    lr 1e-2): a factory, or an optimizer that holds exactly those parameters. tune_scale: False keeps σ fixed.
    train_steps, valid_steps: T_train, T_valid ≥ 1. warmup_epochs: epochs without hyper steps. entropy_weight: τ ≥ 0.
    response_fraction: part of each batch that the response step sees, in (0, 1]; unbiased but for batch statistics.
    perturb: "example" (one ε per example, the paper), "batch", or None: per example where the network allows.
    metrics: {name: f(output, target) → number}, averaged over the validation set. patience: stop after that many epochs
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
        tune_scale: bool = True,
        train_steps: int = 5,
        valid_steps: int = 1,
        warmup_epochs: int = 0,
        entropy_weight: float = 1e-3,
        response_fraction: float = DEFAULT_RESPONSE_FRACTION,
        perturb: str | None = None,
        metrics: dict[str, Callable[[Any, Any], float]] | None = None,
        patience: int | None = None,
        device: torch.device | str | None = None,
        out_dir: str | Path | None = None,
        progress: bool | None = None,
    ) -> None:
        for name, loader in (("train_loader", train_loader), ("valid_loader", valid_loader)):
            if _length(loader) == 0:
                raise ValueError(
                    f"{name} is empty: it yields no batch (fewer examples than batch_size with drop_last?)"
                )
        if (
            train_steps < 1
            or valid_steps < 1
            or warmup_epochs < 0
            or entropy_weight < 0
            or not 0 < response_fraction <= 1
        ):
            raise ValueError(
                f"need train_steps >= 1, valid_steps >= 1, warmup_epochs >= 0, entropy_weight >= 0 and 0 < "
                f"response_fraction <= 1; got {train_steps}, {valid_steps}, {warmup_epochs}, {entropy_weight}, "
                f"{response_fraction}"
            )
        self.device = torch.device(device) if device is not None else next(stn.parameters()).device
        self.stn = stn.to(self.device)
        self.loss_fn, self.valid_loss_fn = loss_fn, valid_loss_fn or loss_fn
        self.train_loader, self.valid_loader = train_loader, valid_loader
        self.train_steps, self.valid_steps, self.warmup_epochs = train_steps, valid_steps, warmup_epochs
        self.entropy_weight, self.response_fraction, self.perturb = entropy_weight, response_fraction, perturb
        self.metrics, self.patience, self.progress = metrics or {}, patience, progress
        self.out_dir = Path(out_dir) if out_dir is not None else None
        general = [parameter for parameter in stn.general_parameters() if parameter.requires_grad]
        self.optimizers = {
            "optimizer": _optimizer(optimizer, _sgd, general, "optimizer"),
            "response_optimizer": _optimizer(
                response_optimizer, _sgd, list(stn.response_parameters()), "response_optimizer"
            ),
            "hyper_optimizer": _optimizer(hyper_optimizer, _rmsprop, [stn.hparams.unconstrained], "hyper_optimizer"),
        }
        if tune_scale:
            self.optimizers["scale_optimizer"] = _optimizer(
                scale_optimizer, _rmsprop, [stn.hparams.raw_scale], "scale_optimizer"
            )
        for name in ("optimizer", "response_optimizer"):
            if stn.penalties and any(group.get("weight_decay") for group in self.optimizers[name].param_groups):
                warnings.warn(
                    f"weight decay is tuned and also set in {name}: both act; set weight_decay=0 there", stacklevel=2
                )
        self.history = History(stn.hparams.names)
        self.best: dict[str, Any] | None = None
        self.steps = 0  # inner steps done; a cycle of train_steps may span epochs
        self._validation = Cycle(valid_loader)

    # Training

    def fit(self, epochs: int) -> History:
        """Train until `epochs` epochs are done in all; resumes from out_dir. Returns the history.

        Raises DivergedError when a loss is no longer finite; what was best is kept in `best` and in out_dir/best.pt.
        """
        if self.out_dir and not len(self.history) and (self.out_dir / "last.pt").exists():
            self.load(self.out_dir / "last.pt")
        disable = None if self.progress is None else not self.progress
        with tqdm(total=epochs, initial=min(len(self.history), epochs), unit="epoch", disable=disable) as bar:
            while len(self.history) < epochs and not self._out_of_patience():
                self._epoch(bar)
                row = self.history.rows[-1]
                bar.set_postfix(train=f"{row['train_loss']:.4f}", valid=f"{row['valid_loss']:.4f}", refresh=False)
                bar.update()
        return self.history

    def _out_of_patience(self) -> bool:
        if self.patience is None or not len(self.history):
            return False
        return len(self.history) - self.history.best()["epoch"] >= self.patience

    def _epoch(self, bar: Any) -> None:
        start, number = time.perf_counter(), len(self.history) + 1
        self.stn.train()
        totals: dict[str, Tensor] = {}
        steps = 0
        for batch in self.train_loader:
            inputs, target = self._to_device(batch)
            for name, loss in self._inner_step(inputs, target).items():
                totals[name] = totals.get(name, torch.zeros((), device=self.device)) + loss
            steps += 1
            self.steps += 1
            if self.steps % self.train_steps == 0 or steps == 1:
                self._check_finite(totals, number, steps)
            if self.steps % self.train_steps == 0 and number > self.warmup_epochs:
                for _ in range(self.valid_steps):
                    self._hyper_step(number, steps)
        if not steps:
            raise ValueError("train_loader is empty: it yielded no batch")
        self._check_finite(totals, number, steps)
        row = {"epoch": number, **{name: (total / steps).item() for name, total in totals.items()}, **self.evaluate()}
        self._check_finite({"valid_loss": torch.tensor(row["valid_loss"])}, number, steps)
        scales = self.stn.hparams.scale.tolist()
        row |= self.stn.hparams.values() | {SCALE + n: s for n, s in zip(self.stn.hparams.names, scales, strict=True)}
        row["seconds"] = round(time.perf_counter() - start, 3)
        self.history.rows.append(row)
        if self.best is None or row["valid_loss"] < self.best["valid_loss"]:
            state = {name: value.clone() for name, value in self.stn.export().state_dict().items()}
            self.best = {"epoch": number, "valid_loss": row["valid_loss"], "model": state}
            if self.out_dir:
                save_atomically(self.best, self.out_dir / "best.pt")
        if self.out_dir:
            self.history.to_csv(self.out_dir / "history.csv")
            self.save(self.out_dir / "last.pt")

    def _inner_step(self, inputs: Any, target: Any) -> dict[str, Tensor]:
        """One step of w₀ and one of Θ on a training batch; of both at once for method "stn"."""
        if self.stn.method == "stn":
            return {"train_loss": self._step(general_loss(self.stn, self.loss_fn, inputs, target, perturb=self.perturb),
                                             "optimizer", "response_optimizer")}  # fmt: skip
        general = self._step(general_loss(self.stn, self.loss_fn, inputs, target), "optimizer")
        if self.response_fraction < 1:
            inputs, target = self._part((inputs, target))
        loss = response_loss(self.stn, self.loss_fn, inputs, target, perturb=self.perturb)
        return {"train_loss": general, "response_loss": self._step(loss, "response_optimizer")}

    def _hyper_step(self, epoch: int, step: int) -> None:
        inputs, target = self._to_device(self._validation.next())
        loss = hyper_loss(
            self.stn, self.valid_loss_fn, inputs, target, entropy_weight=self.entropy_weight, perturb=self.perturb
        )
        self._check_finite({"hyper_loss": loss.detach()}, epoch, step)
        self._step(loss, "hyper_optimizer", *(["scale_optimizer"] if "scale_optimizer" in self.optimizers else []))

    def _step(self, loss: Tensor, *names: str) -> Tensor:
        loss.backward()
        for name in names:  # gradients are freed at once: w₀'s and Θ's never take memory together
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()
        return loss.detach()

    def _part(self, batch: tuple[Any, Any]) -> tuple[Any, Any]:
        """The first examples of a (shuffled) batch, `response_fraction` of them."""
        examples = batch_size(batch[0])
        count = max(1, math.ceil(examples * self.response_fraction))

        def cut(leaf: Any) -> Any:
            return leaf[:count] if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == examples else leaf

        return tree_map(cut, batch)

    def _to_device(self, batch: Any) -> tuple[Any, Any]:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(f"a loader must yield (inputs, target), got {type(batch).__name__} of length "
                             f"{len(batch) if hasattr(batch, '__len__') else '?'}")  # fmt: skip
        move = lambda leaf: leaf.to(self.device, non_blocking=True) if isinstance(leaf, Tensor) else leaf  # noqa: E731
        inputs, target = tree_map(move, tuple(batch))
        return inputs, target

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
        examples = 0
        for batch in loader if loader is not None else self.valid_loader:
            inputs, target = self._to_device(batch)
            loss, output = validation_loss(self.stn, self.valid_loss_fn, inputs, target)
            count = batch_size(inputs)
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
                "stn": self.stn.state_dict(),
                "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
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
        self.steps = state["steps"]
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.history.rows, self.best = state["history"], state["best"]
        self._validation.load_state_dict(state["validation"])
        set_loader_state(self.train_loader, state["train_loader"])
        set_loader_state(self.valid_loader, state["valid_loader"])
        set_random_state(state["random"])
