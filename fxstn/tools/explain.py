"""fxstn.explain: what transform would make of a model, node by node, problems first."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from tabulate import tabulate
from torch import fx, nn

from fxstn.frontends.guards import frozen_modules
from fxstn.frontends.inputs import InputSpec, as_tuple
from fxstn.frontends.live.duals import Note
from fxstn.frontends.original import plain_copy
from fxstn.hp import Activity, Spec
from fxstn.ir.errors import Diagnostic, TransformError, module_path
from fxstn.ir.graphs import forked_rng
from fxstn.ir.node_info import info_of
from fxstn.ir.staging import draws
from fxstn.network import SelfTuningNetwork
from fxstn.ops.noise import alpha_dropout_coefficients, dropout_mask
from fxstn.ops.response import Response, for_all_examples
from fxstn.passes.hyperize import responses
from fxstn.passes.recipe import canonical_graphs
from fxstn.transform import FRONTENDS, transform


@dataclass(frozen=True)
class Row:
    """One node: module path, operation, what became of it, and by which kind of rule."""

    module: str
    operation: str
    became: str
    rule: str


@dataclass
class Explanation:
    """Printable. problems: what stands in the way of transform; rows: the nodes; notes: parameters without response."""

    problems: list[Diagnostic] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        parts = []
        if self.problems:
            parts.append(
                f"PROBLEMS ({len(self.problems)})\n" + "\n".join(f"  - {problem}" for problem in self.problems)
            )
        if self.rows:
            cells = [(row.module, row.operation, row.became, row.rule) for row in self.rows]
            parts.append(tabulate(cells, headers=["module", "operation", "became", "rule"]))
            kinds = Counter(row.rule for row in self.rows)
            parts.append("nodes by rule: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
        return "\n\n".join(parts + (["\n".join(self.notes)] if self.notes else []))


def explain(
    model: nn.Module | SelfTuningNetwork, hparams: Sequence[Spec] | None = None, example_inputs: Any = None
) -> Explanation:
    """What `fxstn.transform(model, hparams)` does with every node that matters, or why it cannot.

    Arguments as for `transform`; a network that it returned is explained as it is (on frontend "live" without its operations,
    unless example_inputs are given). Never raises for an unsupported model: its problems come first in the table, each with
    module path, source line and remedy.
    """
    explanation = Explanation()
    stn = model if isinstance(model, SelfTuningNetwork) else None
    made = stn is not None
    model = stn.model if stn is not None else plain_copy(model)
    inputs = None if example_inputs is None else as_tuple(example_inputs)
    try:
        stn = stn or transform(model, hparams, example_inputs=example_inputs)
        if inputs is not None:
            stn.locate_examples(*inputs)
        if stn.frontend == "live" and inputs is None:
            explanation.notes.append(
                "what runs is known when it runs: fxstn.explain(network, example_inputs=...) lists it"
            )
        elif stn.frontend == "live" and inputs is not None:
            _operations(explanation, stn, inputs)
        else:
            _nodes(explanation, cast(fx.GraphModule, stn.graph("pushforward")), stn.hparams.names)
        _penalties(explanation, stn)
    except TransformError as error:
        explanation.problems += error.problems
    except Exception as error:
        explanation.problems.append(
            Diagnostic("", f"{type(error).__name__}: {error}", "", "see above for what was found")
        )
    _frontends(explanation, stn)
    if made and stn is not None:
        _responding(explanation, stn)
        return explanation
    for kind in FRONTENDS:
        if (stn is not None and stn.frontend != kind.name) or (inputs is None and kind.needs_examples):
            continue
        try:
            frontend = kind(InputSpec.of(model, inputs))
            _parameters(explanation, model, canonical_graphs(frontend, model, tuple(frozen_modules(model)), inputs))
            break
        except TransformError:  # listed already
            continue
    return explanation


def _penalties(explanation: Explanation, stn: SelfTuningNetwork) -> None:
    """What the training objectives add to the loss."""
    found = [(name, f"L{norm} penalty", index) for name, index, norm in stn.terms.penalties]
    sites = (site for site in stn.recipe.plan.binding.auxiliary if isinstance(site.spec, Activity))
    found += [(site.path, "activation penalty", site.index) for site in sites]
    found += [("", "Jacobian penalty", index) for index, _ in stn.terms.jacobian]
    for path, what, index in found:
        explanation.rows.append(Row(path, what, f"strength from λ: {stn.hparams.names[index]}", "conditioned"))


def _frontends(explanation: Explanation, stn: SelfTuningNetwork | None) -> None:
    """How the forward is followed, and why not in the ways that come before."""
    if stn is None:
        return
    explanation.notes.append(f"the forward is followed by trace={stn.frontend!r}")
    refused: dict[str, list[Diagnostic]] = {}
    for problem in stn.rejected:
        refused.setdefault(problem.frontend, []).append(problem)
    for frontend, problems in refused.items():
        more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
        explanation.notes.append(f"not by trace={frontend!r}: {replace(problems[0], frontend='')}{more}")


def _responding(explanation: Explanation, stn: SelfTuningNetwork) -> None:
    if stn.frontend == "live":
        count = sum(isinstance(module, Response) for module in stn.response.modules())
        explanation.notes.append(f"{count} parameters respond to the hyperparameters")
    else:
        _parameters(explanation, stn.model, [stn.canonical(training) for training in (True, False)], stn.structured)


def _parameters(explanation: Explanation, model: nn.Module, graphs: Sequence[Any], structured: bool = False) -> None:
    found = responses(graphs, structured)
    chosen, left_out = found.axes, found.left_out
    explanation.notes.append(f"{len(chosen)} parameters respond to the hyperparameters")
    reasons = Counter(reason.partition(" in '")[0] for reason in left_out.values())
    for reason, count in reasons.most_common():
        example = next(name for name, why in left_out.items() if why.startswith(reason))
        explanation.notes.append(f"{count} parameters get no response, such as '{example}': {reason}")
    unread = [name for name, _ in model.named_parameters() if name not in chosen and name not in left_out]
    if unread:
        explanation.notes.append(f"{len(unread)} parameters are read by no operation, such as '{unread[0]}'")


def _operations(explanation: Explanation, stn: SelfTuningNetwork, inputs: tuple) -> None:
    """One run of a forward that is no graph."""
    log: list[Note] = []
    graph: Any = stn.graph("pushforward")
    with forked_rng(), torch.no_grad():
        graph.duals(inputs, {}, None, torch.zeros_like(stn.hparams.unconstrained), log)
    for note in log:
        if note.kind == "dropout":
            tuned = isinstance(note.strength, int)
            became = f"strength from λ: {stn.hparams.names[note.strength]}" if tuned else f"kept, p = {note.strength}"  # type: ignore[index]
            row = Row(note.module, "dropout", became, "conditioned" if tuned else "fixed noise")
        else:
            became = "responds to λ" if note.kind == "hyperlayer" else "carries a tangent"
            row = Row(note.module, note.operation, became, note.kind)
        explanation.rows.append(row)
    explanation.rows.sort(key=lambda row: row.rule != "fallback")
    explanation.notes.append("one perturbation for the whole batch only, not per example: the forward runs as it is")


def _index(strength: Any) -> int | None:
    """Which λ an argument of a draw is; None for a number of its own."""
    while isinstance(strength, fx.Node) and strength.target is for_all_examples:
        strength = strength.args[0]
    of_lambda = isinstance(strength, fx.Node) and strength.target is operator.getitem
    return strength.args[1][1] if of_lambda else None


def _nodes(explanation: Explanation, graph: fx.GraphModule, names: tuple[str, ...]) -> None:
    rows: list[Row] = []
    for node in graph.graph.nodes:
        if draws(node.target):
            tuned = [names[index] for index in map(_index, node.args[1:]) if index is not None]
            dropout = node.target in (dropout_mask, alpha_dropout_coefficients)
            kept = f"kept, p = {node.args[1]}" if dropout else f"kept, {', '.join(map(str, node.args[1:]))}"
            became = f"strength from λ: {', '.join(tuned)}" if tuned else kept
            name = "dropout" if dropout else node.target.__name__.removeprefix("draw_")  # type: ignore[union-attr]
            rows.append(Row(module_path(node), name, became, "conditioned" if tuned else "fixed noise"))
        elif (info := info_of(node)).rule and info.operation:
            became = "responds to λ" if info.rule == "hyperlayer" else "carries a tangent"
            rows.append(Row(module_path(node), info.operation, became, info.rule))
    shared = [str(node.args[2]) for node in graph.graph.nodes if node.target is for_all_examples]
    if shared:
        explanation.notes.append(
            f"one perturbation for the whole batch only, not per example: the examples are not along one dimension in "
            f"{len(shared)} places, such as {shared[0]}"
        )
    explanation.rows = sorted(rows, key=lambda row: row.rule != "fallback")
