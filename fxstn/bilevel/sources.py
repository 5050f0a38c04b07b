"""What a loader reads from: its data sets, samplers and transforms, their random generators, their epochs, its passes."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import itertools
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Protocol, TypeGuard, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader, Dataset, Sampler

from fxstn.bilevel.state import Stateful
from fxstn.bilevel.workers import batches_of
from fxstn.ir.generators import GlobalRandomState

LARGEST, WIDEST = 5000, 64  # objects visited in all, and entries of one list or dict
_CLOSED = (str, bytes, int, float, complex, type(None), type, ModuleType, BuiltinFunctionType, Tensor)
_LIBRARIES = ("builtins", "torch", "numpy", "random", "typing", "abc", "collections")
SAMPLERS = ("", "sampler", "batch_sampler", "batch_sampler.sampler")  # where torch's classes take a generator
_PARTS = ("sampler", "batch_sampler", "dataset", "datasets")  # attributes by which torch's classes name what they read
_STILL = ("torch.utils.data.dataset", "torch.utils.data.sampler", "torch.utils.data.distributed",
          "torch.utils.data.dataloader", "torch.utils.data._utils.collate")  # fmt: skip


class StatefulLoader(Stateful, Protocol):
    """A loader that saves and restores its place itself, such as torchdata's StatefulDataLoader."""

    def __iter__(self) -> Iterator[object]: ...


def is_stateful(loader: object) -> TypeGuard[StatefulLoader]:
    """Whether a loader saves and restores its place itself; accelerate's say whether they do."""
    return getattr(loader, "use_stateful_dataloader", True) and all(
        callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict")
    )


# Objects


def _attributes(value: object) -> list[tuple[str, object]]:
    """(name, value) of an object's attributes, and of the methods that a user's class gives it."""
    kinds = [kind for kind in type(value).__mro__ if kind.__module__.partition(".")[0] not in _LIBRARIES]
    slots = [slot for kind in kinds for slot in kind.__dict__.get("__slots__", ()) if hasattr(value, slot)]
    methods = [item for kind in kinds for item in vars(kind).items() if isinstance(item[1], FunctionType)]
    own = [item for item in getattr(value, "__dict__", {}).items() if item[0] != "_iterator"]  # persistent workers
    return [*own, *((slot, getattr(value, slot)) for slot in slots if slot != "__dict__"), *methods]


def _variables(function: FunctionType) -> list[tuple[str, object]]:
    """(name, value) of what a function has from outside: variables of functions round it, and generators of its module."""
    names = function.__code__.co_names
    variables = [(name, each) for name in names if _is_generator(each := function.__globals__.get(name))]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # no value yet
            variables.append((name, cell.cell_contents))
    return variables


def _children(value: object) -> list[tuple[str, object]]:
    """(what to append to the path, value) of what an object holds."""
    numpy = sys.modules.get("numpy")
    if isinstance(value, _CLOSED) or _is_generator(value) or (numpy is not None and isinstance(value, numpy.ndarray)):
        return []
    if isinstance(value, dict):
        return [(f"[{key!r}]", each) for key, each in itertools.islice(value.items(), WIDEST)]
    if isinstance(value, (list, tuple, deque)):
        return [(f"[{i}]", each) for i, each in enumerate(itertools.islice(value, WIDEST))]
    if isinstance(value, MethodType):
        return [("", value.__self__)]
    if isinstance(value, functools.partial):
        return [("", value.func), ("", value.args), ("", value.keywords)]
    named = _variables(value) if isinstance(value, FunctionType) else _attributes(value)
    return [(f".{name}", each) for name, each in named]


def _everything(path: str, value: object) -> bool:
    return True


def _is_part(path: str, value: object) -> bool:
    """Whether an object is the loader, or one of the samplers and data sets in it."""
    name = path.rpartition(".")[2].partition("[")[0]
    return not path or name in _PARTS or isinstance(value, (Sampler, Dataset))


def objects_of(loader: object, enters: Callable[[str, object], bool] = _everything) -> Iterator[tuple[str, object]]:
    """(path, object) of what a loader holds, each object once, the nearest first: ".sampler.generator", for example.

    enters: whether to look into an object.
    """
    queue, seen = deque([("", loader)]), {id(loader)}
    while queue:
        path, value = queue.popleft()
        yield path, value
        for step, child in _children(value) if enters(path, value) else ():
            if id(child) not in seen and len(seen) < LARGEST and not isinstance(child, _CLOSED):
                seen.add(id(child))
                queue.append((path + step, child))


def set_epoch(loader: object, number: int) -> None:
    """Call set_epoch(number) once of the loader, and of each sampler and data set in it, that has it."""
    for path, value in objects_of(loader, _is_part):
        if _is_part(path, value) and callable(function := getattr(value, "set_epoch", None)):
            function(number)


def length_of(loader: object) -> int | None:
    """The number of batches of a loader, where it knows."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader of an IterableDataset does not know it
        return None


def may_draw(loader: object) -> bool:
    """Whether later batches of a pass may draw from the global generators in this process.

    Torch's own samplers draw before the first batch only, and its own data sets never.
    """
    if isinstance(loader, (list, tuple)):
        return False
    if type(loader) is not DataLoader:
        return True
    parts: list[object] = [loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
    if loader.num_workers == 0:
        parts += [loader.dataset, *_wrapped(loader.dataset)]
        if getattr(loader.collate_fn, "__module__", "") not in _STILL:
            return True
    return any(type(part).__module__ not in (*_STILL, "builtins") for part in parts)


def _wrapped(dataset: object) -> Iterator[object]:
    """The data sets in torch's own ones."""
    inner = [getattr(dataset, "dataset", None), *tree_leaves(getattr(dataset, "datasets", []))]
    for each in inner:
        if each is not None:
            yield each
            yield from _wrapped(each)


# Generators


def _is_generator(value: object) -> bool:
    """Whether a value is a random generator, and none of the global ones."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(
        value, (numpy.random.Generator, numpy.random.BitGenerator, numpy.random.RandomState)
    ):
        shared = numpy.random.mtrand._rand
        return value is not shared and value is not shared._bit_generator
    if isinstance(value, random.Random):
        return not isinstance(value, random.SystemRandom) and value is not getattr(random, "_inst", None)
    return isinstance(value, torch.Generator) and value is not torch.default_generator


def generators_of(loader: object) -> dict[str, Any]:
    """{path: generator} of those of torch, NumPy and Python that a loader holds."""
    return {path.removeprefix("."): value for path, value in objects_of(loader) if _is_generator(value)}


def generator_state(generator: Any) -> Any:
    """The state of a generator, as a checkpoint holds it."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    import numpy

    generator = generator.bit_generator if isinstance(generator, numpy.random.Generator) else generator
    state = generator.get_state(legacy=False) if isinstance(generator, numpy.random.RandomState) else generator.state
    state = tree_map_only(numpy.ndarray, lambda array: torch.from_numpy(array.copy()), state)
    return tree_map_only(numpy.integer, int, state)


def set_generator_state(generator: Any, state: Any) -> None:
    """Set a generator to a state of one of its kind."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        import numpy

        state = tree_map_only(Tensor, lambda tensor: tensor.cpu().numpy(), state)
        generator = generator.bit_generator if isinstance(generator, numpy.random.Generator) else generator
        if isinstance(generator, numpy.random.RandomState):
            generator.set_state(state)
        else:
            generator.state = state


def lacks_generator(loader: object, path: str) -> bool:
    """Whether a path is that of the argument `generator` of one of torch's classes, which did not get it."""
    owner, _, name = path.rpartition(".")
    for step in filter(None, owner.split(".")):
        loader = getattr(loader, step, None)
    return owner in SAMPLERS and name == "generator" and type(loader).__module__.startswith("torch.utils.data")


def equal_states(a: Any, b: Any) -> bool:
    """Whether two states of generators, or dicts of them, are equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal_states(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


# Passes


def new_pass(loader: Iterable[object]) -> Iterator[object]:
    """An iterator with worker processes and a place of its own: another pass of the loader may be open.

    With persistent_workers=True, too: workers that go on from pass to pass have generators that no other process can restore.
    """
    if is_stateful(loader) or getattr(loader, "persistent_workers", False):
        loader = copy.copy(loader)
        cast(Any, loader)._iterator = None
    return batches_of(loader)


def checksum(batch: object) -> str:
    """A checksum of a batch: of its numbers and strings, and of up to 4,096 entries of each tensor."""
    total, numpy = hashlib.sha256(), sys.modules.get("numpy")
    for leaf in tree_leaves(batch):
        if numpy is not None and isinstance(leaf, numpy.ndarray) and leaf.dtype.kind in "biufc":
            leaf = torch.from_numpy(leaf.copy())
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided and not leaf.is_quantized:
            entries = leaf.detach().reshape(-1)[:: leaf.numel() // 4096 + 1].cpu().resolve_conj().resolve_neg()
            total.update(
                f"{leaf.dtype}{tuple(leaf.shape)}".encode() + entries.contiguous().view(torch.uint8).numpy().tobytes()
            )
        else:
            plain = isinstance(leaf, (str, bytes, int, float))
            total.update((repr(leaf) if plain else type(leaf).__name__).encode())
    return total.hexdigest()


def checksum_of_data(loader: DataLoader) -> str:
    """A checksum of some examples of a loader's data set, and of their number; "" where they cannot be read in this process.

    The data set has no random generator of its own.
    """
    dataset = cast(Sequence[object], loader.dataset)
    with unchanged_generators(loader):
        GlobalRandomState.seeded(0).set()
        try:
            count = len(dataset)
            return checksum([count, *(dataset[index] for index in sorted({0, count // 2, count - 1}))])
        except Exception:  # it may raise anything, as where only workers can open its files
            return ""


@contextlib.contextmanager
def unchanged_generators(loader: object) -> Iterator[None]:
    """Inside, a loader may be read; afterwards the global generators and its own are as they were."""
    before, generators = GlobalRandomState.current(), generators_of(loader)
    states = {path: generator_state(generator) for path, generator in generators.items()}
    try:
        yield
    finally:
        before.set()
        for path, generator in generators.items():
            set_generator_state(generator, states[path])


def place_of(loader: StatefulLoader) -> object:
    """What a loader that saves its place says of it. Some draw to say so, for the pass to come: that shall move nothing."""
    with unchanged_generators(loader):
        return loader.state_dict()
