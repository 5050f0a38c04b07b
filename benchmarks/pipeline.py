"""docs/concepts/pipeline.svg: model → graph → pushforward → runner, from the output of a run.

    python -m benchmarks.pipeline     # seconds on one core; needs scikit-learn

Code stands as it is emitted, less prefixes of modules, `del` marks and lines that only read weights.
"""

from __future__ import annotations

import inspect
import re
from html import escape
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxstn
from fxstn import hp
from fxstn.tools.charts import Scale

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "concepts" / "pipeline.svg"
PANEL, GAP, LINE, MARGIN = 490, 50, 17, 14  # pixels; a panel is as wide as 64 characters
WIDTH, EPOCHS = 2 * PANEL + GAP, 60
OWN = "|".join(path.stem for path in sorted((ROOT / "fxstn" / "ops").glob("*.py"), reverse=True))
PREFIXES = re.compile(rf"fxstn_ops_({OWN})_|torch\._C\._nn\.|torch\.nn\.functional\.|torch\.ops\.aten\.")
SANS = 'system-ui, "DejaVu Sans", Arial, sans-serif'
STYLE = f"""text {{ font: 12px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; fill: #1c2733; white-space: pre }}
.head {{ font: bold 15px {SANS} }} .note {{ font: 12px {SANS}; fill: #55626f }} .tangent {{ fill: #a34400 }}
.strength {{ fill: #1768b5 }} .panel {{ fill: #f6f8fa; stroke: #c5ced8 }}
.arrow {{ stroke: #55626f; stroke-width: 2; fill: none }} .line {{ fill: none; stroke-width: 2 }} .axis {{ stroke: #c5ced8 }}"""
TIP = ("<marker id='tip' viewBox='0 0 8 8' refX='6' refY='4' markerWidth='6' markerHeight='6' orient='auto'>"
       "<path d='M0 0L8 4L0 8z' fill='#55626f'/></marker>")  # fmt: skip
SPOKEN = (
    "A model becomes a graph, then an emitted pushforward with the output and its tangent; the runner tunes with it."
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 128, bias=False)
        self.drop = nn.Dropout(0.5)
        self.fc2 = nn.Linear(128, 10, bias=False)

    def forward(self, x):
        h = torch.relu(self.fc1(x))
        return self.fc2(self.drop(h))


def emitted(code: str) -> list[str]:
    """Lines of an emitted forward."""
    lines = [PREFIXES.sub("", line.partition(";")[0].strip()) for line in code.splitlines()]
    kept = [line for line in lines if line and not re.search(r"= self\.model\.|= scales\[|^def ", line)]
    return [line.replace("(Ellipsis, 0)", "..., 0") for line in kept]


def text(lines: list[str], x: float, y: float) -> str:
    shown = []
    for number, line in enumerate(lines):
        look = "tangent" if re.match(r"d_|t_|scales|return \(", line) else "strength" if "strengths" in line else ""
        shown.append(f"<text class='{look}' x='{x}' y='{y + LINE * number}'>{escape(line)}</text>")
    return "".join(shown)


def panel(place: tuple[float, float], height: float, head: str, note: str, content: str) -> str:
    x, y = place
    return (f"<rect class='panel' x='{x}' y='{y}' width='{PANEL}' height='{height}' rx='6'/>"
            f"<text class='head' x='{x + MARGIN}' y='{y + 24}'>{escape(head)}</text>"
            f"<text class='note' x='{x + MARGIN}' y='{y + 42}'>{escape(note)}</text>{content}")  # fmt: skip


def curve(values: list[float], scale: Scale, x: float, y: float, size: tuple[float, float], color: str) -> str:
    points = " ".join(
        f"{x + size[0] * i / (len(values) - 1):.1f},{y + size[1] * (1 - scale.share(value)):.1f}"
        for i, value in enumerate(values)
    )
    return f"<polyline class='line' stroke='{color}' points='{points}'/>"


def curves(history: fxstn.History, x: float, y: float) -> str:
    """Dropout rate and validation loss over epochs, each on a scale of its own."""
    parts, size = [], (PANEL - 2 * MARGIN, 76)
    rate = [history.start["drop.dropout"], *history["drop.dropout"]]
    losses = history["valid_loss"]
    for name, values, color, top in (
        ("drop.dropout", rate, "#1768b5", y),
        ("validation loss", losses, "#a34400", y + 122),
    ):
        low, high = min(values), max(values)
        label = f"{name}: {values[0]:.3g} → {values[-1]:.3g}" + (
            f", lowest {low:.3g}" if name != "drop.dropout" else ""
        )
        parts.append(f"<text class='note' x='{x}' y='{top}'>{label}</text>")
        parts.append(f"<path class='axis' d='M{x} {top + 8 + size[1]}h{size[0]}'/>")
        parts.append(curve(values, Scale(low, high), x, top + 8, size, color))
    return "".join(parts)


def tuned() -> tuple[fxstn.SelfTuningNetwork, fxstn.History]:
    """The network of the picture, trained on 300 of scikit-learn's digits."""
    torch.manual_seed(0)
    images, classes = (torch.tensor(array) for array in load_digits(return_X_y=True))
    data = TensorDataset(images.float() / 16, classes)
    train, valid = fxstn.hold_out(torch.utils.data.Subset(data, range(500)), 0.4)
    stn = fxstn.transform(Net(), [hp.Dropout()])
    runner = fxstn.BilevelRunner(stn, F.cross_entropy, DataLoader(train, 50, shuffle=True), DataLoader(valid, 200),
                                 optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), progress=False)  # fmt: skip
    return stn, runner.fit(EPOCHS)


def main() -> None:
    stn, history = tuned()
    source = inspect.getsource(Net).rstrip().splitlines()
    plain, pushed = (emitted(stn.graph(name).code) for name in ("train", "pushforward"))
    right, top = PANEL + GAP, 68
    first = top + LINE * max(len(source), len(plain)) + 6
    second = max(top + LINE * len(pushed), top + 220) + 6
    low = first + GAP
    parts = [
        panel((0, 0), first, "nn.Module", "your model, as it is", text(source, MARGIN, top)),
        panel((right, 0), first, "graph", "fxstn.transform: strengths come from λ", text(plain, right + MARGIN, top)),
        panel((right, low), second, "pushforward", "emitted: y, and dy when λ moves and the weights follow",
              text(pushed, right + MARGIN, low + top)),
        panel((0, low), second, "runner", f"λ descends the validation loss while the weights train, {EPOCHS} epochs",
              curves(history, MARGIN, low + top)),
    ]  # fmt: skip
    arrows = [f"M{PANEL + 8} {first / 2}h{GAP - 18}", f"M{right + PANEL / 2} {first + 8}v{GAP - 18}",
              f"M{right - 8} {low + second / 2}h{18 - GAP}"]  # fmt: skip
    parts += [f"<path class='arrow' marker-end='url(#tip)' d='{path}'/>" for path in arrows]
    FILE.write_text(
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='-10 -10 {WIDTH + 20} {low + second + 20}' role='img'>"
        f"<title>From model to tuned run</title><desc>{SPOKEN}</desc><style>{STYLE}</style><defs>{TIP}</defs>"
        f"<rect x='-10' y='-10' width='{WIDTH + 20}' height='{low + second + 20}' fill='#fff'/>{''.join(parts)}</svg>\n",
        encoding="utf-8",
    )
    print(f"written to {FILE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
