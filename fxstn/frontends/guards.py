"""What following a forward must not lose: whatever a graph would drop or freeze without a word is refused by name."""

from __future__ import annotations

import copy
import pickle
import random
import traceback
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy
import torch
from torch import nn

from fxstn.frontends.decompositions import DECOMPOSITIONS
from fxstn.ir.errors import Diagnostic, TransformError, innermost_user_frame

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class UnsupportedError(Exception):
    """Something that a symbolic trace would silently drop."""

    def __init__(self, where: str, what: str, remedy: str, source: str = "") -> None:
        super().__init__(what)
        self.where, self.what, self.remedy, self.source = where, what, remedy, source


def refuse_wrapped(model: nn.Module) -> None:
    """Raises ValueError for a model made for several processes in another way than the runner's: wrapped, norms of a group."""
    kinds = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if wrapped := [name for name, module in model.named_modules() if isinstance(module, kinds)]:
        raise ValueError(f"{f'module {wrapped[0]!r}' if wrapped[0] else 'the model'} is wrapped in DataParallel or "
                         "DistributedDataParallel: transform the module inside (.module); BilevelRunner, or "
                         "fxstn.average_gradients in a loop of one's own, averages the gradients")  # fmt: skip
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and module.process_group is not None:
            raise ValueError(
                f"module {name!r} is a SyncBatchNorm of a process group: only that of all processes is known; "
                "convert_sync_batchnorm(model) without a group makes those"
            )


class Unsupported:
    """What a graph would lose of a forward, found while it is followed; each once, with its line.

    place: the path of the module whose forward is running.
    """

    def __init__(self, place: Callable[[], str]) -> None:
        self.place, self.problems = place, list[Diagnostic]()

    def add(self, what: str, remedy: str, where: str | None = None) -> None:
        where = self.place() if where is None else where
        if all((problem.where, problem.what) != (where, what) for problem in self.problems):
            source = innermost_user_frame("".join(traceback.format_stack()))
            self.problems.append(Diagnostic(where, what, source, remedy))


def module_state(model: nn.Module) -> dict[nn.Module, dict[str, tuple[Any, Any]]]:
    """Every attribute, parameter and buffer of every module: the value, and what it holds where that can change.

    A scripted module keeps its attributes out of Python; only its tensors can change.
    """

    def held(value: Any) -> Any:
        return copy.copy(value) if type(value) in _CONTAINERS else value

    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    return {module: {name: (value, held(value)) for name, value in vars(module).items()} for module in modules}


def restore(state: dict[nn.Module, dict[str, tuple[Any, Any]]]) -> list[str]:
    """Undo what a forward assigned; returns the names of the attributes that it changed."""
    changed = []
    for module, before in state.items():
        now = vars(module)
        for name in {*now, *before}:
            value, held = before.get(name, (_MISSING, _MISSING))
            if name in _REGISTERED:
                found = now[name]
                changed += [key for key in {*found, *held} if found.get(key, _MISSING) is not held.get(key, _MISSING)]
            elif not same(now.get(name, _MISSING), held):
                changed.append(name)
            if type(value) in _CONTAINERS and not same(value, held):
                value.clear()
                value.extend(held) if isinstance(value, list) else value.update(held)
            if value is _MISSING:
                del now[name]
            else:
                now[name] = value
    return changed


_MISSING = object()
_CONTAINERS = (list, dict, OrderedDict, set)
_REGISTERED = {"_parameters", "_buffers", "_modules"}


def same(a: Any, b: Any) -> bool:
    """The same object, or an equal plain value, or a container of the same; tensors and modules are never compared."""
    if a is b or type(a) is not type(b):
        return a is b
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return isinstance(a, (int, float, str, set)) and a == b


@contextmanager
def mode_of(model: nn.Module, training: bool, frozen: Collection[str]) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        for name, module in model.named_modules():
            if name in frozen:
                module.training = False
        yield
    finally:
        for module, flag in before.items():
            module.training = flag


def _generators() -> tuple[Any, ...]:
    return random.getstate(), pickle.dumps(numpy.random.get_state()), bytes(torch.get_rng_state().numpy())


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
    follower: str,
    place: Callable[[], str],
    full_precision: Callable[[], Any] = lambda: None,
    unsupported: Unsupported | None = None,
) -> Iterator[None]:
    """The model in one mode, for the time that something follows its forward; it is left as it was.

    Raises TransformError where the forward does something that a graph would drop or freeze without a word: hooks, autocast
    regions, custom autograd functions, random draws in Python, attributes that the forward assigns; and in place of whatever
    else is raised inside. follower: what follows, for messages; place: the path of the module whose forward is running;
    full_precision: called where a region without autocast begins. unsupported: found so far; what is found here is added, and
    the forward followed on, so that they are raised together.
    """
    unsupported = unsupported or Unsupported(place)
    enter_autocast = torch.autocast.__enter__

    def refuse_custom_function(cls: type, *args: Any, **kwargs: Any) -> Any:
        what = f"custom autograd function {cls.__name__}, whose backward a traced graph would lose,"
        unsupported.add(what, "write it with torch operations")
        alone = cls.setup_context is not torch.autograd.Function.setup_context  # type: ignore[attr-defined]
        return cls.forward(*([] if alone else [mock.MagicMock()]), *args, **kwargs)  # type: ignore[attr-defined]

    def refuse_autocast(region: Any) -> Any:
        if not region._enabled:
            full_precision()
            return enter_autocast(region)
        unsupported.add("an autocast region, which a traced graph would lose,", "put autocast around the training step")
        return enter_autocast(region)

    patches: list[Any] = [
        mock.patch.object(original, "forward", decomposition)
        for original, decomposition in DECOMPOSITIONS.items()
        if isinstance(original, type)
    ] + [
        mock.patch.object(torch.autograd.Function, "apply", classmethod(refuse_custom_function)),
        mock.patch.object(torch.autocast, "__enter__", refuse_autocast),
    ]
    with mode_of(model, training, frozen):
        before, draws = module_state(model), _generators()
        try:
            _refuse_scripted(model)
            if any(getattr(model, hooks) for hooks in HOOKS):
                unsupported.add("a hook, which a traced graph would lose,", "remove it before transform", "")
            with ExitStack() as stack:
                for patch in patches:
                    stack.enter_context(patch)
                yield
            if assigned := sorted(set(restore(before)) - {"_tensor_constants"}):
                what = f"the forward assigns {', '.join(map(repr, assigned))}, which a traced graph would lose,"
                remedy = "return the value, or keep it outside of the model"
                if assigned[0].startswith("_tensor_constant"):
                    what, remedy = "a tensor that is no attribute of the model", "register it as a buffer"
                raise UnsupportedError("", what, remedy)
            if _generators() != draws:
                what = "a random draw in Python, which a traced graph would freeze,"
                raise UnsupportedError("", what, "draw it with torch, from the input")
        except TransformError:
            raise
        except Exception as error:
            source = innermost_user_frame(traceback.format_exc())
            refused = _refusal(error)
            if refused is not None:
                problem = Diagnostic(refused.where, refused.what, refused.source or source, refused.remedy)
                raise TransformError([*unsupported.problems, problem]) from None
            message = str(error).strip().partition("\n")[0]
            what = f"{follower} cannot follow the forward ({type(error).__name__}: {message})"
            remedy = "replace the branch or loop that depends on data or shapes there"
            raise TransformError([*unsupported.problems, Diagnostic(place(), what, source, remedy)]) from error
        finally:
            restore(before)
        if unsupported.problems:
            raise TransformError(unsupported.problems)


def _refuse_scripted(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = "a scripted module, whose operations Python does not see,"
            raise UnsupportedError(name, what, "put the module that was scripted in its place")


def _refusal(error: BaseException | None) -> UnsupportedError | None:
    """The refusal that an exception is, or that it was raised from."""
    while error is not None and not isinstance(error, UnsupportedError):
        error = error.__cause__ or error.__context__
    return error
