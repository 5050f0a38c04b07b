"""Targets that move along with images: which parts of a target are masks, boxes and keypoints, and how they move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_leaves
from torchvision import tv_tensors
from torchvision.ops import box_convert

from fxstn.hp.moving import Move
from fxstn.ops.boxes import has_area, moved_boxes, moved_keypoints

MASK, BOXES, KEYPOINTS, IMAGE, STILL = "masks", "boxes", "keypoints", "images", "maps of floating point numbers"
_OF_NAMES = {"boxes": BOXES, "masks": MASK, "mask": MASK, "keypoints": KEYPOINTS}  # keys of the dicts of detectors
_OF_TYPES = {"Mask": MASK, "BoundingBoxes": BOXES, "KeyPoints": KEYPOINTS, "Image": IMAGE, "Video": IMAGE}
_FORMATS = ("xyxy", "xywh", "cxcywh")


def move_target(target: Any, moves: Sequence[Move]) -> tuple[Any, set[str]]:
    """(a target moved as the images of a batch were, what kinds of things it holds that belong to places of the image).

    target: a structure of tensors with a row per example, or of lists with an entry per example: a dict, or a tv_tensor.
    moves: in their order.

    What moves: `tv_tensors.Mask`, `BoundingBoxes`, `KeyPoints`, `Image` and `Video`; other maps of whole numbers in the size of
    the images, as masks; "boxes", "masks" and "keypoints" of dicts. A pixel of a mask comes from the nearest place. A box
    becomes the one around its moved corners, cut at the borders. A dict of one example loses the objects whose box is then less
    than a pixel wide or high, with all that it has a row for; a tensor of boxes keeps them. Other maps, of floating point
    numbers, stay.
    """
    kinds: set[str] = set()
    for move in moves:
        target = _Mover(move, kinds).structure(target)
    return target, kinds


def still_maps(target: object, moves: Sequence[Move]) -> bool:
    """Whether a target holds a map of floating point numbers in the size of the images of which no type says what it is."""
    sizes = {tuple(move.size) for move in moves}
    plain = (
        leaf for leaf in tree_leaves(target) if isinstance(leaf, Tensor) and not isinstance(leaf, tv_tensors.TVTensor)
    )
    return any(leaf.dim() > 2 and leaf.is_floating_point() and tuple(leaf.shape[-2:]) in sizes for leaf in plain)


class _Mover:
    """One move of a target. kinds: gets what the target holds."""

    def __init__(self, move: Move, kinds: set[str]) -> None:
        self.move, self.kinds = move, kinds
        self.examples = next(leaf.shape[0] for leaf in tree_leaves(move.drawn) if isinstance(leaf, Tensor))

    def structure(self, target: Any, name: str = "") -> Any:
        if isinstance(target, Tensor):
            rows = target.dim() > 0 and target.shape[0] == self.examples
            return self.tensor(target, name) if rows else target
        if isinstance(target, Mapping):
            return {key: self.structure(value, str(key)) for key, value in target.items()}
        if not isinstance(target, (tuple, list)):
            return target
        if self._is_list_of_examples(target):
            return type(target)(self._dicts(target) if isinstance(target[0], Mapping) else self._tensors(target))
        entries = [self.structure(entry) for entry in target]
        return type(target)(*entries) if hasattr(target, "_fields") else type(target)(entries)

    def _is_list_of_examples(self, target: Sequence[Any]) -> bool:
        first = type(target[0]) if target else object
        of_examples = issubclass(first, (Mapping, tv_tensors.TVTensor))
        return of_examples and len(target) == self.examples and all(isinstance(entry, first) for entry in target)

    def _tensors(self, targets: Sequence[Tensor], name: str = "") -> list[Tensor]:
        """A tensor of each example; boxes and keypoints of all at once."""
        kinds = {self._kind(x, name, 0) for x in targets}
        plain = not any(isinstance(x, tv_tensors.TVTensor) for x in targets)
        if plain and kinds <= {BOXES, KEYPOINTS} and len({x.shape[1:] for x in targets}) == 1:
            moved = self.tensor(pad_sequence(list(targets), batch_first=True), name)
            return [row[: len(x)] for row, x in zip(moved.unbind(), targets, strict=True)]
        if kinds == {None}:
            return list(targets)
        movers = (_Mover(self.move.of_example(index), self.kinds) for index in range(self.examples))
        return [mover.tensor(x, name, alone=True) for mover, x in zip(movers, targets, strict=True)]

    def _dicts(self, targets: Sequence[Mapping[Any, Any]]) -> list[dict[Any, Any]]:
        """A dict of each example, without the objects whose box is empty."""
        result = [dict(target) for target in targets]
        for key in set.intersection(*map(set, result)):
            values = [entry[key] for entry in result]
            if all(isinstance(value, Tensor) for value in values):
                for entry, moved in zip(result, self._tensors(values, str(key)), strict=True):
                    entry[key] = moved
        return [_without_empty(entry, self._boxes_in(entry)) for entry in result]

    def _boxes_in(self, target: Mapping[Any, Any]) -> Any:
        """The key of the boxes in the dict of one example; None: it has none."""
        tensors = ((key, x) for key, x in target.items() if isinstance(x, Tensor))
        return next((key for key, x in tensors if self._kind(x, str(key), 0) == BOXES), None)

    def tensor(self, x: Tensor, name: str, alone: bool = False) -> Tensor:
        """alone: x is what one example has, without a dimension of examples."""
        kind = self._kind(x, name, 1 - alone)
        if kind is None:
            return x
        self.kinds.add(kind)
        if kind == STILL or not x.numel():
            return x
        plain = _plain(x)
        result = getattr(self, f"_{kind}")(plain[None] if alone else plain, x)
        result = result[0] if alone else result
        return tv_tensors.wrap(result, like=x) if isinstance(x, tv_tensors.TVTensor) else result

    def _kind(self, x: Tensor, name: str, leading: int) -> str | None:
        """What a tensor is, as its type, its name or its size says. leading: dimensions before those of one example."""
        if isinstance(x, tv_tensors.TVTensor):
            return _OF_TYPES[type(x).__name__]
        if name in _OF_NAMES:
            return _OF_NAMES[name]
        if x.dim() < leading + 2 or tuple(x.shape[-2:]) != tuple(self.move.size):
            return None
        return STILL if x.is_floating_point() or x.is_complex() else MASK

    def _masks(self, x: Tensor, like: Tensor) -> Tensor:
        return self.move.maps(_as_images(x)).view(x.shape)

    def _images(self, x: Tensor, like: Tensor) -> Tensor:
        return self.move.images(x if x.dim() == 4 else _as_images(x)).view(x.shape)

    def _boxes(self, x: Tensor, like: Tensor) -> Tensor:
        form = like.format.value.lower() if isinstance(like, tv_tensors.BoundingBoxes) else "xyxy"
        if form not in _FORMATS:
            raise ValueError(
                f"boxes of format {form.upper()} cannot move along with their image; give XYXY, XYWH or CXCYWH"
            )
        size = tuple(getattr(like, "canvas_size", self.move.size))
        corners = box_convert(x.reshape(len(x), -1, 4), form, "xyxy")
        moved = moved_boxes(corners, lambda points: self.move.points(points, size), size)
        return box_convert(moved, "xyxy", form).view(x.shape)

    def _keypoints(self, x: Tensor, like: Tensor) -> Tensor:
        size = tuple(getattr(like, "canvas_size", self.move.size))
        points = x.reshape(len(x), 1, -1, x.shape[-1])
        return moved_keypoints(points, lambda points: self.move.points(points, size), size).view(x.shape)


def _plain(x: Tensor) -> Tensor:
    return x.as_subclass(Tensor) if isinstance(x, tv_tensors.TVTensor) else x


def _as_images(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1, *x.shape[-2:])


def _without_empty(target: dict[Any, Any], boxes: Any) -> dict[Any, Any]:
    """A dict of one example without the objects whose box is empty. boxes: their key."""
    if boxes is None:
        return target
    own = target[boxes]
    form = own.format.value.lower() if isinstance(own, tv_tensors.BoundingBoxes) else "xyxy"
    keep = has_area(box_convert(_plain(own), form, "xyxy") if form != "xyxy" else _plain(own))
    if bool(keep.all()):
        return target

    def rows(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim() or x.shape[0] != len(keep):
            return x
        chosen = _plain(x)[keep]
        return tv_tensors.wrap(chosen, like=x) if isinstance(x, tv_tensors.TVTensor) else chosen

    return {key: rows(value) for key, value in target.items()}
