"""Validation data that are training data: told once, and not where they may be others."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

import fxstn
from fxstn import hp
from fxstn.bilevel.shared_data import MOST, training_data_in_validation
from tests.test_tune import data, mlp, sgd

DATA, OTHER = data(40), data(40, 1)
LOADER = DataLoader(DATA, 8)
LIST = list(LOADER)
FIRST, LAST = range(20), range(20, 40)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(zip(*DATA.tensors, strict=True))


class Shown(Dataset):
    """Examples of another data set, as a transform shows them."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


def of(dataset: Any, **settings: Any) -> DataLoader:
    return DataLoader(dataset, 8, **settings)


def told(train: Any, valid: Any, of_tune: bool) -> list[str]:
    """The warnings of shared data."""
    model = mlp()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if of_tune:
            run: Any = fxstn.tune(model, sgd(model), F.cross_entropy, train, valid, [hp.Dropout()])
        else:
            stn = fxstn.transform(model, [hp.Dropout()])
            run = fxstn.BilevelRunner(stn, F.cross_entropy, train, valid, progress=False)
    texts = [str(warning.message) for warning in caught if "valid_loader has training data" in str(warning.message)]
    assert [text for _, text in run.warnings] == texts
    return texts


@pytest.mark.parametrize("of_tune", [True, False])
@pytest.mark.parametrize(
    ("train", "valid"),
    [
        (LOADER, LOADER),
        (LIST, LIST),
        (LOADER, of(DATA)),
        (of(DATA, shuffle=True), of(DATA)),
        (of(TensorDataset(*DATA.tensors)), of(TensorDataset(*DATA.tensors))),
        (of(DATA), of(Subset(DATA, LAST))),
        (of(Subset(DATA, range(21))), of(Subset(DATA, torch.arange(20, 40)))),
        (of(Subset(Subset(DATA, LAST), FIRST)), of(Subset(DATA, LAST))),
        (of(DATA, sampler=SubsetRandomSampler(range(25))), of(DATA, sampler=SubsetRandomSampler(LAST))),
        (of(ConcatDataset([DATA, OTHER])), of(OTHER)),
    ],
)
def test_training_data_in_validation_are_told_once(train: Any, valid: Any, of_tune: bool) -> None:
    (text,) = told(train, valid, of_tune)
    assert "fxstn.hold_out" in text


@pytest.mark.parametrize("of_tune", [True, False])
@pytest.mark.parametrize(
    ("train", "valid"),
    [
        (of(DATA), of(OTHER)),
        tuple(map(of, fxstn.hold_out(DATA, 0.5))),
        tuple(map(of, random_split(DATA, [0.5, 0.5]))),
        (of(Subset(DATA, FIRST)), of(Subset(copy.copy(DATA), LAST))),
        (of(Subset(Shown(DATA), FIRST)), of(Subset(DATA, LAST))),
        (of(Shown(Subset(DATA, FIRST))), of(Shown(Subset(DATA, LAST)))),
        (of(DATA, sampler=SubsetRandomSampler(FIRST)), of(DATA, sampler=SubsetRandomSampler(LAST))),
        (of(DATA, sampler=WeightedRandomSampler([1.0] * 20 + [0.0] * 20, 20)), of(Subset(DATA, LAST))),
        (DataLoader(DATA, batch_sampler=[list(FIRST)]), of(Subset(DATA, LAST))),
        (of(Stream()), of(Stream())),
        (of(ConcatDataset([Subset(DATA, FIRST), OTHER])), of(Subset(DATA, LAST))),
    ],
)
def test_other_examples_are_not_told(train: Any, valid: Any, of_tune: bool) -> None:
    assert not told(train, valid, of_tune)


def test_a_stream_may_have_other_examples_in_each_pass() -> None:
    loader = of(Stream())
    assert not told(loader, loader, of_tune=True)


def test_a_large_subset_is_not_compared() -> None:
    assert not training_data_in_validation(of(DATA), of(Subset(DATA, range(MOST + 1))))


def test_a_refit_on_all_data_is_not_told() -> None:
    model = mlp()
    train, valid = fxstn.hold_out(DATA, 0.5)
    loader = of(train)
    runner = fxstn.BilevelRunner(
        fxstn.transform(model, [hp.Dropout()]), F.cross_entropy, loader, of(valid), progress=False
    )
    runner.fit(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "valid_loader has training data")
        runner.refit(LOADER, epochs=1)
