"""The paper's experiments on fxstn's runner: every row and figure, by name; each cell resumes where it stopped.

    python -m benchmarks.paper run --task fmnist --method delta --budget small --seed 0     # a cell
    python -m benchmarks.paper run --task fmnist --budget small                             # a row; without --task everything
    python -m benchmarks.paper robustness --task fmnist --budget small
    python -m benchmarks.paper linear --kind l2 --set yacht --method delta
    python -m benchmarks.paper inert                                                        # a hyperparameter without effect

Methods: "untuned" trains at the start; "random" and "bayes" (Optuna's TPE) draw every strength and train from scratch, a trial
each; "stn", "centered" and "delta" have the paper's settings; "default" is the runner's. Budgets: "tiny" (seconds; a check that
all runs), "small" (a few thousand images, minutes a cell on one CPU thread, the same time for every method), "full" (the
paper's; a GPU). Results: benchmarks/results/paper/BUDGET-TASK.json; checkpoints and Optuna's storage under --out.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fxstn
from benchmarks.paper import inert, linear
from benchmarks.paper.report import FOLDER, read
from benchmarks.paper.tasks import METHODS, ROWS, START, task
from benchmarks.trials import search, trained
from benchmarks.tuned import seconds_of

SEARCHES = {"random": "random", "bayes": "tpe"}
INITIAL = {"start": (0.05, 0.2, 0.4, 0.6, 0.9), "scale": (0.1, 0.3, 1.0, 2.0)}  # of dropout, at σ = 1; of σ, at START


def write(path: Path, key: str, value: Any) -> None:
    """Add a result; another process may have written in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(read(path) | {key: value}, separators=(",", ":")) + "\n")


def single(
    args: argparse.Namespace, row: str, method: str, seed: int, out: Path, start: float, scale: float
) -> dict[str, Any]:
    """One run, resumed from its checkpoint."""
    runner, result = trained(
        task(row, args.budget, scale), method, start, seed, args.data_root, ROWS[row].budgets[args.budget].minutes,
        progress=None, checkpoints=fxstn.CheckpointSettings(out_dir=out, save_minutes=5),
        execution=fxstn.ExecutionSettings(device=args.device, autocast=torch.bfloat16 if args.bf16 else None,
                                          compile=args.compile),
    )  # fmt: skip
    found = runner.history.schedule().values if len(runner.history) else {}  # none where the first epoch diverged
    schedule = {name: [float(f"{v:.3g}") for v in values] for name, values in found.items()}
    return result | {"schedule": schedule, "machine": machine(args.device)}


def machine(device: str) -> str:
    """In words: device and torch's version."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} CPU thread(s)"
    return f"{name}, torch {torch.__version__}"


def cell(args: argparse.Namespace, row: str, method: str, seed: int) -> None:
    """Run what is missing of a cell and write it down."""
    path, key = FOLDER / f"{args.budget}-{row}.json", f"{method} {seed}"
    if method not in SEARCHES:
        if key not in read(path):
            out = args.out / args.budget / row / f"{method}-{seed}"
            write(path, key, single(args, row, method, seed, out, START, 1.0))
        return
    budget, spec = ROWS[row].budgets[args.budget], task(row, args.budget)
    name = SEARCHES[method] + ("-halving" if args.pruned else "")
    key = f"{method}{'-pruned' if args.pruned else ''} {seed}"
    trials = read(path).get(key, [])

    def over() -> bool:
        if budget.minutes is None:
            return len(trials) >= budget.trials
        return sum(map(seconds_of, trials)) >= 60 * budget.minutes

    if over():
        return
    storage = journal(args.out / args.budget / row)
    while not over():
        trials.append(search(spec, name, seed, args.data_root, trials, storage))
        write(path, key, trials)


def journal(folder: Path) -> Any:
    """Optuna's storage of a row's searches; `optuna-dashboard FOLDER/optuna.journal` shows them."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    folder.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(folder / "optuna.journal")))


def robustness(args: argparse.Namespace) -> None:
    """Final validation loss over initial dropout and over initial σ, for each method."""
    for row in args.task:
        path = FOLDER / f"robustness-{args.budget}-{row}.json"
        settings = [(start, 1.0) for start in INITIAL["start"]] + [(START, scale) for scale in INITIAL["scale"]]
        todo = [
            (seed, method, *pair) for seed in args.seed for method in args.method for pair in dict.fromkeys(settings)
        ]
        for seed, method, start, scale in (bar := tqdm(todo, disable=None)):
            bar.set_description(f"{row}: {method}, start {start}, σ {scale}, seed {seed}")
            if (key := f"{method} {start} {scale} {seed}") not in read(path):
                out = args.out / f"robustness-{args.budget}" / row / key.replace(" ", "-")
                write(path, key, single(args, row, method, seed, out, start, scale))


def regressions(args: argparse.Namespace) -> None:
    """Every linear problem from every start."""
    torch.set_num_threads(1)
    for kind in args.kind:
        path = FOLDER / f"linear-{kind}.json"
        todo = [
            (seed, name, scale, method, start) for seed in args.seed for name in args.set for scale in args.scale
            for method in args.method for start in linear.KINDS[kind].starts
        ]  # fmt: skip
        for seed, name, scale, method, start in (bar := tqdm(todo, disable=None)):
            bar.set_description(f"{kind}, {name}: {method}, start {start}, σ {scale}, seed {seed}")
            if (key := f"{name} {method} {start} {scale} {seed}") not in read(path):
                write(path, key, linear.run(name, kind, method, start, scale, seed, args.data_root, args.hyper_steps))


def drifts(args: argparse.Namespace) -> None:
    """A hyperparameter without effect, from every start."""
    torch.set_num_threads(1)
    path = FOLDER / "inert.json"
    todo = [(seed, method, start) for seed in args.seed for method in args.method for start in inert.STARTS]
    for seed, method, start in (bar := tqdm(todo, disable=None)):
        bar.set_description(f"{method}, start {start}, seed {seed}")
        if (key := f"{method} {start} {seed}") not in read(path):
            write(path, key, inert.run(method, start, seed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "benchmarks.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "robustness", "linear", "inert"):
        command = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        methods = {"run": METHODS, "inert": inert.METHODS}.get(name, linear.METHODS)
        seeds = list(range(8 if name == "inert" else 3))
        command.add_argument("--method", nargs="+", default=list(methods), choices=list(METHODS), help="columns")
        command.add_argument("--seed", nargs="+", type=int, default=seeds, help="of data, weights and noise")
        if name == "inert":
            continue
        command.add_argument(
            "--data-root", default=os.environ.get("FXSTN_DATA"),
            help="where torchvision's data and uci/NAME.npz lie, or are downloaded to (default: the variable FXSTN_DATA)",
        )  # fmt: skip
        if name == "linear":
            command.add_argument(
                "--kind", nargs="+", default=list(linear.KINDS), choices=list(linear.KINDS), help="problems"
            )
            command.add_argument(
                "--set", nargs="+", default=list(linear.SETS), choices=list(linear.SETS), help="data sets"
            )
            command.add_argument("--scale", nargs="+", type=float, default=[1.0], help="σ, held; 1: the paper's")
            command.add_argument(
                "--hyper-steps", type=int, default=300, help="steps of λ, after 10 of the weights each"
            )
            continue
        command.add_argument("--task", nargs="+", default=list(ROWS), choices=list(ROWS), help="rows")
        command.add_argument("--budget", default="small", choices=("tiny", "small", "full"), help="see above")
        command.add_argument("--device", default="cpu", help="cpu or cuda")
        command.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
        command.add_argument("--compile", action="store_true", help="through torch.compile")
        command.add_argument(
            "--pruned", action="store_true", help="searches stop trials that fall behind (successive halving)"
        )
        command.add_argument("--out", type=Path, default=Path("out/paper"), help="checkpoints")
    return parser


def main() -> None:
    args = _parser().parse_args()
    if args.command == "linear":
        regressions(args)
    elif args.command == "inert":
        drifts(args)
    elif args.command == "robustness":
        robustness(args)
    else:
        todo = [(seed, row, method) for seed in args.seed for row in args.task for method in args.method]
        for seed, row, method in (bar := tqdm(todo, disable=None)):
            bar.set_description(f"{row}: {method}, seed {seed}")
            cell(args, row, method, seed)


if __name__ == "__main__":
    main()
