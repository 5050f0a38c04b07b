"""What the commands of `fxstn` do, once their arguments are parsed: tune, bench, explain, verify, show."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch.utils.data import ConcatDataset, DataLoader

from fxstn import hp
from fxstn.bilevel import (
    PAPER,
    BilevelRunner,
    CheckpointSettings,
    DivergedError,
    EarlyStopping,
    ExecutionSettings,
    HyperSettings,
    ResponseSettings,
    Schedule,
    accuracy,
)
from fxstn.bilevel.checks import check_device
from fxstn.bilevel.optim import SettlingAdam
from fxstn.ir.input_errors import as_path
from fxstn.network import SelfTuningNetwork
from fxstn.tools import bench, data
from fxstn.tools.explain import explain
from fxstn.tools.models import build_model
from fxstn.tools.report import write_report
from fxstn.tools.show import show
from fxstn.tools.verify import verify
from fxstn.transform import transform

OF_IMAGES = ("fxstn.hp.augment", "fxstn.hp.geometry", "fxstn.hp.mix")
AUGMENTATIONS = {cls.__name__: cls for cls in hp.OPERATIONS.values() if cls.__module__ in OF_IMAGES}


def _network(args: argparse.Namespace, classes: int) -> SelfTuningNetwork:
    specs: list[hp.Spec] = [hp.Dropout()]
    if args.weight_decay != "none":
        specs.append(hp.WeightDecay("*", shared=args.weight_decay == "shared"))
    response = "structured" if _as_in_paper(args) else None
    return transform(build_model(args.model, classes), specs, method=args.method, response=response)


def _as_in_paper(args: argparse.Namespace) -> bool:
    return args.paper or args.method != "delta"


def _runner(args: argparse.Namespace, split: data.Split, device: torch.device, out: Path) -> BilevelRunner:
    paper, sgd = _as_in_paper(args), partial(torch.optim.SGD, lr=args.lr, momentum=0.9)
    response = replace(PAPER["response"], optimizer=sgd) if paper else ResponseSettings()
    hyper = replace(PAPER["hyper"] if paper else HyperSettings(), warmup_epochs=args.warmup_epochs)
    if args.hyper_lr is not None:
        hyper = replace(hyper, optimizer=partial(torch.optim.RMSprop if paper else SettlingAdam, lr=args.hyper_lr))
    schedule = Schedule.from_json(args.replay) if args.replay else None
    stn = _network(args, split.classes)
    out.mkdir(parents=True, exist_ok=True)
    return BilevelRunner(
        stn,
        F.cross_entropy,
        data.loader(split.train, args.batch_size, args.seed),
        data.loader(split.valid, args.batch_size, args.seed + 1),
        optimizer=sgd,
        response=response,
        hyper=hyper,
        checkpoints=CheckpointSettings(out_dir=out),
        execution=ExecutionSettings(device=device),
        metrics={"accuracy": accuracy},
        callbacks=[] if args.patience is None else [EarlyStopping(args.patience)],
        schedule=schedule,
    )


def _write_results(runner: BilevelRunner, out: Path, title: str) -> list[str]:
    """Writes what a run gives besides its checkpoints and its history. Returns the names of all its files."""
    runner.history.schedule().to_json(out / "schedule.json")
    torch.save(runner.best_model().state_dict(), out / "weights.pt")
    files = ["history.csv", "schedule.json", "weights.pt", "last.pt", "best.pt"]
    try:
        runner.history.plot(out / "schedules.png")
        files.append("schedules.png")
        write_report(runner, out / "report.html", title=title)
        files.append("report.html")
    except ImportError as error:
        print(f"no plot and no report: {error}")
    return files


def _refit(runner: BilevelRunner, split: data.Split, args: argparse.Namespace, out: Path) -> None:
    """Train anew on all images but those of the test, into a folder of its own, and say how good that is."""
    model = runner.refit(data.loader(ConcatDataset([split.train, split.valid]), args.batch_size, args.seed)).eval()
    torch.save(model.state_dict(), out / "refit" / "weights.pt")
    with torch.no_grad():
        batches = [(model(x.to(runner.device)), y.to(runner.device)) for x, y in DataLoader(split.test, 256)]
    output, target = torch.cat([output for output, _ in batches]), torch.cat([target for _, target in batches])
    loss, share = F.cross_entropy(output, target).item(), accuracy(output, target)
    print(
        f"refit, {len(runner.refit_history or ())} epochs: test loss {loss:.4f}, accuracy {share:.3f}; in {out / 'refit'}"
    )


def run_tune(args: argparse.Namespace) -> int:
    torch.manual_seed(args.seed)
    out = as_path(args.out, "--out")
    if out.is_file():
        raise ValueError(f"--out {args.out!r} is a file; name a folder, which is made where there is none")
    device = check_device(args.device, "--device")
    split = data.load(args.data, args.image_size, args.train_size, args.valid_size, args.seed, args.data_root)
    runner = _runner(args, split, device, out)
    history = runner.fit(args.epochs)
    files = _write_results(runner, out, f"fxstn tune {args.model} on {args.data}")
    best, last = history.best(), history.rows[-1]
    tests = runner.evaluate(DataLoader(split.test, 256))
    print(f"best epoch {best['epoch']}: validation loss {best['valid_loss']:.4f}, accuracy {best['accuracy']:.3f}")
    print(f"last epoch {last['epoch']}: test loss {tests['valid_loss']:.4f}, accuracy {tests['accuracy']:.3f}")
    outcome, starts, now = history.outcome(), history.start, runner.problem.values()
    rows = [
        (name, f"{starts[name]:.3g}", f"{value:.3g} ± {outcome.spread[name]:.1g}", f"{now[name]:.3g}")
        for name, value in outcome.values.items()
    ]
    print(tabulate(rows, ["hyperparameter", "start", "value", "now"]))
    print(f"in {out}: {', '.join(files)}")
    if args.refit:
        _refit(runner, split, args, out)
    return 0


def run_bench(args: argparse.Namespace) -> int:
    check_device(args.device, "--device")
    setup = bench.Setup(
        args.model, args.batch_size, args.image_size, args.num_classes, args.device, args.tuned, args.compile, args.bf16,
        args.channels_last, args.recompute,
    )  # fmt: skip
    rows = bench.bench(setup, names=args.variants, rounds=args.rounds, warmup=min(3, args.rounds), memory=args.memory)
    columns = ("variant", "step_ms", "ratio", "peak_mb", "failed")
    print(", ".join(f"{key} {value}" for key, value in rows[0].items() if key not in columns))
    print(tabulate([[row.get(key) for key in columns] for row in rows], ["variant", "step ms", "ratio", "peak MB", ""]))
    if args.json:
        bench.write_json(args.json, rows)
        print(f"written to {args.json}")
    return 0


def run_explain(args: argparse.Namespace) -> int:
    explanation = explain(build_model(args.model, args.num_classes, own_classes=True))
    print(explanation)
    return 0 if explanation.ok else 1


def run_show(args: argparse.Namespace) -> int:
    if unknown := [name for name in args.specs if name not in AUGMENTATIONS]:
        raise ValueError(f"{unknown[0]!r} is no augmentation; there are {', '.join(AUGMENTATIONS)}")
    images = data.photographs(args.image_size).flip(0)  # the colourful one first
    show([AUGMENTATIONS[name]() for name in args.specs], images, args.out, columns=args.columns, seed=args.seed)
    print(f"written to {args.out}")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    torch.manual_seed(args.seed)
    x = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    report = verify(build_model(args.model, args.num_classes, own_classes=True), x)
    print(report)
    return 0 if report.ok else 1


COMMANDS = {
    "tune": run_tune,
    "bench": run_bench,
    "explain": run_explain,
    "show": run_show,
    "verify": run_verify,
}


def run(args: argparse.Namespace) -> int:
    """Runs a command and returns its exit status. Errors that a user can mend are printed without a traceback."""
    try:
        return COMMANDS[args.command](args)
    except (ValueError, OSError, ImportError, DivergedError) as error:
        print(f"fxstn {args.command}: {error}", file=sys.stderr)
        return 2
