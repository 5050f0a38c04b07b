"""The command line: the arguments of fxstn tune | bench | explain | verify | show. Nothing here imports torch."""

from __future__ import annotations

import argparse
import io
import math
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fxstn.tools.choices import DATA_SETS, VARIANTS
from fxstn.tools.status import SIGNALLED, STATUSES
from fxstn.tools.version import version

OWN = "a torchvision model, or package.module:function, in the current folder too"
MODEL = f"{OWN}, that takes num_classes"


def _count(text: str, least: int = 1) -> int:
    """A number of things. Raises argparse's error, which names the option, where it is none."""
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, {least} or more")
    return number


def _count_or_zero(text: str) -> int:
    return _count(text, 0)


def _several(text: str) -> int:
    number = _count(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 2 or more: norms of batches need them")
    return number


def _seed(text: str) -> int:
    number = _count(text, 0)
    if number >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} must be below {2**32}")
    return number


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive number")
    return rate


def _kind_or_count(text: str) -> str | int:
    return text if text in ("dropout", "weight-decay") else _count(text)


def _add_tune(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("model and data").add_argument
    add("--model", default="resnet18", help=MODEL)
    add("--data", default="digits",
        help=f"{', '.join(DATA_SETS)} (digits needs no download); or a folder of images, one sub-folder per class, with train/ "
        "and val/ above them where there is a split; or package.module:function, which returns a data set, or (train, valid) "
        "or (train, valid, test) of data sets or loaders of (inputs, class)")  # fmt: skip
    add("--data-root", metavar="DIR", help="where torchvision's data lies or is downloaded to (or FXSTN_DATA)")
    add("--train-size", type=_count, metavar="N", help="training examples (default: 500 digits, all of the others)")
    add("--valid-size", type=_count, metavar="N",
        help="validation examples (default: 500 digits, val/, or 15%% held out by class)")  # fmt: skip
    add("--num-classes", type=_count, metavar="N", help="number of classes of the model (default: that of the data)")
    add("--image-size", type=_count, default=32, metavar="N",
        help="pixels, images are scaled to it; 224 for most torchvision models")  # fmt: skip
    add("--workers", type=_count_or_zero, default=0, metavar="N", help="processes that load images")
    add = command.add_argument_group("training").add_argument
    add("--epochs", type=_count, default=20, metavar="N", help="epochs in all, those of an earlier call included")
    add("--batch-size", type=_count, default=64, metavar="N", help="examples per step")
    add("--lr", type=_rate, default=1e-2,
        help="learning rate of the weights, by SGD with momentum 0.9; with --paper, of the response too")  # fmt: skip
    add("--patience", type=_count, metavar="N", help="stop after that many epochs without improvement")
    add("--seed", type=_seed, default=0, help="random seed of the split, the weights and all noise")
    add("--device", default="cpu", help="cpu or cuda")
    add = command.add_argument_group("tuning").add_argument
    add("--weight-decay", default="shared", choices=("shared", "layers", "none"),
        help="one weight decay for all layers, one for each, or none")  # fmt: skip
    add("--method", default="delta", choices=("delta", "centered", "stn"),
        help="delta: Δ-STN; centered: without linearisation; stn: MacKay et al. 2019")  # fmt: skip
    add(
        "--paper", action="store_true", help="delta with the settings of the paper, which the other methods always have"
    )
    add("--hyper-lr", type=_rate, metavar="LR",
        help="learning rate of the hyperparameters (default: 0.4, which falls; with --paper 0.01)")  # fmt: skip
    add("--warmup-epochs", type=_count_or_zero, default=0, metavar="N",
        help="epochs before the hyperparameters move")  # fmt: skip
    add("--replay", metavar="FILE", help="train on the schedule.json of another run, and tune nothing")
    add = command.add_argument_group("result").add_argument
    add("--refit", action="store_true",
        help="then train anew with the values of the run, on training and validation images, without tuning")  # fmt: skip
    add("--out", default="out", metavar="DIR", help="folder for results; the run resumes from it")


def _add_bench(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", help=MODEL)
    add("--batch-size", type=_count, default=64, help="examples per step")
    add("--image-size", type=_count, default=32, help="pixels")
    add("--num-classes", type=_count, default=10, help="number of classes of the model")
    add("--variants", nargs="+", default=VARIANTS, choices=VARIANTS, metavar="VARIANT",
        help=f"what is timed, of {', '.join(VARIANTS)}; plain always runs (default: all)")  # fmt: skip
    add("--rounds", type=_count, default=15, help="alternating rounds, of which the median is taken")
    add("--memory", nargs="*", default=VARIANTS, choices=VARIANTS, metavar="VARIANT",
        help="variants whose peak memory is measured, in a fresh process each (default: all)")  # fmt: skip
    add("--device", default="cpu", help="cpu or cuda")
    add("--tuned", type=_kind_or_count, default="dropout", metavar="dropout|weight-decay|N",
        help="what is tuned: dropout, a weight decay per layer, or N numbers of the loss function")  # fmt: skip
    add("--compile", action="store_true", help="through torch.compile, plain training too")
    add("--bf16", action="store_true", help="bfloat16 autocast")
    add("--channels-last", action="store_true", help="images and weights with channels last")
    add("--recompute", action="store_true", help="activation checkpointing in response and hyper steps")
    add("--json", metavar="FILE", help="also write the rows to this file")


def _add_explain(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help=OWN)
    command.add_argument("--num-classes", type=_count, default=10, help="number of classes of the model")


def _add_show(command: argparse.ArgumentParser) -> None:
    command.add_argument("specs", nargs="*", default=["ColorJitter", "Affine", "Cutout"], metavar="SPEC",
                         help="augmentations of fxstn.hp; any other word lists them (default: ColorJitter Affine "
                         "Cutout)")  # fmt: skip
    command.add_argument("--image-size", type=_count, default=96, help="pixels")
    command.add_argument("--columns", type=_count, default=7, help="strengths from low to high")
    command.add_argument("--seed", type=_seed, default=0, help="random seed of the draws, one in each row")
    command.add_argument("--out", default="augmentations.png", metavar="FILE", help="image to write")


def _add_verify(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help=OWN)
    command.add_argument("--batch-size", type=_several, default=4, help="examples, at least 2")
    command.add_argument("--image-size", type=_count, default=32, help="pixels")
    command.add_argument("--num-classes", type=_count, default=10, help="number of classes of the model")
    command.add_argument("--seed", type=_seed, default=0, help="random seed of weights and input")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a default once, and none where there is nothing to show; examples as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class Command(NamedTuple):
    """add: adds its arguments. examples: command lines without "fxstn NAME"."""

    add: Callable[[argparse.ArgumentParser], None]
    what: str
    result: str
    examples: tuple[str, ...]


COMMANDS = {
    "tune": Command(
        _add_tune, "train a model and tune its dropout and weight decay", "Writes weights, history and a report.",
        ("--epochs 5 --out out/digits",
         "--model resnet18 --data photos/ --image-size 224 --workers 4 --refit --out out/photos",
         "--model my_models:build --data my_data:load --device cuda"),
    ),
    "bench": Command(
        _add_bench, "measure the overhead against plain training", "Prints times and memory of each kind of step.",
        ("resnet18 --variants plain schedule-default", "my_models:build --batch-size 32 --rounds 5 --json bench.json"),
    ),
    "explain": Command(
        _add_explain, "show what transform makes of a model", "Prints problems first. Exits with 1 if there are any.",
        ("resnet18", "my_models:build"),
    ),
    "show": Command(
        _add_show, "draw what the ranges of augmentations mean", "Writes an image, a row per strength.",
        ("ColorJitter Affine --out ranges.png",),
    ),
    "verify": Command(
        _add_verify, "check the emitted tangent in float64", "Compares it with a central difference. Exits with 1 where they "
        "differ.",
        ("resnet18", "my_models:build --image-size 64"),
    ),
}  # fmt: skip


class _Version(argparse.Action):
    """Prints the version."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"fxstn {version()}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "fxstn", description="Tune regularisation hyperparameters in one training run (Δ-STN).",
        epilog=f"fxstn COMMAND --help has the options and examples of a command. {STATUSES[0].upper()}{STATUSES[1:]}.",
    )  # fmt: skip
    result.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        description = f"{command.what[0].upper()}{command.what[1:]}. {command.result}"
        examples = "\n".join(f"  fxstn {name} {words}" for words in command.examples)
        command.add(
            commands.add_parser(
                name,
                help=command.what,
                description=description,
                formatter_class=_Help,
                epilog=f"examples:\n{examples}\n\n{STATUSES}",
            )
        )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # λ and the like, where the locale's encoding does not have them
            stream.reconfigure(errors="backslashreplace")
    args = parser().parse_args(arguments)
    from fxstn.tools.doing import doing

    try:
        with doing("loading PyTorch"):
            from fxstn.tools import commands  # takes seconds, which --help and a wrong option do without
    except KeyboardInterrupt:
        print(f"fxstn {args.command}: interrupted", file=sys.stderr)
        return SIGNALLED + signal.SIGINT
    return commands.run(args)
