"""A short run in a process of its own, to be killed: python tests/killed.py OUT EPOCHS. Prints "training" when it trains."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from nets import mlp
from torch.utils.data import DataLoader, Dataset

import fxstn
from fxstn import hp


class Noisy(Dataset):
    """Draws from three global generators, in the worker processes where there are any; takes its time."""

    def __init__(self, n: int, seed: int) -> None:
        self.x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(2e-4)
        noise = 0.1 * torch.randn(6) + 0.1 * numpy.random.randn()
        return (self.x[i] + noise).float(), self.x[i, :3].argmax()


def make(out: Path | None) -> fxstn.BilevelRunner:
    torch.manual_seed(0)
    numpy.random.seed(0)
    stn = fxstn.transform(mlp(), [hp.Dropout("2", "5", init=0.3), hp.WeightDecay(shared=True)])
    train = DataLoader(Noisy(160, 0), 8, shuffle=True, num_workers=1, multiprocessing_context="fork")
    valid = DataLoader(Noisy(40, 1), 8, shuffle=True, generator=torch.Generator().manual_seed(1))
    return fxstn.BilevelRunner(
        stn, F.cross_entropy, train, valid, out_dir=out, save_minutes=2e-4, keep=3, progress=False, tune_scale=True,
        train_steps=3, ema=0.9, schedulers={"optimizer": lambda o: torch.optim.lr_scheduler.StepLR(o, 2)},
        step_schedulers={"response_optimizer": lambda o: torch.optim.lr_scheduler.LinearLR(o, total_iters=30)},
    )  # fmt: skip


def main(out: Path, epochs: int) -> None:
    torch.set_num_threads(1)
    runner = make(out)
    print("training", flush=True)
    history = runner.fit(epochs)
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in history]
    torch.save({"rows": rows, "stn": runner.stn.state_dict(), "best": runner.best}, out / "end.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
