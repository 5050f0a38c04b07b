"""Validation data that are training data as well: seen from the loaders, without reading a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import cast

from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

MOST = 2**22  # indices that are compared
_ALL = (SequentialSampler, RandomSampler, DistributedSampler)  # samplers that reach every example
Part = tuple[object, list[int] | None]  # (a data set, the indices of the examples that are read); None: all of them


def training_data_in_validation(train_loader: object, valid_loader: object) -> list[str]:
    """A warning where two loaders are known to have examples in common; [] where they have none, or it cannot be told.

    It cannot be told of streams, nor of data sets of one's own that wrap another one: their examples may be others.
    """
    if train_loader is valid_loader:
        shares = _has_fixed_examples(train_loader)
    else:
        others = _parts(valid_loader)
        shares = any(_share(part, other) for part in _parts(train_loader) for other in others)
    return [
        "valid_loader has training data, where regularisation only does harm, so that λ turns it off: hold out other examples "
        "(fxstn.hold_out)"
    ] * shares


def _has_fixed_examples(loader: object) -> bool:
    """Whether each pass has the same examples: a stream may have others each time."""
    dataset = loader.dataset if isinstance(loader, DataLoader) else loader
    return isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset)


def _parts(loader: object) -> list[Part]:
    """The data sets that a DataLoader reads from; [] where it is none, or has a sampler that is not known."""
    if not isinstance(loader, DataLoader):
        return []
    batches = loader.batch_sampler
    sampler = loader.sampler if batches is None else batches.sampler if type(batches) is BatchSampler else None
    if isinstance(sampler, SubsetRandomSampler):
        return _within(loader.dataset, _whole_numbers(sampler.indices))
    return _within(loader.dataset, None) if isinstance(sampler, _ALL) else []


def _within(dataset: object, indices: list[int] | None) -> list[Part]:
    """The data sets within `Subset` and `ConcatDataset`."""
    if indices == []:
        return []
    if isinstance(dataset, Subset):
        own = _whole_numbers(dataset.indices)
        return _within(dataset.dataset, own if indices is None else [own[i] for i in indices if i < len(own)])
    if isinstance(dataset, ConcatDataset) and indices is None:
        return [part for inner in dataset.datasets for part in _within(inner, None)]
    return [] if isinstance(dataset, IterableDataset) else [(dataset, indices)]


def _whole_numbers(indices: object) -> list[int]:
    """Indices as Python's own numbers; [] where there are too many to compare."""
    if not isinstance(indices, Sized) or len(indices) > MOST:
        return []
    tolist = getattr(indices, "tolist", None)
    return list(tolist()) if tolist is not None else [int(index) for index in cast(Iterable[int], indices)]


def _share(one: Part, other: Part) -> bool:
    """Whether two parts have an example in common."""
    (a, own), (b, others) = one, other
    same = (
        isinstance(a, TensorDataset)
        and isinstance(b, TensorDataset)
        and list(map(id, a.tensors)) == list(map(id, b.tensors))
    )
    return (a is b or same) and (own is None or others is None or not set(own).isdisjoint(others))
