"""The rows of a target: one or several per example of the inputs, or those of the output, as of graphs among their nodes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fxstn.ir.containers import leaves


def checked_rows(target: object, output: object, examples: int) -> int:
    """How many values of a number the loss reads: one per example, or one per row of a target that has those of the output.

    examples: of the inputs.

    Raises ValueError where a target that is a tensor has neither the rows of the inputs, perhaps several for each, or one for
    several, as for views of an image, nor those of the output. A loss would broadcast a single row without an error.
    """
    if not isinstance(target, Tensor) or not target.dim() or not target.shape[0] % examples:
        return examples
    rows = target.shape[0]
    of_output = [leaf.shape[0] for leaf in leaves(output) if isinstance(leaf, Tensor) and leaf.dim()]
    if rows in of_output:
        return rows
    if rows > 1 and not examples % rows:
        return examples
    others = f" and the output has {of_output[0]} rows" if of_output and of_output[0] != examples else ""
    raise ValueError(
        f"the target has {rows} examples, the inputs have {examples}{others}; give as many, or a tuple of targets, whose rows "
        "are not compared"
    )


def hparams_of_rows(hparams: Mapping[str, Tensor] | None, rows: int) -> dict[str, Tensor] | None:
    """The numbers that a loss function reads, one for each row of its target.

    hparams: {name: (examples,)}; where all examples share a number, it is expanded.

    Raises ValueError where rows that are no examples would need numbers of their own.
    """
    if hparams is None:
        return None
    return {name: column if len(column) == rows else _shared(name, column, rows) for name, column in hparams.items()}


def _shared(name: str, column: Tensor, rows: int) -> Tensor:
    if column.stride(0):
        raise ValueError(
            f"the loss reads {name} for {rows} rows of the target, and the {len(column)} examples have a value each: give "
            "perturb='batch'"
        )
    return column[:1].expand(rows)


def target_in(batch: object) -> object:
    """The target of a batch: its "labels", or its last part; None where it has no parts."""
    if isinstance(batch, Mapping):
        return target_in(batch.get("labels"))
    if isinstance(batch, (tuple, list)):
        return target_in(batch[-1]) if batch else None
    return batch
