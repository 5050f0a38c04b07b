"""The three steps in a loop of Hugging Face accelerate, on one process or several: pip install 'fxstn[accelerate]'

    python examples/with_accelerate.py
    torchrun --nproc-per-node 2 examples/with_accelerate.py --cpu

accelerate gives each process its device and its share of the batches. The network is not wrapped: gradients, which reach the
parameters of one step at a time, are averaged by fxstn.average_gradients.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

import fxstn
from fxstn import hp
from fxstn.tools import data


def main(arguments: list[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15, help="passes over the training images (default: 15)")
    parser.add_argument("--every", type=int, default=4, help="training steps per hyper step (default: 4)")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU (default: the best device there is)")
    args = parser.parse_args(arguments)
    accelerator = Accelerator(cpu=args.cpu)
    set_seed(0)  # the same weights in all processes
    split = data.load("digits", image_size=8)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 10))
    stn = fxstn.transform(net, [hp.Dropout(), hp.WeightDecay(shared=True)]).to(accelerator.device)
    train, valid, test, optimizer, response_optimizer, hyper_optimizer = accelerator.prepare(
        DataLoader(split.train, 50, shuffle=True),
        DataLoader(split.valid, 50, shuffle=True),
        DataLoader(split.test, 200),
        torch.optim.SGD(stn.general_parameters(), lr=0.02, momentum=0.9),
        torch.optim.Adam(stn.response_parameters(), lr=1e-2),
        torch.optim.Adam([stn.hparams.unconstrained], lr=0.05),
    )
    set_seed(0, device_specific=True)  # but other noise

    def step(optimizer, loss):
        accelerator.backward(loss)
        fxstn.average_gradients([w for group in optimizer.param_groups for w in group["params"]])
        optimizer.step()
        optimizer.zero_grad()

    def evaluate(model, loader):
        """(loss, accuracy) in eval mode, over all processes"""
        model.eval()
        with torch.no_grad():
            pairs = [accelerator.gather_for_metrics((model(x), y)) for x, y in loader]
        output, target = torch.cat([o for o, _ in pairs]), torch.cat([y for _, y in pairs])
        return F.cross_entropy(output, target).item(), fxstn.accuracy(output, target)

    steps = 0
    for epoch in range(1, args.epochs + 1):
        stn.train()
        validation = iter(valid)  # at least as long as the hyper steps of an epoch
        for x, y in train:
            with accelerator.autocast():
                loss = fxstn.general_loss(stn, F.cross_entropy, x, y)
            step(optimizer, loss)
            with accelerator.autocast():
                loss = fxstn.response_loss(stn, F.cross_entropy, x, y)
            step(response_optimizer, loss)
            steps += 1
            if steps % args.every == 0:
                with accelerator.autocast():
                    loss = fxstn.hyper_loss(stn, F.cross_entropy, *next(validation), perturb="off")
                step(hyper_optimizer, loss)
        values = ", ".join(f"{name} {value:.3g}" for name, value in stn.hparams.values().items())
        accelerator.print(f"epoch {epoch}: valid loss {evaluate(stn, valid)[0]:.3f}; {values}")
    plain = stn.export()
    accelerator.print("test loss {:.3f}, accuracy {:.3f}".format(*evaluate(plain, test)))
    accelerator.end_training()
    return plain


if __name__ == "__main__":
    main()
