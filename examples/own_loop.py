"""Without the runner: the three steps in a loop of one's own, on scikit-learn's digits."""

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
    parser.add_argument("--every", type=int, default=4, help="training steps from one hyper step to the next")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    split = data.load("digits", image_size=8)
    train, valid, test = (DataLoader(s, 50, shuffle=True) for s in (split.train, split.valid, split.test))
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    stn = fxstn.transform(net, [hp.Dropout(), hp.WeightDecay(shared=True)])

    optimizer = torch.optim.SGD(stn.general_parameters(), lr=0.02, momentum=0.9)
    response_optimizer = torch.optim.Adam(stn.response_parameters(), lr=1e-2)
    hyper_optimizer = fxstn.optim.SettlingAdam([stn.hparams.unconstrained])  # Adam(..., lr=0.03) does, too
    validation, steps = iter(valid), 0
    for epoch in range(1, args.epochs + 1):
        total = 0.0
        stn.train()
        for x, y in train:
            loss = fxstn.general_loss(stn, F.cross_entropy, x, y)  # for w: plain training at the present λ
            step(optimizer, loss)
            total += loss.item()
            step(response_optimizer, fxstn.response_loss(stn, F.cross_entropy, x, y))  # for Θ: how w answers to λ
            steps += 1
            if steps % args.every == 0:
                if (batch := next(validation, None)) is None:
                    validation = iter(valid)
                    batch = next(validation)
                step(hyper_optimizer, fxstn.hyper_loss(stn, F.cross_entropy, *batch, perturb="off"))  # for λ
        values = ", ".join(f"{name} {value:.3g}" for name, value in stn.hparams.values().items())
        print(f"epoch {epoch}: train loss {total / len(train):.3f}, valid loss {evaluate(stn, valid)[0]:.3f}; {values}")
    plain = stn.export()  # an nn.Sequential again
    print("test loss {:.3f}, accuracy {:.3f}".format(*evaluate(plain, test)))
    return plain


def step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def evaluate(model: nn.Module, loader: DataLoader) -> tuple[float, float]:
    """(loss, accuracy) in eval mode."""
    model.eval()
    with torch.no_grad():
        pairs = [(model(x), y) for x, y in loader]
    output, target = torch.cat([o for o, _ in pairs]), torch.cat([y for _, y in pairs])
    return F.cross_entropy(output, target).item(), fxstn.accuracy(output, target)


if __name__ == "__main__":
    main()
