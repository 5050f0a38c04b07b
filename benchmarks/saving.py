"""What a checkpoint costs: how long training stands still, how long the file takes, and the peak memory of a resume.

python -m benchmarks.saving: resnet18 on images of 32 pixels (docs/guides/runs.md). Each part runs in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

import fxstn
from fxstn import hp
from fxstn.tools import measure

FILES = 7


def build(out: Path) -> fxstn.BilevelRunner:
    torch.manual_seed(0)
    stn = fxstn.transform(resnet18(num_classes=10), [hp.Dropout(), hp.WeightDecay(shared=True)])
    data = TensorDataset(torch.randn(64, 3, 32, 32), torch.randint(10, (64,)))
    loaders = DataLoader(data, 16), DataLoader(data, 64)
    return fxstn.BilevelRunner(
        stn,
        F.cross_entropy,
        *loaders,
        progress=False,
        response=fxstn.ResponseSettings(every=1),
        checkpoints=fxstn.CheckpointSettings(out_dir=out),
    )


def save(out: Path) -> None:
    """Prints medians of seconds in which training stands still for a file, and until the file is whole."""
    runner = build(out)
    runner.fit(1)
    checkpoints, still, whole = runner._checkpoints, [], []
    for _ in range(FILES):
        start = time.perf_counter()
        checkpoints.keep()
        still.append(time.perf_counter() - start)
        checkpoints.finish()
        whole.append(time.perf_counter() - start)
    size = (out / "last.pt").stat().st_size / 1e6
    print(f"a file of {size:.0f} MB: training stands still for {statistics.median(still):.3f} s, "
          f"the file is whole after {statistics.median(whole):.3f} s")  # fmt: skip


def resume(out: Path) -> None:
    """Prints the peak memory of a resume above that of the new runner."""
    runner = build(out)
    gc.collect()
    before = measure._reset_peak()
    runner._checkpoints.resume()
    peak, size = (measure._peak_kb() - before) / 1e3, (out / "last.pt").stat().st_size / 1e6
    print(f"a resume takes {peak:.0f} MB more than the new runner, {peak / size:.2f} times the file")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", nargs=2, metavar=("PART", "OUT"), help="save or resume, and a folder")
    options = parser.parse_args()
    if options.part:
        torch.set_num_threads(1)
        {"save": save, "resume": resume}[options.part[0]](Path(options.part[1]))
        return
    with tempfile.TemporaryDirectory() as out:
        for part in ("save", "resume"):
            subprocess.run([sys.executable, "-m", "benchmarks.saving", "--part", part, out], check=True)


if __name__ == "__main__":
    main()
