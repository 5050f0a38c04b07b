"""A weight for every training example, learned in one run: digits of which 40 % have a random label.

λ is a logit per training example; the training loss is the cross entropy weighted by 2 sigmoid(λ), 1 at the start. Its
hypergradient needs no response: the validation loss is taken one step ahead, at w − η ∇L_T(w, λ) on the batch seen last, and
derived in λ through that step (Ren et al. 2018, Learning to Reweight Examples; here λ is kept from batch to batch). It is a
problem of one's own in the runner. To compare with, from the same weights: plain training on the same labels, and plain
training on the validation set alone, for as many steps. "Stopped early": at the epoch of the best validation accuracy.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from tabulate import tabulate
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, StackDataset

import fxstn
from fxstn.tools import data

COLUMNS = ["test accuracy", "stopped early", "area under the ROC curve"]


class Reweighting(fxstn.BilevelProblem):
    """Training inputs are (images, indices of the examples), validation inputs images. eta: the step that λ looks ahead."""

    def __init__(self, model: nn.Module, examples: int, eta: float) -> None:
        super().__init__()
        self.model, self.eta = model, eta
        self.logits = nn.Parameter(torch.zeros(examples))
        self.seen = None  # the batch that general_loss saw last

    def general_parameters(self):
        return self.model.parameters()

    def hyper_parameters(self):
        return [self.logits]

    def weights(self):
        return 2 * self.logits.sigmoid()

    def general_loss(self, inputs, target):
        self.seen = images, index, target = *inputs, target
        return (self.weights().detach()[index] * F.cross_entropy(self.model(images), target, reduction="none")).mean()

    def hyper_loss(self, inputs, target):
        images, index, labels = self.seen
        held = {
            name: w.detach().requires_grad_() for name, w in self.model.named_parameters()
        }  # w itself gets no gradient
        losses = F.cross_entropy(functional_call(self.model, held, (images,)), labels, reduction="none")
        gradients = torch.autograd.grad((self.weights()[index] * losses).mean(), list(held.values()), create_graph=True)
        ahead = {name: w.detach() - self.eta * g for (name, w), g in zip(held.items(), gradients, strict=True)}
        return F.cross_entropy(functional_call(self.model, ahead, (inputs,)), target)

    def validation_loss(self, inputs, target):
        output = self.model(inputs)
        return F.cross_entropy(output, target), output

    def values(self):
        return {"mean weight": self.weights().mean().item(), "smallest weight": self.weights().min().item()}

    def local_state(self):
        return {"seen": self.seen}

    def load_local_state(self, state):
        self.seen = state["seen"]

    def export(self):
        return copy.deepcopy(self.model)


def loader(x, y, batch: int, seed: int, indexed: bool) -> DataLoader:
    inputs = StackDataset(x, torch.arange(len(y))) if indexed else x
    return DataLoader(StackDataset(inputs, y), batch, shuffle=True, generator=torch.Generator().manual_seed(seed))


def prepare(args: argparse.Namespace, seed: int, out_dir=None):
    """(runner with weights to learn, plain runner, plain runner on the clean set, test set, which labels are right)."""
    split = data.load("digits", image_size=8, train=args.train_size, valid=args.valid_size, seed=seed)
    (x, right), (xv, yv), test = split.train.tensors, split.valid.tensors, split.test.tensors
    torch.manual_seed(seed)
    y = torch.where(torch.rand(len(right)) < args.noise, torch.randint(split.classes, right.shape), right)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, split.classes))

    learned = fxstn.HyperSettings(train_steps=1, optimizer=lambda p: torch.optim.Adam(p, lr=args.hyper_lr))
    equal = replace(learned, warmup_epochs=10**9)  # all epochs are without hyper steps

    def runner(x, y, hyper, out_dir=None):
        return fxstn.BilevelRunner(
            Reweighting(copy.deepcopy(model), len(y), args.eta),
            loader(x, y, 50, seed, True),
            loader(xv, yv, 50, seed, False),
            optimizer=lambda p: torch.optim.SGD(p, lr=args.lr, momentum=0.9),
            hyper=hyper,
            metrics={"accuracy": fxstn.accuracy},
            checkpoints=fxstn.CheckpointSettings(out_dir=out_dir),
        )

    plain, clean = runner(x, y, equal), runner(xv, yv, equal)
    return runner(x, y, learned, out_dir), plain, clean, test, right == y


def train(runner: fxstn.BilevelRunner, epochs: int, xt, yt) -> tuple[float, float]:
    """Test accuracy after the last epoch, and after that of the best validation accuracy."""
    accuracies: list[float] = []
    runner.callbacks = (lambda runner: accuracies.append(fxstn.accuracy(runner.problem.model(xt), yt)),)
    best = max(runner.fit(epochs), key=lambda row: row["accuracy"])
    return accuracies[-1], accuracies[best["epoch"] - 1]


def main(arguments: list[str] | None = None) -> dict[str, list[list[float]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30, help="of each run")
    parser.add_argument("--seeds", type=int, default=3, help="each chooses split, labels, weights and order")
    parser.add_argument("--train-size", type=int, default=1200, help="training images")
    parser.add_argument("--valid-size", type=int, default=100, help="validation images, with the right labels")
    parser.add_argument("--noise", type=float, default=0.4, help="share of training labels replaced at random")
    parser.add_argument("--eta", type=float, default=0.15, help="length of the step that λ looks ahead")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate of the weights")
    parser.add_argument("--hyper-lr", type=float, default=0.1, help="learning rate of λ")
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    args = parser.parse_args(arguments)
    found: dict[str, list[list[float]]] = {"weights learned": [], "plain": [], "plain, clean set alone": []}
    start = time.perf_counter()
    for seed in range(args.seeds):
        *runners, (xt, yt), right = prepare(args, seed)
        for name, runner in zip(found, runners, strict=True):
            alone = name.endswith("alone")
            epochs = args.epochs * args.train_size // args.valid_size if alone else args.epochs
            last, best = train(runner, epochs, xt, yt)
            area = roc_auc_score(right, runner.problem.logits.detach()) if not alone else float("nan")
            found[name].append([last, best if not alone else float("nan"), area])
    means = [[name, *(statistics.mean(column) for column in zip(*rows, strict=True))] for name, rows in found.items()]
    print(tabulate(means, [f"mean of {args.seeds} seeds", *COLUMNS], floatfmt=".3f"))
    print(
        f"{args.epochs} epochs, {time.perf_counter() - start:.0f} s in all; the area tells right labels from wrong ones"
    )
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
