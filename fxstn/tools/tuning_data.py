"""What `fxstn tune` trains on: a data set by name, a folder of images, or what a function of the user's returns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from fxstn.ir.input_errors import as_path
from fxstn.tools import data
from fxstn.tools.choices import DATA_SETS
from fxstn.tools.functions import is_function_name, named_function
from fxstn.tools.hold_out import hold_out, known_classes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's models expect
VALID = ("val", "valid", "validation")  # names of the folder of validation images
SHARE = 0.15  # of the examples, which is held out where there are no validation data
FORMS = "a data set, or (train, valid) or (train, valid, test) of data sets or loaders"


@dataclass(frozen=True)
class DataRequest:
    """What the command line says about data.

    name: one of DATA_SETS, a folder, or package.module:function.
    image_size: pixels; of data sets by name and of folders.
    train_size, valid_size: numbers of examples. None: all, and `SHARE` of them (500 each of the digits).
    classes: None: what the data say.
    workers: processes that load images of a folder, or of data sets that a function returns.
    root: of torchvision's data.
    """

    name: str
    image_size: int = 32
    train_size: int | None = None
    valid_size: int | None = None
    batch_size: int = 64
    seed: int = 0
    classes: int | None = None
    workers: int = 0
    root: str | None = None


@dataclass(frozen=True)
class TuningData:
    """Loaders, which yield (inputs, class).

    test: None where there are no test data.
    everything: of training and validation data, for a refit; None where these are no data sets.
    classes: the number of them.
    """

    train: Iterable[object]
    valid: Iterable[object]
    test: Iterable[object] | None
    everything: DataLoader | None
    classes: int


def load_tuning_data(request: DataRequest) -> TuningData:
    """The data of a request. Raises ValueError where there are none such, ImportError for the digits without scikit-learn."""
    name = request.name
    if name in DATA_SETS:
        split = data.load(name, request.image_size, request.train_size, request.valid_size, request.seed, request.root)
        return _loaders([split.train, split.valid, split.test], request, split.classes)
    if (folder := as_path(name, "--data")).is_dir():
        return _loaders(_sized(_image_folders(folder, request.image_size), request), request)
    if is_function_name(name):
        return _loaders(_sized(_returned(name), request), request)
    raise ValueError(
        f"--data {name!r} is neither one of {', '.join(DATA_SETS)}, nor a folder that exists, nor package.module:function"
    )


# Sources


def _image_folders(folder: Path, size: int) -> list[Any]:
    """[all images], or [train, valid] or more of them: torchvision's ImageFolder, scaled to a middle square.

    A sub-folder is a class. Where there is train/, val/ and test/ beside it are read, if they are there.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    steps = [v2.ToImage(), v2.Resize(size), v2.CenterCrop(size), v2.ToDtype(torch.float32, scale=True)]
    transform = v2.Compose([*steps, v2.Normalize(MEAN, STD)])
    parts = [folder]
    if (folder / "train").is_dir():
        valid = [folder / part for part in VALID if (folder / part).is_dir()][:1]
        test = [folder / "test"] if valid and (folder / "test").is_dir() else []
        parts = [folder / "train", *valid, *test]
    try:
        result = [ImageFolder(str(part), transform) for part in parts]
    except FileNotFoundError as error:
        raise ValueError(f"--data {str(folder)!r} needs a sub-folder of images for each class: {error}") from error
    for part, images in zip(parts, result, strict=True):
        if odd := set(images.classes) ^ set(result[0].classes):
            raise ValueError(
                f"{parts[0]} and {part} must have the same classes, but {sorted(odd)[0]!r} is in one alone"
            )
    return result


def _returned(name: str) -> list[Any]:
    """[all], [train, valid] or [train, valid, test] of a function of the user's."""
    result = named_function(name)()
    parts = list(result) if isinstance(result, tuple) else [result]
    right = 1 <= len(parts) <= 3 and (len(parts) > 1 or _is_data_set(result))
    if not right or not all(hasattr(part, "__iter__") or _is_data_set(part) for part in parts):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise ValueError(f"--data {name} must return {FORMS}; it returns {kinds}")
    return parts


def _is_data_set(value: object) -> bool:
    return hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, (list, dict))


# Parts


def _sized(parts: list[Any], request: DataRequest) -> list[Any]:
    """Data sets of the sizes that are wanted. Validation data are held out, class by class, where there are none."""
    if len(parts) == 1:
        parts = list(hold_out(parts[0], request.valid_size or SHARE, seed=request.seed))
    elif request.valid_size is not None:
        parts[1] = _some(parts[1], request.valid_size, "--valid-size", request.seed)
    if request.train_size is not None:
        parts[0] = _some(parts[0], request.train_size, "--train-size", request.seed)
    return parts


def _some(part: Any, size: int, option: str, seed: int) -> Any:
    """So many examples of a data set, class by class."""
    if not _is_data_set(part):
        raise ValueError(f"{option} is for data sets, and these are {type(part).__name__}; leave it out")
    if size > len(part):
        raise ValueError(f"{option} {size} is more than the {len(part)} examples that there are")
    return part if size == len(part) else hold_out(part, size, seed=seed)[1]


def _loaders(parts: list[Any], request: DataRequest, classes: int | None = None) -> TuningData:
    """The loaders of two or three parts."""
    classes = request.classes or classes or _number_of_classes(parts[:2])
    if classes is None:
        raise ValueError(f"--data {request.name} does not say how many classes it has; add --num-classes N")
    for part, what in zip(parts, ("training", "validation", "test"), strict=False):
        if _is_data_set(part) and not len(part):
            raise ValueError(f"--data {request.name}: the {what} data are empty; give at least one example")
    sets: list[Any] = [part if _is_data_set(part) else getattr(part, "dataset", None) for part in parts[:2]]
    everything = None
    if all(_is_data_set(part) for part in sets):
        everything = _loader(ConcatDataset(sets), request, 0, parts[0])
    train, valid = (_loader(part, request, number, part) for number, part in enumerate(parts[:2]))
    test = None
    if len(parts) == 3:
        test = DataLoader(parts[2], 256, num_workers=request.workers) if _is_data_set(parts[2]) else parts[2]
    return TuningData(train, valid, test, everything, classes)


def _loader(part: Any, request: DataRequest, number: int, like: Any) -> Any:
    """Shuffled batches of a data set; a loader stays as it is.

    like: where it is a loader, the batches are collated as its are.
    """
    if not _is_data_set(part):
        return part
    collate = like.collate_fn if isinstance(like, DataLoader) else None
    return data.loader(part, request.batch_size, request.seed + number, request.workers, collate)


def _number_of_classes(parts: list[Any]) -> int | None:
    """As the data sets tell; None where they do not."""
    for part in parts:
        inner: Any = part
        while inner is not None:
            if isinstance(getattr(inner, "classes", None), (list, tuple)):
                return len(inner.classes)
            inner = getattr(inner, "dataset", None)
    sets = [part if _is_data_set(part) else getattr(part, "dataset", None) for part in parts]
    classes = [value for part in sets if isinstance(part, Dataset) for value in known_classes(part) or ()]
    numbers = [value for value in classes if isinstance(value, int)]
    return 1 + max(numbers) if numbers and len(numbers) == len(classes) else None
