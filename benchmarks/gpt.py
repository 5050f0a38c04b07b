"""A small GPT on characters of a text: fixed dropouts, and dropout that `fxstn.tune` tunes from several starts.

    python -m benchmarks.gpt --text ptb.train.txt ptb.valid.txt ptb.test.txt [--seeds 3] [--dropouts 0 0.1] [--starts 0.05 0.2]

All runs have the same number of steps, the same learning rates and, by seed, the same weights. The training text is so short
that the network overfits without dropout. One run takes one to two minutes on one thread. Writes benchmarks/results/gpt.json
as it goes, and goes on where it stopped; prints the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from tqdm import tqdm

import fxstn
from benchmarks.overhead import RESULTS
from fxstn import hp

FILE = RESULTS / "gpt.json"


@dataclass
class GPTConfig:
    """Sizes of a GPT, and the dropout at each of its 1 + 3·layers sites."""

    vocabulary: int
    block: int = 64
    layers: int = 4
    heads: int = 4
    width: int = 128
    dropout: float = 0.0


class Attention(nn.Module):
    """Causal self-attention; its probabilities and its output are dropped."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv, self.out = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        return self.drop(self.out(y.transpose(1, 2).reshape(batch, length, width)))


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and a residual connection."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln1, self.attention = nn.LayerNorm(config.width), Attention(config)
        self.ln2, self.up = nn.LayerNorm(config.width), nn.Linear(config.width, 4 * config.width)
        self.down, self.drop = nn.Linear(4 * config.width, config.width), nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln1(x))
        return x + self.drop(self.down(F.gelu(self.up(self.ln2(x)))))


class GPT(nn.Module):
    """(characters, next characters or None) → (logits, loss or None). The head is tied to the embedding."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.block, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm, self.head = (
            nn.LayerNorm(config.width),
            nn.Linear(config.width, config.vocabulary, bias=False),
        )
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers) if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, words: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        places = torch.arange(words.shape[1], device=words.device)
        x = self.drop(self.tokens(words) + self.positions(places))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if target is None:  # to write on from the last position
            return self.head(x[:, -1:]), None
        logits = self.head(x)
        return logits, cross_entropy(logits, target)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The mean over all characters."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def logits_and_target(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(logits, next characters) of a batch, as `fxstn.tune` takes a forward whose model computes its loss."""
    return model(*batch)[0], batch[1]


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """(characters, next characters) of a text, one window at every `stride` characters."""

    def __init__(self, text: Tensor, length: int, stride: int) -> None:
        self.text, self.length, self.stride = text, length, stride

    def __len__(self) -> int:
        return (len(self.text) - self.length - 1) // self.stride + 1

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        start = i * self.stride
        return self.text[start : start + self.length], self.text[start + 1 : start + 1 + self.length]


def texts(paths: list[Path], characters: list[int]) -> tuple[list[Tensor], int]:
    """The first characters of each text as numbers, and how many numbers there are."""
    strings = [path.read_text(encoding="utf-8")[:most] for path, most in zip(paths, characters, strict=True)]
    numbers = {character: i for i, character in enumerate(sorted(set("".join(strings))))}
    return [torch.tensor([numbers[c] for c in string]) for string in strings], len(numbers)


def groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for vectors."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    losses = [(model(x, y)[1].item(), len(x)) for x, y in loader]
    model.train()
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)


def schedule(step: int, steps: int) -> float:
    """A share of the learning rate: up in 50 steps, then down along a cosine to a tenth."""
    return min((step + 1) / 50, 0.55 + 0.45 * math.cos(math.pi * step / steps))


def run(dropout: float, tunes: bool, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """{"curve": [[train, valid], ...], "valid", "last", "test" where validation is best, "seconds", "history" of λ}."""
    (train, valid, test), vocabulary = texts(args.text, args.characters)
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocabulary, args.block, args.layers, 4, args.width, dropout))
    windows = Windows(train, args.block, 1)
    sampler = RandomSampler(windows, num_samples=args.batch * args.every)
    loader = DataLoader(windows, args.batch, sampler=sampler)
    valid_loader, test_loader = (DataLoader(Windows(t, args.block, args.block), 64) for t in (valid, test))
    optimizer = torch.optim.AdamW(groups(model, 0.1), lr=args.lr, betas=(0.9, 0.99))
    if tunes:
        tuner = fxstn.tune(
            model, optimizer, cross_entropy, loader, valid_loader, [hp.Dropout()], forward=logits_and_target
        )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: schedule(i, args.steps))
    curve, best, started = [], (math.inf, math.inf), time.perf_counter()
    for _ in range(args.steps // args.every):
        total = 0.0
        for x, y in loader:
            _, loss = model(x, y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            total += loss.item()
        curve.append([round(total / args.every, 4), round(evaluate(model, valid_loader), 4)])
        if curve[-1][1] < best[0]:
            best = (curve[-1][1], round(evaluate(model, test_loader), 4))
    seconds = round(time.perf_counter() - started, 1)
    result = {"valid": best[0], "last": curve[-1][1], "test": best[1], "curve": curve, "seconds": seconds}
    return result | ({"history": tuner.history.rows} if tunes else {})


def table(results: dict[str, dict[str, Any]]) -> str:
    """Means over seeds and each seed's, by way: a fixed dropout, or a start of tuning."""
    ways = dict.fromkeys(key.rpartition(" seed ")[0] for key in results)
    rows = []
    for way in ways:
        runs = [run for key, run in results.items() if key.startswith(f"{way} seed ")]
        columns = [[run[key] for run in runs] for key in ("valid", "last", "test")]
        shown = [f"{statistics.mean(c):.3f} ({', '.join(f'{v:.3f}' for v in c)})" for c in columns]
        rows.append([way, *shown])
    headers = ["dropout", "best validation loss", "last validation loss", "test loss at the best"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs=3, type=Path, required=True, help="training, validation and test file")
    parser.add_argument("--characters", nargs=3, type=int, default=[12_000, 12_000, 12_000], help="used of each")
    parser.add_argument("--dropouts", nargs="*", type=float, default=[0.0, 0.1, 0.2, 0.3], help="fixed ones")
    parser.add_argument("--starts", nargs="*", type=float, default=[0.05, 0.2, 0.5], help="dropouts from which to tune")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--json", type=Path, default=FILE)
    args = parser.parse_args()
    ways = [(f"fixed {d:g}", d, False) for d in args.dropouts] + [(f"from {d:g}", d, True) for d in args.starts]
    for seed, (way, dropout, tunes) in tqdm(list(itertools.product(range(args.seeds), ways)), disable=None):
        results = json.loads(args.json.read_text()) if args.json.exists() else {}
        if (key := f"{way} seed {seed}") not in results:
            results[key] = run(dropout, tunes, seed, args)
            args.json.write_text(json.dumps(results, separators=(",", ":")) + "\n")
    print(table(json.loads(args.json.read_text())))


if __name__ == "__main__":
    main()
