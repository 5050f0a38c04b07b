"""The three objectives of Δ-STN (paper, Alg. 1), each a scalar to call .backward() on, and a loss that reads λ."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fxstn.bilevel.checks import remark_on
from fxstn.bilevel.temporary import eval_mode
from fxstn.ir.containers import leaves
from fxstn.ir.input_errors import explained_loss_errors
from fxstn.network import SelfTuningNetwork
from fxstn.ops.batch_axis import batch_size
from fxstn.ops.penalty import squared_jacobian
from fxstn.ops.response import frozen

LossFunction = Callable[..., Tensor]  # (output, target), or (output, target, hparams)
PerturbMode = Literal["auto", "example", "batch", "off"]
Perturb = PerturbMode | Tensor


def cross_entropy(output: Tensor, target: Tensor, hparams: Mapping[str, Tensor] | None = None) -> Tensor:
    """`F.cross_entropy`, with the label smoothing of each example where `hparams` has "label_smoothing".

    output: (batch, classes), logits.
    target: (batch,), classes, or (batch, classes), probabilities.
    hparams: {name: (batch,)}. None, as in the hyper step and in evaluation: the plain loss.

    Returns a scalar, the mean over the batch.
    """
    losses = F.cross_entropy(output, target, reduction="none")
    smoothing = None if hparams is None else hparams.get("label_smoothing")
    if smoothing is not None:
        losses = losses + smoothing * (-F.log_softmax(output, -1).mean(-1) - losses)
    return losses.mean()


def as_tuple(inputs: object) -> tuple:
    """Inputs as a tuple of them."""
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def takes_hparams(loss_fn: LossFunction) -> bool:
    """Whether a loss function has a parameter named `hparams`."""
    try:
        signature = inspect.signature(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn)
    except ValueError:  # some builtins have no signature
        return False
    return "hparams" in signature.parameters


def evaluate_loss(
    loss_fn: LossFunction, output: object, target: object, examples: int, hparams: dict[str, Tensor] | None
) -> Tensor:
    """loss_fn(output, target), with `hparams` where it takes them.

    examples: of the inputs.

    Raises ValueError where there are no examples, where the target has another number of them than the inputs, where the loss
    function cannot take the two, and where the loss is not a scalar, or no function of the output that autograd knows.
    """
    if not examples:
        raise ValueError("the batch has no examples; leave it out")
    if (
        isinstance(target, Tensor) and target.dim() and target.shape[0] % examples
    ):  # a multiple is allowed: targets per token
        raise ValueError(f"the target has {target.shape[0]} examples, the inputs have {examples}; give as many")
    with explained_loss_errors(output, target):
        loss = loss_fn(output, target, hparams=hparams) if takes_hparams(loss_fn) else loss_fn(output, target)
    if not isinstance(loss, Tensor) or loss.dim():
        kind = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a scalar tensor, the mean over the batch; got {kind}")
    if not loss.requires_grad and torch.is_grad_enabled() and _has_gradient(output):
        raise ValueError("loss_fn returns a tensor without a gradient; compute it from the output in torch operations, without "
                         ".item(), .detach() or no_grad")  # fmt: skip
    return loss


def _has_gradient(output: object) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves(output))


def _check_network(stn: object) -> None:
    if not hasattr(stn, "perturbed_output"):  # a compiled network has it, too
        raise TypeError(f"stn must come from fxstn.transform, got {type(stn).__name__}; give transform(model, hparams)")


def perturbation(stn: SelfTuningNetwork, inputs: object, perturb: Perturb) -> Tensor:
    """ε of a step.

    perturb: "example" draws one ε per example, (batch, h), and "batch" one for all examples, (h,). "auto" draws one per example
        where the network allows. Or ε itself, in one of the two shapes.

    Raises ValueError for anything else.
    """
    inputs = as_tuple(inputs)
    if isinstance(perturb, Tensor):
        return perturb
    if perturb not in ("auto", "example", "batch"):
        raise ValueError(f"perturb={perturb!r} must be 'auto', 'example', 'batch' or a tensor{remark_on(perturb)}")
    per_example = stn.per_example(*inputs) if perturb == "auto" else perturb == "example"
    return stn.hparams.sample(batch_size(inputs)) if per_example else stn.hparams.sample(1)[0]


def general_loss(
    stn: SelfTuningNetwork, loss_fn: LossFunction, inputs: object, target: object, *, perturb: Perturb = "auto"
) -> Tensor:
    """L_T(λ₀, f(x; w₀, λ₀)) (paper, Eq. 3.9): a plain training loss, for w₀.

    inputs: a tensor or a tuple of them, (batch, ...).
    target: what loss_fn takes.
    perturb: as in `response_loss`, for method "stn" only. There this is the one objective of all parameters, L_T at λ + ε
        (MacKay et al. 2019); the other methods draw no perturbation here.
    """
    _check_network(stn)
    if stn.method == "stn":
        return _perturbed_loss(stn, loss_fn, inputs, target, perturb, 1.0, update_statistics=True)
    inputs = _differentiable(stn, inputs)
    output, auxiliary = stn.conditioned_output(*inputs)
    return _training_loss(stn, loss_fn, inputs, target, output, auxiliary, None)


def response_loss(
    stn: SelfTuningNetwork, loss_fn: LossFunction, inputs: object, target: object, *, perturb: Perturb = "auto",
    widening: float = 1.0,
) -> Tensor:  # fmt: skip
    """L_T(λ₀ + ε, y + dy) (paper, Eq. 3.10 and 3.13), for Θ; w₀ gets no gradient and running statistics stay.

    inputs, target: as in `general_loss`.
    perturb: "example" draws one ε per example (the paper), "batch" one for all examples. "auto" draws one per example, unless
        the network moves the batch dimension where it cannot be followed. Or ε itself, (batch, h) or (h,).
    widening: ≥ 1, how many times σ at most ε has near the ends of a range, where a change of λ changes little (the paper: 1).
    """
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
) -> Tensor:
    inputs = _differentiable(stn, inputs)
    epsilon = perturbation(stn, inputs, perturb).detach()
    if widening > 1:
        epsilon = epsilon * stn.hparams.widening(widening)
    output, auxiliary = stn.perturbed_output(
        *inputs, delta=epsilon, condition=epsilon, training=True, update_statistics=update_statistics
    )
    return _training_loss(stn, loss_fn, inputs, target, output, auxiliary, epsilon)


def _differentiable(stn: SelfTuningNetwork, inputs: object) -> tuple:
    """The inputs as a tuple; where the Jacobian is penalised, derivatives with respect to them are recorded."""
    inputs = as_tuple(inputs)
    if not stn.terms.jacobian:
        return inputs
    result: tuple = tree_map_only(Tensor, lambda x: x.detach().requires_grad_() if x.is_floating_point() else x, inputs)
    return result


def _training_loss(
    stn: SelfTuningNetwork,
    loss_fn: LossFunction,
    inputs: tuple,
    target: object,
    output: object,
    auxiliary: Sequence,
    epsilon: Tensor | None,
) -> Tensor:
    """L_T of an output at λ₀ + ε: the loss function and every penalty.

    epsilon: None for zero.
    """
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
    inputs: object,
    target: object,
    *,
    entropy_weight: float = 1e-3,
    perturb: Perturb = "auto",
) -> Tensor:
    """L_V(y + dy) − τ H[ε] (paper, Eq. 2.7 with 3.13), for λ and σ; w₀ and Θ get no gradient.

    inputs, target: as in `response_loss`, of validation data.
    entropy_weight: τ ≥ 0.
    perturb: as in `response_loss`, or "off": ε = 0, the gradient at λ itself, and σ gets its gradient from the entropy alone.

    The network is in eval mode. With method "delta", batch norms normalise by this batch all the same, as where Θ was learned
    (`transform`, statistics). A loss_fn that takes `hparams` gets None: L_V must not read λ, or λ would minimise it directly.
    """
    _check_network(stn)
    inputs = as_tuple(inputs)
    examples = batch_size(inputs)
    unconstrained = stn.hparams.unconstrained
    delta = unconstrained - unconstrained.detach()
    if isinstance(perturb, Tensor) or perturb != "off":
        delta = delta + perturbation(stn, inputs, perturb)
    with frozen((*stn.response_parameters(), *stn.general_parameters())):
        output, _ = stn.perturbed_output(*inputs, delta=delta, training=False)
    return evaluate_loss(loss_fn, output, target, examples, None) - entropy_weight * stn.hparams.entropy()


def validation_loss(
    stn: SelfTuningNetwork, loss_fn: LossFunction, inputs: object, target: object
) -> tuple[Tensor, object]:
    """(L_V, output) of the plain network in eval mode, without gradients: what is reported and selected on."""
    inputs = as_tuple(inputs)
    with eval_mode(stn):
        output = stn(*inputs)
        return evaluate_loss(loss_fn, output, target, batch_size(inputs), None), output
