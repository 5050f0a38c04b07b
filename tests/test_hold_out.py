"""hold_out: the parts are disjoint, mixed and stratified; the held-out one alone shows the evaluation transform."""

from __future__ import annotations

import copy
import random

import numpy
import pytest
import torch
import torchvision
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, random_split
from torchvision.datasets import CIFAR10, FakeData, ImageFolder, VisionDataset
from torchvision.datasets.vision import StandardTransform

import fxstn


def twice(x):
    return 2 * x


def negative(x):
    return -x


class Numbers(Dataset):
    """Example i is `transform` of i."""

    def __init__(self, count=40, transform=twice, **attributes):
        self.count, self.transform = count, transform
        vars(self).update(attributes)

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return i if self.transform is None else self.transform(i)


class Reading(Dataset):
    """A data set round another one."""

    def __init__(self, dataset, transform=None):
        self.dataset, self.transform = dataset, transform

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        value = self.dataset[i]
        return value if self.transform is None else self.transform(value)


class Table:
    """As `datasets.Dataset` of Hugging Face: columns, and a transform of a batch of rows."""

    def __init__(self, columns, rows=None, transform=None):
        self.columns, self.transform = columns, transform
        self.rows = list(range(len(next(iter(columns.values()))))) if rows is None else rows

    column_names = property(lambda self: list(self.columns))
    format = property(lambda self: {"type": None if self.transform is None else "custom"})

    def with_transform(self, transform):
        return Table(self.columns, self.rows, transform)

    def with_format(self, type):
        assert type is None
        return Table(self.columns, self.rows)

    def select(self, indices):
        return Table(self.columns, [self.rows[i] for i in indices], self.transform)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        if isinstance(key, str):
            assert self.transform is None, "a column of what the transform makes of the rows"
            return [self.columns[key][i] for i in self.rows]
        row = {name: [values[self.rows[key]]] for name, values in self.columns.items()}
        return {name: values[0] for name, values in (self.transform or dict)(row).items()}


def contents(part):
    return [part[i] for i in range(len(part))]


def test_each_example_is_in_one_part_and_the_held_out_part_alone_has_the_evaluation_transform():
    dataset = Numbers()
    train, valid = fxstn.hold_out(dataset, 0.25, transform=negative)
    assert (len(train), len(valid)) == (30, 10)
    assert sorted([value // 2 for value in contents(train)] + [-value for value in contents(valid)]) == list(range(40))
    assert min(contents(train)) >= 0 >= max(contents(valid))
    assert dataset.transform is twice
    assert dataset[3] == 6
    assert contents(valid) != sorted(contents(valid), reverse=True)  # mixed, also without shuffling
    assert contents(train) != sorted(contents(train))


def test_the_data_sets_own_transform_stays_unless_another_one_or_none_is_passed():
    _, valid = fxstn.hold_out(Numbers(), 4)
    assert all(value == 2 * i for value, i in zip(contents(valid), valid.indices, strict=True))
    _, valid = fxstn.hold_out(Numbers(), 4, transform=None)
    assert contents(valid) == valid.indices


@pytest.mark.parametrize("place", ["transform", "transforms"])
def test_a_data_set_may_call_it_transforms(place):
    class Images(Numbers):
        def __getitem__(self, i):
            return getattr(self, place)(i)

    dataset = Images(**{"transform": None, place: twice})
    _, valid = fxstn.hold_out(dataset, 4, transform=negative)
    assert contents(valid) == [-i for i in valid.indices]


NESTED = {
    "subset": lambda: Subset(Numbers(80), range(20, 60)),
    "random split": lambda: random_split(Numbers(80), [40, 40])[0],
    "concatenation": lambda: Numbers(10) + Numbers(30),
    "subset of a concatenation": lambda: Subset(Numbers(10) + Numbers(50), range(40)),
    "wrapper without a transform": lambda: Reading(Reading(Numbers())),
}


@pytest.mark.parametrize("name", NESTED)
def test_data_sets_inside_others_get_the_transform_and_keep_their_own(name):
    dataset = NESTED[name]()
    before = contents(dataset)
    train, valid = fxstn.hold_out(dataset, 8, transform=negative)
    assert contents(train) == [before[i] for i in train.indices]
    assert contents(valid) == [-before[i] // 2 for i in valid.indices]
    assert contents(dataset) == before


def test_the_outermost_transform_is_replaced_and_what_comes_before_it_stays():
    _, valid = fxstn.hold_out(Reading(Numbers(), transform=str), 8, transform=negative)
    assert contents(valid) == [-2 * i for i in valid.indices]
    _, valid = fxstn.hold_out(Reading(Numbers(transform=None)), 8, transform=negative)
    assert contents(valid) == [-i for i in valid.indices]


# torchvision


class Joint(VisionDataset):
    """As torchvision's detection data sets: it reads `transforms` alone."""

    def __init__(self, **arguments):
        super().__init__(None, **arguments)

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return (i, i) if self.transforms is None else self.transforms(i, i)


def test_torchvisions_data_sets_by_example_keep_their_target_transform(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(6):
            (tmp_path / name / f"{i}.png").touch()
    folder = ImageFolder(str(tmp_path), lambda path: "train", lambda y: y + 10, loader=str)
    train, valid = fxstn.hold_out(folder, 4, transform=lambda path: "valid")
    assert sorted(contents(valid)) == [("valid", 10)] * 2 + [("valid", 11)] * 2
    assert {x for x, _ in contents(train)} == {"train"}
    assert folder[0] == ("train", 10)
    images = FakeData(10, (3, 4, 4), transform=torchvision.transforms.ToTensor())
    _, valid = fxstn.hold_out(images, 2, transform=torchvision.transforms.PILToTensor())
    assert {image.dtype for image, _ in contents(valid)} == {torch.uint8}
    assert images[0][0].dtype == torch.float32


def test_torchvisions_data_sets_with_joint_transforms():
    train, valid = fxstn.hold_out(Joint(transform=twice, target_transform=str), 3, transform=negative)
    assert contents(valid) == [(-i, str(i)) for i in valid.indices]
    assert contents(train) == [(2 * i, str(i)) for i in train.indices]
    _, valid = fxstn.hold_out(Joint(transform=twice), 3, transform=None)
    assert contents(valid) == [(i, i) for i in valid.indices]
    _, valid = fxstn.hold_out(Joint(), 3, transform=negative)
    assert contents(valid) == [(-i, i) for i in valid.indices]
    assert isinstance(valid.dataset.transforms, StandardTransform)
    train, valid = fxstn.hold_out(Joint(transforms=lambda x, y: (x, y + 1)), 3, transform=lambda x, y: (-x, -y))
    assert contents(valid) == [(-i, -i) for i in valid.indices]
    assert contents(train) == [(i, i + 1) for i in train.indices]


def test_torchvisions_wrapper_for_boxes_and_masks():
    class Pictures(CIFAR10):
        def __init__(self, **arguments):
            VisionDataset.__init__(self, None, **arguments)
            self.data, self.targets = numpy.zeros((10, 2, 2, 3), numpy.uint8), list(range(10))

    dataset = Pictures(transform=lambda image: "train", target_transform=str)
    dataset = torchvision.datasets.wrap_dataset_for_transforms_v2(dataset)
    _, valid = fxstn.hold_out(dataset, 3, transform=lambda image: "valid")
    assert contents(valid) == [("valid", str(i)) for i in valid.indices]
    assert dataset[0] == ("train", "0")


# Hugging Face


def test_hugging_faces_data_sets_stay_such():
    def doubled(rows):
        return {"x": [2 * x for x in rows["x"]]}

    table = Table({"x": list(range(40)), "label": [i % 4 for i in range(40)]}).with_transform(doubled)
    train, valid = fxstn.hold_out(table, 0.2, transform=lambda rows: {"x": [-x for x in rows["x"]]})
    assert (type(train), type(valid)) == (Table, Table)
    assert contents(valid) == [{"x": -i} for i in valid.rows]
    assert contents(train) == [{"x": 2 * i} for i in train.rows]
    assert torch.bincount(torch.tensor([i % 4 for i in valid.rows])).tolist() == [2, 2, 2, 2]
    _, valid = fxstn.hold_out(table, 0.2, transform=None)
    assert contents(valid) == [{"x": i, "label": i % 4} for i in valid.rows]
    _, valid = fxstn.hold_out(Subset(table, range(10)), 0.2, transform=None)
    assert contents(valid) == [{"x": i, "label": i % 4} for i in valid.indices]


# Strata and seeds

CLASSES = [0] * 50 + [7] * 30 + [-2] * 15 + [3] * 5
KNOWING = {
    "targets": lambda: Numbers(100, targets=CLASSES),
    "labels of NumPy": lambda: Numbers(100, labels=numpy.array(CLASSES)),
    "targets in a tensor": lambda: Numbers(100, targets=torch.tensor(CLASSES)),
    "a tensor": lambda: TensorDataset(torch.rand(100, 3), torch.rand(100, 2), torch.tensor(CLASSES)),
    "names": lambda: Numbers(100, targets=[f"class {c}" for c in CLASSES]),
    "subset": lambda: Subset(Numbers(120, targets=[9] * 20 + CLASSES), range(20, 120)),
    "concatenation": lambda: Numbers(60, targets=CLASSES[:60]) + Numbers(40, targets=CLASSES[60:]),
}


@pytest.mark.parametrize("name", KNOWING)
def test_each_class_has_its_share_in_both_parts(name):
    for seed in range(5):
        _, valid = fxstn.hold_out(KNOWING[name](), 0.2, seed=seed)
        numbers = [sum(CLASSES[i] == c for i in valid.indices) for c in (0, 7, -2, 3)]
        assert numbers == [10, 6, 3, 1]


def test_shares_that_are_no_whole_numbers_are_rounded_so_that_each_example_is_as_likely_as_another():
    counts = torch.zeros(23)
    dataset = Numbers(23, targets=[0] * 11 + [1] * 7 + [2] * 4 + [3])
    for seed in range(2000):
        _, valid = fxstn.hold_out(dataset, 5, seed=seed)
        counts[valid.indices] += 1
        per_class = torch.bincount(torch.tensor([dataset.targets[i] for i in valid.indices]), minlength=4) * 23 / 5
        assert (per_class - torch.tensor([11, 7, 4, 1])).abs().max() < 23 / 5
    probability = 5 / 23
    deviation = (counts / 2000 - probability) / (probability * (1 - probability) / 2000) ** 0.5
    assert deviation.abs().max() < 4


@pytest.mark.parametrize("targets", [[0.5] * 40, torch.rand(40), torch.zeros(40, 3).long(), [0] * 39, None])
def test_what_is_no_class_per_example_does_not_count(targets):
    dataset = Numbers(targets=targets)
    assert fxstn.hold_out(dataset, 8)[1].indices == fxstn.hold_out(Numbers(), 8)[1].indices
    with pytest.raises(
        ValueError, match=r"stratify=True, but Numbers has no classes in `targets` or `labels`; pass strat"
    ):
        fxstn.hold_out(dataset, 8, stratify=True)


def test_stratify_takes_classes_and_may_be_switched_off():
    _, valid = fxstn.hold_out(Numbers(100), 0.2, stratify=CLASSES)
    assert sum(CLASSES[i] == 0 for i in valid.indices) == 10
    dataset = Numbers(100, targets=CLASSES)
    assert fxstn.hold_out(dataset, 0.2, stratify=False)[1].indices == fxstn.hold_out(Numbers(100), 0.2)[1].indices
    with pytest.raises(ValueError, match="stratify must hold 40 whole numbers or names, the class of each example"):
        fxstn.hold_out(Numbers(), 0.2, stratify=CLASSES)


def test_the_seed_alone_decides():
    def split(seed):
        return [part.indices for part in fxstn.hold_out(Numbers(), 0.2, seed=seed)]

    torch.manual_seed(1)
    state, states = torch.get_rng_state(), (random.getstate(), numpy.random.get_state()[1].tolist())
    first = split(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == states
    torch.rand(5)
    assert split(3) == first
    assert split(4) != first
    assert first[1] == [26, 25, 14, 39, 36, 13, 30, 34]  # in every process, and in every version


# Other data sets of the same examples, and what is refused


def test_a_data_set_without_a_place_for_a_transform_has_another_one_for_evaluation():
    tensors = TensorDataset(torch.arange(10.0), torch.zeros(10))
    with pytest.raises(
        ValueError, match=r"dataset is of type TensorDataset, which has no attribute `transform` to replace"
    ):
        fxstn.hold_out(tensors, 0.2, transform=negative)
    with pytest.raises(ValueError, match=r"hold_out: dataset\.datasets\[1\] is of type list, which has no attribute"):
        fxstn.hold_out(ConcatDataset([Numbers(10), [1, 2]]), 2, transform=negative)
    train, valid = fxstn.hold_out(tensors, 0.2, valid_dataset=TensorDataset(-torch.arange(10.0), torch.zeros(10)))
    assert sorted([x for x, _ in train] + [-x for x, _ in valid]) == list(range(10))
    with pytest.raises(ValueError, match="valid_dataset has 3 examples and dataset has 10; both must hold the same"):
        fxstn.hold_out(tensors, 0.2, valid_dataset=[1, 2, 3])
    with pytest.raises(ValueError, match="valid_dataset shows its examples by itself; pass it or transform, not both"):
        fxstn.hold_out(tensors, 0.2, valid_dataset=tensors, transform=negative)


@pytest.mark.parametrize("size", [0.0, 1.0, -0.1, 1.5, True, "0.1", float("nan"), None])
def test_a_size_is_a_share_or_a_number(size):
    with pytest.raises(ValueError, match=r"size=.* must be a share between 0 and 1, or a number of examples"):
        fxstn.hold_out(Numbers(), size)


@pytest.mark.parametrize(("size", "number"), [(numpy.int64(10), 10), (numpy.float32(0.25), 10)])
def test_sizes_and_seeds_may_be_numbers_of_numpy(size, number):
    assert len(fxstn.hold_out(Numbers(), size, seed=numpy.int64(3))[1]) == number


@pytest.mark.parametrize(("count", "size", "parts"), [(40, 0.01, "0 for validation and 40"), (1, 0.5, "0 for validation"),
                                                      (40, 40, "40 for validation and 0"), (40, 0, "0 for"),
                                                      (40, 50, "40 for validation and 0"), (0, 0.5, "0 for")])  # fmt: skip
def test_both_parts_need_an_example(count, size, parts):
    with pytest.raises(ValueError, match=f"size={size} of {count} examples leaves {parts}.*; both need at least one"):
        fxstn.hold_out(Numbers(count), size)


class Endless(IterableDataset):
    def __iter__(self):
        yield 1


@pytest.mark.parametrize("dataset", [Endless(), iter([1]), {"train": [1, 2]}, DataLoader(Numbers())])
def test_what_has_no_index_is_refused(dataset):
    with pytest.raises(
        TypeError, match="needs a length and an index of examples; pass the data set of a loader, one split"
    ):
        fxstn.hold_out(dataset, 0.2)


def test_the_parts_go_through_loaders_and_copies():
    train, valid = fxstn.hold_out(Numbers(), 0.2, transform=negative)
    batches = torch.cat(list(DataLoader(copy.deepcopy(valid), 3)))
    assert batches.tolist() == contents(valid)
    assert len(torch.cat(list(DataLoader(train, 3, shuffle=True)))) == 32
