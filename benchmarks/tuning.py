"""Does tuning in one run pay? Tasks × methods × starts × seeds: best validation loss against time, and the test loss there.

    python -m benchmarks.tuning [--tasks mnist-mlp diabetes-mlp] [--methods ...] [--seeds 3] [--trials 30] [--data-root DIR]
    python -m benchmarks.tuning --report      # what is there, as tables and docs/results/tuning.png

One run: "untuned" trains at the start; "stn", "centered" and "delta" have the paper's settings, "default" the runner's own;
"unlimited" knows nothing of the generalisation gap (`SettlingAdam(limits=False)`), "uncertain" besides moves by every gradient
(certainty None, lr 0.2), "constant-rate" by Adam at 6e-2; three change one setting of the default: "every-step" (a response
step at every inner step), "uncorrected" (no inner_correction), "unwidened" (no response_widening).
Searches, of `--trials` runs each: "random", "tpe" (Optuna), and both with successive halving, which stops a run that falls
behind. A task's optimiser of the weights serves all. Writes benchmarks/results/tuning-TASK.json as it goes and goes on where
it stopped; the report (benchmarks/tuned.py) reads these files alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.transforms import v2
from tqdm import tqdm

from benchmarks.ridge import load_arrays
from benchmarks.trials import RUNS, Task, search, trained
from benchmarks.tuned import SEARCHES, STARTS, path_of, report
from fxstn import hp
from fxstn.tools import data


def _images(
    name: str, size: int, train: int, valid: int, seed: int, root: str | None, normalise: bool = True
) -> Sequence[TensorDataset]:
    split = data.load(name, size, train, valid, seed, root, normalise)
    return split.train, split.valid, split.test


def _grey(name: str, train: int, valid: int, seed: int, root: str | None) -> Sequence[TensorDataset]:
    sets = _images(name, 28, train, valid, seed, root)
    return [TensorDataset(part.tensors[0][:, :1].contiguous(), part.tensors[1]) for part in sets]


def _regression(name: str, seed: int, root: str | None) -> Sequence[TensorDataset]:
    """60 % to train, 20 % to validate, 20 % to test, standardised by the training part."""
    X, y = (torch.as_tensor(values, dtype=torch.float32) for values in load_arrays(name, root))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split([int(0.6 * len(y)), int(0.8 * len(y))])
    X, y = ((values - values[parts[0]].mean(0)) / values[parts[0]].std(0) for values in (X, y))
    return [TensorDataset(X[part], y[part, None]) for part in parts]


def _mlp(train: TensorDataset, widths: Sequence[int], outputs: int) -> nn.Module:
    sizes = [train.tensors[0][0].numel(), *widths]
    hidden = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], outputs))


class SimpleCNN(nn.Sequential):
    """The paper's network for FashionMNIST: two 5×5 convolutions, pools, two linear layers; as many filters as its
    implementation has, where the paper has 32 and 64."""

    def __init__(self, first: int = 16, second: int = 32) -> None:
        blocks = [
            layer
            for inputs, filters in ((1, first), (first, second))
            for layer in (nn.Conv2d(inputs, filters, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.0))
        ]
        width = 49 * second
        super().__init__(
            *blocks, nn.Flatten(), nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.0), nn.Linear(width, 10)
        )


def small_resnet18(stride: int = 1) -> nn.Module:
    """torchvision's ResNet-18 with a stem for small images: a 3×3 convolution and no pooling."""
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, stride, padding=1, bias=False)
    model.maxpool = nn.Identity()  # type: ignore[assignment]
    return model


def _weight_decay(start: float, shared: bool = True) -> hp.Spec:
    return hp.WeightDecay("*", shared=shared, init=1e-6 * 1e5**start, low=1e-7, high=1e-1)


def _regression_task(name: str) -> Task:
    """An MLP of two hidden layers on a regression set: three dropouts and one weight decay."""
    return Task(
        partial(_regression, name), partial(_mlp, widths=(64, 64), outputs=1),
        lambda start: [hp.Dropout("input", "2", "4", init=start), _weight_decay(start)],
        F.mse_loss, partial(torch.optim.Adam, lr=1e-3), 100, 32,
    )  # fmt: skip


def _mnist_task(decay: bool) -> Task:
    """An MLP on 5,000 digits: three dropouts, and on demand a weight decay for each layer."""
    return Task(
        partial(_grey, "mnist", 5000, 2000), partial(_mlp, widths=(600, 600), outputs=10),
        lambda start: [
            hp.Dropout("input", "2", "4", init=start), *([_weight_decay(start, shared=False)] if decay else [])
        ],
        F.cross_entropy, partial(torch.optim.Adam, lr=1e-3), 40,
    )  # fmt: skip


TASKS = {
    "mnist-mlp": _mnist_task(decay=False),
    "mnist-mlp-decay": _mnist_task(decay=True),
    "diabetes-mlp": _regression_task("diabetes"),
    "concrete-mlp": _regression_task("concrete"),
    "fashion-cnn": Task(
        partial(_grey, "fashion-mnist", 5000, 2000), lambda train: SimpleCNN(),
        lambda start: [
            hp.Dropout("input", "3", "7", "11", init=start),
            hp.Cutout("input", init={"holes": round(5 * start), "length": round(2 + 22 * start)}),
        ],
        F.cross_entropy, partial(torch.optim.SGD, lr=1e-2, momentum=0.9), 20,
    ),
    "cifar10-resnet18": Task(
        partial(_images, "cifar10", 32, 5000, 2000, normalise=False),
        lambda train: nn.Sequential(v2.Normalize([0.5] * 3, [0.25] * 3), small_resnet18(stride=2)),
        lambda start: [  # the paper's 19
            hp.ColorJitter("input", init={name: n.high * start for name, n in hp.ColorJitter.numbers.items()}),
            hp.Affine("input", init={name: n.high * start for name, n in hp.Affine.numbers.items()}),
            hp.Cutout("input", init={"holes": round(5 * start), "length": round(2 + 22 * start)}),
            hp.Dropout("input", "1.layer?.?", init=start),
        ],
        F.cross_entropy, partial(torch.optim.SGD, lr=3e-2, momentum=0.9), 20,
    ),
    "digits-resnet18": Task(
        partial(_images, "digits", 8, 500, 500), lambda train: small_resnet18(),
        lambda start: [hp.Dropout(init=start), _weight_decay(start)],
        F.cross_entropy, partial(torch.optim.SGD, lr=1e-2, momentum=0.9), 20, 32,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="which tasks")
    parser.add_argument(
        "--methods", nargs="+", default=[*RUNS, *SEARCHES], choices=[*RUNS, *SEARCHES], help="which methods"
    )
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=list(STARTS), help="of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--trials", type=int, default=30, help="of each search, for each seed")
    parser.add_argument(
        "--data-root",
        default=os.environ.get("FXSTN_DATA"),
        help="where torchvision's data and uci/NAME.npz lie (default: the variable FXSTN_DATA)",
    )
    parser.add_argument("--report", action="store_true", help="print and draw what is there, and run nothing")
    args = parser.parse_args()
    todo = [] if args.report else [
        (seed, task, method, start, trial)
        for task in args.tasks for seed in range(args.seeds) for method in args.methods
        for start in (args.starts if method in RUNS else ["any"])
        for trial in range(1 if method in RUNS else args.trials)
    ]  # fmt: skip
    for seed, task, method, start, trial in (bar := tqdm(todo, disable=None)):
        path, key = path_of(task), f"{method} {start} {seed}"
        results = json.loads(path.read_text()) if path.exists() else {}
        if key in results if method in RUNS else len(results.get(key, [])) > trial:
            continue
        bar.set_description(f"{task}: {method}, {start}, seed {seed}")
        if method in RUNS:
            _, results[key] = trained(TASKS[task], method, STARTS[start], seed, args.data_root)
        else:
            earlier = results.setdefault(key, [])
            earlier.append(search(TASKS[task], method, seed, args.data_root, earlier))
        path.write_text(json.dumps(results, separators=(",", ":")) + "\n")
    report([task for task in args.tasks if path_of(task).exists()])


if __name__ == "__main__":
    main()
