"""Tune the seven regularisation hyperparameters of a word-level language model while it trains.

    python examples/language_model.py --small                          # Python's own reference texts, 10 minutes on 2 cores
    python examples/language_model.py train.txt valid.txt test.txt     # or any plain text, as three files or as one

The network is an LSTM with tied weights (Merity et al. 2017, arXiv 1708.02182), tuned in: dropout of whole words, variational
dropout of the input, between layers and of the output, DropConnect of the hidden-to-hidden weights, and the penalties on the
output's size and on its change in time. Typed again with the same --out it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxstn
from fxstn import hp
from fxstn.tools import text

SMALL = {"width": 200, "words": 100_000, "epochs": 20, "rate": 20.0, "patience": 1, "batch": 20, "length": 35}


class LanguageModel(nn.Module):
    """Words (batch, time) and the state of its layers, h and c (batch, layers, width), → scores (batch, time, words), state.

    This is the protocol of `fxstn.CarriedState`: state goes in after the inputs and comes out beside the output, a row per
    example.
    """

    def __init__(self, words: int, width: int, layers: int) -> None:
        super().__init__()
        self.encoder = nn.Embedding(words, width)
        self.layers = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(layers))
        self.decoder = nn.Linear(width, words)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        self.decoder.weight = self.encoder.weight

    def forward(self, words: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x, after = self.encoder(words), []
        for i, layer in enumerate(self.layers):
            x, state = layer(x, (h[:, i].unsqueeze(0), c[:, i].unsqueeze(0)))
            after.append(state)
        h, c = (torch.cat([state[k] for state in after]).transpose(0, 1) for k in (0, 1))
        return self.decoder(x), (h, c)

    def initial_state(self, batch: int) -> tuple[Tensor, Tensor]:
        zeros = self.encoder.weight.new_zeros(batch, len(self.layers), self.encoder.embedding_dim)
        return zeros, zeros


def specs(layers: int, start: float, penalty: float) -> list[hp.Spec]:
    """The seven: dropout rates at `start`, coefficients at `penalty`."""
    last = f"layers.{layers - 1}"
    return [
        hp.EmbeddingDropout("encoder", init=start),
        hp.LockedDropout("encoder", init=start),
        hp.LockedDropout(*(f"layers.{i}" for i in range(layers - 1)), init=start, shared=layers > 2),
        hp.LockedDropout(last, init=start),
        hp.DropConnect("layers.*.weight_hh_l0", init=start, shared=True),
        hp.ActivationDecay(last, init=penalty),
        hp.TemporalDecay(last, init=penalty),
    ]


def cross_entropy(scores: Tensor, target: Tensor) -> Tensor:
    """The mean over words, in nats; its exponential is the perplexity."""
    return F.cross_entropy(scores.flatten(0, 1), target.flatten())


def perplexity(row: dict[str, float]) -> float:
    return math.exp(min(row["valid_loss"], 20.0))


def prepare(args: argparse.Namespace) -> tuple[fxstn.BilevelRunner, text.Windows]:
    """A runner, and the test text."""
    torch.manual_seed(args.seed)
    corpus = text.load(*args.text, most=args.words)
    model = LanguageModel(len(corpus.words), args.width, args.layers)
    method = "delta" if args.method in ("default", "untuned") else args.method
    tuned = specs(args.layers, args.start, args.penalty)
    stn = fxstn.transform(model, tuned, method=method, response="scaled" if args.method == "untuned" else None)
    sgd = partial(torch.optim.SGD, lr=args.rate)
    plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, factor=0.25, patience=args.patience)
    slow = partial(torch.optim.SGD, lr=args.response_rate)
    response, hyper = fxstn.ResponseSettings(), fxstn.HyperSettings()
    if args.method == "untuned":
        response, hyper = fxstn.ResponseSettings(every=10**9), fxstn.HyperSettings(warmup_epochs=args.epochs)
    elif args.method != "default":
        response, hyper = replace(fxstn.PAPER["response"], optimizer=slow), fxstn.PAPER["hyper"]
    runner = fxstn.BilevelRunner(
        stn, cross_entropy, *(text.Windows(part, args.batch, args.length) for part in (corpus.train, corpus.valid)),
        initial_state=model.initial_state, optimizer=sgd, schedulers={"optimizer": plateau}, clip_norm=0.25,
        response=response, hyper=hyper, columns={"perplexity": perplexity},
        execution=fxstn.ExecutionSettings(device=args.device), checkpoints=fxstn.CheckpointSettings(out_dir=args.out),
    )  # fmt: skip
    return runner, text.Windows(corpus.test, args.batch, args.length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "text", nargs="*", help="training, validation and test file; one file; none: Python's reference texts"
    )
    parser.add_argument("--small", action="store_true", help=f"a preset: {SMALL}")
    parser.add_argument("--method", default="default", choices=["default", "untuned", "delta", "centered", "stn"],
                        help="fxstn's defaults; the start kept; or the paper's settings with one of its methods")  # fmt: skip
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=650)
    parser.add_argument("--words", type=int, help="of the training text, from its start (default: all)")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--minutes", type=float, help="stop after the epoch in which these are over")
    parser.add_argument("--batch", type=int, default=40, help="rows that are read side by side")
    parser.add_argument("--length", type=int, default=70, help="of a window (BPTT)")
    parser.add_argument("--rate", type=float, default=30.0, help="learning rate of SGD; a quarter on a plateau")
    parser.add_argument("--response-rate", type=float, default=1.0, help="of the response, with the paper's settings")
    parser.add_argument("--patience", type=int, default=20, help="epochs of a plateau")
    parser.add_argument("--start", type=float, default=0.05, help="of the dropout rates")
    parser.add_argument("--penalty", type=float, default=1e-3, help="start of the two coefficients")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("out/language_model"), help="checkpoints, history and result")
    if parser.parse_args().small:
        parser.set_defaults(**SMALL)
    args = parser.parse_args()
    runner, test = prepare(args)
    runner.fit(args.epochs, args.minutes)
    best = runner.history.best()
    runner.stn.model.load_state_dict(runner.best["model"])
    result = {
        "method": args.method, "seed": args.seed, "epochs": len(runner.history), "best_epoch": best["epoch"],
        "seconds": round(sum(runner.history["seconds"])), "valid_perplexity": math.exp(best["valid_loss"]),
        "test_perplexity": math.exp(runner.evaluate(test)["valid_loss"]),
        "found": {name: float(f"{best[name]:.4g}") for name in runner.stn.hparams.names}, "history": runner.history.rows,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "result.json").write_text(json.dumps(result) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "history"}, indent=1))


if __name__ == "__main__":
    main()
