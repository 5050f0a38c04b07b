"""How the overhead grows with the batch, the depth, the image and the number of hyperparameters.

    python -m benchmarks.scaling [--device cuda]

One axis at a time around resnet18, batch 32, 32×32; every point in a fresh process, ratios to plain training in the same
process. Writes benchmarks/results/scaling-DEVICE.json as it goes, and goes on where it stopped; `python -m benchmarks.tables`
plots it.
"""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from tqdm import tqdm

from benchmarks.overhead import RESULTS, one_process

VARIANTS = ("response", "schedule", "schedule-default")
BASE = {"model": "resnet18", "batch-size": 32, "image-size": 32, "tuned": "dropout"}
AXES: dict[str, tuple[str, list[Any]]] = {
    "batch size": ("batch-size", [8, 32, 128]),
    "depth": ("model", ["resnet18", "resnet34", "resnet50"]),
    "image size": ("image-size", [32, 64, 96]),
    "hyperparameters": ("tuned", [1, 10, 100, 1000]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds for each point")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    file = RESULTS / f"scaling-{re.sub('[^a-z0-9]+', '-', args.device)}.json"
    points: dict[str, list[dict[str, Any]]] = json.loads(file.read_text()) if file.exists() else {}
    todo = [(axis, key, value) for axis, (key, values) in AXES.items() for value in values]
    for axis, key, value in (bar := tqdm(todo, disable=None)):
        if any(point["at"] == value for point in points.get(axis, [])):
            continue
        bar.set_description(f"{axis} {value}")
        settings = BASE | {key: value}
        options = [str(part) for name, own in settings.items() if name != "model" for part in (f"--{name}", own)]
        options += ["--rounds", str(args.rounds), "--device", args.device, "--variants", *VARIANTS]
        rows = one_process(settings["model"], options)
        points.setdefault(axis, []).append(
            {"at": value, "torch": rows[0]["torch"], "device": rows[0]["device"]}
            | {row["variant"]: row["ratio"] for row in rows}
        )
        file.write_text(json.dumps(points, indent=1) + "\n")


if __name__ == "__main__":
    main()
