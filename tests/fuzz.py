"""Random mistakes in what a user writes: arguments, specs, loaders, files. Each is refused in fxstn's own words, or works.

A mistake is drawn by hypothesis and committed in a temporary folder. What comes out of it must be nothing, an error that a
`raise` statement of fxstn raises, or what the system says of a file, with its name.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from inspect import signature
from pathlib import Path
from types import TracebackType

import numpy
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxstn
from fxstn import hp
from fxstn.bilevel.run_settings import Settings
from fxstn.bilevel.settings import GROUPS
from tests.nets import mlp

PACKAGE = str(Path(fxstn.__file__).parent)
X, Y = torch.randn(24, 6, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
ALLOWED = (
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    OSError,
    RuntimeError,
)  # kinds that tell of a mistake


@cache
def _raises(path: str) -> list[tuple[int, int]]:
    """(first, last) line of every `raise` statement in a file."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    return [
        (node.lineno, node.end_lineno or node.lineno)
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and node.exc is not None
    ]


def raised_by_fxstn(error: BaseException) -> bool:
    """Whether a `raise` statement of fxstn raised an error."""
    trace: TracebackType | None = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    path = trace.tb_frame.f_code.co_filename
    return path.startswith(PACKAGE) and any(first <= trace.tb_lineno <= last for first, last in _raises(path))


def outcome(mistake: Callable[[Path], object], folder: Path) -> str:
    """The message that a mistake ends with; "" where it works. Raises AssertionError for an error of somebody else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            mistake(folder)
        except OfUser:
            return "raised by a function of the user's"
        except Exception as error:
            of_system = isinstance(error, OSError) and error.filename is not None
            ours = isinstance(error, ALLOWED) and str(error).strip() and raised_by_fxstn(error)
            if not (of_system or ours):
                raise AssertionError(f"not in fxstn's words: {type(error).__name__}: {error}") from error
            return str(error)
    return ""


# Values

JUNK: dict[str, Callable[[], object]] = {
    "None": lambda: None, "True": lambda: True, "False": lambda: False, "0": lambda: 0, "1": lambda: 1, "-1": lambda: -1,
    "2": lambda: 2, "3.0": lambda: 3.0, "0.5": lambda: 0.5, "-0.5": lambda: -0.5, "1e300": lambda: 1e300,
    "10**30": lambda: 10**30,
        "nan": lambda: float("nan"), "inf": lambda: float("inf"), "-inf": lambda: float("-inf"), "1j": lambda: 1j,
    "''": lambda: "", "'x'": lambda: "x", "'1'": lambda: "1", "'cuda'": lambda: "cuda", "bytes": lambda: b"x",
    "[]": list, "[1]": lambda: [1], "()": tuple, "(1, 2)": lambda: (1, 2), "{}": dict, "{'x': 1}": lambda: {"x": 1},
    "{1: 2}": lambda: {1: 2}, "{'x': f}": lambda: {"x": lambda *values: 1.0}, "set": set, "object": object, "int": lambda: int,
    "nn.Linear": lambda: nn.Linear, "module": lambda: nn.Linear(2, 2), "f()": lambda: lambda: 1,
    "f(x)": lambda: lambda x: x, "f(*)": lambda: lambda *x, **y: None, "f raises": lambda: _fails,
    "0-d": lambda: torch.tensor(1.0),
        "tensor": lambda: torch.ones(3), "numpy 1": lambda: numpy.float64(1.0), "numpy int": lambda: numpy.int64(2),
    "array": lambda: numpy.ones(2), "dtype": lambda: torch.float32, "float16": lambda: torch.float16,
    "generator": lambda: (x for x in ()), "Path": lambda: Path("x"), 
    "optimizer": lambda: torch.optim.SGD([nn.Parameter(torch.ones(2))]),
        "SGD": lambda: torch.optim.SGD, "partial": lambda: partial(torch.optim.SGD, lr=0.1), "long": lambda: "x" * 300,
    "NUL": lambda: "a\0b", "range": lambda: range(3), "Exception": lambda: ValueError("x"), "ellipsis": lambda: ...,
}  # fmt: skip
values = st.sampled_from(sorted(JUNK))


class OfUser(Exception):
    """What a function of the user's raises; it may pass."""


def _fails(*values: object, **named: object) -> object:
    raise OfUser


# Mistakes


def _loader(x: object = X, y: object = Y, **settings: object) -> DataLoader:
    return DataLoader(TensorDataset(x, y), 8, **settings)  # type: ignore[arg-type]


def runner(folder: Path | None = None, **replaced: object) -> fxstn.BilevelRunner:
    """A small run, with some of its arguments replaced."""
    arguments: dict[str, object] = {
        "stn": None, "loss_fn": F.cross_entropy, "train_loader": _loader(), "valid_loader": _loader(),
        "progress": False, "hyper": fxstn.HyperSettings(train_steps=1),
        "checkpoints": fxstn.CheckpointSettings(out_dir=folder),
    } | replaced  # fmt: skip
    first = [arguments.pop(name) for name in ("stn", "loss_fn", "train_loader", "valid_loader")]
    if "stn" not in replaced:
        first[0] = fxstn.transform(mlp(), [hp.Dropout("2", init=0.3), hp.WeightDecay(shared=True)])
    return fxstn.BilevelRunner(*first, **arguments)  # type: ignore[arg-type]


def setting(name: str, value: str) -> Callable[[Path], object]:
    """One argument of the runner is something else."""

    def commit(folder: Path) -> object:
        given = JUNK[value]()
        group, _, field = name.rpartition(".")
        if field == "valid_steps" and isinstance(given, (int, float)) and given > 4:
            return None  # takes as long as it says
        if field == "out_dir" and isinstance(given, (str, Path)):
            given = folder / given
        if group:
            kind = next(kind for kind in GROUPS if kind.keyword == group)
            return runner(None, **{group: kind(**{field: given})}).fit(1)
        return runner(None, **{name: given}).fit(1)

    return commit


SETTINGS = [*Settings().by_path(), *(kind.keyword for kind in GROUPS), "stn", "loss_fn", "train_loader", "valid_loader"]
CHOICES = ("init", "low", "high", "scale", "shared", "perturb", "where", "p")
SPECS: dict[str, type[hp.Spec]] = {
    name: kind for name in hp.__all__ if isinstance(kind := getattr(hp, name), type) and issubclass(kind, hp.Spec)
}


def specs(kind: str, changes: dict[str, str]) -> Callable[[Path], object]:
    """A spec with other keywords."""

    def commit(folder: Path) -> object:
        keywords = {name: JUNK[value]() for name, value in changes.items()}
        where = [keywords.pop("where", "2")]
        if SPECS[kind] is hp.Scalar:
            where = ["x", keywords.pop("init", 0.5), keywords.pop("low", 0.0), keywords.pop("high", 1.0)]
        elif not any(p.kind is p.VAR_POSITIONAL for p in signature(SPECS[kind]).parameters.values()):
            where = []
        spec = SPECS[kind](*where, **keywords)  # type: ignore[arg-type]
        stn = fxstn.transform(mlp(), [hp.WeightDecay(shared=True), spec])
        return runner(None, stn=stn, loss_fn=fxstn.cross_entropy).fit(1)

    return commit


def transform_argument(name: str, value: str) -> Callable[[Path], object]:
    """One argument of transform is something else."""

    def commit(folder: Path) -> object:
        given = JUNK[value]()
        if name == "model":
            return fxstn.transform(given)  # type: ignore[arg-type]
        stn = fxstn.transform(mlp(), **{name: given})  # type: ignore[arg-type]
        return runner(None, stn=stn).fit(1)

    return commit


TRANSFORM = ("model", "hparams", "example_inputs", "method", "response", "trace", "recompute", "statistics")


def batch_of(part: str, value: str, where: str) -> Callable[[Path], object]:
    """A loader yields something else, from its second batch on."""

    def commit(folder: Path) -> object:
        given = JUNK[value]()
        good = [(X[:8], Y[:8]), (X[8:16], Y[8:16])]
        bad = {"batch": given, "inputs": (given, Y[:8]), "target": (X[:8], given), "pair": (given, given)}[part]
        return runner(None, **{where: [good[0], bad, good[1]]}).fit(1)

    return commit


def shapes(x: tuple[int, ...], y: tuple[int, ...], kinds: tuple[str, str], where: str) -> Callable[[Path], object]:
    """A loader yields tensors of another shape or type."""

    def commit(folder: Path) -> object:
        inputs, target = (
            torch.zeros(shape, dtype=getattr(torch, kind)) for shape, kind in zip((x, y), kinds, strict=True)
        )
        return runner(None, **{where: [(X[:8], Y[:8]), (inputs, target)]}).fit(1)

    return commit


def call(method: str, value: str) -> Callable[[Path], object]:
    """A method of the runner gets something else."""

    def commit(folder: Path) -> object:
        run, given = runner(folder), JUNK[value]()
        if method in ("save", "load") and isinstance(given, (str, Path)):
            given = folder / given
        if method == "minutes":
            return run.fit(1, given)  # type: ignore[arg-type]
        if method == "epochs":
            large = isinstance(given, (int, float)) and given > 3
            return None if large else run.fit(given)  # type: ignore[arg-type]
        return getattr(run, method)(given)

    return commit


CALLS = ("epochs", "minutes", "save", "load", "evaluate")


def spoil(data: bytes, kind: str, at: float, byte: int) -> bytes:
    """The bytes of a file, cut, with one of them flipped, or with some inserted. at: the place, a share of the length."""
    place = int(at * (len(data) - 1))
    start, rest = data[:place], data[place:]
    after = {"cut": b"", "flip": bytes([rest[0] ^ byte]) + rest[1:], "insert": bytes([byte]) * 5 + rest}
    return start + after.get(kind, rest)


def damage(file: str, kind: str, at: float, byte: int) -> Callable[[Path], object]:
    """A file of a run is changed before the run goes on."""

    def commit(folder: Path) -> object:
        runner(folder).fit(1)
        path = folder / file
        data = b"{}" if kind == "text" else spoil(path.read_bytes(), kind, at, byte)
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind != "gone":
            path.write_bytes(data)
        return runner(folder).fit(2)

    return commit


def schedule(kind: str, at: float, byte: int) -> Callable[[Path], object]:
    """A schedule in JSON is changed before it is replayed."""

    def commit(folder: Path) -> object:
        run = runner(None)
        run.fit(2)
        path = folder / "schedule.json"
        run.history.schedule().to_json(path)
        path.write_bytes(spoil(path.read_bytes(), kind, at, byte))
        return runner(None, schedule=fxstn.Schedule.from_json(path)).fit(2)

    return commit


def _sizes() -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.sampled_from([0, 1, 3, 6, 8]), max_size=4).map(tuple)


def mistakes() -> st.SearchStrategy[tuple[str, tuple]]:
    """(name of a function above, its arguments)."""
    where = st.sampled_from(["train_loader", "valid_loader"])
    dtype = st.sampled_from(["float32", "float64", "int64", "bool", "complex64", "float16"])
    share, byte = st.floats(0, 1), st.integers(1, 255)
    return st.one_of(
        st.tuples(st.just("setting"), st.tuples(st.sampled_from(SETTINGS), values)),
        st.tuples(
            st.just("specs"),
            st.tuples(
                st.sampled_from(sorted(SPECS)), st.dictionaries(st.sampled_from(CHOICES), values, min_size=1, max_size=2)
            ),
        ),
        st.tuples(st.just("transform_argument"), st.tuples(st.sampled_from(TRANSFORM), values)),
        st.tuples(
            st.just("batch_of"), st.tuples(st.sampled_from(["batch", "inputs", "target", "pair"]), values, where)
        ),
        st.tuples(st.just("shapes"), st.tuples(_sizes(), _sizes(), st.tuples(dtype, dtype), where)),
        st.tuples(st.just("call"), st.tuples(st.sampled_from(CALLS), values)),
        st.tuples(
            st.just("damage"),
            st.tuples(
                st.sampled_from(["last.pt", "best.pt", "history.csv"]),
                st.sampled_from(["cut", "flip", "insert", "text", "folder", "gone"]), share, byte,
            ),
        ),
        st.tuples(st.just("schedule"), st.tuples(st.sampled_from(["cut", "flip", "insert"]), share, byte)),
    )  # fmt: skip


KINDS: dict[str, Callable[..., Callable[[Path], object]]] = {
    function.__name__: function
    for function in (setting, specs, transform_argument, batch_of, shapes, call, damage, schedule)
}


def committed(mistake: tuple[str, tuple], folder: Path) -> str:
    """`outcome` of a mistake from `mistakes`."""
    name, arguments = mistake
    return outcome(KINDS[name](*arguments), folder)


def everything() -> Iterator[tuple[str, tuple]]:
    """Every single argument with every value: what hypothesis draws from, in order."""
    for kind, names in (("setting", SETTINGS), ("transform_argument", TRANSFORM), ("call", CALLS)):
        for name in names:
            for value in sorted(JUNK):
                yield kind, (name, value)
