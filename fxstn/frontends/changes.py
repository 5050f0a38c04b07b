"""What users change on the modules of a network after transform: noticed before the next step, by comparing identities."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import attrgetter, call, itemgetter
from typing import Any

from torch import fx, nn

from fxstn.frontends.conditioned import ConditionedForward
from fxstn.frontends.guards import HOOKS
from fxstn.frontends.interface import Plan
from fxstn.frontends.module_state import same
from fxstn.hp.binding import Binding
from fxstn.ir.containers import INTERNAL
from fxstn.ir.errors import module_path
from fxstn.ops.parameters import parameters_in
from fxstn.ops.response import Response

_ANEW = "change it before transform, or before fxstn.tune"


@dataclass(frozen=True)
class Change:
    """One change of a module.

    path: of the module.
    what: changed, for messages.
    remedy: what to do where it cannot be followed; "" where the graphs can be made again.
    """

    path: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        where = f"module '{self.path}'" if self.path else "the model"
        return f"{where}: {self.what}"


@dataclass(frozen=True)
class _Record:
    """One module as it was."""

    path: str
    module: nn.Module
    attributes: dict[str, object]
    children: dict[str, nn.Module | None]
    parameters: dict[str, nn.Parameter | None]


class ModuleState:
    """The modules of a model as they are now, in train mode.

    frozen: paths of the modules that stay in eval mode.
    hooks: whether hooks are compared; a forward that runs as it is runs them.
    """

    def __init__(self, model: nn.Module, frozen: tuple[str, ...], hooks: bool) -> None:
        self.hooks = hooks
        self.records = [
            _Record(path, module, _attributes(module), dict(module._modules), dict(module._parameters))
            for path, module in model.named_modules()
        ]
        self.modules = [record.module for record in self.records]
        self.flags = [record.path not in frozen for record in self.records]
        self.entries: list[Callable[[], tuple]] = []  # the objects of one container each
        self.containers: list[dict] = []
        for record in self.records:
            module, own = record.module, vars(record.module)
            for container, names in ((own, record.attributes), (module._modules, module._modules),
                                     (module._parameters, module._parameters)):  # fmt: skip
                self.containers.append(container)
                self.entries += [_getter(container, list(names))] if names else []
            self.containers += _hooks_of(module) if hooks else ()
        # Lists and dicts of the model's own; those of torch's modules, which begin with "_", follow from other attributes.
        self.contents = [
            (value, copy.copy(value))
            for record in self.records
            for name, value in record.attributes.items()
            if isinstance(value, (list, dict, set)) and not name.startswith("_")
        ]
        self.identities = self._identities()
        self.parameters = dict(model.named_parameters())
        self.named_parameters = parameters_in(model)  # with each name of a shared one
        self.trained = self._trained()

    def _identities(self) -> list[int]:
        """Which objects there are. This runs before every step, so it is short."""
        try:
            return [*map(len, self.containers), *map(id, chain.from_iterable(map(call, self.entries)))]
        except KeyError:  # one is no longer there
            return []

    def _trained(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self.parameters.values()]

    def frozen(self) -> tuple[str, ...] | None:
        """Paths of the modules in eval mode where they are others than those that are frozen; else None.

        Where the model itself is in eval mode, users evaluate it; that freezes nothing.
        """
        flags = [module.training for module in self.modules]
        if flags == self.flags or not flags[0]:
            return None
        return tuple(sorted(record.path for record, flag in zip(self.records, flags, strict=True) if not flag))

    def newly_trained(self) -> list[str] | None:
        """Names of the parameters that require gradients since the last call; None where nothing has changed.

        Where no parameter does, all are constants for a while, and nothing has changed.
        """
        trained, before = self._trained(), self.trained
        if trained == before or not any(trained):
            return None
        self.trained = trained
        pairs = zip(self.parameters, zip(before, trained, strict=True), strict=True)
        return [name for name, change in pairs if change == (False, True)]

    def changes(self) -> list[Change]:
        """What has changed, but for modes and gradients."""
        now = self._identities()
        if now == self.identities and all(same(*pair) for pair in self.contents):
            return []
        result = [change for record in self.records for change in self._changes_of(record)]
        if not result:
            self.identities = now  # what has changed is of no concern
        return result

    def _changes_of(self, record: _Record) -> Iterator[Change]:
        path, module = record.path, record.module
        if self.hooks and _has_hooks(module):
            remedy = 'remove it, or give transform, or fxstn.tune, trace="live", which runs hooks'
            yield Change(
                path, "it has a hook that it did not have when the graphs were made, and they would not run it", remedy
            )
        for kind, before, now in (
            ("parameter", record.parameters, module._parameters),
            ("module", record.children, module._modules),
        ):
            for name in sorted({*before, *now}):
                if before.get(name) is not now.get(name):
                    values = (
                        ""
                        if kind == "module"
                        else "copy values into the old one (with torch.no_grad(): p.copy_()), or "
                    )
                    yield Change(path, f"its {kind} {name!r} is another object than at first", values + _ANEW)
        attributes, copies = _attributes(module), {id(value): copied for value, copied in self.contents}
        for name in sorted({*record.attributes, *attributes}):
            known = name in record.attributes or hasattr(type(module), name)
            old = record.attributes.get(name)
            if known and not same(copies.get(id(old), old), attributes.get(name)):
                yield Change(path, f"{name} is {attributes.get(name)!r} now")


def refuse(changes: list[Change], plan: Plan, frozen: tuple[str, ...]) -> None:
    """Raises ValueError for the first change that graphs cannot follow, and for one that a tuned strength takes no notice of.

    plan: of the graphs to be made.
    frozen: paths of the modules that stayed in eval mode before.
    """
    tuned = {site.path: site for site in plan.binding.sites if not site.insert}
    off = [Change(path, "it is in eval mode now") for path in plan.frozen if path not in frozen]
    for change in (*changes, *off):
        if change.remedy:
            raise ValueError(f"{change}; {change.remedy}")
        if change.path in tuned:
            names = [plan.binding.hyperparameters[index].name for index in tuned[change.path].indices]
            raise ValueError(
                f"{change}, but its strength is λ, {', '.join(map(repr, names))}: set that by hparams.set of the network (of "
                "tuner.problem.stn in a loop of your own), or begin with hparams that leave this module out"
            )


def refuse_other_sites(binding: Binding, before: fx.GraphModule, now: fx.GraphModule) -> None:
    """Raises ValueError where a site of the first training graph is not at the same place in the second."""

    def places(graph: fx.GraphModule) -> dict[str, tuple[object, str]]:
        return {node.name: (node.target, module_path(node)) for node in graph.graph.nodes}

    old, new = places(before), places(now)
    for site in binding.sites:
        if old[site.node] != new.get(site.node):
            what = "the operation is no longer where its strength was tuned, because modules were changed"
            raise ValueError(f"{Change(site.path, what)}; {_ANEW}")


def respond_where_trained(tree: nn.Module, model: nn.Module, unfrozen: list[str]) -> None:
    """Let exactly the parameters respond that are trained.

    tree: their Response modules.
    unfrozen: names of the parameters that are trained from now on and were constants at transform. Warns where one of them
        that has rows has no response.
    """
    responses = {name: child for name, child in tree.named_modules() if isinstance(child, Response)}
    for name, response in responses.items():
        response.active = model.get_parameter(name).requires_grad
    if without := [name for name in unfrozen if name not in responses and model.get_parameter(name).dim() > 1]:
        warnings.warn(
            f"{without[0]!r}{f' and {len(without) - 1} more' if len(without) > 1 else ''} will be trained, but cannot respond "
            "to the hyperparameters, because requires_grad was False at transform; set it to False after transform instead",
            stacklevel=2,
        )


def _attributes(module: nn.Module) -> dict[str, object]:
    return {
        name: value
        for name, value in vars(module).items()
        if name not in INTERNAL and not isinstance(value, ConditionedForward)
    }


def _getter(container: Mapping[str, Any], names: Sequence[str]) -> Callable[[], tuple]:
    """A function that returns the entries of these names, without a loop of Python's. It raises KeyError."""
    return partial(itemgetter(*names, names[0]), container)  # twice, because of a single one it would return no tuple


_hooks_of = attrgetter(*HOOKS)


def _has_hooks(module: nn.Module) -> bool:
    return any(_hooks_of(module))
