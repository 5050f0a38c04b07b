"""Where a step's time goes, by operation: the general, response and hyper steps against plain training.

    python -m benchmarks.profile [--model resnet18] [--batch-size 64] [--image-size 32] [--top 12]

Self time of torch's operations (torch.profiler), in percent of the plain step's total; kinds of operation are rows. The sum
of a column is the step's ratio to plain training, as far as the profiler sees it.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable

from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

from fxstn.tools.bench import variants
from fxstn.tools.workloads import Setup

KINDS = {
    "convolution": ("conv", "mkldnn", "cudnn", "mm", "linear"),
    "normalisation": ("norm",),
    "optimizer": ("sgd", "_foreach", "optimizer"),
    "dropout and its noise": ("rand", "uniform", "dropout", "bernoulli", "aten::ge", "native_dropout"),
    "elementwise": ("add", "mul", "div", "threshold", "relu", "sub", "where", "clamp", "rsub"),
    "pooling": ("pool", "gather", "scatter"),
    "copies, zeros": ("copy", "zero", "fill", "clone", "contiguous", "empty", "to_mkldnn"),
}


def self_times(step: Callable[[], None], repeats: int) -> Counter[str]:
    """Self milliseconds per step and kind of operation."""
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(repeats):
            step()
    times: Counter[str] = Counter()
    for event in seen.key_averages():
        name = event.key.lower()
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")
        times[kind] += event.self_cpu_time_total / 1e3 / repeats
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="as for `fxstn bench`")
    parser.add_argument("--batch-size", type=int, default=64, help="examples per step")
    parser.add_argument("--image-size", type=int, default=32, help="pixels")
    parser.add_argument("--repeats", type=int, default=10, help="steps that are averaged")
    args = parser.parse_args()
    names = ["plain", "general", "response"]
    steps = variants(Setup(args.model, args.batch_size, args.image_size), names)
    columns = {name: self_times(steps[name][0], args.repeats) for name in names}
    plain = columns["plain"].total()
    rows = [
        [kind, *(f"{100 * columns[name][kind] / plain:.1f}" for name in names)]
        for kind in sorted(set().union(*columns.values()), key=lambda kind: -columns["response"][kind])
    ]
    rows.append(["total", *(f"{100 * columns[name].total() / plain:.1f}" for name in names)])
    print(tabulate(rows, ["% of the plain step", *names], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
