"""What tuning seven hyperparameters of a language model costs: an LSTM of 2 × 650 units, batch 40, windows of 70, 10,000 words.

    python -m benchmarks.language [--width 650] [--rounds 5] [--device cuda] [--compile]

Variants alternate in one process; medians. "bare": no regularisation; "plain": the regularisers of examples/language_model.py
written by hand at fixed strengths; "general", "response": one step of w₀, of Θ; "schedule": the paper's, per inner step;
"schedule-default": the runner's. Ratios are against "plain". Writes benchmarks/results/language-DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from functools import partial

import torch
from tabulate import tabulate
from torch import Tensor

import fxstn
from benchmarks.overhead import RESULTS
from examples.language_model import LanguageModel, cross_entropy, specs
from fxstn import CarriedState
from fxstn.bilevel.optim import SettlingAdam
from fxstn.bilevel.optimizers import adam
from fxstn.ops.noise import locked_mask, weight_mask, word_mask
from fxstn.tools.measure import step_times

TRAIN_STEPS = 5
Steps = dict[str, tuple[Callable[[], None], int]]


class Plain(LanguageModel):
    """The regularisers by hand; forward also returns their penalty."""

    def __init__(self, *sizes: int, p: float) -> None:
        super().__init__(*sizes)
        self.p = torch.tensor(p)

    def forward(self, words: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x = self.encoder(words) * word_mask(words, self.encoder.weight, self.p)
        x, after = x * locked_mask(x, self.p, 1), []
        for i, layer in enumerate(self.layers):
            own = [layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0]
            own[1] = own[1] * weight_mask(own[1], self.p)
            state = (h[:, i].unsqueeze(0).contiguous(), c[:, i].unsqueeze(0).contiguous())
            x, *state = torch.lstm(x, tuple(state), own, True, 1, 0.0, True, False, True)
            x = x * locked_mask(x, self.p, 1)
            after.append(state)
        self.penalty = 1e-3 * (x.square().mean() + x.diff(dim=1).square().mean())
        h, c = (torch.cat([state[k] for state in after]).transpose(0, 1) for k in (0, 1))
        return self.decoder(x), (h, c)


def variants(args: argparse.Namespace) -> Steps:
    sizes = (args.words, args.width, 2)
    batch = torch.randint(args.words, (2, args.batch, args.length), device=args.device)
    sgd = partial(torch.optim.SGD, lr=1e-3)
    steps: Steps = {}

    def by_hand(model: LanguageModel) -> Callable[[], None]:
        model.to(args.device).train()
        optimizer, state = sgd(model.parameters()), model.initial_state(args.batch)

        def step() -> None:
            scores, _ = model(batch[0], *state)
            (cross_entropy(scores, batch[1]) + getattr(model, "penalty", 0.0)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            optimizer.step()
            optimizer.zero_grad()

        return step

    steps["bare"] = by_hand(LanguageModel(*sizes)), 1
    steps["plain"] = by_hand(Plain(*sizes, p=0.05).to(args.device)), 1

    def tuned(response: str) -> tuple[Callable[[], None], ...]:
        model = LanguageModel(*sizes)
        stn = fxstn.transform(model, specs(2, 0.05, 1e-3), response=response).to(args.device).train()
        if args.compile:
            stn.compile()
        carried = CarriedState(cross_entropy, stn.model.initial_state)
        inputs, target = carried.inputs(batch[0]), batch[1]
        own = {
            "general": (sgd(stn.general_parameters()), lambda: fxstn.general_loss(stn, carried.loss, inputs, target)),
            "response": (
                (sgd if response == "structured" else adam)(list(stn.response_parameters())),
                lambda: fxstn.response_loss(stn, carried.loss, inputs, target),
            ),
            "hyper": (
                SettlingAdam([stn.hparams.unconstrained]),
                lambda: fxstn.hyper_loss(stn, carried.loss, inputs, target,
                                         perturb="auto" if response == "structured" else "off"),
            ),
        }  # fmt: skip

        def step(name: str) -> None:
            optimizer, loss = own[name]
            loss().backward()
            if name == "general":
                torch.nn.utils.clip_grad_norm_(list(stn.general_parameters()), 0.25)
                if response == "scaled":
                    stn.hypergradient()
            optimizer.step()
            optimizer.zero_grad()

        return tuple(partial(step, name) for name in own)

    def cycle(general: Callable, response: Callable, hyper: Callable, every: int) -> tuple[Callable[[], None], int]:
        steps_in_all = TRAIN_STEPS * every

        def run() -> None:
            for i in range(1, steps_in_all + 1):
                general()
                if i % every == 0:
                    response()
                if i % TRAIN_STEPS == 0:
                    hyper()

        return run, steps_in_all

    paper, default = tuned("structured"), tuned("scaled")
    steps["general"], steps["response"] = (paper[0], 1), (paper[1], 1)
    steps["schedule"] = cycle(*paper, 1)
    steps["response-default"] = default[1], 1
    steps["schedule-default"] = cycle(*default, fxstn.ResponseSettings.every)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=650)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--length", type=int, default=70)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="stn.compile() for the tuned variants")
    args = parser.parse_args()
    torch.manual_seed(0)
    times = step_times(variants(args), args.rounds, 1, args.device, quiet=False)
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
    rows = [
        {"variant": key, "step_ms": 1000 * time, "ratio": time / times["plain"], "device": name, "torch": torch.__version__,
         "threads": torch.get_num_threads(), "words": args.words, "width": args.width, "batch": args.batch,
         "length": args.length, "compile": args.compile}
        for key, time in times.items()
    ]  # fmt: skip
    print(tabulate([[row["variant"], row["step_ms"], row["ratio"]] for row in rows], ["variant", "step ms", "ratio"]))
    device = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    file = RESULTS / f"language-{device}{'-compile' if args.compile else ''}.json"
    file.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
