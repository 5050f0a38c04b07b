"""hold_out: splits a data set in two, of which the held-out part shows its examples as evaluation does."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets.vision import StandardTransform, VisionDataset

from fxstn.ir.input_errors import is_number

Example = TypeVar("Example")
_TRANSFORMS = ("transform", "transforms")  # attributes that a data set applies to each example
_CLASSES = ("targets", "labels", "label")  # attributes, or columns, with the class of each example


@overload
def hold_out(
    dataset: Dataset[Example], size: float, *, transform: Callable[..., object] | str | None = "same",
    valid_dataset: Dataset[Example] | None = None, stratify: bool | Iterable[object] | None = None, seed: int = 0,
) -> tuple[Subset[Example], Subset[Example]]: ...  # fmt: skip
@overload
def hold_out(
    dataset: object, size: float, *, transform: Callable[..., object] | str | None = "same", valid_dataset: object = None,
    stratify: bool | Iterable[object] | None = None, seed: int = 0,
) -> tuple[Any, Any]: ...  # fmt: skip
def hold_out(
    dataset: Any, size: float, *, transform: Callable[..., object] | str | None = "same", valid_dataset: Any = None,
    stratify: bool | Iterable[object] | None = None, seed: int = 0,
) -> tuple[Any, Any]:  # fmt: skip
    """(training part, held-out part) of a data set, which itself is not changed.

    dataset: anything with a length and an index. `Subset`, `ConcatDataset` and other data sets in an attribute `dataset` are
        looked into. The parts are `Subset`s; those of Hugging Face's data sets are such data sets.
    size: of the held-out part, a share in (0, 1) or a number of examples.
    transform: what the held-out part applies in place of the data set's attribute `transform` (`transforms` where it has a
        joint one of inputs and targets); None for nothing, "same" for the data set's own. A `target_transform` stays.
    valid_dataset: the same examples in the same order as evaluation shows them, for data sets without such an attribute.
    stratify: whether each class has its share in both parts, up to one example. None: where `targets`, `labels` or a tensor of
        a TensorDataset are classes. Or the class of each example.
    seed: a whole number, of the split, which depends on nothing else: not on the global generator, nor on the process.

    Both parts are in random order, so that batches without shuffling are mixed, too. Raises TypeError for what has no length
    or no index, and ValueError for a size that leaves a part empty, for a transform that has no place, and for
    stratify=True without classes.
    """
    if not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise ValueError(f"hold_out: seed={seed!r} must be a whole number, 0 or more, below 2**63")
    if transform not in ("same", None) and not callable(transform):
        raise TypeError(f"hold_out: transform={transform!r} must be a function of an example, None or 'same'")
    _refuse_tensors(dataset)
    count = _length(dataset)
    chosen, others = _split(_classes(dataset, stratify, count), _number(size, count), seed)
    if valid_dataset is not None:
        if transform != "same":
            raise ValueError("hold_out: valid_dataset shows its examples by itself; pass it or transform, not both")
        if _length(valid_dataset, "valid_dataset") != count:
            raise ValueError(
                f"hold_out: valid_dataset has {len(valid_dataset)} examples and dataset has {count}; both must hold the same "
                "examples in the same order"
            )
    elif transform == "same":
        valid_dataset = dataset
    else:
        valid_dataset = _with_transform(dataset, transform, "dataset")
    return _part(dataset, others), _part(valid_dataset, chosen)


def _refuse_tensors(dataset: object) -> None:
    """Raises TypeError for (inputs, targets), which has the length and the index of a data set with an example for each."""
    if not isinstance(dataset, (tuple, list)) or not all(isinstance(part, Tensor) and part.dim() for part in dataset):
        return
    lengths = {len(part) for part in dataset}
    if 1 < len(dataset) < 5 and len(lengths) == 1 and lengths.pop() > len(dataset):
        raise TypeError(
            f"hold_out: dataset is a {type(dataset).__name__} of {len(dataset)} tensors, each with {len(dataset[0])} examples; "
            "give TensorDataset(inputs, targets)"
        )


def _length(dataset: Any, name: str = "dataset") -> int:
    """The number of examples. Raises TypeError where there is no length or no index."""
    indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, (IterableDataset, Mapping)) or not indexed:
        raise TypeError(
            f"hold_out: {name} is of type {type(dataset).__name__}, but needs a length and an index of examples; pass the data "
            "set of a loader, one split of a dict of them, or split the files that an iterable data set reads"
        )
    return len(dataset)


def _number(size: float, count: int) -> int:
    """The number of examples that a size is."""
    whole = isinstance(size, Integral)
    if not is_number(size) or not (whole or 0 < size < 1):
        raise ValueError(f"hold_out: size={size!r} must be a share between 0 and 1, or a number of examples")
    number = int(size) if whole else round(float(size) * count)
    if not 0 < number < count:
        raise ValueError(
            f"hold_out: size={size} of {count} examples leaves {min(max(number, 0), count)} for validation and "
            f"{min(max(count - number, 0), count)} for training; both need at least one"
        )
    return number


def _split(classes: Tensor, number: int, seed: int) -> tuple[list[int], list[int]]:
    """(indices of so many examples, those of the others), in random order.

    classes: (examples,) whole numbers from 0.

    The examples stand in a row, class after class, and are chosen at equal distances from a random start (systematic
    sampling). So each has the same probability, and each class its share, rounded up or down.
    """
    generator, count = torch.Generator().manual_seed(int(seed)), len(classes)
    shuffled = torch.randperm(count, generator=generator)
    ranks = torch.randperm(int(classes.max()) + 1, generator=generator)
    row = shuffled[torch.argsort(ranks[classes[shuffled]], stable=True)]
    start = torch.randint(count, (), generator=generator)
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[row[(torch.arange(number) * count + start) // number]] = True
    return shuffled[chosen[shuffled]].tolist(), shuffled[~chosen[shuffled]].tolist()


# Classes


def _classes(dataset: Any, stratify: bool | Iterable[object] | None, count: int) -> Tensor:
    """(examples,) the class of each example as a number from 0; 0 for all where they are not told apart."""
    one = torch.zeros(count, dtype=torch.long)
    if stratify is False:
        return one
    if stratify is None or stratify is True:
        classes = known_classes(dataset)
        if classes is None and stratify:
            raise ValueError(
                f"hold_out: stratify=True, but {type(dataset).__name__} has no classes in `targets` or `labels`; pass "
                "stratify=[the class of each example]"
            )
    else:
        classes = _as_classes(stratify, count)
        if classes is None:
            raise ValueError(f"hold_out: stratify must hold {count} whole numbers or names, the class of each example")
    if classes is None:
        return one
    numbers = {value: i for i, value in enumerate(dict.fromkeys(classes))}
    return torch.tensor([numbers[value] for value in classes])


def known_classes(dataset: Any) -> list[object] | None:
    """The class of each example, where a data set tells it."""
    if isinstance(dataset, Subset):
        inner = known_classes(dataset.dataset)
        return None if inner is None else [inner[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [known_classes(part) for part in dataset.datasets]
        return None if None in parts else [value for part in parts for value in part or ()]
    if isinstance(dataset, TensorDataset):
        candidates = list(dataset.tensors[1:])
    elif _is_hugging_face(dataset):
        plain = dataset.with_format(None)
        candidates = [plain[name] for name in _CLASSES if name in plain.column_names]
    else:
        candidates = [getattr(dataset, name) for name in _CLASSES if hasattr(dataset, name)]
    lists = (_as_classes(values, len(dataset)) for values in candidates)
    return next((values for values in lists if values is not None), None)


def _as_classes(values: Any, count: int) -> list[object] | None:
    """A list of whole numbers or names, one per example; None where the values are no such thing."""
    try:
        values = values.tolist() if hasattr(values, "tolist") else list(values)
        classes: list[object] = [value if isinstance(value, str) else operator.index(value) for value in values]
    except TypeError:
        return None
    return classes if len(classes) == count else None


# Parts


def _is_hugging_face(dataset: object) -> bool:
    return all(hasattr(dataset, name) for name in ("select", "with_transform", "with_format", "column_names"))


def _part(dataset: Any, indices: list[int]) -> Any:
    return dataset.select(indices) if _is_hugging_face(dataset) else Subset(dataset, indices)


def _inner(dataset: object) -> Any:
    """The data set that another one reads; None where it reads none."""
    inner = getattr(dataset, "dataset", None)
    return inner if isinstance(inner, Dataset) or _is_hugging_face(inner) else None


def _has_transform(dataset: Any) -> bool:
    """Whether a data set, or one inside it, applies a transform."""
    if _is_hugging_face(dataset):
        return bool(dataset.format["type"] == "custom")
    if isinstance(dataset, ConcatDataset):
        return any(map(_has_transform, dataset.datasets))
    own = any(getattr(dataset, name, None) is not None for name in _TRANSFORMS)
    return own or (_inner(dataset) is not None and _has_transform(_inner(dataset)))


def _with_transform(dataset: Any, transform: object, path: str) -> Any:
    """A shallow copy of a data set that applies another transform: the outermost one that it applies is replaced.

    Raises ValueError for a data set that has no place for it.
    """
    if _is_hugging_face(dataset):
        return dataset.with_format(None) if transform is None else dataset.with_transform(transform)
    names = [name for name in _TRANSFORMS if hasattr(dataset, name)]
    inner = _inner(dataset)
    result = copy.copy(dataset)
    if names and (any(getattr(dataset, name) is not None for name in names) or not _has_transform(inner)):
        for name, value in _replacements(dataset, names, transform).items():
            setattr(result, name, value)
    elif inner is not None:
        result.dataset = _with_transform(inner, transform, f"{path}.dataset")
    elif isinstance(dataset, ConcatDataset):
        parts = enumerate(dataset.datasets)
        result.datasets = [_with_transform(part, transform, f"{path}.datasets[{i}]") for i, part in parts]
    else:
        raise ValueError(
            f"hold_out: {path} is of type {type(dataset).__name__}, which has no attribute `transform` to replace; leave "
            "transform out, or pass valid_dataset, the same examples as evaluation shows them"
        )
    return result


def _replacements(dataset: Any, names: list[str], transform: Any) -> dict[str, object]:
    """{attribute: value} of a data set that applies another transform.

    torchvision's data sets read either `transform` and `target_transform`, or `transforms`, which combines the two.
    """
    if not isinstance(dataset, VisionDataset):
        return dict.fromkeys([name for name in names if getattr(dataset, name) is not None] or names[:1], transform)
    if dataset.transforms is not None and not isinstance(dataset.transforms, StandardTransform):
        return {"transforms": transform}
    of_target = dataset.target_transform
    neither = transform is None and of_target is None
    return {
        "transform": transform,
        "target_transform": of_target,
        "transforms": None if neither else StandardTransform(transform, of_target),
    }
