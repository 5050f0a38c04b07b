"""What each step of a run launches, counted without a GPU, and what an H100 would make of it.

    python -m benchmarks.kernels                                       # the networks of docs/results/overhead.md
    python -m benchmarks.kernels --model resnet18 vit_b_16 --bf16 --batch-size 64 --image-size 64 --tuned dropout
    python -m benchmarks.kernels --model resnet18 --operators 20       # also the operators launched most

The training loop of a runner takes as many inner steps as its schedule needs to repeat itself, with their response and hyper
steps, on fake CUDA tensors (benchmarks/fake_cuda.py). Adds to benchmarks/results/kernels.json as it goes, and goes on where it
stopped; `python -m benchmarks.tables` makes the table of docs/results/overhead.md.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from tqdm import tqdm

import fxstn
from benchmarks.fake_cuda import fake_cuda, move, move_tensors
from benchmarks.launches import ESTIMATES, NETWORK, PURPOSES, Launches, summary
from fxstn import hp
from fxstn.bilevel.cadence import steps_of_run
from fxstn.bilevel.network_problem import as_problem
from fxstn.bilevel.run_settings import settings_of
from fxstn.bilevel.settings import PAPER
from fxstn.bilevel.training import TrainingLoop
from fxstn.bilevel.tuner import Tuner
from fxstn.loops.checks import place_of
from fxstn.tools.bench import LONG, SHORT, plain_baseline
from fxstn.tools.models import build_model

DECAY = 1e-4
FILE = Path(__file__).resolve().parent / "results" / "kernels.json"
STEPS = ("inner", "response", "hyper")
START = 50  # inner steps that lie behind: response steps are regular, and the next check of losses is not near
PULL_BACK = "pull-back"  # Θᵀg of an inner step, for a hyper step
SPECS: dict[str, Callable[[], list[hp.Spec] | None]] = {
    "both": lambda: [hp.Dropout(), hp.WeightDecay(shared=True)],
    "dropout": lambda: None,
    "decay-per-layer": lambda: [hp.Dropout(), hp.WeightDecay()],
}


@dataclass(frozen=True)
class Case:
    """A network, and what it trains on.

    model: as for `build_model`.
    tuned: a key of SPECS.
    """

    model: str
    batch_size: int = 128
    image_size: int = 32
    bf16: bool = False
    tuned: str = "both"

    @property
    def name(self) -> str:
        size = f"{self.batch_size} × {self.image_size}²"
        return f"{self.model.rpartition(':')[2]}, {size}, {self.tuned}" + ", bf16" * self.bf16

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        if self.model == "vit_b_16":
            from torchvision.models import vit_b_16

            return vit_b_16(num_classes=10, image_size=self.image_size)
        return build_model(self.model, 10)


TABLE = (
    Case("resnet18", tuned="dropout"),
    Case("resnet18"),
    Case("benchmarks.networks:three_layers"),
    Case("mobilenet_v3_small", image_size=224),
    Case("resnet50", image_size=224),
    Case("vit_b_16", image_size=224, bf16=True),
    Case("convnext_tiny", image_size=224, bf16=True),
)


@dataclass
class Batches:
    """The same batch again and again, on the device: what a training loop and a tuner draw from.

    left: the number of training batches of the pass.
    """

    inputs: Tensor
    target: Tensor
    left: int = 0

    loader: ClassVar[tuple] = ()
    remembers: ClassVar[bool] = False

    def begin(self) -> None:
        """A pass begins."""

    def take(self, count: int) -> list[object]:
        """Training batches."""
        count = min(count, self.left)
        self.left -= count
        return [(self.inputs, self.target)] * count

    def next(self) -> tuple[object, bool]:
        """A validation batch, and whether it is the first of a pass."""
        return (self.inputs, self.target), False

    def resize(self, size: int) -> None:
        """It has the size of the training batches."""


def count_plain(model: nn.Module, x: Tensor, target: Tensor, decay: float, precision: torch.dtype | None) -> Launches:
    """A step of training without fxstn, when the optimizer has its state.

    model: with fixed dropout, on the CPU or on the fake device.
    x, target: of a batch, on the fake device.
    """
    move(model.train())
    optimizer, launches = fixed_sgd(model, decay), Launches(on=False)
    with launches:
        for number in range(2):
            launches.on = number > 0
            with launches.step("inner"):
                step_plainly(model, optimizer, x, target, precision)
    return launches


def fixed_sgd(model: nn.Module, decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=decay, fused=True)


def step_plainly(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor, precision: torch.dtype | None
) -> None:
    with torch.autocast(x.device.type, precision, enabled=precision is not None):
        loss = F.cross_entropy(model(x), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def network(model: nn.Module, specs: Sequence[hp.Spec] | None, few: Tensor, **options: Any) -> Any:
    """A network from transform that knows where the examples of a batch are, on the CPU.

    few: a batch of some examples.
    """
    stn = fxstn.transform(model, specs, example_inputs=few, **options).train()
    stn.per_example(few)
    stn.locate_examples(few)
    for name in ("linearized", "linearized_eval"):
        stn.graph(name)  # made by trials on values, which fake tensors do not have
    return stn


def cycle(
    stn: Any, x: Tensor, target: Tensor, loss_fn: Any = F.cross_entropy, **settings: Any
) -> tuple[Batches, TrainingLoop]:
    """The training loop of a runner over a pass that is a cycle: inner steps until the schedule repeats itself.

    stn: on its device. Optimizers have their state, and the first steps, in which response steps become rarer, lie behind.
    x, target: of a batch there.
    settings: of `BilevelRunner`.
    """
    options = settings_of(settings)
    batches = Batches(x, target, left=math.lcm(options.response.every, options.hyper.train_steps))
    tuner = Tuner(as_problem(stn, loss_fn, options), stn, options, x.device, batches, batches, seed=0)
    for step in (partial(tuner.stepper.inner, tunes=False), tuner.stepper.response):
        step([(x, target)])
    tuner.stepper.hyper((x, target))
    tuner.counters.steps = START
    tuner.begin_epoch()
    return batches, TrainingLoop(tuner, batches, batches.left)


def count_run(stn: Any, x: Tensor, target: Tensor, loss_fn: Any = F.cross_entropy, **settings: Any) -> Launches:
    """What a cycle of a runner does.

    stn: from `network`; it is moved to the fake device.
    x, target, loss_fn, settings: of `cycle`.
    """
    move(stn, *(stn.canonical(training) for training in (True, False)))
    batches, loop = cycle(stn, x, target, loss_fn, **settings)
    launches = Launches()
    label_steps(launches, loop.tuner.stepper)

    def pause() -> None:
        launches.on = batches.left > 0  # what an epoch ends with is no part of a cycle

    with launches:
        loop.epoch(pause)
    return launches


def count_loop(model: nn.Module, optimizer: torch.optim.Optimizer, specs: Sequence[hp.Spec] | None,
               few: tuple[Tensor, Tensor], x: Tensor, target: Tensor) -> Launches:  # fmt: skip
    """What a loop of one's own does in a cycle, the second one, with `fxstn.tune` in front of it.

    model, few: on the CPU; few: a batch of some examples.
    x, target: a batch on the fake device.
    """
    with _disable_current_modes():
        tuner = fxstn.tune(model, optimizer, F.cross_entropy, None, [few], specs)
        tuner.stn.per_example(few[0])
        tuner.stn.locate_examples(few[0])
        graphs = [tuner.stn.canonical(training) for training in (True, False)]
    method, batches, launches = tuner._tuner, Batches(x, target), Launches(on=False)
    move(model, tuner.stn, *graphs)
    move_tensors(tuner._strengths)
    for part in (tuner, method, method.prepare, method.means, method.guard):
        vars(part)["device"] = x.device  # which a run does not let be set
    method.valid, tuner._place = batches, place_of(model)
    method.counters.steps = START
    label_steps(launches, method.stepper)
    period = math.lcm(fxstn.ResponseSettings.every, fxstn.HyperSettings.train_steps)
    with launches:
        for number in range(2 * period):
            launches.on = number >= period
            with launches.step("inner"):
                step_plainly(model, optimizer, x, target, None)
            tuner.step((x, target))
    return launches


def label_steps(launches: Launches, stepper: Any) -> None:
    """Let each step of a kind note its operators under its name."""

    def labelled(kind: str, step: Callable[..., Any], *args: Any) -> Any:
        with launches.step(kind):
            return step(*args)

    for kind in STEPS:
        setattr(stepper, kind, partial(labelled, kind, getattr(stepper, kind)))
    problem = stepper.problem
    problem.training_hypergradient = partial(labelled, PULL_BACK, problem.training_hypergradient)


# Results


def measure(case: Case) -> dict[str, Any]:
    """The entry of a network: figures of plain training and of each schedule."""
    few = torch.rand(4, 3, case.image_size, case.image_size), torch.zeros(4, dtype=torch.long)
    precision, specs = (torch.bfloat16 if case.bf16 else None), SPECS[case.tuned]
    dropouts = [spec for spec in specs() or [] if isinstance(spec, hp.Dropout)] or None
    plain = plain_baseline(case.build(), dropouts)
    scaled, structured = (network(case.build(), specs(), few[0], response=kind) for kind in ("scaled", "structured"))
    with fake_cuda():
        x, target = (torch.empty(case.batch_size, *t.shape[1:], dtype=t.dtype, device="cuda") for t in few)
        run = partial(count_run, x=x, target=target, execution=fxstn.ExecutionSettings(autocast=precision))
        counts = {
            "plain": count_plain(plain, x, target, 0.0 if case.tuned == "dropout" else DECAY, precision),
            "default": run(scaled),
            "paper": run(structured, **PAPER),
        }
    return {name: figures(launches, counts["plain"]) for name, launches in counts.items()}


def figures(launches: Launches, plain: Launches) -> dict[str, Any]:
    """Per inner step of the schedule, with ratios to plain training; per step of each kind; and what should not be there."""
    total, base = summary(launches.operators, launches.steps["inner"]), summary(plain.operators)
    result: dict[str, Any] = {**total, "ratios": {e: total[f"{e}_ms"] / base[f"{e}_ms"] for e in ESTIMATES}}
    result["steps"], result["of each kind"], result["operators"], result["purposes"] = (
        dict(launches.steps), {}, {}, {},
    )  # fmt: skip
    for kind in (*STEPS, PULL_BACK, "between"):
        own = [o for o in launches.operators if (o.kind or "between") == kind]
        names: Counter[str] = Counter()
        for o in own:
            names[o.name] += o.launches
        result["of each kind"][kind] = summary(own, launches.steps[kind] or launches.steps["inner"])
        result["operators"][kind] = dict(names.most_common(20))
        count = launches.steps[kind] or launches.steps["inner"]
        result["purposes"][kind] = {
            purpose: summary([o for o in own if o.purpose == purpose], count) for purpose in (NETWORK, *PURPOSES)
        }
    return result | {name: dict(getattr(launches, name)) for name in ("syncs", "copies", "unlike")}


def rates(inner: int) -> dict[str, float]:
    """{kind: steps for each inner step} of the default's first so many inner steps."""
    counts = dict(zip(STEPS, (inner, *steps_of_run(inner)), strict=True)) | {"between": inner}
    counts[PULL_BACK] = min(inner, counts["hyper"] * fxstn.HyperSettings.train_steps)  # what a hyper step reads
    return {kind: count / inner for kind, count in counts.items()}


def averages(figures: dict[str, Any], inner: int) -> dict[str, float]:
    """Figures per inner step, with the other steps of the default's first so many inner steps.

    figures: of the default schedule.
    """
    kinds = figures["of each kind"]
    return {name: sum(rate * kinds[kind][name] for kind, rate in rates(inner).items()) for name in kinds["inner"]}


def parts(entry: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """{what for: (launches, their share of the time of a step of plain training)} of the default's first 1,000 steps.

    Per inner step, both under CUDA graphs. The passes of the network are by kind of step.
    """
    shares, kinds = rates(SHORT), entry["default"]["purposes"]
    groups = {f"{kind}: {NETWORK}": [(kind, NETWORK)] for kind in STEPS}
    groups |= {purpose: [(kind, purpose) for kind in shares] for purpose in PURPOSES}

    def total(figure: str, group: list[tuple[str, str]]) -> float:
        return sum(shares[kind] * kinds[kind][own][figure] for kind, own in group)

    whole = entry["plain"]["graphed_ms"]
    return {name: (total("launches", own), total("graphed_ms", own) / whole) for name, own in groups.items()}


def purposes(entries: dict[str, Any]) -> str:
    """What the launches of the default schedule are for, as Markdown: as in `parts`."""
    rows = []
    for name, entry in entries.items():
        cells = [f"{launches:.1f}, {100 * share:.0f} %" for launches, share in parts(entry).values()]
        rows.append([name, f"{entry['plain']['launches']:.0f}", *cells])
    headers = ["network, batch × image, what is tuned", "plain", *parts(next(iter(entries.values())))]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def read() -> dict[str, Any]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def table(entries: dict[str, Any]) -> str:
    """The networks, as Markdown."""
    cells = []
    for name, entry in entries.items():
        kinds = entry["default"]["of each kind"]
        steps = [f"{kinds[kind]['launches']:.0f}" for kind in ("inner", PULL_BACK, "response", "hyper")]
        runs = [entry["default"], *(averages(entry["default"], inner) for inner in (SHORT, LONG)), entry["paper"]]
        launches = " → ".join(f"{run['launches']:.0f}" for run in (entry["plain"], *runs))
        ratios = [
            " / ".join(f"{run[f'{e}_ms'] / entry['plain'][f'{e}_ms']:.2f}" for e in ESTIMATES) for run in runs[1:]
        ]
        cells.append([name, " / ".join(steps), launches, *ratios])
    headers = [
        "network, batch × image, what is tuned", "launches of an inner step / its Θᵀg / a response / a hyper step",
        "per inner step: plain → a cycle of the default → its first 1,000 → 10,000 steps → paper's",
        "default / plain, 1,000 steps: eager / graphs / fused", "10,000 steps", "paper's / plain",
    ]  # fmt: skip
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", help="of torchvision, or package.module:function; default: the table's")
    parser.add_argument("--batch-size", type=int, default=Case.batch_size)
    parser.add_argument("--image-size", type=int, default=Case.image_size)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--tuned", default=Case.tuned, choices=list(SPECS))
    parser.add_argument("--again", action="store_true", help="also what is in the file already")
    parser.add_argument("--operators", type=int, default=0, help="also print the operators launched most, so many")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = (args.batch_size, args.image_size, args.bf16, args.tuned)
    cases = [Case(model, *sizes) for model in args.model] if args.model else TABLE
    for case in (progress := tqdm(cases, disable=None)):
        progress.set_description(case.name)
        entries = read()
        if args.again or case.name not in entries:
            entry = measure(case)
            entries = read() | {case.name: entry}  # another process may have added some
            FILE.write_text(json.dumps(entries, indent=1) + "\n")
        for schedule, entry in entries[case.name].items():
            for kind, operators in entry["operators"].items() if args.operators else ():
                most = ", ".join(f"{name} {launches}" for name, launches in list(operators.items())[: args.operators])
                tqdm.write(f"{schedule}, {kind}: {most}")
    tqdm.write(table({case.name: read()[case.name] for case in cases}))


if __name__ == "__main__":
    main()
