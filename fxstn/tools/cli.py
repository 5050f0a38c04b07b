"""The command line: fxstn tune | bench | explain | verify | show."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fxstn
from fxstn import hp
from fxstn.bilevel.optim import SettlingAdam
from fxstn.bilevel.settings import check_device
from fxstn.tools import data
from fxstn.tools.bench import VARIANTS, Setup, write_json
from fxstn.tools.bench import bench as measure

AUGMENTATIONS = {
    cls.__name__: cls for cls in hp.OPERATIONS.values() if cls.__module__ in ("fxstn.hp.augment", "fxstn.hp.mix")
}


def build_model(name: str, classes: int) -> nn.Module:
    """A torchvision model by name, or 'package.module:function' called with num_classes. Raises ValueError if unknown."""
    if ":" in name:
        module, _, function = name.partition(":")
        try:
            model = getattr(importlib.import_module(module), function)(num_classes=classes)
        except (AttributeError, ImportError, TypeError) as error:
            raise ValueError(
                f"--model {name!r} cannot be made: {error}; name a function that can be imported and takes num_classes"
            ) from error
        if not isinstance(model, nn.Module):
            raise ValueError(f"--model {name!r} must return an nn.Module, it returns {type(model).__name__}")
        return model
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ValueError(f"--model {name!r} is neither a torchvision classification model nor package.module:function")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # googlenet and inception announce other initial weights
        return models.get_model(name, weights=None, num_classes=classes)


def _hparams(args: argparse.Namespace) -> list[hp.Spec]:
    return [
        hp.Dropout(),
        *([hp.WeightDecay("*", shared=args.weight_decay == "shared")] if args.weight_decay != "none" else []),
    ]


def loader(dataset: Dataset, batch_size: int, seed: int) -> DataLoader:
    return DataLoader(dataset, batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))


def tune(args: argparse.Namespace) -> int:
    torch.manual_seed(args.seed)
    out = Path(args.out)
    if out.is_file():
        raise ValueError(f"--out {args.out!r} is a file; name a folder, which is made where there is none")
    device = check_device(args.device or "cpu", "--device")
    split = data.load(args.data, args.image_size, args.train_size, args.valid_size, args.seed, args.data_root)
    model = build_model(args.model, split.classes)
    sgd = partial(torch.optim.SGD, lr=args.lr, momentum=0.9)
    paper = args.paper or args.method != "delta"
    settings = fxstn.PAPER | {"response_optimizer": sgd} if paper else {}
    if args.hyper_lr is not None:
        settings["hyper_optimizer"] = partial(torch.optim.RMSprop if paper else SettlingAdam, lr=args.hyper_lr)
    schedule = fxstn.Schedule.from_json(args.replay) if args.replay else None
    response = "structured" if paper else None
    stn = fxstn.transform(model, _hparams(args), method=args.method, response=response)
    out.mkdir(parents=True, exist_ok=True)
    runner = fxstn.BilevelRunner(
        stn,
        F.cross_entropy,
        loader(split.train, args.batch_size, args.seed),
        loader(split.valid, args.batch_size, args.seed + 1),
        optimizer=sgd,
        metrics={"accuracy": fxstn.accuracy},
        warmup_epochs=args.warmup_epochs,
        patience=args.patience,
        device=device,
        out_dir=out,
        schedule=schedule,
        **settings,
    )
    history = runner.fit(args.epochs)
    history.schedule().to_json(out / "schedule.json")
    torch.save(runner.best_model().state_dict(), out / "weights.pt")
    written = ["history.csv", "schedule.json", "weights.pt", "last.pt", "best.pt"]
    try:
        history.plot(out / "schedules.png")
        written.append("schedules.png")
        fxstn.write_report(runner, out / "report.html", title=f"fxstn tune {args.model} on {args.data}")
        written.append("report.html")
    except ImportError as error:
        print(f"no plot and no report: {error}")
    best, last = history.best(), history.rows[-1]
    tests = runner.evaluate(DataLoader(split.test, 256))
    print(f"best epoch {best['epoch']}: validation loss {best['valid_loss']:.4f}, accuracy {best['accuracy']:.3f}")
    print(f"last epoch {last['epoch']}: test loss {tests['valid_loss']:.4f}, accuracy {tests['accuracy']:.3f}")
    starts = {p.name: p.init for p in stn.hparams.hyperparameters}
    values = stn.hparams.values()
    print(tabulate([(n, f"{starts[n]:.3g}", f"{values[n]:.3g}") for n in values], ["hyperparameter", "start", "now"]))
    print(f"in {out}: {', '.join(written)}")
    return 0


def bench(args: argparse.Namespace) -> int:
    check_device(args.device, "--device")
    setup = Setup(
        args.model, args.batch_size, args.image_size, args.num_classes, args.device, args.tuned, args.compile, args.bf16,
        args.channels_last, args.recompute,
    )  # fmt: skip
    rows = measure(setup, names=args.variants, rounds=args.rounds, warmup=min(3, args.rounds), memory=args.memory)
    shown = ("variant", "step_ms", "ratio", "peak_mb", "failed")
    print(", ".join(f"{key} {value}" for key, value in rows[0].items() if key not in shown))
    print(tabulate([[row.get(key) for key in shown] for row in rows], ["variant", "step ms", "ratio", "peak MB", ""]))
    if args.json:
        write_json(args.json, rows)
        print(f"written to {args.json}")
    return 0


def explain(args: argparse.Namespace) -> int:
    explanation = fxstn.explain(build_model(args.model, args.num_classes))
    print(explanation)
    return 0 if explanation.ok else 1


def show(args: argparse.Namespace) -> int:
    if unknown := [name for name in args.specs if name not in AUGMENTATIONS]:
        raise ValueError(f"{unknown[0]!r} is no augmentation; there are {', '.join(AUGMENTATIONS)}")
    images = data.photographs(args.image_size).flip(0)  # the colourful one first
    fxstn.show([AUGMENTATIONS[name]() for name in args.specs], images, args.out, columns=args.columns, seed=args.seed)
    print(f"written to {args.out}")
    return 0


def verify(args: argparse.Namespace) -> int:
    torch.manual_seed(args.seed)
    x = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    report = fxstn.verify(build_model(args.model, args.num_classes), x)
    print(report)
    return 0 if report.ok else 1


def _whole(text: str) -> int:
    """A number of something. Raises argparse's error, which names the option, where it is none."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 or more")
    return number


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive number")
    return rate


def _tuned(text: str) -> str | int:
    return text if text in ("dropout", "weight-decay") else _whole(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fxstn", description="Tune regularisation hyperparameters in one training run (Δ-STN)."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show_defaults = argparse.ArgumentDefaultsHelpFormatter
    model_help = "a torchvision model, or package.module:function(num_classes)"

    command = commands.add_parser(
        "tune", help="train a model and tune its dropout and weight decay", formatter_class=show_defaults
    )
    command.set_defaults(run=tune)
    command.add_argument("--model", default="resnet18", help=model_help)
    command.add_argument("--data", default="digits", choices=data.NAMES, help="digits needs no download")
    command.add_argument("--data-root", help="where torchvision's data lies or is downloaded to (or FXSTN_DATA)")
    command.add_argument("--train-size", type=_whole, help="training images (default: 500 digits, all of the others)")
    command.add_argument(
        "--valid-size", type=_whole, help="validation images (default: 500 digits, 15%% of the others)"
    )
    command.add_argument("--image-size", type=_whole, default=32, help="pixels, images are scaled to it")
    command.add_argument("--epochs", type=_whole, default=20, help="epochs in all, those of an earlier call included")
    command.add_argument("--batch-size", type=_whole, default=64, help="examples per step")
    command.add_argument("--method", default="delta", choices=("delta", "centered", "stn"), help="see the README")
    command.add_argument(
        "--weight-decay", default="shared", choices=("shared", "layers", "none"), help="one λ, one each, or none"
    )
    command.add_argument("--paper", action="store_true", help="the paper's settings, as with the other methods")
    command.add_argument("--lr", type=_rate, default=1e-2, help="of SGD with momentum 0.9 (the paper's response too)")
    command.add_argument("--hyper-lr", type=_rate, help="for λ: Adam's first (0.4), or the paper's RMSprop's (1e-2)")
    command.add_argument("--replay", metavar="FILE", help="train on the schedule.json of another run, and tune nothing")
    command.add_argument("--warmup-epochs", type=int, default=0, help="epochs before λ moves")
    command.add_argument("--patience", type=_whole, help="stop after that many epochs without improvement")
    command.add_argument("--seed", type=int, default=0, help="of the split, the weights and all noise")
    command.add_argument("--device", help="default: the CPU")
    command.add_argument("--out", default="out", help="folder for results; the run resumes from it")

    command = commands.add_parser(
        "bench", help="measure the overhead against plain training", formatter_class=show_defaults
    )
    command.set_defaults(run=bench)
    command.add_argument("model", help=model_help)
    command.add_argument("--batch-size", type=_whole, default=64, help="examples per step")
    command.add_argument("--image-size", type=_whole, default=32, help="pixels")
    command.add_argument("--num-classes", type=_whole, default=10, help="of the model")
    command.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS, help="plain always runs")
    command.add_argument("--rounds", type=_whole, default=15, help="alternating rounds, of which the median is taken")
    command.add_argument(
        "--memory",
        nargs="*",
        default=VARIANTS,
        choices=VARIANTS,
        help="variants whose peak memory is measured, in a fresh process each",
    )
    command.add_argument("--device", default="cpu", help="cpu or cuda")
    command.add_argument(
        "--tuned",
        type=_tuned,
        default="dropout",
        help="dropout, weight-decay (per layer), or a number of other hyperparameters",
    )
    command.add_argument("--compile", action="store_true", help="through torch.compile, plain training too")
    command.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    command.add_argument("--channels-last", action="store_true", help="images and weights with channels last")
    command.add_argument(
        "--recompute", action="store_true", help="activation checkpointing in response and hyper steps"
    )
    command.add_argument("--json", help="also write the rows to this file")

    command = commands.add_parser("explain", help="show what transform makes of a model", formatter_class=show_defaults)
    command.set_defaults(run=explain)
    command.add_argument("model", help=model_help)
    command.add_argument("--num-classes", type=_whole, default=10, help="of the model")

    command = commands.add_parser(
        "show", help="draw what the ranges of augmentations mean", formatter_class=show_defaults
    )
    command.set_defaults(run=show)
    command.add_argument(
        "specs", nargs="*", default=["ColorJitter", "Affine", "Cutout"], metavar="SPEC",
        help=f"of {', '.join(AUGMENTATIONS)}",
    )  # fmt: skip
    command.add_argument("--image-size", type=_whole, default=96, help="pixels")
    command.add_argument("--columns", type=_whole, default=7, help="strengths from low to high")
    command.add_argument("--seed", type=int, default=0, help="of the draws, one in each row")
    command.add_argument("--out", default="augmentations.png", help="image to write")

    command = commands.add_parser("verify", help="check the emitted tangent in float64", formatter_class=show_defaults)
    command.set_defaults(run=verify)
    command.add_argument("model", help=model_help)
    command.add_argument("--batch-size", type=_whole, default=4, help="examples, at least 2")
    command.add_argument("--image-size", type=_whole, default=32, help="pixels")
    command.add_argument("--num-classes", type=_whole, default=10, help="of the model")
    command.add_argument("--seed", type=int, default=0, help="of weights and input")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. Errors a user can mend are printed without a traceback."""
    args = _parser().parse_args(arguments)
    try:
        return args.run(args)
    except (ValueError, OSError, ImportError, fxstn.DivergedError) as error:
        print(f"fxstn {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
