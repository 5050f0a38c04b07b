"""What tuning costs in whole runs: tuned and plain training side by side, and where the time of the tuned run goes.

    python -m benchmarks.whole_runs [--networks cnn demo mlp] [--rounds 3] [--epochs 60]

cnn: two convolutions on 300 images of 28×28, batch 25, dropout and weight decay. demo: resnet18 as in examples/demo.py, without
files. mlp: 784-600-600-10 on 2,000 images, batch 100. Images are random: cost does not depend on what they show.

plain is a loop of its own with torch's dropout and weight decay, with a pass over the validation data after each epoch, as the
tuned run has one. Both train for an epoch in turn, in one process, in seconds of its CPU time. `parts` are those of the tuned
run, each without the parts inside it, in percent of plain training.

Writes benchmarks/results/whole-runs.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18
from tqdm import tqdm

import fxstn
from benchmarks.overhead import RESULTS
from fxstn import hp
from fxstn.bilevel.best_model import BestModel
from fxstn.bilevel.checkpoint_manager import CheckpointManager
from fxstn.bilevel.evaluation import EvaluatedStatistics, Evaluator
from fxstn.bilevel.network_problem import NetworkProblem
from fxstn.bilevel.steps import Stepper

FILE = RESULTS / "whole-runs.json"
DROPOUT, DECAY = 0.1, 1e-4
PARTS: dict[str, tuple[tuple[type, str], ...]] = {  # {part: the methods whose time it is}
    "inner": ((Stepper, "inner"),),
    "response": ((Stepper, "response"),),
    "hyper": ((Stepper, "hyper"),),
    "validation data": ((Evaluator, "means"),),
    "statistics of norms": ((EvaluatedStatistics, "estimated"),),
    "clean training loss": ((Evaluator, "clean_train_loss"),),
    "diagnostics": ((NetworkProblem, "diagnostics"),),
    "copies and files": ((CheckpointManager, "keep"), (BestModel, "offer")),
}
REST = "loaders, history, Python"


def cnn() -> nn.Module:
    blocks = [nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5, padding=2), nn.ReLU()]
    return nn.Sequential(
        *blocks, nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(DROPOUT), nn.Linear(1568, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def mlp() -> nn.Module:
    hidden = [nn.Linear(784, 600), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(600, 600), nn.ReLU(), nn.Dropout(DROPOUT)]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(600, 10))


# {name: (network, shape of an image, training and validation images, batch, that of the validation loader, epochs)}
Case = tuple[Callable[[], nn.Module], tuple[int, ...], int, int, int, int, int]
CASES: dict[str, Case] = {
    "cnn": (cnn, (1, 28, 28), 300, 200, 25, 200, 60),
    "demo": (partial(resnet18, num_classes=10), (3, 32, 32), 300, 500, 50, 125, 20),
    "mlp": (mlp, (1, 28, 28), 2000, 500, 100, 250, 60),
}


class PlainRun:
    """Training by torch alone: fixed dropout, weight decay in the optimizer, a pass over the validation data in each epoch."""

    def __init__(self, model: nn.Module, train: DataLoader, valid: DataLoader) -> None:
        self.model, self.train, self.valid = model, train, valid
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=DECAY, fused=True)

    def epoch(self) -> None:
        self.model.train()
        for x, y in self.train:
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.model.eval()
        with torch.no_grad():
            for x, y in self.valid:
                F.cross_entropy(self.model(x), y)


class Account:
    """CPU seconds by part: of each, those outside of the parts that it calls."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside = [REST]
        self._last = time.process_time()

    def _turn(self) -> None:
        now = time.process_time()
        self.seconds[self._inside[-1]] += now - self._last
        self._last = now

    def begin(self, part: str) -> None:
        self._turn()
        self._inside.append(part)

    def end(self) -> None:
        self._turn()
        self._inside.pop()

    def watch(self, part: str, owner: type, name: str) -> None:
        """Count the calls of a method; of one that returns a context manager, how it begins and ends."""
        method = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.begin(part)
            try:
                result = method(*args, **kwargs)
            finally:
                self.end()
            return _Entered(self, part, result) if hasattr(result, "__enter__") else result

        setattr(owner, name, watched)


class _Entered:
    """A context manager whose beginning and end an account counts."""

    def __init__(self, account: Account, part: str, inner: Any) -> None:
        self.account, self.part, self.inner = account, part, inner

    def __enter__(self) -> Any:
        self.account.begin(self.part)
        try:
            return self.inner.__enter__()
        finally:
            self.account.end()

    def __exit__(self, *error: Any) -> Any:
        self.account.begin(self.part)
        try:
            return self.inner.__exit__(*error)
        finally:
            self.account.end()


def data_of(case: Case, seed: int) -> tuple[DataLoader, DataLoader]:
    _, shape, train, valid, batch, valid_batch, _ = case
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(train + valid, *shape, generator=generator)
    classes = torch.randint(10, (train + valid,), generator=generator)
    sets = [TensorDataset(images[part], classes[part]) for part in (slice(train), slice(train, None))]
    return DataLoader(sets[0], batch, shuffle=True), DataLoader(sets[1], valid_batch)


def tuned_run(model: nn.Module, train: DataLoader, valid: DataLoader) -> fxstn.BilevelRunner:
    specs = [hp.Dropout(init=DROPOUT), hp.WeightDecay(shared=True, init=DECAY)]
    return fxstn.BilevelRunner(fxstn.transform(model, specs), F.cross_entropy, train, valid, progress=False)


def one_round(case: Case, epochs: int, seed: int, account: Account) -> tuple[float, float, fxstn.BilevelRunner]:
    """CPU seconds of whole runs, plain and tuned, epoch by epoch in turn; and the tuned one."""
    torch.manual_seed(seed)
    model = case[0]()
    plain, tuned = PlainRun(model, *data_of(case, seed)), tuned_run(model, *data_of(case, seed))
    seconds = [0.0, 0.0]
    account.seconds.clear()
    for epoch in range(1, epochs + 1):
        start = time.process_time()
        plain.epoch()
        seconds[0] += time.process_time() - start
        account._last = start = time.process_time()
        tuned.fit(epoch)
        account._turn()
        seconds[1] += time.process_time() - start
    return seconds[0], seconds[1], tuned


def measure(name: str, rounds: int, epochs: int | None, account: Account) -> dict[str, Any]:
    """The median of whole runs of one network."""
    case = CASES[name]
    epochs = epochs or case[-1]
    ratios, parts, seconds = [], [], []
    for number in range(rounds):
        plain, tuned, runner = one_round(case, epochs, number, account)
        ratios.append(tuned / plain)
        seconds.append(plain)
        parts.append({part: account.seconds[part] / plain for part in (*PARTS, REST)})
    shares = {part: round(100 * statistics.median(run[part] for run in parts), 1) for part in (*PARTS, REST)}
    steps = {"inner": runner.steps, "response": runner.response_steps, "hyper": runner.hyper_steps}
    return {
        "epochs": epochs, "steps": steps, "plain_seconds": round(statistics.median(seconds), 2), "parts": shares,
        "ratios": [round(ratio, 3) for ratio in ratios], "ratio": round(statistics.median(ratios), 3),
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """Percent of plain training, by part."""
    rows = [[part, *(f"{result['parts'][part]:.1f}" for result in results.values())] for part in (*PARTS, REST)]
    rows += [["tuned / plain", *(f"{result['ratio']:.2f}" for result in results.values())]]
    counts = [result["steps"] for result in results.values()]
    rows += [[f"{kind} steps", *(str(count[kind]) for count in counts)] for kind in ("inner", "response", "hyper")]
    heads = [f"{name}, {result['epochs']} epochs" for name, result in results.items()]
    return tabulate(rows, ["% of plain training", *heads], tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=list(CASES), help="which networks")
    parser.add_argument("--rounds", type=int, default=3, help="whole runs of each kind")
    parser.add_argument("--epochs", type=int, help="of each run; default: as many as the network has")
    parser.add_argument("--file", type=Path, default=FILE, help="where results are written")
    args = parser.parse_args()
    account = Account()
    for part, methods in PARTS.items():
        for owner, method in methods:
            account.watch(part, owner, method)
    results = json.loads(args.file.read_text()) if args.file.exists() else {}
    for name in tqdm(args.networks, desc="networks", disable=None):
        results[name] = measure(name, args.rounds, args.epochs, account)
        args.file.write_text(json.dumps(results, indent=1) + "\n")
    print(table({name: results[name] for name in args.networks}))


if __name__ == "__main__":
    main()
