"""The optimizers of a run: those that a user gives, and the defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer

from fxstn.bilevel.combined import CombinedOptimizer
from fxstn.bilevel.optim import SettlingAdam
from fxstn.bilevel.plain import plain_numbers
from fxstn.bilevel.problem import BilevelProblem

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer | Sequence[Optimizer]]
OptimizerLike = Optimizer | Sequence[Optimizer] | OptimizerFactory | None
_FACTORY = "pass a factory, such as lambda params: torch.optim.SGD(params, lr=0.1)"


def _fusible(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether a step is one kernel. SGD's for half precision on the CPU leaves weights as they are in torch 2.9."""
    single = (torch.float32, torch.float64)
    return all(p.dtype in single if p.is_cpu else p.is_cuda and p.is_floating_point() for p in parameters)


def sgd(parameters: Sequence[nn.Parameter], fused: bool = True) -> Optimizer:
    """SGD with momentum 0.9, learning rate 1e-2.

    fused: whether a step is one kernel where the device has it, which takes no sparse gradients.
    """
    optimizer = torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, fused=fused and _fusible(parameters))
    if optimizer.defaults["fused"]:  # the kernel takes no weight that joins the others later, without a momentum yet
        (group,) = optimizer.param_groups
        optimizer.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in group["params"]})
    return optimizer


def adam(parameters: Sequence[nn.Parameter]) -> Optimizer:
    """Adam, learning rate 1e-2: for scales U, which are of the order of 1 whatever the layer."""
    return torch.optim.Adam(parameters, lr=1e-2, fused=_fusible(parameters))


rmsprop = partial(torch.optim.RMSprop, lr=1e-2)


def build_optimizer(
    optimizer: OptimizerLike, default: OptimizerFactory, parameters: list[nn.Parameter], name: str
) -> Optimizer:
    """An optimizer over exactly these parameters.

    optimizer: the optimizer itself, several over different parameters, a factory for these, or None, for the default.
    default: a factory.
    name: what errors call it.

    Raises TypeError for anything else. Raises ValueError for an optimizer that cannot be made, has other parameters, or needs a
    closure.
    """
    result: object
    if isinstance(optimizer, (Optimizer, list, tuple)):
        result = optimizer
    elif optimizer is None or callable(optimizer):
        try:
            result = (optimizer or default)(parameters)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} cannot be made: {error}; {_FACTORY}") from error
    else:
        raise TypeError(f"{name}={optimizer!r} must be an optimizer or a factory; {_FACTORY}")
    parts = list(result) if isinstance(result, (list, tuple)) else [result]
    optimizers = [part for part in parts if isinstance(part, Optimizer)]
    if len(optimizers) < len(parts) or not parts:
        raise TypeError(f"{name} must be an optimizer, or a list of them, its factory returns {type(result).__name__}; "
                        f"{_FACTORY}")  # fmt: skip
    for part in optimizers:
        closure = inspect.signature(part.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(f"{name}: {type(part).__name__} evaluates a closure, which a run has none of; use SGD, Adam or "
                             "another that steps on gradients")  # fmt: skip
    return _over_exactly(parameters, optimizers[0] if len(parts) == 1 else _combined(optimizers, name), name)


def _combined(parts: Sequence[Optimizer], name: str) -> Optimizer:
    try:
        return CombinedOptimizer(parts)
    except ValueError as error:
        raise ValueError(
            f"{name}: the optimizers of the list have a parameter in common; give each parameter to one"
        ) from error


def _over_exactly(parameters: Sequence[nn.Parameter], result: Optimizer, name: str) -> Optimizer:
    """The optimizer, its settings in plain numbers. Raises ValueError where it has other parameters."""
    for group in result.param_groups:
        group |= {key: plain_numbers(value) for key, value in group.items() if key != "params"}
    theirs = {id(parameter) for group in result.param_groups for parameter in group["params"]}
    ours = {id(parameter) for parameter in parameters}
    if name == "optimizer" and ours and not theirs & ours:
        raise ValueError(
            f"{name} is not over the {len(ours)} parameters of the network: fxstn.transform copies the model, so {_FACTORY}"
        )
    if theirs != ours:
        raise ValueError(
            f"{name} holds {len(theirs - ours)} parameters that are not its own and lacks {len(ours - theirs)} of its "
            f"{len(ours)}; {_FACTORY}"
        )
    return result


def build_optimizers(
    problem: BilevelProblem, choices: dict[str, OptimizerLike], structured: bool
) -> dict[str, Optimizer]:
    """{argument of the runner: optimizer} for every kind of parameters that a problem has.

    choices: {argument: as `build_optimizer` takes it}; others are left out.
    structured: whether the response is a structured one, whose optimizer is by default that of the weights.
    """
    tables = (module for module in problem.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag)))
    sparse = any(table.sparse for table in tables)
    kinds: dict[str, tuple[OptimizerFactory, Iterable[nn.Parameter]]] = {
        "optimizer": (partial(sgd, fused=not sparse), problem.general_parameters()),
        "response.optimizer": (sgd if structured else adam, problem.response_parameters()),
        "hyper.optimizer": (SettlingAdam, problem.hyper_parameters()),
        "hyper.scale_optimizer": (rmsprop, problem.scale_parameters()),
    }
    return {
        name: build_optimizer(choices[name], default, parameters, name)
        for name, (default, generator) in kinds.items() if name in choices and (parameters := list(generator))
    }  # fmt: skip
