"""A training loop of one's own, with three lines of fxstn, on scikit-learn's digits."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import fxstn
from fxstn import hp
from fxstn.tools import data


def main(arguments: list[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15, help="passes over the training images")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    split = data.load("digits", image_size=8)
    train, valid, test = (DataLoader(s, 50, shuffle=True) for s in (split.train, split.valid, split.test))
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    tuner = fxstn.tune(net, optimizer, F.cross_entropy, train, valid, [hp.Dropout(), hp.WeightDecay(shared=True)])
    for epoch in range(1, args.epochs + 1):
        net.train()
        for x, y in train:
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        values = ", ".join(f"{name} {value:.3g}" for name, value in tuner.values().items())
        print(f"epoch {epoch}: valid loss {evaluate(net, valid)[0]:.3f}; {values}")
    tuner.detach()  # a plain network again
    print("test loss {:.3f}, accuracy {:.3f}".format(*evaluate(net, test)))
    return net


def evaluate(model: nn.Module, loader: DataLoader) -> tuple[float, float]:
    """(loss, accuracy) in eval mode."""
    model.eval()
    with torch.no_grad():
        pairs = [(model(x), y) for x, y in loader]
    output, target = torch.cat([o for o, _ in pairs]), torch.cat([y for _, y in pairs])
    return F.cross_entropy(output, target).item(), fxstn.accuracy(output, target)


if __name__ == "__main__":
    main()
