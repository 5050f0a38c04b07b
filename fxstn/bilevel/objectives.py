"""The three objectives of Δ-STN (paper, Alg. 1), each a scalar to call .backward() on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fxstn.bilevel.lending import evaluating
from fxstn.ir.input_errors import explained_loss_errors
from fxstn.network import SelfTuningNetwork
from fxstn.ops.batch_axis import batch_size
from fxstn.ops.penalty import squared_jacobian
from fxstn.ops.response import frozen

LossFunction = Callable[..., Tensor]
Perturb = str | Tensor | None


def as_tuple(inputs: Any) -> tuple:
    """Inputs as a tuple of them."""
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def takes_hparams(loss_fn: LossFunction) -> bool:
    """Whether a loss function has a parameter named `hparams`."""
    try:
        signature = inspect.signature(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn)
    except ValueError:  # some builtins have none
        return False
    return "hparams" in signature.parameters


def evaluate_loss(
    loss_fn: LossFunction, output: Any, target: Any, examples: int, hparams: dict[str, Tensor] | None
) -> Tensor:
    """loss_fn(output, target), with `hparams` where it takes them.

    Raises ValueError when there are no examples, when the target has another number of them than the inputs, when the loss
    function cannot take the two, and when the loss is not a scalar, or no function of the output that autograd knows.
    """
    if not examples:
        raise ValueError("the batch has no examples; leave it out")
    if isinstance(target, Tensor) and target.dim() and target.shape[0] % examples:  # a multiple: targets per token
        raise ValueError(f"the target has {target.shape[0]} examples, the inputs have {examples}; give as many")
    with explained_loss_errors(output, target):
        loss = loss_fn(output, target, hparams=hparams) if takes_hparams(loss_fn) else loss_fn(output, target)
    if not isinstance(loss, Tensor) or loss.dim():
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a scalar tensor, the mean over the batch; got {got}")
    if not loss.requires_grad and torch.is_grad_enabled() and _has_gradient(output):
        raise ValueError("loss_fn returns a tensor without a gradient; compute it from the output in torch operations, without "
                         ".item(), .detach() or no_grad")  # fmt: skip
    return loss


def _has_gradient(output: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output))


def perturbation(stn: SelfTuningNetwork, inputs: Any, perturb: Perturb) -> Tensor:
    """ε of a step, (batch, h) or (h,)."""
    inputs = as_tuple(inputs)
    if isinstance(perturb, Tensor):
        return perturb
    if perturb not in (None, "example", "batch"):
        raise ValueError(
            f"perturb={perturb!r} is neither 'example' nor 'batch' (nor None, for what the network allows)"
        )
    per_example = stn.per_example(*inputs) if perturb is None else perturb == "example"
    return stn.hparams.sample(batch_size(inputs)) if per_example else stn.hparams.sample(1)[0]


def general_loss(
    stn: SelfTuningNetwork, loss_fn: LossFunction, inputs: Any, target: Any, *, perturb: Perturb = None
) -> Tensor:
    """L_T(λ₀, f(x; w₀, λ₀)) (paper, Eq. 3.9): a plain training loss, for w₀.

    inputs: a tensor or a tuple of them, (batch, ...). target: what loss_fn takes. For method "stn" this is the one
    objective of all parameters, L_T at λ + ε (MacKay et al. 2019), with `perturb` as in `response_loss`; the other methods
    draw no perturbation here.
    """
    if stn.method == "stn":
        return _perturbed_loss(stn, loss_fn, inputs, target, perturb, 1.0, update_statistics=True)
    inputs = _watched(stn, inputs)
    output, auxiliary = stn.conditioned_output(*inputs)
    return _training_loss(stn, loss_fn, inputs, target, output, auxiliary, None)


def response_loss(
    stn: SelfTuningNetwork, loss_fn: LossFunction, inputs: Any, target: Any, *, perturb: Perturb = None,
    widening: float = 1.0,
) -> Tensor:  # fmt: skip
    """L_T(λ₀ + ε, y + dy) (paper, Eq. 3.10 and 3.13), for Θ; w₀ gets no gradient and running statistics stay.

    Arguments as in `general_loss`. perturb: "example" draws one ε per example (the paper), "batch" one for all; None: per
    example, unless the network moves the batch dimension where it cannot be followed; or ε itself, (batch, h) or (h,).
    widening: ≥ 1, how many times σ at most ε has near the ends of a range, where a change of λ changes little (the paper: 1).
    """
    return _perturbed_loss(stn, loss_fn, inputs, target, perturb, widening, update_statistics=False)


def _perturbed_loss(
    stn: SelfTuningNetwork,
    loss_fn: LossFunction,
    inputs: Any,
    target: Any,
    perturb: Perturb,
    widening: float,
    update_statistics: bool,
) -> Tensor:
    inputs = _watched(stn, inputs)
    epsilon = perturbation(stn, inputs, perturb).detach()
    if widening > 1:
        epsilon = epsilon * stn.hparams.widening(widening)
    output, auxiliary = stn.perturbed_output(
        *inputs, delta=epsilon, condition=epsilon, training=True, update_statistics=update_statistics
    )
    return _training_loss(stn, loss_fn, inputs, target, output, auxiliary, epsilon)


def _watched(stn: SelfTuningNetwork, inputs: Any) -> tuple:
    """The inputs as a tuple; where the Jacobian is penalised, so that derivatives with respect to them are recorded."""
    inputs = as_tuple(inputs)
    if not stn.terms.jacobian:
        return inputs
    return tree_map_only(Tensor, lambda x: x.detach().requires_grad_() if x.is_floating_point() else x, inputs)


def _training_loss(
    stn: SelfTuningNetwork,
    loss_fn: LossFunction,
    inputs: tuple,
    target: Any,
    output: Any,
    auxiliary: tuple,
    epsilon: Tensor | None,
) -> Tensor:
    """L_T of an output at λ₀ + ε (None: λ₀): the loss function and every penalty."""
    examples, strengths = batch_size(inputs), stn.hparams(epsilon)
    for spec, value in zip(stn.terms.auxiliary, auxiliary, strict=True):
        target = spec.retarget(target, output, value)
    hparams = stn.hparams.named(strengths.expand(examples, -1)) if takes_hparams(loss_fn) else None
    loss = evaluate_loss(loss_fn, output, target, examples, hparams) + stn.penalty(epsilon)
    for spec, value in zip(stn.terms.auxiliary, auxiliary, strict=True):
        loss = loss + spec.penalty(value)
    for index, projections in stn.terms.jacobian:
        loss = loss + (strengths[..., index] * squared_jacobian(output, inputs, projections)).mean()
    return loss


def hyper_loss(
    stn: SelfTuningNetwork,
    loss_fn: LossFunction,
    inputs: Any,
    target: Any,
    *,
    entropy_weight: float = 1e-3,
    perturb: Perturb = None,
) -> Tensor:
    """L_V(y + dy) − τ H[ε] (paper, Eq. 2.7 with 3.13), for λ and σ; w₀ and Θ get no gradient.

    Arguments as in `response_loss`, on validation data; the network is in eval mode, but that with method "delta" batch norms
    normalise by this batch, as where Θ was learned (`transform`, statistics). entropy_weight: τ ≥ 0. A loss_fn
    that takes `hparams` gets None: L_V must not read λ, or λ would minimise it directly. perturb: also "none", for the
    gradient at λ itself: ε = 0, and σ gets its gradient from the entropy alone.
    """
    inputs = as_tuple(inputs)
    examples = batch_size(inputs)
    unconstrained = stn.hparams.unconstrained
    delta = unconstrained - unconstrained.detach()
    if perturb != "none":
        delta = delta + perturbation(stn, inputs, perturb)
    with frozen((*stn.response_parameters(), *stn.general_parameters())):
        output, _ = stn.perturbed_output(*inputs, delta=delta, training=False)
    return evaluate_loss(loss_fn, output, target, examples, None) - entropy_weight * stn.hparams.entropy()


def validation_loss(stn: SelfTuningNetwork, loss_fn: LossFunction, inputs: Any, target: Any) -> tuple[Tensor, Any]:
    """(L_V, output) of the plain network in eval mode, without gradients: what is reported and selected on."""
    inputs = as_tuple(inputs)
    with evaluating(stn):
        output = stn(*inputs)
        return evaluate_loss(loss_fn, output, target, batch_size(inputs), None), output
