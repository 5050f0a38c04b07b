"""The three objectives of Δ-STN (paper, Alg. 1), each as a `Loss`, which knows what it is a mean over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fxstn.bilevel import targets
from fxstn.bilevel.counts import Count, Loss, LossValue, as_loss
from fxstn.bilevel.perturbation import Perturb, inputs_of, perturbation
from fxstn.bilevel.target_rows import checked_rows, hparams_of_rows
from fxstn.bilevel.temporary import eval_mode
from fxstn.frontends.inputs import Inputs, signature_once
from fxstn.ir.containers import leaves, mapped
from fxstn.ir.input_errors import explained_loss_errors
from fxstn.network import SelfTuningNetwork
from fxstn.ops.batch_axis import batch_size
from fxstn.ops.penalty import squared_jacobian, twice_differentiable
from fxstn.ops.pull_back import through_response
from fxstn.ops.response import frozen

LossFunction = Callable[..., LossValue]  # (output, target), or (output, target, hparams)


def takes_hparams(loss_fn: LossFunction) -> bool:
    """Whether a loss function has a parameter named `hparams`."""
    try:
        signature = signature_once(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn)
    except ValueError:  # some builtins have no signature
        return False
    return "hparams" in signature.parameters


class _Record(torch.autograd.Function):
    """The identity, after which autograd records operations on a tensor, without a copy."""

    @staticmethod
    def forward(ctx: Any, trigger: Tensor, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x


def _with_record(output: object) -> object:
    """The output of a forward without gradients, such that a loss of it has a record of its operations."""

    def one(leaf: object) -> object:
        if not isinstance(leaf, Tensor) or leaf.requires_grad or not (leaf.is_floating_point() or leaf.is_complex()):
            return leaf
        result: Tensor = _Record.apply(torch.ones((), device=leaf.device, requires_grad=True), leaf.detach())
        return result

    return mapped(one, output)


def evaluate_loss(
    loss_fn: LossFunction, output: object, inputs: object, target: object, hparams: dict[str, Tensor] | None = None,
    reads: bool | None = None,
) -> Loss:  # fmt: skip
    """loss_fn(output, target), with `hparams` where it takes them.

    inputs: of the network.
    reads: whether it takes them; None: not known yet.

    Raises ValueError where there are no examples, where the target has neither the inputs' rows nor the output's, where the
    loss function cannot take the two, and where the loss is not a scalar, or no function of the output that autograd knows.
    """
    examples, training = batch_size(inputs), torch.is_grad_enabled()
    if not examples:
        raise ValueError("the batch has no examples; leave it out")
    hparams = hparams_of_rows(hparams, checked_rows(target, output, examples))
    named = {"hparams": hparams} if (takes_hparams(loss_fn) if reads is None else reads) else {}
    if torch.compiler.is_compiling():
        return as_loss(loss_fn(output, target, **named), inputs, target)
    with explained_loss_errors(output, target), torch.enable_grad():
        value = loss_fn(output if training else _with_record(output), target, **named)
    loss = as_loss(value, inputs, target)
    if not training:
        return loss.detach()
    if not loss.data.requires_grad and _has_gradient(output):
        raise ValueError("loss_fn returns a tensor without a gradient; compute it from the output in torch operations, without "
                         ".item(), .detach() or no_grad")  # fmt: skip
    return loss


def _has_gradient(output: object) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves(output))


def _check_network(stn: object) -> None:
    if not hasattr(stn, "perturbed_output"):  # a compiled network has it, too
        raise TypeError(f"stn must come from fxstn.transform, got {type(stn).__name__}; give transform(model, hparams)")


def general_loss(
    stn: SelfTuningNetwork, loss_fn: LossFunction, inputs: object, target: object, *, perturb: Perturb = "auto",
    decays: bool = True,
) -> Loss:  # fmt: skip
    """`fxstn.general_loss`, with what it is a mean over.

    decays: whether weight decay is in the loss. Where it is not, `add_decay` of the problem adds its gradient.
    """
    _check_network(stn)
    if stn.method == "stn":
        return _perturbed_loss(stn, loss_fn, inputs, target, perturb, 1.0, update_statistics=True)
    inputs = _differentiable(stn, inputs)
    finish = _TrainingLoss(stn, loss_fn, inputs, target, None, takes_hparams(loss_fn), decays)
    with twice_differentiable(bool(stn.terms.jacobian)), targets.moving_along(target, loss_fn):
        return Loss(*stn.conditioned_output(*inputs.args, finish=finish, **inputs.kwargs))


def response_loss(
    stn: SelfTuningNetwork, loss_fn: LossFunction, inputs: object, target: object, *, perturb: Perturb = "auto",
    widening: float = 1.0,
) -> Loss:  # fmt: skip
    """`fxstn.response_loss`, with what it is a mean over."""
    _check_network(stn)
    return _perturbed_loss(stn, loss_fn, inputs, target, perturb, widening, update_statistics=False)


def _perturbed_loss(
    stn: SelfTuningNetwork,
    loss_fn: LossFunction,
    inputs: object,
    target: object,
    perturb: Perturb,
    widening: float,
    update_statistics: bool,
) -> Loss:
    inputs = _differentiable(stn, inputs)
    epsilon = perturbation(stn, inputs, perturb).detach()
    if widening > 1:
        epsilon = epsilon * stn.hparams.widening(widening)
    finish = _TrainingLoss(stn, loss_fn, inputs, target, epsilon, takes_hparams(loss_fn))
    with twice_differentiable(bool(stn.terms.jacobian)), targets.moving_along(target, loss_fn):
        return Loss(*stn.perturbed_output(
            *inputs.args, delta=epsilon, condition=epsilon, training=True, update_statistics=update_statistics,
            finish=finish, **inputs.kwargs,
        ))  # fmt: skip


def _differentiable(stn: SelfTuningNetwork, inputs: object) -> Inputs:
    """The inputs; where the Jacobian is penalised, derivatives with respect to them are recorded."""
    inputs = inputs_of(stn, inputs)
    if not stn.terms.jacobian:
        return inputs
    result: Inputs = tree_map_only(
        Tensor, lambda x: x.detach().requires_grad_() if x.is_floating_point() else x, inputs
    )
    return result


Parts = tuple[Tensor, Count, Count, bool | Tensor, tuple[Tensor | float, ...]]  # the fields of a Loss


def _parts(loss: Loss, penalties: Sequence[Tensor | float]) -> Parts:
    """A loss with further penalties, in a form that compiled code can return; there the penalties are one number."""
    added = (*loss.penalties, *penalties)
    joined = (sum(added),) if torch.compiler.is_compiling() else added
    return loss.data, loss.count, loss.entries, loss.additive, joined


@dataclass(frozen=True)
class _TrainingLoss:
    """L_T at λ₀ + ε of what a graph returns: the loss function and every penalty.

    epsilon: None for zero.
    reads: whether loss_fn takes hparams.
    decays: of `general_loss`.
    """

    stn: SelfTuningNetwork
    loss_fn: LossFunction
    inputs: Inputs
    target: object
    epsilon: Tensor | None
    reads: bool
    decays: bool = True

    def __call__(self, result: Any) -> Parts:
        stn, target = self.stn, targets.moved_target(self.target, self.loss_fn)
        output, auxiliary = result if stn.terms.auxiliary else (result, ())
        strengths = stn.hparams(self.epsilon)
        for spec, value in zip(stn.terms.auxiliary, auxiliary, strict=True):
            target = spec.retarget(target, output, value)
        hparams = stn.hparams.named(strengths.expand(batch_size(self.inputs), -1)) if self.reads else None
        loss = evaluate_loss(self.loss_fn, output, self.inputs, target, hparams, self.reads)
        penalties = [stn.penalty(self.epsilon)] if self.decays else []
        penalties += [spec.penalty(value) for spec, value in zip(stn.terms.auxiliary, auxiliary, strict=True)]
        for index, projections in stn.terms.jacobian:
            penalties.append((strengths[..., index] * squared_jacobian(output, self.inputs, projections)).mean())
        return _parts(loss, penalties)


@dataclass(frozen=True)
class _ValidationLoss:
    """L_V − τ H[ε] of what a graph returns, τ the entropy_weight. reads: whether loss_fn takes hparams; it gets None."""

    stn: SelfTuningNetwork
    loss_fn: LossFunction
    inputs: Inputs
    target: object
    reads: bool
    entropy_weight: float = 0.0

    def __call__(self, output: Any) -> Parts:
        loss = evaluate_loss(self.loss_fn, output, self.inputs, self.target, None, self.reads)
        return _parts(loss, self.stn.hparams.entropy_terms(self.entropy_weight))


def hyper_loss(
    stn: SelfTuningNetwork,
    loss_fn: LossFunction,
    inputs: object,
    target: object,
    *,
    entropy_weight: float = 1e-3,
    perturb: Perturb = "auto",
) -> Loss:
    """`fxstn.hyper_loss`, with what it is a mean over."""
    _check_network(stn)
    inputs = inputs_of(stn, inputs)
    unconstrained, off = stn.hparams.unconstrained, not isinstance(perturb, Tensor) and perturb == "off"
    if off and stn.method != "stn":
        finish = _ValidationLoss(stn, loss_fn, inputs, target, takes_hparams(loss_fn))
        loss = Loss(*stn.output_at_rest(*inputs.args, finish=finish, **inputs.kwargs))
        if loss.data.requires_grad:
            loss = replace(loss, data=through_response(loss.data, unconstrained, stn.response, stn.named_weights))
        return loss.with_penalties(*stn.hparams.entropy_terms(entropy_weight))
    delta = unconstrained - unconstrained.detach()
    delta = delta if off else delta + perturbation(stn, inputs, perturb)
    with frozen((*stn.response_parameters(), *stn.general_parameters())):
        finish = _ValidationLoss(stn, loss_fn, inputs, target, takes_hparams(loss_fn), entropy_weight)
        return Loss(*stn.perturbed_output(*inputs.args, delta=delta, training=False, finish=finish, **inputs.kwargs))


def validation_loss(
    stn: SelfTuningNetwork, loss_fn: LossFunction, inputs: object, target: object
) -> tuple[Loss, object]:
    """(L_V, output) of the plain network in eval mode, without gradients: what is reported and selected on."""
    inputs = inputs_of(stn, inputs)
    with eval_mode(stn):
        output = stn(*inputs.args, **inputs.kwargs)
        return evaluate_loss(loss_fn, output, inputs, target), output
