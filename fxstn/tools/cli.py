"""The command line: the arguments of fxstn tune | bench | explain | verify | show. Nothing here imports torch."""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Sequence

from fxstn.tools.choices import DATA_SETS, VARIANTS

OWN = "a torchvision model, or package.module:function, in the current folder too"
MODEL = f"{OWN}, that takes num_classes"


def _count(text: str) -> int:
    """A number of things. Raises argparse's error, which names the option, where it is none."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 or more")
    return number


def _several(text: str) -> int:
    number = _count(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 2 or more: norms of batches need them")
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
    add = command.add_argument
    add("--model", default="resnet18", help=MODEL)
    add("--data", default="digits", choices=DATA_SETS, help="digits needs no download")
    add("--data-root", help="where torchvision's data lies or is downloaded to (or FXSTN_DATA)")
    add("--train-size", type=_count, help="training images (default: 500 digits, all of the others)")
    add("--valid-size", type=_count, help="validation images (default: 500 digits, 15%% of the others)")
    add("--image-size", type=_count, default=32, help="pixels, images are scaled to it")
    add("--epochs", type=_count, default=20, help="epochs in all, those of an earlier call included")
    add("--batch-size", type=_count, default=64, help="examples per step")
    add("--method", default="delta", choices=("delta", "centered", "stn"),
        help="delta: Δ-STN; centered: without linearisation; stn: MacKay et al. 2019")  # fmt: skip
    add("--weight-decay", default="shared", choices=("shared", "layers", "none"), help="one λ, one each, or none")
    add(
        "--paper", action="store_true", help="delta with the settings of the paper, which the other methods always have"
    )
    add("--lr", type=_rate, default=1e-2, 
        help="learning rate of the weights, by SGD with momentum 0.9; with --paper, of the response too")  # fmt: skip
    add("--hyper-lr", type=_rate, 
        help="learning rate of the hyperparameters (default: 0.4, which falls; with --paper 0.01)")  # fmt: skip
    add("--replay", metavar="FILE", help="train on the schedule.json of another run, and tune nothing")
    add("--refit", action="store_true", 
        help="then train anew with the values of the run, on training and validation images, without tuning")  # fmt: skip
    add("--warmup-epochs", type=int, default=0, help="epochs before λ moves")
    add("--patience", type=_count, help="stop after that many epochs without improvement")
    add("--seed", type=int, default=0, help="random seed of the split, the weights and all noise")
    add("--device", default="cpu", help="cpu or cuda")
    add("--out", default="out", help="folder for results; the run resumes from it")


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
    add("--json", help="also write the rows to this file")


def _add_explain(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help=OWN)
    command.add_argument("--num-classes", type=_count, default=10, help="number of classes of the model")


def _add_show(command: argparse.ArgumentParser) -> None:
    command.add_argument("specs", nargs="*", default=["ColorJitter", "Affine", "Cutout"], metavar="SPEC",
                         help="augmentations of fxstn.hp; any other word lists them")  # fmt: skip
    command.add_argument("--image-size", type=_count, default=96, help="pixels")
    command.add_argument("--columns", type=_count, default=7, help="strengths from low to high")
    command.add_argument("--seed", type=int, default=0, help="random seed of the draws, one in each row")
    command.add_argument("--out", default="augmentations.png", help="image to write")


def _add_verify(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help=OWN)
    command.add_argument("--batch-size", type=_several, default=4, help="examples, at least 2")
    command.add_argument("--image-size", type=_count, default=32, help="pixels")
    command.add_argument("--num-classes", type=_count, default=10, help="number of classes of the model")
    command.add_argument("--seed", type=int, default=0, help="random seed of weights and input")


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default once, and none where there is nothing to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


# {name: (what adds its arguments, help, further description)}
COMMANDS = {
    "tune": (_add_tune, "train a model and tune its dropout and weight decay", "Writes weights, history and a report."),
    "bench": (_add_bench, "measure the overhead against plain training", "Prints times and memory of each kind of step."),
    "explain": (_add_explain, "show what transform makes of a model", "Prints problems first. Exits with 1 if there are any."),
    "show": (_add_show, "draw what the ranges of augmentations mean", "Writes an image, a row per strength."),
    "verify": (_add_verify, "check the emitted tangent in float64", "Compares it with a central difference. Exits with 1 "
               "where they differ."),
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "fxstn", description="Tune regularisation hyperparameters in one training run (Δ-STN)."
    )
    commands = result.add_subparsers(dest="command", required=True)
    for name, (add_arguments, help_text, more) in COMMANDS.items():
        description = f"{help_text[0].upper()}{help_text[1:]}. {more}"
        add_arguments(commands.add_parser(name, help=help_text, description=description, formatter_class=_Defaults))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # λ and the like, where the locale's encoding does not have them
            stream.reconfigure(errors="backslashreplace")
    args = parser().parse_args(arguments)
    from fxstn.tools import commands  # torch takes seconds to import, which --help and a wrong option do without

    return commands.run(args)


if __name__ == "__main__":
    sys.exit(main())
