"""The shape of nanoGPT's train.py: get_batch, a loss inside forward, accumulation, scaler, schedule by hand, torch.compile."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext

import torch

# fxstn: import fxstn
from benchmarks.gpt import GPT, GPTConfig, groups
from tests.ports.data import text


def main(argv: Sequence[str] = ()) -> dict:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out_dir", default="")
    parser.add_argument("--init_from", default="scratch", choices=("scratch", "resume"))
    parser.add_argument("--eval_interval", type=int, default=5)
    parser.add_argument("--eval_iters", type=int, default=2)
    parser.add_argument("--max_iters", type=int, default=15)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--block_size", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--min_lr", type=float, default=1e-3)
    parser.add_argument("--warmup_iters", type=int, default=3)
    parser.add_argument("--lr_decay_iters", type=int, default=15)
    parser.add_argument("--weight_decay", type=float, default=1e-1)
    parser.add_argument("--grad_clip", type=float, default=1.0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args(argv)

    torch.manual_seed(1337)
    device_type = "cpu"
    ptdtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[args.dtype]
    ctx = nullcontext() if args.dtype == "float32" else torch.amp.autocast(device_type=device_type, dtype=ptdtype)
    texts = {"train": text(2000, 0), "val": text(400, 1)}

    def get_batch(split):
        ix = torch.randint(len(texts[split]) - args.block_size, (args.batch_size,))
        x = torch.stack([texts[split][i : i + args.block_size] for i in ix])
        y = torch.stack([texts[split][i + 1 : i + 1 + args.block_size] for i in ix])
        return x, y

    iter_num, best_val_loss = 0, 1e9
    model_args = {"vocabulary": 12, "block": args.block_size, "layers": 2, "heads": 2, "width": 16}
    if args.init_from == "resume":
        checkpoint = torch.load(os.path.join(args.out_dir, "ckpt.pt"))
        model_args, iter_num, best_val_loss = (checkpoint[k] for k in ("model_args", "iter_num", "best_val_loss"))
    model = GPT(GPTConfig(**model_args, dropout=args.dropout))
    scaler = torch.amp.GradScaler(device_type, enabled=(args.dtype == "float16"))
    optimizer = torch.optim.AdamW(groups(model, args.weight_decay), lr=args.learning_rate, betas=(0.9, 0.95))
    # fxstn: tuner = fxstn.tune(model, optimizer, None, None, [get_batch("val") for _ in range(8)], epoch_steps=5)
    if args.init_from == "resume":
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    # fxstn: tuner.load_state_dict(checkpoint["tuner"]) if args.init_from == "resume" else None
    raw_model = model
    if args.compile:
        model = torch.compile(model, backend="eager")

    @torch.no_grad()
    def estimate_loss():
        out = {}
        model.eval()
        for split in ["train", "val"]:
            losses = torch.zeros(args.eval_iters)
            for k in range(args.eval_iters):
                X, Y = get_batch(split)
                with ctx:
                    _, loss = model(X, Y)
                losses[k] = loss.item()
            out[split] = losses.mean().item()
        model.train()
        return out

    def get_lr(it):
        if it < args.warmup_iters:
            return args.learning_rate * (it + 1) / (args.warmup_iters + 1)
        if it > args.lr_decay_iters:
            return args.min_lr
        ratio = (it - args.warmup_iters) / (args.lr_decay_iters - args.warmup_iters)
        return args.min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (args.learning_rate - args.min_lr)

    log, evaluations = [], []
    torch.manual_seed(1337 + iter_num)
    X, Y = get_batch("train")
    while True:
        lr = get_lr(iter_num)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        if iter_num % args.eval_interval == 0:
            losses = estimate_loss()
            evaluations.append(losses["val"])
            if losses["val"] < best_val_loss:
                best_val_loss = losses["val"]
            if iter_num > 0 and args.out_dir:
                checkpoint = {
                    "model": raw_model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "model_args": model_args,
                    "iter_num": iter_num,
                    "best_val_loss": best_val_loss,
                    "config": vars(args),
                    # fxstn: "tuner": tuner.state_dict(),
                }
                torch.save(checkpoint, os.path.join(args.out_dir, "ckpt.pt"))
            torch.manual_seed(1337 + iter_num)
            X, Y = get_batch("train")
        for _ in range(args.gradient_accumulation_steps):
            with ctx:
                _logits, loss = model(X, Y)
                loss = loss / args.gradient_accumulation_steps
            X, Y = get_batch("train")
            scaler.scale(loss).backward()
        if args.grad_clip != 0.0:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        # fxstn: tuner.step((X, Y))
        optimizer.zero_grad(set_to_none=True)
        log.append({"iter": iter_num, "loss": loss.item() * args.gradient_accumulation_steps, "lr": lr})
        iter_num += 1
        if iter_num > args.max_iters:
            break
    return {"model": model, "optimizer": optimizer, "log": log, "evaluations": evaluations}


if __name__ == "__main__":
    main()
