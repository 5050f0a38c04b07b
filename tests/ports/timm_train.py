"""The shape of timm's train.py: groups without decay, a scaler that steps, accumulation, a schedule by update, averages."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

# fxstn: import fxstn
from tests.ports.data import images


class DropPath(nn.Module):
    """Drops a residual branch, for each example alone."""

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        random_tensor = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
        if keep_prob > 0.0 and self.scale_by_keep:
            random_tensor.div_(keep_prob)
        return x * random_tensor


class Mixer(nn.Module):
    """An MLP over patches and one over channels, each on a residual branch."""

    def __init__(self, patches: int, dim: int, drop: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.tokens = nn.Sequential(nn.Linear(patches, 16), nn.GELU(), nn.Dropout(drop), nn.Linear(16, patches))
        self.channels = nn.Sequential(nn.Linear(dim, 32), nn.GELU(), nn.Dropout(drop), nn.Linear(32, dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2))
        return x + self.drop_path(self.channels(self.norm2(x)))


class Network(nn.Module):
    def __init__(
        self, num_classes: int, drop_rate: float, drop_path_rate: float, depth: int = 2, dim: int = 16
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, 4)
        self.blocks = nn.Sequential(
            *[Mixer(16, dim, drop_rate, drop_path_rate * (i + 1) / depth) for i in range(depth)]
        )
        self.norm, self.head_drop, self.head = nn.LayerNorm(dim), nn.Dropout(drop_rate), nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x).flatten(2).transpose(1, 2))
        return self.head(self.head_drop(self.norm(x).mean(dim=1)))


class NativeScaler:
    """Scales the loss, goes backward, clips, and steps where this is due."""

    def __init__(self, device: str = "cpu", enabled: bool = False) -> None:
        self._scaler = torch.amp.GradScaler(device, enabled=enabled)

    def __call__(self, loss, optimizer, clip_grad=None, parameters=None, create_graph=False, need_update=True):
        self._scaler.scale(loss).backward(create_graph=create_graph)
        if need_update:
            if clip_grad is not None:
                self._scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(parameters, clip_grad)
            self._scaler.step(optimizer)
            self._scaler.update()

    def state_dict(self):
        return self._scaler.state_dict()

    def load_state_dict(self, state_dict):
        self._scaler.load_state_dict(state_dict)


class CosineScheduler:
    """A learning rate by epoch or by update, which it writes into the groups; no scheduler of torch."""

    def __init__(self, optimizer, updates: int, warmup: int = 2, lr_min: float = 1e-4) -> None:
        self.optimizer, self.updates, self.warmup, self.lr_min = optimizer, updates, warmup, lr_min
        self.base = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
        self.step_update(0)

    def step(self, epoch: int, metric: float | None = None) -> None:
        pass

    def step_update(self, num_updates: int) -> None:
        share = 0.5 * (1 + math.cos(math.pi * num_updates / self.updates))
        factor = (num_updates + 1) / self.warmup if num_updates < self.warmup else share
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = self.lr_min + (base - self.lr_min) * factor


def param_groups_weight_decay(model, weight_decay):
    decay, no_decay = [], []
    for name, param in model.named_parameters():
        (no_decay if param.ndim <= 1 or name.endswith(".bias") else decay).append(param)
    return [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": weight_decay}]


def main(argv: Sequence[str] = ()) -> dict:
    parser = argparse.ArgumentParser()
    parser.add_argument("-b", "--batch-size", type=int, default=8)
    parser.add_argument("--validation-batch-size", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--grad-accum-steps", type=int, default=2)
    parser.add_argument("--drop", type=float, default=0.1)
    parser.add_argument("--drop-path", type=float, default=0.1)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--model-ema-decay", type=float, default=0.9)
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--torchcompile", action="store_true")
    parser.add_argument("--resume", default="")
    parser.add_argument("--output", default="")
    args = parser.parse_args(argv)

    torch.manual_seed(42)
    model = Network(4, args.drop, args.drop_path)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, args.weight_decay), lr=args.lr)
    loss_scaler = NativeScaler() if args.amp else None
    start_epoch = 0
    if args.resume:
        checkpoint = torch.load(args.resume)
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start_epoch = checkpoint["epoch"] + 1
    model_ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.model_ema_decay), use_buffers=True)
    if args.resume:
        model_ema.load_state_dict(checkpoint["state_dict_ema"])
    task = torch.compile(model, backend="eager") if args.torchcompile else model
    loader_train = DataLoader(images(104, 0), args.batch_size, shuffle=True)
    loader_eval = DataLoader(images(48, 1), args.validation_batch_size)
    train_loss_fn = nn.CrossEntropyLoss(label_smoothing=args.smoothing)
    # fxstn: tuner = fxstn.tune(model, optimizer, train_loss_fn, loader_train, loader_eval)
    # fxstn: tuner.load_state_dict(checkpoint["tuner"]) if args.resume else None
    updates_per_epoch = (len(loader_train) + args.grad_accum_steps - 1) // args.grad_accum_steps
    lr_scheduler = CosineScheduler(optimizer, args.epochs * updates_per_epoch)
    lr_scheduler.step_update(start_epoch * updates_per_epoch)

    log, metrics = [], []
    for epoch in range(start_epoch, args.epochs):
        torch.manual_seed(42 + epoch)
        log += train_one_epoch(
            epoch,
            task,
            loader_train,
            optimizer,
            train_loss_fn,
            args,
            lr_scheduler,
            updates_per_epoch,
            loss_scaler,
            model_ema,
        )
        metrics = [validate(task, loader_eval), validate(model_ema, loader_eval)]
        lr_scheduler.step(epoch + 1, metrics[0])
        if args.output:
            save_state = {
                "epoch": epoch,
                "state_dict": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "state_dict_ema": model_ema.state_dict(),
                # fxstn: "tuner": tuner.state_dict(),
            }
            torch.save(save_state, os.path.join(args.output, "last.pth.tar"))
    return {"model": model, "optimizer": optimizer, "model_ema": model_ema, "log": log, "evaluations": metrics}


def train_one_epoch(
    epoch, model, loader, optimizer, loss_fn, args, lr_scheduler, updates_per_epoch, loss_scaler, model_ema
):
    model.train()
    accum_steps = args.grad_accum_steps
    last_accum_steps = len(loader) % accum_steps
    last_batch_idx_to_accum = len(loader) - last_accum_steps
    num_updates, log = epoch * updates_per_epoch, []
    optimizer.zero_grad()
    for batch_idx, (input, target) in enumerate(loader):
        need_update = batch_idx == len(loader) - 1 or (batch_idx + 1) % accum_steps == 0
        if batch_idx >= last_batch_idx_to_accum:
            accum_steps = last_accum_steps
        lr = optimizer.param_groups[0]["lr"]
        loss = loss_fn(model(input), target)
        if accum_steps > 1:
            loss /= accum_steps
        if loss_scaler is not None:
            loss_scaler(loss, optimizer, args.clip_grad, model.parameters(), need_update=need_update)
        else:
            loss.backward()
            if need_update:
                nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
                optimizer.step()
        if not need_update:
            continue
        num_updates += 1
        optimizer.zero_grad()
        model_ema.update_parameters(model)
        log.append({"epoch": epoch, "loss": loss.item() * accum_steps, "lr": lr})
        lr_scheduler.step_update(num_updates=num_updates)
    return log


def validate(model, loader):
    model.eval()
    with torch.no_grad():
        hits = [(model(input).argmax(1) == target).float() for input, target in loader]
    return torch.cat(hits).mean().item()


if __name__ == "__main__":
    main()
