"""The same task by implicit differentiation: one weight decay per layer of resnet18, tuned by betty (Choe et al. 2023).

    pip install betty-ml; python -m benchmarks.peer

betty's inner problem is trained for 5 steps, then takes one hypergradient by a Neumann series (Lorraine et al. 2020) or by
conjugate gradients, with betty's default number of terms; fxstn runs its schedules on the same batches. Alternating in one
process, medians, ratio to plain training. Writes benchmarks/results/peer-DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks.overhead import RESULTS
from fxstn.bilevel.optimizers import sgd
from fxstn.tools.bench import Steps, environment, variants
from fxstn.tools.measure import step_times
from fxstn.tools.workloads import TRAIN_STEPS, Setup


class Decays(nn.Module):
    """One weight decay, in logarithm, for each weight that fxstn's hp.WeightDecay finds."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.full((count,), -9.0))

    def forward(self, weights: list[Tensor]) -> Any:
        return sum(0.5 * log.exp() * w.square().sum() for log, w in zip(self.log, weights, strict=True))


def betty_steps(setup: Setup, method: str) -> Any:
    """What runs TRAIN_STEPS inner steps and one hypergradient step."""
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    model, x, target = setup.build()

    def weights(module: nn.Module) -> list[Tensor]:
        return [layer.weight for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]

    class Inner(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.module(batch[0]), batch[1]) + self.outer(weights(self.module))

    class Outer(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.inner(batch[0]), batch[1])

    decays = Decays(len(weights(model))).to(setup.device)
    common: dict[str, Any] = {"train_data_loader": [(x, target)], "device": setup.device}
    inner = Inner(name="inner", config=Config(type=method, unroll_steps=TRAIN_STEPS), module=model,
                  optimizer=sgd(list(model.parameters())), **common)  # fmt: skip
    outer = Outer(name="outer", config=Config(), module=decays,
                  optimizer=torch.optim.RMSprop(decays.parameters(), lr=1e-3), **common)  # fmt: skip
    engine = Engine(problems=[inner, outer], dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
                    config=EngineConfig(train_iters=1))  # fmt: skip
    engine.train()

    def cycle() -> None:
        for _ in range(TRAIN_STEPS):
            engine.global_step += 1
            engine.train_step()

    return cycle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="alternating rounds")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    setup = Setup("resnet18", device=args.device, tuned="weight-decay")
    steps: Steps = variants(setup, ["plain", "schedule", "schedule-default"])
    for method in ("neumann", "cg"):
        steps[f"betty, {method}"] = betty_steps(setup, method), TRAIN_STEPS
    times = step_times(steps, args.rounds, 2, args.device, quiet=False)
    rows = [
        {"variant": name, "step_ms": round(1e3 * seconds, 2), "ratio": round(seconds / times["plain"], 3)}
        for name, seconds in times.items()
    ]
    print(tabulate([row.values() for row in rows], ["variant", "ms per inner step", "ratio"]))
    file = RESULTS / f"peer-{re.sub('[^a-z0-9]+', '-', args.device)}.json"
    file.write_text(json.dumps({"setup": asdict(setup) | environment(args.device), "rows": rows}, indent=1) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
