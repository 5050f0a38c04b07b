"""Tune dropout and weight decay on several processes: torchrun --nproc-per-node 2 examples/distributed.py"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import fxstn
from fxstn import hp
from fxstn.tools import data

if "LOCAL_WORLD_SIZE" not in os.environ:
    raise SystemExit(f"start it as {__doc__.partition(': ')[2]}")
cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"
if cuda:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if cuda else "gloo")
torch.manual_seed(0)  # the same network everywhere; the runner then seeds each process's noise apart
model = nn.Sequential(
    nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.LazyLinear(10)
)  # fmt: skip
digits = data.load("digits", 16)
model(digits.train[0][0][None])
model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
stn = fxstn.transform(model, [hp.Dropout(), hp.WeightDecay(shared=True)])
train, valid = (DataLoader(part, 64, sampler=DistributedSampler(part)) for part in (digits.train, digits.valid))
runner = fxstn.BilevelRunner(
    stn,
    F.cross_entropy,
    train,
    valid,
    execution=fxstn.ExecutionSettings(device=device),
    metrics={"accuracy": fxstn.accuracy},
    checkpoints=fxstn.CheckpointSettings(out_dir="out/distributed"),
)
history = runner.fit(epochs=int(os.environ.get("EPOCHS", 5)))
if dist.get_rank() == 0:
    print(dist.get_world_size(), "processes,", {name: round(value, 4) for name, value in history.rows[-1].items()})
dist.destroy_process_group()
