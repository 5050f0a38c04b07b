"""fxstn.explain: what transform would make of a model, node by node, problems first."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from tabulate import tabulate
from torch import fx, nn

from fxstn.frontends.guards import frozen_modules
from fxstn.frontends.inputs import Inputs, InputSpec, as_inputs
from fxstn.frontends.live.calls import OperationNote
from fxstn.frontends.live.graph import LiveGraph
from fxstn.frontends.original import plain_copy
from fxstn.frontends.preservation import Preservation
from fxstn.hp import Activity, Spec
from fxstn.ir.coverage import Coverage, shown
from fxstn.ir.errors import Diagnostic, TransformError, module_path, operation_name
from fxstn.ir.generators import forked_rng
from fxstn.ir.node_info import info_of
from fxstn.ir.staging import draws, staging_of
from fxstn.network import SelfTuningNetwork
from fxstn.ops.noise import alpha_dropout_coefficients, dropout_mask, one_for_all_examples
from fxstn.ops.response import Response, for_all_examples, refused_places
from fxstn.passes.effects import is_random
from fxstn.passes.hyperize import responses
from fxstn.passes.recipe import canonical_graphs
from fxstn.passes.request import check_hparams, check_model
from fxstn.tools.doing import doing
from fxstn.transform import FRONTENDS, transform


@dataclass(frozen=True)
class Row:
    """One node of the graph.

    module: path of the module that it belongs to.
    operation: its name.
    became: what transform makes of it.
    rule: kind of rule.
    """

    module: str
    operation: str
    became: str
    rule: str


@dataclass
class Explanation:
    """What `explain` says; print() shows it, and so does the prompt.

    problems: what stands in the way of transform.
    rows: the nodes.
    notes: how the forward is followed, and which parameters have no response.
    coverage: which weights respond, of those that could.
    """

    problems: list[Diagnostic] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    coverage: Coverage | None = None

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        problems = "".join(f"\n  - {problem}" for problem in self.problems)
        parts = [f"PROBLEMS ({len(self.problems)}){problems}"] if problems else []
        if self.rows:
            cells = [(row.module, row.operation, row.became, row.rule) for row in self.rows]
            parts.append(tabulate(cells, headers=["module", "operation", "became", "rule"]))
            kinds = Counter(row.rule for row in self.rows)
            parts.append("nodes by rule: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
        return "\n\n".join(parts + (["\n".join(self.notes)] if self.notes else []))


def explain(
    model: nn.Module | SelfTuningNetwork, hparams: Sequence[Spec] | None = None, example_inputs: object = None
) -> Explanation:
    """What `fxstn.transform(model, hparams)` does with every node that matters, or why it cannot.

    model: a model, or a network that `transform` returned, which is explained as it is.
    hparams, example_inputs: as for `transform`. The operations of a network of frontend "live" are only known with
        example_inputs.

    Never raises for an unsupported model. Its problems come first in the table, each with module path, source line and remedy.
    Raises TypeError for what is no model, and for hparams that are no list of specs, ValueError for an empty list.
    """
    check_hparams(hparams)
    explanation = Explanation()
    if isinstance(model, SelfTuningNetwork):
        _explain_network(explanation, model, None if example_inputs is None else as_inputs(example_inputs, model.model))
        _responses_of_network(explanation, model)
        return explanation
    check_model(model)
    model, frontend = plain_copy(model), None
    inputs = None if example_inputs is None else as_inputs(example_inputs, model)
    try:
        with shown(), doing("following the forward"):
            stn = transform(model, hparams, example_inputs=example_inputs)
    except Exception as error:
        explanation.problems += _problems(error)
    else:
        _explain_network(explanation, stn, inputs)
        frontend = stn.frontend
    _responses_of_model(explanation, model, inputs, frontend)
    return explanation


def _problems(error: Exception) -> list[Diagnostic]:
    if isinstance(error, TransformError):
        return error.problems
    return [Diagnostic("", f"{type(error).__name__}: {error}", "", "see above for what was found")]


def _explain_network(explanation: Explanation, stn: SelfTuningNetwork, inputs: Inputs | None) -> None:
    """Its rows, and how its forward is followed."""
    explanation.coverage = stn.coverage
    try:
        if inputs is not None:
            stn.locate_examples(*inputs.args, **inputs.kwargs)
        if stn.frontend == "live":
            explanation.rows += _rows_of_run(explanation, stn, inputs)
        else:
            graph = cast(fx.GraphModule, stn.graph("pushforward"))
            explanation.rows += _rows_of_graph(graph, stn.hparams.names)
            _note_lost_examples(explanation, graph)
        explanation.rows += _penalties(stn)
    except Exception as error:
        explanation.problems += _problems(error)
    _note_starts(explanation, stn)
    _note_frontends(explanation, stn)


def _note_starts(explanation: Explanation, stn: SelfTuningNetwork) -> None:
    """Where each hyperparameter starts, and why: those that start alike together."""
    alike: dict[str, list[str]] = {}
    for hyperparameter in stn.hparams.hyperparameters:
        alike.setdefault(f"{hyperparameter.init:g} ({hyperparameter.origin})", []).append(hyperparameter.name)
    for start, names in alike.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        explanation.notes.append(f"start {start}: {', '.join(names[:3])}{more}")


def _rows_of_run(explanation: Explanation, stn: SelfTuningNetwork, inputs: Inputs | None) -> list[Row]:
    """The operations of one run of a forward that is no graph."""
    if inputs is None:
        explanation.notes.append("what runs is known when it runs: fxstn.explain(network, example_inputs=...) lists it")
        return []
    log: list[OperationNote] = []
    delta, graph = torch.zeros_like(stn.hparams.unconstrained), cast(LiveGraph, stn.graph("pushforward"))
    with Preservation(stn.model, inputs) as stand_ins, forked_rng(), torch.no_grad():
        graph.duals(stand_ins, None, delta, log)
    for reason in graph.refused_places(inputs):
        explanation.notes.append(f"one perturbation for the whole batch only, not per example: {reason}")
    return sorted((_row_of_note(note, stn.hparams.names) for note in log), key=lambda row: row.rule != "fallback")


def _row_of_note(note: OperationNote, names: tuple[str, ...]) -> Row:
    if note.kind == "draw":
        return _row_of_own_draw(note.module, note.operation)
    if note.kind != "random":
        return Row(note.module, note.operation, _change(note.kind), note.kind)
    tuned = [names[index] for index in note.strengths if isinstance(index, int)]
    return _row_of_random(note.module, note.operation, tuned, note.strengths)


def _row_of_random(path: str, operation: str, tuned: Sequence[str], strengths: Sequence[object]) -> Row:
    """A random operation: at the hyperparameters of these names, or at its own strengths."""
    if tuned:
        return Row(path, operation, f"strength from λ: {', '.join(tuned)}", "conditioned")
    fixed = ", ".join(map(str, strengths))
    return Row(path, operation, f"kept, {'p = ' * (operation == 'dropout')}{fixed}", "fixed noise")


def _change(rule: str) -> str:
    return "responds to λ" if rule == "hyperlayer" else "carries a tangent"


def _rows_of_graph(graph: fx.GraphModule, names: tuple[str, ...]) -> list[Row]:
    rows = []
    for node in graph.graph.nodes:
        if draws(node.target):
            rows.append(_row_of_draw(node, names))
        elif node.op == "call_function" and is_random(node.target):
            staging = staging_of(node.target)
            operation = staging.derivative_of if staging and staging.derivative_of else node.target
            rows.append(_row_of_own_draw(module_path(node), operation_name(operation)))
        elif (info := info_of(node)).rule and info.operation:
            rows.append(Row(module_path(node), info.operation, _change(info.rule), info.rule))
    return sorted(rows, key=lambda row: row.rule != "fallback")


def _row_of_draw(node: fx.Node, names: tuple[str, ...]) -> Row:
    strengths = node.args[1:]
    dropout = node.target in (dropout_mask, alpha_dropout_coefficients)
    name = "dropout" if dropout else getattr(node.target, "__name__", "").removeprefix("draw_")
    tuned = [names[index] for index in map(_index, strengths) if index is not None]
    return _row_of_random(module_path(node), name, tuned, strengths[:1] if dropout else strengths)


def _row_of_own_draw(path: str, operation: str) -> Row:
    """A random number that the model draws itself, in no operation that a spec could take over."""
    return Row(path, operation, "kept as the model draws it, not tuned", "fixed noise")


def _index(strength: fx.node.Argument) -> int | None:
    """Which λ an argument of a draw is, λ[..., index]; None for a number of its own."""
    while isinstance(strength, fx.Node) and strength.target in (for_all_examples, one_for_all_examples):
        strength = strength.args[0]
    if not isinstance(strength, fx.Node) or strength.target is not operator.getitem:
        return None
    _, index = cast(tuple[object, int], strength.args[1])
    return index


def _note_lost_examples(explanation: Explanation, graph: fx.GraphModule) -> None:
    """Where a perturbation per example is not possible."""
    if places := list(dict.fromkeys(refused_places(graph.graph))):
        explanation.notes.append(
            f"one perturbation for the whole batch only, not per example: the examples are not along one dimension in "
            f"{len(places)} places, {'; '.join(places)}"
        )


def _penalties(stn: SelfTuningNetwork) -> list[Row]:
    """What the training objectives add to the loss."""
    penalties = [(name, f"L{norm} penalty", index) for name, index, norm in stn.terms.penalties]
    sites = (site for site in stn.recipe.plan.binding.auxiliary if isinstance(site.spec, Activity))
    penalties += [(site.path, "activation penalty", site.index) for site in sites]
    penalties += [("", "Jacobian penalty", index) for index, _ in stn.terms.jacobian]
    names = stn.hparams.names
    return [Row(path, what, f"strength from λ: {names[index]}", "conditioned") for path, what, index in penalties]


def _note_frontends(explanation: Explanation, stn: SelfTuningNetwork) -> None:
    """How the forward is followed, and why not by the frontends that are tried before."""
    explanation.notes.append(f"the forward is followed by trace={stn.frontend!r}")
    reasons: dict[str, list[Diagnostic]] = {}
    for problem in stn.rejected:
        reasons.setdefault(problem.frontend, []).append(problem)
    for frontend, problems in reasons.items():
        more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
        explanation.notes.append(f"not by trace={frontend!r}: {replace(problems[0], frontend='')}{more}")


def _responses_of_network(explanation: Explanation, stn: SelfTuningNetwork) -> None:
    if stn.frontend == "live":
        count = sum(isinstance(module, Response) for module in stn.response.modules())
        _note_coverage(explanation, count, stn.coverage)
    else:
        graphs = [stn.canonical(training) for training in (True, False)]
        _note_responses(explanation, stn.model, graphs, stn.structured)


def _responses_of_model(explanation: Explanation, model: nn.Module, inputs: Inputs | None, chosen: str | None) -> None:
    """By the frontend that transform has chosen; where transform failed, by the first that can follow the forward."""
    for kind in FRONTENDS:
        if (chosen is not None and kind.name != chosen) or (inputs is None and kind.needs_examples):
            continue
        try:
            frontend = kind(InputSpec.of(model, inputs))
            graphs = canonical_graphs(frontend, model, tuple(frozen_modules(model)), inputs)
            _note_responses(explanation, model, graphs)
            break
        except TransformError:  # listed already
            continue


def _note_coverage(explanation: Explanation, count: int, coverage: Coverage) -> None:
    """How many parameters respond, and of the weights that do not the largest. What transform has decided comes first."""
    explanation.coverage = coverage = explanation.coverage or coverage
    explanation.notes.append(f"{count} parameters respond to the hyperparameters; {coverage}")
    if coverage.lost:
        explanation.notes.append(f"the largest weights that do not: {coverage.named()}")


def _note_responses(
    explanation: Explanation, model: nn.Module, graphs: Sequence[fx.GraphModule], structured: bool = False
) -> None:
    result = responses(graphs, structured)
    _note_coverage(explanation, len(result.axes), Coverage.of(model, result.axes, result.obstacles))
    reasons = Counter(reason.partition(" in '")[0] for reason in result.obstacles.values())
    for reason, count in reasons.most_common():
        example = next(name for name, why in result.obstacles.items() if why.startswith(reason))
        explanation.notes.append(f"{count} parameters get no response, such as '{example}': {reason}")
    unread = [name for name, _ in model.named_parameters() if name not in result.axes | result.obstacles]
    if unread:
        explanation.notes.append(f"{len(unread)} parameters are read by no operation, such as '{unread[0]}'")
