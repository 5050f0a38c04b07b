"""The passes choose_statistics and hold_statistics: which statistics batch norms use and update."""

from __future__ import annotations

import inspect

import torch.nn.functional as F
from torch import fx

from fxstn.frontends.interface import DEFAULT_PLAN, Plan
from fxstn.ir.graphs import copied
from fxstn.ops.synced import BATCH_NORMS


def hold_statistics(module: fx.GraphModule, plan: Plan = DEFAULT_PLAN) -> fx.GraphModule:
    """Batch and instance norms stop updating their running statistics.

    Only the general step updates them. A response step runs the network at perturbed λ, which no one uses after training.
    """
    module = copied(module)
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in BATCH_NORMS and node.args[5]:
            x, _, _, weight, bias, _, _, eps = node.args
            node.args = (x, None, None, weight, bias, True, 0.0, eps)
        elif node.op == "call_function" and node.target is F.instance_norm:
            bound = inspect.signature(F.instance_norm).bind(*node.args, **node.kwargs)
            bound.apply_defaults()
            if bound.arguments["use_input_stats"]:
                bound.arguments.update(running_mean=None, running_var=None)
            node.args, node.kwargs = bound.args, bound.kwargs
    return module


def choose_statistics(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Batch norms normalise by the plan's statistics in both modes; the frozen ones by their running statistics.

    "batch": those of an evaluation graph use the batch too, as in training.
    "running": those of a training graph that have running statistics use them, as in eval mode.
    """
    module = copied(module)
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target not in BATCH_NORMS:
            continue
        x, mean, variance, weight, bias, by_batch, _, eps = node.args
        if plan.statistics == "running" and by_batch and mean is not None:
            node.args = (x, mean, variance, weight, bias, False, 0.0, eps)
        elif plan.statistics == "batch" and not by_batch and not (plan.kind.training or _belongs_to_frozen(mean, plan)):
            node.args = (x, None, None, weight, bias, True, 0.0, eps)
    return module


def _belongs_to_frozen(statistic: fx.Node, plan: Plan) -> bool:
    """Whether a running statistic is that of a module which stays in eval mode."""
    return str(statistic.target).removeprefix("model.").rpartition(".")[0] in plan.frozen
