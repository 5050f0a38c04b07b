"""Guards around a capture: whatever a graph would drop or freeze without a word is refused by name."""

from __future__ import annotations

import re
import traceback
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._library.autograd import make_autograd_impl
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import _checkpoint_hook
from torch.utils.hooks import RemovableHandle

from fxstn.frontends.decompositions import DECOMPOSITIONS
from fxstn.frontends.decompositions.layer_drop import no_layer_skipped
from fxstn.frontends.model_forwards import original_forwards
from fxstn.frontends.module_state import ModuleState, module_state, restore
from fxstn.ir.errors import Diagnostic, TransformError, innermost_user_frame
from fxstn.ir.generators import GlobalRandomState
from fxstn.ir.weighted_l1 import fill_tables_of_torch, l1_keeps_weight

_OF_EXPORT = "inline_constraints"  # a key in the meta of what ExportedProgram.module() returns
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
TENSOR_HOOKS = ("register_hook", "register_post_accumulate_grad_hook")
_LIVE_RUNS_HOOKS = 'remove it, or give transform, or fxstn.tune, trace="live", which runs hooks'
_SAME_VALUES = (save_on_cpu, _checkpoint_hook)  # hooks of torch by which the backward pass reads what the forward saved


class UnsupportedError(Exception):
    """Something in a forward that a graph would drop or freeze without a word.

    where: module path.
    what, remedy: as in `Diagnostic`.
    source: "file:line: code"; "" for the line that raises this.
    """

    def __init__(self, where: str, what: str, remedy: str, source: str = "") -> None:
        super().__init__(what)
        self.where, self.what, self.remedy, self.source = where, what, remedy, source


def refuse_wrapped(model: nn.Module) -> None:
    """Raises ValueError for a model that averages gradients itself, that was exported in one mode, or whose norms belong to a
    group of processes."""
    kinds = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if wrapped := [name for name, module in model.named_modules() if isinstance(module, kinds)]:
        raise ValueError(f"{f'module {wrapped[0]!r}' if wrapped[0] else 'the model'} is wrapped in DataParallel or "
                         "DistributedDataParallel: transform the module inside (.module); BilevelRunner, or "
                         "fxstn.average_gradients in a loop of one's own, averages the gradients")  # fmt: skip
    for name, module in model.named_modules():
        if isinstance(module, fx.GraphModule) and _OF_EXPORT in module.meta:
            raise ValueError(f"{f'module {name!r}' if name else 'the model'} comes from torch.export, which keeps one mode, "
                             "so that dropout acts always or never; transform the module that was exported")  # fmt: skip
        if isinstance(module, nn.SyncBatchNorm) and module.process_group is not None:
            raise ValueError(
                f"module {name!r} is a SyncBatchNorm of a process group: only that of all processes is known; "
                "convert_sync_batchnorm(model) without a group makes those"
            )


def refuse_scripted(model: nn.Module) -> None:
    """Raises TransformError with the path of every outermost module of TorchScript."""
    outermost: list[str] = []
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in outermost)
        if isinstance(module, torch.jit.ScriptModule) and not inside:
            outermost.append(name)
    if outermost:
        what, remedy = "a scripted module, whose operations Python does not see,", "put what was scripted in its place"
        raise TransformError([Diagnostic(name, what, "", remedy) for name in outermost])


class ProblemCollector:
    """Collects what a graph would lose of a forward, each thing once, with its line.

    place: returns the path of the module whose forward is running.
    """

    def __init__(self, place: Callable[[], str]) -> None:
        self.place, self.problems = place, list[Diagnostic]()

    def add(self, what: str, remedy: str, where: str | None = None) -> None:
        where = self.place() if where is None else where
        if all((problem.where, problem.what) != (where, what) for problem in self.problems):
            source = innermost_user_frame("".join(traceback.format_stack()))
            self.problems.append(Diagnostic(where, what, source, remedy))

    def add_tensor_hook(self, *_: object) -> RemovableHandle:
        """In place of the methods `TENSOR_HOOKS` of a tensor."""
        self.add("a hook on a tensor, which a traced graph would lose,", _LIVE_RUNS_HOOKS)
        return RemovableHandle(OrderedDict())

    def add_seed(self, *_: object) -> torch.Generator:
        """In place of torch.manual_seed."""
        self.add("torch.manual_seed, which a traced graph would lose,", 'trace="live" runs it')
        return torch.default_generator


@contextmanager
def mode_of(model: nn.Module, training: bool, frozen: Collection[str]) -> Iterator[None]:
    """The model with its own forwards, in train or in eval mode, except for the modules that stay in eval mode; afterwards as
    it was."""
    before = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        for name, module in model.named_modules():
            if name in frozen:
                module.training = False
        with original_forwards(model):
            yield
    finally:
        for module, flag in before.items():
            module.training = flag


def frozen_modules(model: nn.Module) -> set[str]:
    """Modules that stay in eval mode when the model trains: batch norms frozen by hand or by an overridden train()."""
    if model.training:
        return {name for name, module in model.named_modules() if not module.training}
    with mode_of(model, True, ()):
        return {name for name, module in model.named_modules() if not module.training}


@contextmanager
def guarded_capture(
    model: nn.Module,
    training: bool,
    frozen: Collection[str],
    tool: str,
    unsupported: ProblemCollector,
    regions: list[str] | None = None,
) -> Iterator[None]:
    """The model in one mode, for the time that a tool follows its forward; it is left as it was.

    tool: what follows the forward, for messages.
    unsupported: collects what a graph would lose while the forward is followed on, so that all of it is raised together.
    regions: holds, all the while, the types of device whose autocast is off where the forward is, the innermost region's last.

    Raises TransformError where the forward does something that a graph would drop or freeze without a word: hooks, regions
    with autocast, custom autograd functions, random draws in Python, attributes that the forward assigns, scripted modules; and
    in place of whatever else is raised inside.
    """
    with mode_of(model, training, frozen), _errors_explained(tool, unsupported), _hooks_kept(), _nothing_changed(model):
        refuse_scripted(model)
        if any(getattr(model, hooks) for hooks in HOOKS):
            unsupported.add("a hook, which a traced graph would lose,", "remove it before transform", "")
        operations = _operations_noticed(unsupported, [] if regions is None else regions)
        with operations, _hooks_and_seeds_noticed(unsupported), no_layer_skipped(model), l1_keeps_weight():
            yield


@contextmanager
def _hooks_kept() -> Iterator[None]:
    """Afterwards modules register buffers, parameters and children as before: some versions of torch.export that fail leave
    hooks, by which every later assignment of a buffer fails."""
    tables = [
        getattr(nn.modules.module, f"_global_{kind}_registration_hooks") for kind in ("buffer", "module", "parameter")
    ]
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, own in zip(tables, before, strict=True):
            table.clear()
            table.update(own)


@contextmanager
def _operations_noticed(unsupported: ProblemCollector, regions: list[str]) -> Iterator[None]:
    """Decompositions stand in for modules; custom autograd functions and regions with autocast are collected as unsupported."""
    enter_autocast, exit_autocast = torch.autocast.__enter__, torch.autocast.__exit__
    apply = torch.autograd.Function.__dict__["apply"]

    def custom_function(cls: type[torch.autograd.Function], *args: object, **kwargs: object) -> object:
        if cls.__module__ == make_autograd_impl.__module__:  # a custom operator, which the graph keeps as one node
            return apply.__get__(None, cls)(*args, **kwargs)
        what = f"custom autograd function {cls.__name__}, whose backward a traced graph would lose,"
        unsupported.add(what, "write it with torch operations")
        without_context = cls.setup_context is not torch.autograd.Function.setup_context
        return cls.forward(*([] if without_context else [mock.MagicMock()]), *args, **kwargs)

    def enter(region: torch.autocast) -> object:
        if region._enabled:
            what = "an autocast region, which a traced graph would lose,"
            unsupported.add(what, "put autocast around the training step")
        regions.append(region.device)
        return enter_autocast(region)

    def leave(region: torch.autocast, *error: Any) -> object:
        regions.pop()
        return exit_autocast(region, *error)

    with ExitStack() as patches:
        for original, decomposition in DECOMPOSITIONS.items():
            if isinstance(original, type):
                patches.enter_context(mock.patch.object(original, "forward", decomposition))
        patches.enter_context(mock.patch.object(torch.autograd.Function, "apply", classmethod(custom_function)))
        patches.enter_context(mock.patch.object(torch.autocast, "__enter__", enter))
        patches.enter_context(mock.patch.object(torch.autocast, "__exit__", leave))
        yield


@contextmanager
def _hooks_and_seeds_noticed(unsupported: ProblemCollector) -> Iterator[None]:
    """Hooks that the forward sets on tensors, or on what is saved for the backward pass, and seeds are collected as
    unsupported."""
    enter = saved_tensors_hooks.__enter__

    def enter_region(hooks: saved_tensors_hooks) -> None:
        if not isinstance(hooks, _SAME_VALUES):
            unsupported.add("a region with saved_tensors_hooks, which a traced graph would lose,", _LIVE_RUNS_HOOKS)
        enter(hooks)

    fill_tables_of_torch()
    with ExitStack() as patches:
        for place in (torch, torch.random):
            patches.enter_context(mock.patch.object(place, "manual_seed", unsupported.add_seed))
        for name in TENSOR_HOOKS:
            patches.enter_context(mock.patch.object(Tensor, name, unsupported.add_tensor_hook))
        patches.enter_context(mock.patch.object(saved_tensors_hooks, "__enter__", enter_region))
        yield


def _refuse_assigned(before: ModuleState) -> None:
    if assigned := sorted(set(restore(before)) - {"_tensor_constants"}):
        what = f"the forward assigns {', '.join(map(repr, assigned))}, which a traced graph would lose,"
        remedy = "return the value, or keep it outside of the model"
        if assigned[0].startswith("_tensor_constant"):
            what, remedy = "a tensor that is no attribute of the model", "register it as a buffer"
        raise UnsupportedError("", what, remedy)


@contextmanager
def _nothing_changed(model: nn.Module) -> Iterator[None]:
    """Raises UnsupportedError where the forward assigned attributes or drew random numbers in Python. Both are undone."""
    before, generators = module_state(model), GlobalRandomState.current()
    try:
        try:
            yield
        except ValueError as error:  # older versions of torch.export look themselves
            if re.search("attrs were created in the model.forward|Node arity mismatch", str(error)):
                _refuse_assigned(before)
            raise
        _refuse_assigned(before)
        if not generators.still_holds():
            what = "a random draw in Python, which a traced graph would freeze,"
            raise UnsupportedError("", what, "draw it with torch, from the input")
    finally:
        restore(before)
        generators.set()


@contextmanager
def _errors_explained(tool: str, unsupported: ProblemCollector) -> Iterator[None]:
    """Raises TransformError in place of whatever is raised inside, with what was collected until then, and for that alone."""
    try:
        yield
    except TransformError:
        raise
    except Exception as error:
        source = innermost_user_frame(traceback.format_exc())
        reason = _refusal_behind(error)
        if reason is not None:
            problem = Diagnostic(reason.where, reason.what, reason.source or source, reason.remedy)
            raise TransformError([*unsupported.problems, problem]) from None
        what = f"{tool} cannot follow the forward ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
        remedy = "replace the branch or loop that depends on data or shapes there"
        problem = Diagnostic(unsupported.place(), what, source, remedy)
        raise TransformError([*unsupported.problems, problem]) from error
    if unsupported.problems:
        raise TransformError(unsupported.problems)


def _refusal_behind(error: BaseException | None) -> UnsupportedError | None:
    """The UnsupportedError that an exception is, or that it was raised from."""
    while error is not None and not isinstance(error, UnsupportedError):
        error = error.__cause__ or error.__context__
    return error
