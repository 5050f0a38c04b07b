"""The shape of the ImageNet example of pytorch/examples: torchvision's network, DDP on demand, checkpoints, top-k accuracy."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchvision.models.shufflenetv2 import ShuffleNetV2

# fxstn: import fxstn
from tests.ports import data


def main(argv: Sequence[str] = ()) -> dict:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--start-epoch", type=int, default=0)
    parser.add_argument("-b", "--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--wd", "--weight-decay", dest="weight_decay", type=float, default=1e-4)
    parser.add_argument("--resume", default="")
    parser.add_argument("--out", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--distributed", action="store_true")
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    model = ShuffleNetV2([1, 1, 1], [8, 16, 32, 64, 64], num_classes=10)
    if args.distributed:
        model = nn.parallel.DistributedDataParallel(model)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.1)

    best_acc1 = 0.0
    if args.resume:
        checkpoint = torch.load(args.resume)
        args.start_epoch = checkpoint["epoch"]
        best_acc1 = checkpoint["best_acc1"]
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])

    train_dataset, val_dataset = data.images(64, 0), data.images(32, 1)
    train_sampler = DistributedSampler(train_dataset) if args.distributed else None
    train_loader = DataLoader(train_dataset, args.batch_size, shuffle=train_sampler is None, sampler=train_sampler)
    val_loader = DataLoader(val_dataset, 2 * args.batch_size)
    # fxstn: tuner = fxstn.tune(model, optimizer, criterion, train_loader, val_loader, [fxstn.hp.WeightDecay(shared=True)])
    # fxstn: tuner.load_state_dict(checkpoint["tuner"]) if args.resume else None

    log = []
    for epoch in range(args.start_epoch, args.epochs):
        torch.manual_seed(args.seed + epoch)
        if args.distributed:
            train_sampler.set_epoch(epoch)
        loss = train(train_loader, model, criterion, optimizer)
        acc1 = validate(val_loader, model, criterion)
        log.append({"epoch": epoch, "loss": loss, "lr": scheduler.get_last_lr()[0], "accuracy": acc1})
        scheduler.step()
        is_best = acc1 > best_acc1
        best_acc1 = max(acc1, best_acc1)
        if args.out and (not args.distributed or dist.get_rank() == 0):
            state = {
                "epoch": epoch + 1,
                "state_dict": model.state_dict(),
                "best_acc1": best_acc1,
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                # fxstn: "tuner": tuner.state_dict(),
            }
            save_checkpoint(state, is_best, args.out)
    return {"model": model, "optimizer": optimizer, "log": log}


def train(train_loader, model, criterion, optimizer):
    losses, top1, top5 = AverageMeter("Loss"), AverageMeter("Acc@1"), AverageMeter("Acc@5")
    model.train()
    for images, target in train_loader:
        output = model(images)
        loss = criterion(output, target)
        acc1, acc5 = accuracy(output, target, topk=(1, 5))
        losses.update(loss.item(), images.size(0))
        top1.update(acc1.item(), images.size(0))
        top5.update(acc5.item(), images.size(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses.avg


def validate(val_loader, model, criterion):
    losses, top1 = AverageMeter("Loss"), AverageMeter("Acc@1")
    model.eval()
    with torch.no_grad():
        for images, target in val_loader:
            output = model(images)
            losses.update(criterion(output, target).item(), images.size(0))
            top1.update(accuracy(output, target)[0].item(), images.size(0))
    return top1.avg


def save_checkpoint(state, is_best, folder):
    torch.save(state, os.path.join(folder, "checkpoint.pt"))
    if is_best:
        shutil.copyfile(os.path.join(folder, "checkpoint.pt"), os.path.join(folder, "model_best.pt"))


class AverageMeter:
    """The present value and the mean of all so far."""

    def __init__(self, name):
        self.name, self.val, self.sum, self.count = name, 0.0, 0.0, 0

    def update(self, val, n=1):
        self.val, self.sum, self.count = val, self.sum + val * n, self.count + n

    @property
    def avg(self):
        return self.sum / self.count


def accuracy(output, target, topk=(1,)):
    with torch.no_grad():
        hits = output.topk(max(topk), 1).indices.eq(target[:, None])
        return [100 * hits[:, :k].any(1).float().mean() for k in topk]


if __name__ == "__main__":
    main()
