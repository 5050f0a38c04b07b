"""Whether a forward does in eval mode what it does in train mode but for its dropouts: then one export serves both."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

from fxstn.frontends.guards import ProblemCollector, guarded_capture
from fxstn.frontends.inputs import Inputs
from fxstn.frontends.preservation import Preservation
from fxstn.ir.facts import overloads
from fxstn.ir.generators import forked_torch_rng
from fxstn.ir.graphs import copied
from fxstn.ir.vocabulary import DROPOUTS

_OFF = {
    "train": False,
    "dropout_p": 0.0,
}  # arguments of torch's operations that switch a dropout, and their values for off
Flags = dict[int | str, tuple[object, object]]
_ARITHMETIC = (
    "add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv", "truediv", "rtruediv", "mod", "rmod", "pow", "neg",
    "eq", "ne", "lt", "le", "gt", "ge", "bool",
)  # fmt: skip


def modes_agree(model: nn.Module, frozen: Collection[str], inputs: Inputs) -> bool:
    """Whether a forward, in train and in eval mode, calls the same functions with the same arguments, and does the same with
    sizes, but that in eval mode no dropout acts.

    The two runs are on the meta device, which has no values. False also where this cannot be found out.
    """
    known: dict[int, Tensor] = {}

    def without_values(x: Tensor) -> Tensor:
        if id(x) not in known:
            known[id(x)] = x.detach().to("meta").requires_grad_(x.requires_grad)
        return known[id(x)]

    registered = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    others = Preservation(model, None, but=dict(registered).values())  # tensors that have values in a run, too
    try:
        stand_ins = {name: without_values(x) for name, x in registered}
        args, kwargs = tree_map_only(Tensor, without_values, (inputs.args, inputs.kwargs))
        names = {id(x): f"tensor {number}" for number, x in enumerate(known.values())}
        results = []
        for training in (True, False):
            with others:
                results.append(_run(model, training, frozen, stand_ins, Inputs(args, kwargs), names))
        (train, _), (evaluation, drops) = results
        return train == evaluation and not drops
    except Exception:  # whatever the forward, or the device, raises: then each mode is exported
        return False


def _run(
    model: nn.Module,
    training: bool,
    frozen: Collection[str],
    tensors: Mapping[str, Tensor],
    inputs: Inputs,
    names: Mapping[int, str],
) -> tuple[list[object], bool]:
    """What a forward does in one mode, as under torch.export, and whether a dropout acts."""
    recorder = _Recorder(names)
    with ExitStack() as stack:
        for flag in ("_is_compiling_flag", "_is_exporting_flag"):
            stack.enter_context(mock.patch.object(torch.compiler, flag, True))
        unsupported = ProblemCollector(lambda: "")
        stack.enter_context(guarded_capture(model, training, frozen, "torch.export", unsupported, recorder.regions))
        stack.enter_context(forked_torch_rng())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_reparametrize_module(model, dict(tensors), stack_weights=True))
        with recorder:
            output = model(*inputs.args, **inputs.kwargs)
    events, recorder.events = [*recorder.events, recorder.shown(output)], []  # to compare sizes is no event of the run
    return events, recorder.drops


class _Recorder(TorchFunctionMode):
    """Records each call of a function of torch, and what Python does with the sizes that it returns.

    events: what happened, in order; equal for two runs that do the same.
    drops: whether a dropout acted.
    regions: types of device whose autocast is off now.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names, self.alive = dict(names), list[Tensor]()
        self.events, self.drops, self.regions = list[object](), False, list[str]()
        logged = {name: self._logged(name) for name in (f"__{operation}__" for operation in _ARITHMETIC)}
        self.size: type[int] = type("Size", (int,), logged | {"__hash__": int.__hash__})

    def __torch_function__(
        self, function: Callable[..., object], types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        flags = _flags(function, args, kwargs)
        self.drops |= any(value != off for value, off in flags.values())
        shown = [None if i in flags else arg for i, arg in enumerate(args)]
        named = {key: None if key in flags else value for key, value in kwargs.items()}
        self.events.append((function, self.shown((shown, named)), torch.is_grad_enabled(), *self.regions))
        if flags and isinstance(result, Tensor) and id(result) in self.names:
            result = result.view_as(result)  # a dropout that does not act hands its input through
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, Tensor) and id(leaf) not in self.names:
                self.names[id(leaf)] = f"value {len(self.names)}"
                self.alive.append(leaf)  # or another one would get its id
        return self._with_sizes(result)

    def _with_sizes(self, result: object) -> object:
        """Sizes as numbers that record what is done with them."""
        if isinstance(result, torch.Size):
            return torch.Size(map(self.size, result))
        return self.size(result) if type(result) is int else result

    def shown(self, structure: object) -> object:
        """A structure with names in place of its tensors, to be compared with another run's."""
        leaves, form = tree_flatten(structure)
        plain = [self.names[id(x)] if isinstance(x, Tensor) else int(x) if isinstance(x, self.size) else x
                 for x in leaves]  # fmt: skip
        return form, [(type(x), x) for x in plain]

    def _logged(self, name: str) -> Callable[..., object]:
        method = getattr(int, name)

        def logged(*operands: object) -> object:
            result = method(*operands)
            self.events.append((name, *(int(x) if isinstance(x, int) else x for x in operands)))
            return self.size(result) if type(result) is int else result

        return logged


def _flags(function: Callable[..., object], args: Sequence, kwargs: Mapping[str, object]) -> Flags:
    """{position or name of an argument that switches a dropout: (its value, that for off)}."""
    if function in DROPOUTS:
        return {2: (args[2], False)} if len(args) > 2 else {"training": (kwargs.get("training", True), False)}
    result: Flags = {}
    for overload in overloads(function):
        for position, argument in enumerate(overload._schema.arguments):
            if (off := _OFF.get(argument.name)) is not None:
                if position < len(args):
                    result[position] = args[position], off
                elif argument.name in kwargs:
                    result[argument.name] = kwargs[argument.name], off
    return result


def without_dropout(module: fx.GraphModule) -> fx.GraphModule:
    """An exported graph of train mode → that of eval mode, where the two agree."""
    result = copied(module)
    for node in result.graph.nodes:
        flags = _flags(node.target, node.args, node.kwargs) if node.op == "call_function" else {}
        for key, (_, off) in flags.items():
            if isinstance(key, int):
                node.update_arg(key, off)
            else:
                node.update_kwarg(key, off)
    return result
