"""Small runs that the tests share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxstn
from fxstn import hp
from fxstn.bilevel.settings import GROUPS
from tests.nets import mlp

STARTS = [hp.Dropout("2", "5", init=0.3), hp.WeightDecay(shared=True)]


def dataset(n: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return TensorDataset(x, (x[:, :3] + 0.3 * torch.randn(n, 3, generator=generator)).argmax(1))


class Empty:
    """A loader whose passes have no batch."""

    def __iter__(self):
        return iter(())


def grouped(settings, **defaults):
    """Keywords of a runner. A group of settings may be a dict; it then has what the default group sets besides."""
    keywords = defaults | settings
    for kind in GROUPS:
        if isinstance(own := settings.get(kind.keyword, {}), dict):
            keywords[kind.keyword] = kind(**defaults.get(kind.keyword, {}) | own)
    return keywords


def make(out_dir=None, generator=True, train=40, seed=0, **settings):
    torch.manual_seed(seed)
    order = {"generator": torch.Generator().manual_seed(1)} if generator else {}
    other = {"generator": torch.Generator().manual_seed(2)} if generator else {}
    method = settings.pop("method", "delta")
    return fxstn.BilevelRunner(
        fxstn.transform(mlp(), settings.pop("hparams", STARTS), method=method),
        settings.pop("loss_fn", F.cross_entropy),
        DataLoader(dataset(train, 0), 8, shuffle=True, **order),
        DataLoader(dataset(30, 1), 8, shuffle=True, **other),
        **grouped(
            settings,
            metrics={"accuracy": fxstn.accuracy},
            progress=False,
            hyper={"train_steps": 2},
            checkpoints={"out_dir": out_dir},
        ),
    )


def without_times(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def same(a, b) -> bool:
    """Whether two structures of tensors, dicts, lists and numbers are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)
