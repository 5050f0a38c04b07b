"""What a forward returns: plain containers stay in the graph, other types come back in the last pass, the rest is refused."""

from __future__ import annotations

import dataclasses
from collections import namedtuple  # pytree's type of all of them; fx keeps their own

from torch import fx
from torch.utils._pytree import TreeSpec, tree_flatten

from fxstn.frontends.guards import UnsupportedError

_PLAIN = (tuple, list, dict)


def structure_of(output: object) -> TreeSpec | None:
    """The structure of a forward's output, see `special_structure`.

    Raises UnsupportedError where a container among the leaves shows that pytree does not know its type.
    """
    leaves, structure = tree_flatten(output)
    for leaf in leaves:
        if isinstance(leaf, _PLAIN) or (dataclasses.is_dataclass(leaf) and not isinstance(leaf, (type, fx.Proxy))):
            raise _unsupported(type(leaf))
    return special_structure(structure)


def special_structure(structure: TreeSpec) -> TreeSpec | None:
    """The structure, where it has containers besides plain tuples, lists and dicts; None where it has not.

    Raises UnsupportedError for a type that is none of the three, and no subclass of one: a graph cannot hold it.
    """
    types = {spec.type for spec in _containers(structure)} - {*_PLAIN, namedtuple, None}
    for kind in types:
        if not issubclass(kind, _PLAIN):
            raise _unsupported(kind)
    return structure if types else None


def _containers(structure: TreeSpec) -> list[TreeSpec]:
    return [structure, *(spec for child in structure.children() for spec in _containers(child))]


def _unsupported(kind: type) -> UnsupportedError:
    what = f"the forward returns a {kind.__name__}, which a graph cannot hold,"
    return UnsupportedError("", what, "return tensors in tuples, lists or dicts")
