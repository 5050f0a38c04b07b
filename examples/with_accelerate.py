"""A loop of Hugging Face accelerate, on one process or several: pip install 'fxstn[accelerate]'

    python examples/with_accelerate.py
    torchrun --nproc-per-node 2 examples/with_accelerate.py --cpu

The tuner works with what accelerator.prepare returns. The loop is the one that accelerate's documentation has.
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
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU (default: the best device there is)")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of one step (default: 1)")
    parser.add_argument("--save", help="a folder to write the last epoch's state to (default: none)")
    parser.add_argument("--resume", help="a folder of accelerator.save_state to go on from (default: none)")
    args = parser.parse_args(arguments)
    accelerator = Accelerator(cpu=args.cpu, gradient_accumulation_steps=args.accumulate)
    set_seed(0)  # the same weights in all processes
    split = data.load("digits", image_size=8)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 10))
    model, optimizer, train, valid, test = accelerator.prepare(
        net,
        torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4),
        DataLoader(split.train, 50, shuffle=True),
        DataLoader(split.valid, 50),
        DataLoader(split.test, 200),
    )
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, train, valid, [hp.Dropout(), hp.WeightDecay(shared=True)])
    accelerator.register_for_checkpointing(tuner)
    set_seed(0, device_specific=True)  # but other noise
    if args.resume:
        accelerator.load_state(args.resume)

    def evaluate(loader: DataLoader) -> tuple[float, float]:
        """(loss, accuracy) in eval mode, over all processes."""
        model.eval()
        with torch.no_grad():
            pairs = [accelerator.gather_for_metrics((model(x), y)) for x, y in loader]
        output, target = torch.cat([o for o, _ in pairs]), torch.cat([y for _, y in pairs])
        return F.cross_entropy(output, target).item(), fxstn.accuracy(output, target)

    for epoch in range(len(tuner.history) + 1, args.epochs + 1):
        model.train()
        for x, y in train:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        values = ", ".join(f"{name} {value:.3g}" for name, value in tuner.values().items())
        accelerator.print(f"epoch {epoch}: valid loss {evaluate(valid)[0]:.3f}; {values}")
    if args.save:
        accelerator.save_state(args.save)
    tuner.detach()  # a plain network again
    accelerator.print("test loss {:.3f}, accuracy {:.3f}".format(*evaluate(test)))
    accelerator.end_training()
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    main()
