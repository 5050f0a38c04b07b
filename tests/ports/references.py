"""The shape of torchvision's references/classification/train.py: groups without decay for norms, averages, clipping, scaler."""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision.ops import MLP
from torchvision.ops.misc import Conv2dNormActivation

# fxstn: import fxstn
from tests.ports.data import images


class MetricLogger:
    """Means of what a loop reports, by name."""

    def __init__(self):
        self.values = defaultdict(list)

    def update(self, **values):
        for name, value in values.items():
            self.values[name].append(value)

    def log_every(self, iterable):
        yield from iterable

    def __getattr__(self, name):
        values = self.__dict__["values"][name]
        return sum(values) / len(values)


class ExponentialMovingAverage(AveragedModel):
    def __init__(self, model, decay, device="cpu"):
        super().__init__(model, device, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def set_weight_decay(model, weight_decay, norm_weight_decay=None, custom_keys_weight_decay=()):
    """Groups of parameters: norms, those of custom keys (names), all others."""
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    decays = {"other": weight_decay, "norm": norm_weight_decay, **dict(custom_keys_weight_decay)}
    params = defaultdict(list)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            custom = [key for key, _ in custom_keys_weight_decay if key == name]
            norm = norm_weight_decay is not None and isinstance(module, norms)
            params[custom[0] if custom else "norm" if norm else "other"].append(p)
    return [{"params": params[key], "weight_decay": decays[key]} for key in params]


def accuracy(output, target, topk=(1,)):
    with torch.inference_mode():
        hits = output.topk(max(topk), 1).indices.eq(target[:, None])
        return [100 * hits[:, :k].any(1).float().mean() for k in topk]


def train_one_epoch(model, criterion, optimizer, data_loader, device, epoch, args, model_ema=None, scaler=None):
    model.train()
    metric_logger = MetricLogger()
    for i, (image, target) in enumerate(metric_logger.log_every(data_loader)):
        image, target = image.to(device), target.to(device)
        with torch.amp.autocast("cpu", enabled=scaler is not None and scaler.is_enabled()):
            output = model(image)
            loss = criterion(output, target)
        optimizer.zero_grad()
        if scaler is not None:
            scaler.scale(loss).backward()
            if args.clip_grad_norm is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad_norm)
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            if args.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad_norm)
            optimizer.step()
        if model_ema and i % args.model_ema_steps == 0:
            model_ema.update_parameters(model)
            if epoch < args.lr_warmup_epochs:
                model_ema.n_averaged.fill_(0)
        acc1, _acc2 = accuracy(output, target, topk=(1, 2))
        metric_logger.update(loss=loss.item(), lr=optimizer.param_groups[0]["lr"], acc1=acc1.item())
    return metric_logger


def evaluate(model, criterion, data_loader, device):
    model.eval()
    metric_logger = MetricLogger()
    with torch.inference_mode():
        for image, target in metric_logger.log_every(data_loader):
            image, target = image.to(device), target.to(device)
            output = model(image)
            metric_logger.update(loss=criterion(output, target).item(), acc1=accuracy(output, target)[0].item())
    return metric_logger.acc1


def main(argv: Sequence[str] = ()) -> dict:
    args = get_args_parser().parse_args(argv)
    torch.manual_seed(args.seed)
    device = torch.device("cpu")
    dataset, dataset_test = images(96, 0), images(48, 1)
    loader = DataLoader(dataset, args.batch_size, shuffle=True)
    data_loader_test = DataLoader(dataset_test, args.batch_size)

    model = nn.Sequential(
        Conv2dNormActivation(3, 8, stride=2),
        Conv2dNormActivation(8, 16, stride=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        MLP(64, [32, 4], norm_layer=nn.LayerNorm, dropout=0.1, inplace=False),
    )
    model.to(device)
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    custom = [("bias", args.bias_weight_decay)] if args.bias_weight_decay is not None else []
    parameters = set_weight_decay(model, args.weight_decay, args.norm_weight_decay, custom)
    if args.opt == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.SGD(parameters, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay, nesterov=True)
    # fxstn: tuner = fxstn.tune(model, optimizer, criterion, loader, data_loader_test, [fxstn.hp.WeightDecay(shared=True)])
    scaler = torch.amp.GradScaler("cpu", enabled=False) if args.amp else None
    main_lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs - args.lr_warmup_epochs)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=args.lr_warmup_epochs)
    lr_scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer, [warmup, main_lr_scheduler], milestones=[args.lr_warmup_epochs]
    )
    model_without_ddp = model
    if args.distributed:
        model = nn.parallel.DistributedDataParallel(model)
        model_without_ddp = model.module
    model_ema = ExponentialMovingAverage(model_without_ddp, decay=args.model_ema_decay) if args.model_ema else None

    if args.resume:
        checkpoint = torch.load(args.resume, map_location="cpu", weights_only=False)
        model_without_ddp.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])
        args.start_epoch = checkpoint["epoch"] + 1
        if model_ema:
            model_ema.load_state_dict(checkpoint["model_ema"])
        if scaler:
            scaler.load_state_dict(checkpoint["scaler"])
        # fxstn: tuner.load_state_dict(checkpoint["tuner"])

    log = []
    for epoch in range(args.start_epoch, args.epochs):
        torch.manual_seed(args.seed + epoch)
        meters = train_one_epoch(model, criterion, optimizer, loader, device, epoch, args, model_ema, scaler)
        log.append({"epoch": epoch, "loss": meters.loss, "lr": meters.lr})
        lr_scheduler.step()
        accuracies = [evaluate(model, criterion, data_loader_test, device)]
        if model_ema:
            accuracies.append(evaluate(model_ema, criterion, data_loader_test, device))
        if args.output_dir:
            checkpoint = {
                "model": model_without_ddp.state_dict(),
                "optimizer": optimizer.state_dict(),
                "lr_scheduler": lr_scheduler.state_dict(),
                "epoch": epoch,
                "args": args,
                # fxstn: "tuner": tuner.state_dict(),
            }
            if model_ema:
                checkpoint["model_ema"] = model_ema.state_dict()
            if scaler:
                checkpoint["scaler"] = scaler.state_dict()
            torch.save(checkpoint, os.path.join(args.output_dir, "checkpoint.pth"))
    return {"model": model, "optimizer": optimizer, "log": log, "evaluations": accuracies}


def get_args_parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("-b", "--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--start-epoch", type=int, default=0)
    parser.add_argument("--opt", default="sgd")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--wd", "--weight-decay", dest="weight_decay", type=float, default=1e-4)
    parser.add_argument("--norm-weight-decay", type=float, default=0.0)
    parser.add_argument("--bias-weight-decay", type=float)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--lr-warmup-epochs", type=int, default=1)
    parser.add_argument("--clip-grad-norm", type=float)
    parser.add_argument("--model-ema", action="store_true")
    parser.add_argument("--model-ema-steps", type=int, default=2)
    parser.add_argument("--model-ema-decay", type=float, default=0.9)
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--distributed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", default="")
    parser.add_argument("--output-dir", default="")
    return parser


if __name__ == "__main__":
    main()
