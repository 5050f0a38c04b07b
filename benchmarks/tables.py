"""Write the tables of the README from the JSON files under benchmarks/results.

    python -m benchmarks.tables

A table stands between <!-- table NAME --> and <!-- end -->; what is between is replaced.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MEANING = {
    "plain": "plain training, fixed dropout at the same places",
    "general": "general step: the same training, conditioned on λ",
    "response": "response step, by the emitted tangent",
    "schedule": "whole schedule of the paper, per inner step",
    "func-jvp": "response step by `torch.func.jvp`, ε per example",
    "func-jvp-batch": "response step by `torch.func.jvp`, one ε per batch",
}


def overhead() -> str:
    rows = {row["variant"]: row for row in json.loads((RESULTS / "overhead-resnet18-cpu.json").read_text())}
    cells = [(what, f"{rows[v]['ratio']:.2f}", f"{rows[v]['peak_mb']:.0f}") for v, what in MEANING.items() if v in rows]
    return tabulate(cells, ["resnet18, batch 64, 32×32, 2 CPU threads", "time / plain", "peak MB"], tablefmt="github")


def demo() -> str:
    results = json.loads((RESULTS / "demo.json").read_text())
    columns = ["valid loss", "valid accuracy", "test loss", "test accuracy", "seconds"]
    cells = [
        [name, *(f"{statistics.mean(run[c] for run in runs):.{1 if c == 'seconds' else 3}f}" for c in columns)]
        for name, runs in results.items()
    ]
    return tabulate(
        cells, [f"mean of {len(results['tuned'])} seeds", *columns], tablefmt="github", disable_numparse=True
    )


TABLES = {"overhead": overhead, "demo": demo}


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, table in TABLES.items():
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        assert re.search(pattern, text, re.DOTALL), name
        new = table()
        text = re.sub(pattern, lambda match, new=new: f"{match[1]}{new}\n{match[2]}", text, flags=re.DOTALL)
    readme.write_text(text)
    print(f"written to {readme}")


if __name__ == "__main__":
    main()
