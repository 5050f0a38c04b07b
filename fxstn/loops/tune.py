"""fxstn.tune: tunes the regularisation of a model in the training loop that its user already has."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict, TypeVar, Unpack, cast

import torch
from torch import nn
from torch.optim import Optimizer

from fxstn.bilevel import distributed
from fxstn.bilevel.arguments import check_loader
from fxstn.bilevel.checks import check_synced_norms
from fxstn.bilevel.losses import LossFunction
from fxstn.bilevel.network_problem import NetworkProblem, as_problem
from fxstn.bilevel.run_settings import Settings
from fxstn.bilevel.settings import ExecutionSettings, HyperSettings, ResponseSettings
from fxstn.bilevel.validation import example_batch
from fxstn.frontends.model_forwards import has_owner, note_owner, restore_modules
from fxstn.frontends.original import COMPILED
from fxstn.hp import Spec
from fxstn.ir.input_errors import in_a_line
from fxstn.loops.attached import AttachedTuner
from fxstn.loops.checks import check_arguments, check_names_of_settings, check_order
from fxstn.loops.decay import decayed_specs, start_at_decay, without_undecayed
from fxstn.loops.forwards import BatchReader, Forward, default_forward, loss_of, own_loss
from fxstn.loops.observed import can_be_observed
from fxstn.loops.step_hooks import unwrapped_optimizer
from fxstn.network import SelfTuningNetwork
from fxstn.passes.request import Request, check_model
from fxstn.passes.take_over import ForwardDiffersError, condition_model
from fxstn.transform import FRONTENDS, network_over

Loader = TypeVar("Loader", bound=Iterable[object])


class TuneSettings(TypedDict, total=False):
    """The settings of `fxstn.tune`."""

    response: ResponseSettings
    hyper: HyperSettings
    execution: ExecutionSettings
    callbacks: Sequence[Callable[[LoopTuner], object]]
    trace: str
    statistics: str


class LoopTuner(AttachedTuner):
    """What `fxstn.tune` returns: tunes λ while somebody else trains.

    `values()` are the hyperparameters now, `history` has a row for each epoch. `state_dict()` and `load_state_dict(state)` are
    for the checkpoint of the loop. `report(path)` writes a page, `detach()` leaves a plain model. `follow(loader)` is for loops
    that have a second one, `step(batch)` and `end_epoch()` for those without a train_loader.
    """

    def follow(self, loader: Loader) -> Loader:
        """Also see the passes over another loader, until `detach`; returns it.

        loader: what the loop iterates over for a while in place of train_loader, as of accelerator.skip_first_batches.

        Raises ValueError where the tuner has no train_loader that it sees, and for a loader whose passes cannot be seen.
        """
        remedy = "call tuner.step(batch) after each step"
        if not self.loaders.seen:
            raise ValueError(f"follow: the tuner sees the passes of no train_loader; {remedy}, with train_loader=None")
        if not can_be_observed(loader):
            raise ValueError(f"follow: the passes over a {type(loader).__name__} cannot be seen; give a loader, such as a "
                             f"DataLoader; or {remedy}, with train_loader=None")  # fmt: skip
        self.loaders.follow(loader)
        return loader


def tune(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    loss_fn: LossFunction | None,
    train_loader: Iterable[object] | None,
    valid_loader: Iterable[object],
    hparams: Sequence[Spec] | None = None,
    *,
    forward: Forward | None = None,
    valid_loss_fn: LossFunction | None = None,
    example_inputs: object = None,
    epoch_steps: int | None = None,
    **settings: Unpack[TuneSettings],
) -> LoopTuner:
    """Tune the regularisation of a model from now on, in the training loop that there is. The loop does not change.

    model: stays the object that it is. It may be wrapped in DistributedDataParallel or compiled, before or after. In train mode
        its random operations draw at λ.
    optimizer: of the model, or several that step together; accelerator.prepare may have wrapped them. Their step hooks run the
        tuner; a step that is left out is none.
    loss_fn: loss_fn(output, target) → scalar, the mean over the batch, or (sum, count). None: the loss that the model returns.
        One with an argument `hparams` reads numbers of the loss, such as hp.LabelSmoothing(): the loop's own loss then gets
        `tuner.strengths(examples)`, too.
    train_loader: the very object that the loop iterates over; a list is for a step per batch. None: call `step(batch)` after
        optimizer.step().
    valid_loader: held-out data. The tuner takes batches of the training size from its data set.
    hparams: as for `fxstn.transform`. hp.WeightDecay() takes over the optimizer's weight_decay, coupled or decoupled as it is
        there, and starts from it; groups without decay stay without, unless a spec is for them alone.
    forward: function (model, batch) → (output, target). Default: for (inputs, target), longer tuples, dicts with "labels".
    valid_loss_fn: loss of validation batches. Default: loss_fn.
    example_inputs: as for `fxstn.transform`. Default: a few examples of train_loader.
    epoch_steps: ≥ 1, optimizer steps between two evaluations. Default: those of a pass over train_loader.
    settings: response, hyper and execution as for `fxstn.BilevelRunner`, where autocast by default follows the loop; callbacks,
        functions of the tuner, called after each row; trace and statistics as for `fxstn.transform`.

    Several processes: all must call it; the tuner averages what is its own. Raises TransformError, ValueError and TypeError as
    transform and BilevelRunner, and ValueError for what the model's own forward cannot do (hp.DropConnect, hp.MixUp, hp.CutMix,
    hp.ActivationDecay, hp.TemporalDecay, hp.JacobianNorm).
    """
    check_names_of_settings(settings, list(TuneSettings.__annotations__))
    check_order(optimizer, loss_fn, train_loader, valid_loader, hparams)
    functions = {"loss_fn": loss_fn, "valid_loss_fn": valid_loss_fn, "forward": forward}
    check_arguments(hparams, functions, epoch_steps, settings.get("callbacks", ()))
    parts = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    plain, optimizers = unwrapped(model), [unwrapped_optimizer(part) for part in parts]
    check_model(plain)
    _check_loop(plain, optimizers, train_loader, valid_loader)
    restore_modules(plain)  # of a tuner that nobody has any more
    forward = forward or (own_loss if loss_fn is None else default_forward)
    reader = BatchReader(forward, plain)
    loader = valid_loader if train_loader is None else train_loader
    with reader.seeded(0, 0):
        examples = reader(example_batch(loader))[0] if example_inputs is None else example_inputs
    trace, statistics = settings.get("trace", "auto"), settings.get("statistics", "batch")
    groups = {name: value for name, value in settings.items() if name not in ("trace", "statistics")}

    def build(specs: Sequence[Spec] | None) -> SelfTuningNetwork:
        return network_over(plain, Request(specs, examples, "delta", None, trace, False, statistics, FRONTENDS))

    specs = decayed_specs(hparams, optimizers)
    try:
        network = build(specs)
    except (ValueError, TypeError):
        if example_inputs is not None:
            raise
        with reader.seeded(0, 0):
            examples = reader(example_batch(loader, None))[0]  # some nodes of a graph are no batch
        network = build(specs)
    if (decayed := without_undecayed(network, specs, optimizers)) is not specs:
        network = build(decayed)
    start_at_decay(network, optimizers)
    loss = loss_of(forward, plain, loss_fn)
    valid_loss = loss if valid_loss_fn is None else loss_of(forward, plain, valid_loss_fn)
    options = Settings(valid_loss_fn=valid_loss, unpack=reader, **groups)  # type: ignore[arg-type]
    problem = as_problem(network, loss, options)
    assert isinstance(problem, NetworkProblem)
    execute(network, options.execution)
    check_synced_norms(network)
    distributed.share((*network.response.parameters(), *network.hparams.parameters()))
    data, seed = (train_loader, valid_loader), distributed.common_seed()
    try:
        strengths = condition_model(plain, network, examples)
    except ForwardDiffersError:
        if trace != "auto" or not network.recipe.frontend.rewritable:
            raise
        options_of_live: TuneSettings = {**settings, "trace": "live"}  # which follows the very calls of the forward
        return tune(
            model, optimizer, loss_fn, train_loader, valid_loader, hparams, forward=forward, valid_loss_fn=valid_loss_fn,
            example_inputs=example_inputs, epoch_steps=epoch_steps, **options_of_live,
        )  # fmt: skip
    try:
        tuner = LoopTuner(plain, problem, options, optimizers, data, epoch_steps, strengths, reader, seed)
    except BaseException:
        restore_modules(plain)
        raise
    note_owner(plain, tuner)
    return tuner


def execute(network: SelfTuningNetwork, settings: ExecutionSettings) -> None:
    """Compile the tuner's graphs where the settings say so. Raises ValueError for another device than the model's."""
    device = network.hparams.unconstrained.device
    if settings.device is not None and torch.device(settings.device).type != device.type:
        raise ValueError(f"execution.device={settings.device!r}, and the model is on {device}: the tuner works where the "
                         "model is; leave it out, and move the model before tune")  # fmt: skip
    if settings.compile:  # without CUDA graphs: they would write over what the loop's own CUDA graphs return
        network.compile(**settings.compile if isinstance(settings.compile, dict) else {})


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, where it is wrapped in DistributedDataParallel, compiled, or set up by Lightning Fabric.

    Raises ValueError where DataParallel runs copies of it on several devices.
    """
    while isinstance(model, nn.Module):
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise ValueError(
                f"nn.DataParallel runs copies of the model on {len(model.device_ids)} devices, which a tuner cannot follow: "
                "start a process per device, with torchrun, or let the program see one device, CUDA_VISIBLE_DEVICES=0"
            )
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif COMPILED in model._modules:
            model = model.get_submodule(COMPILED)
        elif isinstance(vars(type(model)).get("module"), property):  # Lightning Fabric's wrapper
            model = cast(nn.Module, model.module)
        else:
            break
    return model


def _check_loop(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    train_loader: Iterable[object] | None,
    valid_loader: Iterable[object],
) -> None:
    """Raises ValueError and TypeError where the pieces of a loop do not go together."""
    if not optimizers or (wrong := [part for part in optimizers if not isinstance(part, Optimizer)]):
        got = in_a_line(wrong[0]) if optimizers else "none"
        raise TypeError(f"optimizer must be an optimizer of the model, or a list of them, got {got}")
    if len({id(part) for part in optimizers}) < len(optimizers):
        raise ValueError("optimizer names one twice; give each optimizer that steps with the others once")
    steps = {id(p) for part in optimizers for group in part.param_groups for p in group["params"]}
    if not any(id(parameter) in steps for parameter in model.parameters()):
        raise ValueError(
            "optimizer has none of the model's parameters: make it of model.parameters(), of this very model"
        )
    if has_owner(model):
        gc.collect()  # a tuner that nobody has any more, as after an error in its loop, holds itself
        if has_owner(model):
            raise ValueError(
                "the model is tuned already; call detach() of that tuner first, maybe one of an earlier cell, or drop it "
                "together with its optimizer"
            )
    if train_loader is not None:
        check_loader(train_loader, "train_loader")
    check_loader(valid_loader, "valid_loader")
    if compiled := [name for name, module in model.named_modules() if COMPILED in module._modules]:
        raise ValueError(
            f"module {compiled[0]!r} is wrapped by torch.compile: compile it in place, by module.compile(), or after tune"
        )
