"""For the time of one run: other tensors in place of a model's own, and memory that may be written into."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from fxstn.frontends.guards import mode_of
from fxstn.frontends.module_state import module_state, restore
from fxstn.ir.containers import INTERNAL, mapped, reachable


@contextmanager
def swapped_tensors(
    model: nn.Module, training: bool, frozen: Collection[str], replacements: Mapping[int, Tensor], keep: bool
) -> Iterator[None]:
    """The model in train or eval mode, with other tensors in place of some of its own.

    frozen: paths of the modules that stay in eval mode.
    replacements: {id of a tensor: the other one}; parameters, buffers, and, unless `keep`, tensors in other attributes.
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
                if not keep:
                    vars(module).update(_replaced_attributes(module, replacements))
            yield
        finally:
            for table, name, x in originals:
                table[name] = x
            restore(state)


def _replaced_attributes(module: nn.Module, replacements: Mapping[int, Tensor]) -> dict[str, object]:
    """Attributes that hold tensors to be replaced, in containers of their own."""

    def replaced(leaf: object) -> object:
        return replacements.get(id(leaf), leaf)

    plain = {name: value for name, value in vars(module).items() if name not in INTERNAL}
    chosen = (name for name, value in plain.items() if any(id(x) in replacements for _, x in reachable(value, name)))
    return {name: mapped(replaced, plain[name]) for name in chosen}


@contextmanager
def temporary_memory(tensors: Iterable[Tensor]) -> Iterator[None]:
    """These tensor objects show their own memory again afterwards; live duals write into a copy of it, see `Table`.

    Parameters are left out, because nothing writes into them.
    """
    aliases = [(x, x.data, x.requires_grad) for x in tensors if not isinstance(x, nn.Parameter)]
    try:
        yield
    finally:
        for x, alias, requires_grad in aliases:
            x.data = alias
            if x.grad_fn is not None and not requires_grad and not x._is_view():  # torch detaches no view in place
                x.detach_()
            if x.is_leaf and x.requires_grad is not requires_grad:
                x.requires_grad_(requires_grad)
