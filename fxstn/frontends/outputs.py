"""What a forward returns: plain containers stay in the graph, other types come back in the last pass (restore_types)."""

from __future__ import annotations

import operator

from torch import Tensor, fx
from torch.utils._pytree import tree_is_leaf, tree_leaves

from fxstn.frontends.guards import UnsupportedError
from fxstn.ir.containers import hidden, leaves, path_to
from fxstn.ir.output_types import OutputTypes

_VALUES = (Tensor, fx.Proxy)


def plain_output(output: object) -> tuple[object, OutputTypes | None]:
    """What a graph returns for an output: plain tuples, lists and dicts as they are; for other types a list of the leaves.

    The second value makes the output of the leaves again; None for plain containers. Raises UnsupportedError where a tensor
    is in an object that cannot be made anew, a set say.
    """
    values = leaves(output, _VALUES)
    for leaf in values:
        if not isinstance(leaf, _VALUES) and any(True for _ in hidden(leaf, _VALUES)):
            raise UnsupportedError("", *hidden_in_output(leaf, output))
    entries = tree_leaves(output)
    if _is_plain(output) and len(entries) == len(values) and all(map(operator.is_, entries, values)):
        return output, None
    return values, OutputTypes.of(output, _VALUES)


def hidden_in_output(leaf: object, output: object) -> tuple[str, str]:
    """What is wrong with an output whose leaf holds a tensor, and the remedy."""
    place, kind = path_to(leaf, output, "output"), type(leaf).__name__
    what = f"the forward returns tensors inside a {kind}, at {place}, where they would lose their gradient,"
    return what, "return them in tuples, lists, dicts or objects with plain attributes"


def _is_plain(value: object) -> bool:
    """Whether a value consists of tuples, lists, dicts and leaves, of these very types."""
    if type(value) in (tuple, list, dict):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))  # type: ignore[call-overload]
    return tree_is_leaf(value)
