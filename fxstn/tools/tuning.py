"""fxstn tune: trains a model, tunes it on the way, and writes what comes of it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn
from tqdm.auto import tqdm

from fxstn import hp
from fxstn.bilevel import (
    PAPER,
    BilevelRunner,
    CheckpointSettings,
    DivergedError,
    EarlyStopping,
    ExecutionSettings,
    History,
    HyperSettings,
    ResponseSettings,
    Schedule,
    accuracy,
)
from fxstn.bilevel.batches import to_device
from fxstn.bilevel.checks import check_device
from fxstn.bilevel.optim import SettlingAdam
from fxstn.bilevel.sources import unchanged_generators
from fxstn.frontends.inputs import as_inputs
from fxstn.ir.errors import TransformError
from fxstn.ir.input_errors import as_path
from fxstn.network import SelfTuningNetwork
from fxstn.tools.doing import doing
from fxstn.tools.models import build_model
from fxstn.tools.report import write_report
from fxstn.tools.status import DONE, RunFailed
from fxstn.tools.tuning_data import DataRequest, TuningData, load_tuning_data
from fxstn.transform import transform


def _network(args: argparse.Namespace, data: TuningData) -> SelfTuningNetwork:
    specs: list[hp.Spec] = [hp.Dropout()]
    if args.weight_decay != "none":
        specs.append(hp.WeightDecay("*", shared=args.weight_decay == "shared"))
    response = "structured" if _as_in_paper(args) else None
    build = partial(transform, build_model(args.model, data.classes), specs, method=args.method, response=response)
    try:
        return build()
    except TransformError:  # the other frontends need inputs
        return build(example_inputs=_first_inputs(data.train))


def _first_inputs(loader: Iterable[object]) -> object:
    """Inputs like those of training. Later batches are what they would be without this."""
    with unchanged_generators(loader):
        batch = next(iter(loader), None)
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None


def _as_in_paper(args: argparse.Namespace) -> bool:
    return args.paper or args.method != "delta"


class Beginning:
    """A callback that notes how far a run was when `fit` began: an error before its first step is one of the call."""

    def __init__(self) -> None:
        self.steps: int | None = None

    def __call__(self, runner: BilevelRunner) -> None:
        """After an epoch there is nothing to do."""

    def on_fit_start(self, runner: BilevelRunner) -> None:
        self.steps = runner.steps


def _runner(args: argparse.Namespace, data: TuningData, device: torch.device, out: Path) -> BilevelRunner:
    paper, sgd = _as_in_paper(args), partial(torch.optim.SGD, lr=args.lr, momentum=0.9)
    response = replace(PAPER["response"], optimizer=sgd) if paper else ResponseSettings()
    hyper = replace(PAPER["hyper"] if paper else HyperSettings(), warmup_epochs=args.warmup_epochs)
    if args.hyper_lr is not None:
        hyper = replace(hyper, optimizer=partial(torch.optim.RMSprop if paper else SettlingAdam, lr=args.hyper_lr))
    schedule = Schedule.from_json(args.replay) if args.replay else None
    stn = _network(args, data)
    out.mkdir(parents=True, exist_ok=True)
    return BilevelRunner(
        stn,
        F.cross_entropy,
        data.train,
        data.valid,
        optimizer=sgd,
        response=response,
        hyper=hyper,
        checkpoints=CheckpointSettings(out_dir=out),
        execution=ExecutionSettings(device=device),
        metrics={"accuracy": accuracy},
        callbacks=[] if args.patience is None else [EarlyStopping(args.patience)],
        schedule=schedule,
    )


def _fit(runner: BilevelRunner, epochs: int) -> History:
    """Train. Raises RunFailed for what goes wrong after the first step, and ValueError before it."""
    beginning = Beginning()
    runner.callbacks = (*runner.callbacks, beginning)
    try:
        return runner.fit(epochs)
    except DivergedError as error:
        raise RunFailed(str(error)) from error
    except (ValueError, OSError) as error:
        if beginning.steps is None or runner.steps == beginning.steps:
            raise
        raise RunFailed(str(error)) from error


def _write_results(runner: BilevelRunner, out: Path, title: str) -> list[str]:
    """Writes what a run gives besides its checkpoints and its history. Returns the names of all its files."""
    runner.history.schedule().to_json(out / "schedule.json")
    torch.save(runner.best_model().state_dict(), out / "weights.pt")
    files = ["history.csv", "schedule.json", "weights.pt", "last.pt", "best.pt"]
    write_report(runner, out / "report.html", title=title)
    try:
        runner.history.plot(out / "schedules.png")
        files.append("schedules.png")
    except ImportError as error:
        tqdm.write(f"no schedules.png: {error}")
    return [*files, "report.html"]


def _refit(runner: BilevelRunner, data: TuningData, out: Path) -> None:
    """Train anew on training and validation data, into a folder of its own, and say how good that is on the test data."""
    assert data.everything is not None
    model = runner.refit(data.everything).eval()
    torch.save(model.state_dict(), out / "refit" / "weights.pt")
    print(f"refit, {len(runner.refit_history or ())} epochs{_tested(model, data, runner)}; in {out / 'refit'}")


def _tested(model: nn.Module, data: TuningData, runner: BilevelRunner) -> str:
    """How good a plain model is on the test data; "" without such data."""
    if data.test is None:
        return ""
    outputs, targets = [], []
    with torch.no_grad():
        for batch in data.test:
            value, target = to_device(batch, runner.device, None, "the test data")
            inputs = as_inputs(value, model)
            outputs.append(model(*inputs.args, **inputs.kwargs))
            targets.append(target)
    output, target = torch.cat(outputs), torch.cat(targets)
    loss, share = F.cross_entropy(output, target).item(), accuracy(output, target)
    return f": test loss {loss:.4f}, accuracy {share:.3f}"


def run_tune(args: argparse.Namespace) -> int:
    torch.manual_seed(args.seed)
    out = as_path(args.out, "--out")
    if out.is_file():
        raise ValueError(f"--out {args.out!r} is a file; name a folder, which is made where there is none")
    device = check_device(args.device, "--device")
    request = DataRequest(
        args.data, args.image_size, args.train_size, args.valid_size, args.batch_size, args.seed, args.num_classes,
        args.workers, args.data_root,
    )  # fmt: skip
    with doing("loading the data"):
        data = load_tuning_data(request)
    if args.refit and data.everything is None:
        raise ValueError("--refit trains on training and validation data together: return data sets from your function")
    with doing("following the model"):
        runner = _runner(args, data, device, out)
    history = _fit(runner, args.epochs)
    with doing("writing the report"):
        files = _write_results(runner, out, f"fxstn tune {args.model} on {args.data}")
    best, last = history.best(), history.rows[-1]
    score = f"accuracy {best['accuracy']:.3f}" if best["epoch"] else "that of the start, which no epoch is better than"
    print(f"best epoch {best['epoch']}: validation loss {best['valid_loss']:.4f}, {score}")
    if data.test is not None:
        with doing("evaluating the test data"):
            tests = runner.evaluate(data.test)
        print(f"last epoch {last['epoch']}: test loss {tests['valid_loss']:.4f}, accuracy {tests['accuracy']:.3f}")
    outcome, starts, now = history.outcome(), history.start, runner.problem.values()
    rows = [
        (name, f"{starts[name]:.3g}", f"{value:.3g} ± {outcome.spread[name]:.1g}", f"{now[name]:.3g}")
        for name, value in outcome.values.items()
    ]
    print(tabulate(rows, ["hyperparameter", "start", "value", "now"]))
    print(f"in {out}: {', '.join(files)}")
    if args.refit:
        _refit(runner, data, out)
    return DONE
