"""For the time of one run: other tensors in place of a model's own, and memory that may be written into."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from fxstn.frontends.guards import mode_of, module_state, restore


@contextmanager
def swapped_tensors(
    model: nn.Module, training: bool, frozen: Collection[str], replacements: Mapping[int, Tensor], keep: bool
) -> Iterator[None]:
    """The model in train or eval mode, with other tensors in place of some parameters and buffers.

    frozen: paths of the modules that stay in eval mode.
    replacements: {id of a parameter or buffer: tensor}.
    keep: whether buffers and attributes that the forward assigns stay assigned, as after a training step.
    """
    with mode_of(model, training, frozen):
        state = {} if keep else module_state(model)
        originals: list[tuple[dict, str, Tensor]] = []
        try:
            for module in model.modules():
                tables: tuple[dict, dict] = (module._parameters, module._buffers)
                for table in tables:
                    own = [(table, name, x) for name, x in table.items() if x is not None and id(x) in replacements]
                    originals += own
                    table.update({name: replacements[id(x)] for _, name, x in own})
            yield
        finally:
            for table, name, x in originals:
                table[name] = x
            restore(state)


@contextmanager
def temporary_memory(tensors: Iterable[Tensor]) -> Iterator[None]:
    """These tensor objects show their own memory again afterwards; live duals write into a copy of it, see `Table`.

    Parameters are left out, because nothing writes into them.
    """
    aliases = [(x, x.data) for x in tensors if not isinstance(x, nn.Parameter)]
    try:
        yield
    finally:
        for x, alias in aliases:
            x.data = alias
