"""Ridge regression, where the best weight decay is known in closed form: do the three methods find it?

L_T(λ, w) = mean squared error + ½ λ ‖w‖² on 60 examples, L_V = mean squared error on 200 others. The inner problem is
quadratic, so w*(λ) solves (2/n XᵀX + λI) w = 2/n Xᵀy, and the best λ is a one-dimensional search. Every method starts
from three λ within two decades of it. Writes a JSON file and a figure.

    python benchmarks/ridge.py --data-root DIR      # diabetes alone where neither --data-root nor FXSTN_DATA is set
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import fxstn
from fxstn import hp

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("delta", "centered", "stn")
# Split seeds: of the seeds 0 to 7, the one whose closed-form optimum is sharpest in log λ. Under some of the others the
# validation loss has no interior minimum at all (diabetes 6; concrete 0 and 3).
SPLITS = {"diabetes": 3, "concrete": 4, "wine-quality-red": 7}
# Starts, as multiples of the optimum. From 0.01 times it, diabetes did not arrive (λ fell to the lower end) with these
# settings, the other two did: there λ moves the weights so little that ε's noise at σ = 0.05 may hide the response.
STARTS = (0.1, 10.0, 100.0)
TRAIN_EXAMPLES, VALID_EXAMPLES = 60, 200


@dataclass(frozen=True)
class Problem:
    """One data set, split; float64. X: (n, d), y: (n, 1), standardised by the training part's mean and deviation."""

    name: str
    X: Tensor
    y: Tensor
    X_valid: Tensor
    y_valid: Tensor


@dataclass(frozen=True)
class Settings:
    """How a run trains. σ = scale is fixed, and small against the curvature of log λ in the unconstrained coordinate.

    One epoch is train_steps full-batch steps of w₀ and of Θ (Adam) and, after warmup_epochs, one of λ (Adam). A batch
    holds the training set `copies` times, each row with an ε of its own: L_T is the same, but the noise of Θ's gradient,
    1/σ times its signal per row, is averaged. phases: (epochs, factor on all learning rates), in turn, after the warm-up,
    which has the first factor.
    """

    scale: float = 0.05
    low: float = 1e-4
    high: float = 1e3
    copies: int = 256
    valid_copies: int = 64
    train_steps: int = 10
    warmup_epochs: int = 60
    phases: tuple[tuple[int, float], ...] = ((80, 1.0), (50, 0.5), (50, 0.2), (40, 0.1))
    lr: float = 0.02
    response_lr: float = 0.005
    hyper_lr: float = 0.05
    hyper_betas: tuple[float, float] = (0.9, 0.99)


# The data


def load_arrays(name: str, data_root: str | Path | None) -> tuple[np.ndarray, np.ndarray]:
    """X (n, d) and y (n,) of a data set: scikit-learn's diabetes, or data_root/uci/NAME.npz.

    Raises FileNotFoundError where a UCI set is asked for and there is no such file or no data_root.
    """
    if name == "diabetes":
        from sklearn.datasets import load_diabetes

        return load_diabetes(return_X_y=True)
    if data_root is None:
        raise FileNotFoundError(f"{name} needs --data-root DIR or the variable FXSTN_DATA, with DIR/uci/{name}.npz")
    with np.load(Path(data_root) / "uci" / f"{name}.npz") as arrays:
        return arrays["X"], arrays["y"].reshape(-1)


def load_problem(name: str, data_root: str | Path | None = None, seed: int | None = None) -> Problem:
    """A data set, shuffled by seed (None: the one in SPLITS), split and standardised. Raises as `load_arrays`."""
    X, y = load_arrays(name, data_root)
    order = np.random.default_rng(SPLITS[name] if seed is None else seed).permutation(len(y))
    train, valid = order[:TRAIN_EXAMPLES], order[TRAIN_EXAMPLES : TRAIN_EXAMPLES + VALID_EXAMPLES]
    X = (X - X[train].mean(0)) / X[train].std(0)
    y = ((y - y[train].mean()) / y[train].std())[:, None]
    return Problem(name, *(torch.tensor(values) for values in (X[train], y[train], X[valid], y[valid])))


# The closed form


def hessian(problem: Problem, weight_decay: float) -> Tensor:
    """∂²L_T/∂w² = 2/n XᵀX + λI, (d, d)."""
    n, d = problem.X.shape
    return 2 / n * problem.X.T @ problem.X + weight_decay * torch.eye(d, dtype=problem.X.dtype)


def best_weights(problem: Problem, weight_decay: float) -> Tensor:
    """w*(λ), (d,): the minimum of the inner objective."""
    target = 2 / len(problem.X) * problem.X.T @ problem.y
    return torch.linalg.solve(hessian(problem, weight_decay), target).squeeze(1)


def best_valid_loss(problem: Problem, log_weight_decay: float) -> float:
    """L_V at w*(λ), λ = exp(log_weight_decay)."""
    output = problem.X_valid @ best_weights(problem, math.exp(log_weight_decay))
    return (output - problem.y_valid.squeeze(1)).square().mean().item()


def golden_section(function: Callable[[float], float], low: float, high: float, width: float = 1e-9) -> float:
    """Place of the minimum of a unimodal function on [low, high], to `width`."""
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > width:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if function(left) < function(right):
            high = right
        else:
            low = left
    return (low + high) / 2


def optimal_weight_decay(problem: Problem, low: float = 1e-5, high: float = 1e4, points: int = 400) -> float:
    """The λ of the lowest validation loss at w*(λ): a grid in log λ, then golden section around its best point.

    Raises ValueError when the best point is an end of the grid: then the split has no interior optimum.
    """
    grid = np.linspace(math.log(low), math.log(high), points)
    loss = partial(best_valid_loss, problem)
    best = min(range(points), key=lambda i: loss(grid[i]))
    if best in (0, points - 1):
        raise ValueError(f"{problem.name}: the validation loss has no minimum inside [{low:g}, {high:g}]")
    return math.exp(golden_section(loss, grid[best - 1], grid[best + 1]))


# The runs


def full_batches(X: Tensor, y: Tensor, copies: int, batches: int) -> DataLoader[Any]:
    """A loader of `batches` equal float32 batches, each the whole set `copies` times."""
    dataset = TensorDataset(X.float().repeat(copies, 1), y.float().repeat(copies, 1))
    return DataLoader(dataset, batch_size=None, sampler=[slice(None)] * batches)


def make_runner(problem: Problem, method: str, start: float, settings: Settings) -> fxstn.BilevelRunner:
    """A runner that tunes the weight decay of a linear model from λ = start."""
    model = nn.Linear(problem.X.shape[1], 1, bias=False)
    spec = hp.WeightDecay("*", init=start, low=settings.low, high=settings.high, scale=settings.scale)
    adam = partial(torch.optim.Adam, fused=True)
    return fxstn.BilevelRunner(
        fxstn.transform(model, [spec], method=method, response="structured"),
        nn.MSELoss(),
        full_batches(problem.X, problem.y, settings.copies, settings.train_steps),
        full_batches(problem.X_valid, problem.y_valid, settings.valid_copies, 1),
        optimizer=partial(adam, lr=settings.lr),
        response=fxstn.ResponseSettings(optimizer=partial(adam, lr=settings.response_lr), every=1, widening=1.0),
        hyper=fxstn.HyperSettings(
            optimizer=partial(adam, lr=settings.hyper_lr, betas=settings.hyper_betas),
            train_steps=settings.train_steps,
            inner_correction=0.0,
            warmup_epochs=settings.warmup_epochs,
        ),
        progress=False,
    )


def tune(problem: Problem, method: str, start: float, settings: Settings | None = None, seed: int = 0) -> list[float]:
    """λ after each epoch of one run from λ = start. Torch's global generator is left as it was."""
    settings = settings or Settings()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        runner = make_runner(problem, method, start, settings)
        groups = [group for optimizer in runner.optimizers.values() for group in optimizer.param_groups]
        rates = [group["lr"] for group in groups]
        done = settings.warmup_epochs
        for epochs, factor in settings.phases:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = factor * rate
            done += epochs
            runner.fit(done)
    (name,) = runner.stn.hparams.names
    return runner.history[name]


def thinned(values: list[float], points: int = 100) -> list[tuple[int, float]]:
    """At most `points` pairs (epoch from 0, value), the first and the last among them."""
    chosen = sorted(set(np.linspace(0, len(values) - 1, points).round().astype(int).tolist()))
    return [(i, float(f"{values[i]:.5g}")) for i in chosen]


def run(problem: Problem, method: str, factor: float, optimum: float, seed: int) -> dict[str, Any]:
    """One run from λ = factor × optimum, as a row of the results; trajectory: pairs (epoch, λ), the start included."""
    torch.set_num_threads(1)
    start = factor * optimum
    trajectory = [start, *tune(problem, method, start, seed=seed)]
    return {
        "method": method,
        "start_over_optimum": factor,
        "final": trajectory[-1],
        "log_error": math.log(trajectory[-1] / optimum),
        "trajectory": thinned(trajectory),
    }


def run_all(problems: list[Problem], seed: int, workers: int) -> dict[str, Any]:
    """Every method from every start on every problem, in `workers` processes. Returns the results by data set."""
    optima = {problem.name: optimal_weight_decay(problem) for problem in problems}
    rows: dict[str, list[dict[str, Any]]] = {problem.name: [] for problem in problems}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {
            pool.submit(run, problem, method, factor, optima[problem.name], seed): problem.name
            for problem in problems
            for method in METHODS
            for factor in STARTS
        }
        for future in tqdm(as_completed(futures), total=len(futures), unit="run"):
            rows[futures[future]].append(future.result())
    return {
        problem.name: {
            "split_seed": SPLITS[problem.name],
            "optimum": optima[problem.name],
            "optimal_valid_loss": best_valid_loss(problem, math.log(optima[problem.name])),
            "runs": sorted(
                rows[problem.name], key=lambda row: (METHODS.index(row["method"]), row["start_over_optimum"])
            ),
        }
        for problem in problems
    }


# The report


def summary(results: dict[str, Any]) -> str:
    """A table: data set, method, log(λ/optimum) at the end from each start."""
    heads = [f"from ×{factor:g}" for factor in STARTS]
    lines = [f"{'data set':18}{'method':10}" + "".join(f"{head:>12}" for head in heads) + "   log(λ / optimum)"]
    for name, result in results.items():
        for method in METHODS:
            errors = [row["log_error"] for row in result["runs"] if row["method"] == method]
            lines.append(f"{name:18}{method:10}" + "".join(f"{error:12.3f}" for error in errors))
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path, settings: Settings) -> None:
    """One panel per data set: λ on a logarithmic axis over training steps; a dashed line at the optimum."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    styles = {
        "stn": {"color": "#d95f02", "lw": 1.4, "label": "STN"},
        "centered": {"color": "#7fb8e6", "lw": 4.0, "label": "centered STN"},
        "delta": {"color": "#08306b", "lw": 1.4, "label": "Δ-STN"},
    }
    optimum = {"color": "black", "lw": 1.2, "ls": (0, (5, 3))}
    figure = Figure(figsize=(4.3 * len(results), 4.2), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    for axis, (name, result) in zip(axes, results.items(), strict=True):
        for method, style in styles.items():
            for row in (row for row in result["runs"] if row["method"] == method):
                epochs, values = zip(*row["trajectory"], strict=True)
                axis.plot([epoch * settings.train_steps for epoch in epochs], values, **style)
        axis.axhline(result["optimum"], **optimum)
        axis.axvspan(0, settings.warmup_epochs * settings.train_steps, color="black", alpha=0.05, lw=0)
        axis.set(title=f"{name}: optimum λ = {result['optimum']:.3g}", xlabel="training steps", yscale="log")
        axis.set_xlim(0, None)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("weight decay λ")
    handles = [Line2D([], [], **styles[method]) for method in METHODS]
    handles.append(Line2D([], [], **optimum, label="closed-form optimum"))
    handles.append(Line2D([], [], color="black", alpha=0.08, lw=8, label="warm-up, λ fixed"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default=os.environ.get("FXSTN_DATA"), metavar="DIR",
                        help="folder with uci/NAME.npz, keys X and y (default: the variable FXSTN_DATA)")  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the starts of w and Θ and of the noise (default 0)"
    )
    parser.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE",
                        help="where the results go (default: benchmarks/results, or out without data root)")  # fmt: skip
    parser.add_argument("--figure", type=Path, metavar="FILE",
                        help="where the figure goes (default: docs/results, or out without data root)")  # fmt: skip
    options = parser.parse_args(arguments)
    names = list(SPLITS) if options.data_root else ["diabetes"]
    options.json = options.json or ROOT / ("benchmarks/results" if options.data_root else "out") / "ridge.json"
    options.figure = options.figure or ROOT / ("docs/results" if options.data_root else "out") / "ridge.png"
    problems = [load_problem(name, options.data_root) for name in names]
    results = run_all(problems, options.seed, options.workers)
    settings = Settings()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": asdict(settings) | {"seed": options.seed}, "results": results}
    options.json.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    draw(results, options.figure, settings)
    print(summary(results))


if __name__ == "__main__":
    main()
