"""What the commands of `fxstn` do, once their arguments are parsed: tune, bench, explain, verify, show."""

from __future__ import annotations

import argparse
import inspect
import os
import signal
import sys

import torch
from tabulate import tabulate

from fxstn import hp
from fxstn.bilevel.checks import check_device
from fxstn.ir.input_errors import first_line
from fxstn.tools import bench, data
from fxstn.tools.doing import doing
from fxstn.tools.explain import explain
from fxstn.tools.models import build_model
from fxstn.tools.show import show
from fxstn.tools.status import DONE, FAILED, SIGNALLED, USAGE, RunFailed
from fxstn.tools.tuning import run_tune
from fxstn.tools.verify import verify

OF_IMAGES = ("fxstn.hp.augment", "fxstn.hp.geometry", "fxstn.hp.mix")
AUGMENTATIONS = {cls.__name__: cls for cls in hp.OPERATIONS.values() if cls.__module__ in OF_IMAGES}


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
    return DONE


def run_explain(args: argparse.Namespace) -> int:
    explanation = explain(build_model(args.model, args.num_classes, own_classes=True))
    print(explanation)
    return DONE if explanation.ok else FAILED


def run_show(args: argparse.Namespace) -> int:
    if unknown := [name for name in args.specs if name not in AUGMENTATIONS]:
        raise ValueError(f"{unknown[0]!r} is no augmentation; there are {', '.join(AUGMENTATIONS)}")
    with doing("drawing"):
        images = data.photographs(args.image_size).flip(0)  # the colourful one first
        show([AUGMENTATIONS[name]() for name in args.specs], images, args.out, columns=args.columns, seed=args.seed)
    print(f"written to {args.out}")
    return DONE


def run_verify(args: argparse.Namespace) -> int:
    torch.manual_seed(args.seed)
    x = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    model = build_model(args.model, args.num_classes, own_classes=True)
    try:
        inspect.signature(model.forward).bind(x)
    except TypeError as error:
        raise ValueError(f"the forward of {args.model}: {error}; the command gives images alone, fxstn.verify(model, *inputs) "
                         "anything") from error  # fmt: skip
    report = verify(model, x)
    print(report)
    return DONE if report.ok else FAILED


COMMANDS = {
    "tune": run_tune,
    "bench": run_bench,
    "explain": run_explain,
    "show": run_show,
    "verify": run_verify,
}


def _text_of(error: Exception) -> str:
    """What an error says, and the page that explains it or what it comes from."""
    notes = [*getattr(error, "__notes__", ()), *getattr(error.__cause__, "__notes__", ())]
    return "\n".join([str(error), *dict.fromkeys(notes)])


def run(args: argparse.Namespace) -> int:
    """Runs a command and returns its exit status. Errors that a user can mend are printed without a traceback."""
    try:
        status = COMMANDS[args.command](args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads has enough, `head` say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SIGNALLED + signal.SIGPIPE
    except RunFailed as error:
        status, text = FAILED, _text_of(error)
    except torch.OutOfMemoryError as error:
        status, text = FAILED, f"{first_line(error)}; choose a smaller --batch-size, or another --device"
    except (ValueError, OSError, ImportError) as error:
        status, text = USAGE, _text_of(error)
    except KeyboardInterrupt:
        status, text = SIGNALLED + signal.SIGINT, "interrupted"
    except SystemExit as end:  # at SIGTERM, which a run takes as a wish to save and end
        status, text = int(end.code or 0), "ended by a signal"
    if status > SIGNALLED and args.command == "tune":
        text += f"; the same command goes on from {args.out}"
    print(f"fxstn {args.command}: {text}", file=sys.stderr)
    return status
