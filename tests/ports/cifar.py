"""The shape of a CIFAR script: own ResNet, Nesterov, OneCycleLR, label smoothing, autocast, channels_last, averaged weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

# fxstn: import fxstn
from tests.ports.data import images


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(self.dropout(out)))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet(nn.Module):
    def __init__(self, classes: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8))
        self.layers = nn.Sequential(BasicBlock(8, 8, 1, dropout), BasicBlock(8, 16, 2, dropout))
        self.linear = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.relu(self.stem(x)))
        out = F.adaptive_avg_pool2d(out, 1)
        return self.linear(out.view(out.size(0), -1))


def main(argv: Sequence[str] = ()) -> dict:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    model = ResNet(dropout=args.dropout).to(memory_format=torch.channels_last)
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    train_loader = DataLoader(images(120, 0), args.batch_size, shuffle=True, drop_last=True)
    valid_loader = DataLoader(images(64, 1), 64)
    # fxstn: tuner = fxstn.tune(model, optimizer, criterion, train_loader, valid_loader)
    ema_model = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.lr, epochs=args.epochs, steps_per_epoch=len(train_loader)
    )
    start = 0
    if args.resume:
        state = torch.load(args.checkpoint)
        start = state["epoch"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema_model.load_state_dict(state["ema_model"])
        scheduler.load_state_dict(state["scheduler"])
        # fxstn: tuner.load_state_dict(state["tuner"])

    log = []
    for epoch in range(start, args.epochs):
        torch.manual_seed(epoch)
        model.train()
        for x, y in train_loader:
            x = x.to(memory_format=torch.channels_last)
            lr = optimizer.param_groups[0]["lr"]
            with torch.autocast("cpu", torch.bfloat16):
                loss = criterion(model(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            ema_model.update_parameters(model)
            log.append({"epoch": epoch, "loss": loss.item(), "lr": lr})
        accuracies = [accuracy(model, valid_loader), accuracy(ema_model, valid_loader)]
        if args.checkpoint:
            state = {
                "epoch": epoch + 1,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema_model": ema_model.state_dict(),
                "scheduler": scheduler.state_dict(),
                # fxstn: "tuner": tuner.state_dict(),
            }
            torch.save(state, args.checkpoint)
    return {"model": model, "optimizer": optimizer, "ema_model": ema_model, "log": log, "evaluations": accuracies}


def accuracy(model, loader):
    model.eval()
    correct = total = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for x, y in loader:
            correct += (model(x.to(memory_format=torch.channels_last)).argmax(1) == y).sum().item()
            total += len(y)
    return correct / total


if __name__ == "__main__":
    main()
