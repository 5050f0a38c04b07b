"""What a caller of `transform` asks for, checked before anything is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from fxstn.frontends.guards import refuse_wrapped
from fxstn.frontends.inputs import Inputs, as_inputs
from fxstn.frontends.interface import Frontend
from fxstn.hp import Spec
from fxstn.network import SelfTuningNetwork

METHODS = ("delta", "centered", "stn")


@dataclass(frozen=True)
class Request:
    """The arguments of `fxstn.transform` but the model. Raises ValueError and TypeError as it does.

    frontends: what `trace` may name, in the order that "auto" tries them.
    """

    hparams: Sequence[Spec] | None
    example_inputs: object
    method: str
    response: str | None
    trace: str
    recompute: bool
    statistics: str
    frontends: Sequence[type[Frontend]]

    def __post_init__(self) -> None:
        check_hparams(self.hparams)
        if self.example_inputs is not None:
            _check_inputs(self.example_inputs)
        named = {frontend.name: frontend for frontend in self.frontends}
        _check_choice("method", self.method, METHODS)
        _check_choice("response", self.response, (None, "scaled", "structured"))
        if self.response == "scaled" and self.method == "stn":
            raise ValueError("response='scaled' is not for method 'stn'; give 'structured', or another method")
        _check_choice("trace", self.trace, ("auto", *named))
        _check_choice("recompute", self.recompute, (False, True))
        _check_choice("statistics", self.statistics, ("batch", "running"))
        if self.trace in named and named[self.trace].needs_examples and self.example_inputs is None:
            raise ValueError(f"trace={self.trace!r} needs example_inputs")
        if self.needs_graph and (self.method != "delta" or not self.candidates):
            what = "recompute=True" if self.recompute else f"statistics={self.statistics!r}"
            raise ValueError(
                f"{what} is for method 'delta', traced by fx or export; got {self.method!r} and {self.trace!r}"
            )

    @property
    def candidates(self) -> list[type[Frontend]]:
        """The frontends to try, in their order."""
        return [
            frontend
            for frontend in self.frontends
            if self.trace in ("auto", frontend.name)
            and (self.example_inputs is not None or not frontend.needs_examples)
            and (frontend.rewritable or not self.needs_graph)
        ]

    def inputs_of(self, model: nn.Module) -> Inputs | None:
        """The example inputs as arguments of a model's forward."""
        return None if self.example_inputs is None else as_inputs(self.example_inputs, model)

    @property
    def structured(self) -> bool:
        """Whether R is learned."""
        return self.response == "structured" or (self.response is None and self.method != "delta")

    @property
    def needs_graph(self) -> bool:
        """Whether only a graph that passes rewrite will do."""
        return self.recompute or self.statistics != "batch"


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises ValueError for an argument that is none of its choices, whatever it is and however it compares."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(str, choices))}")


def _check_inputs(inputs: object) -> None:
    """Raises TypeError for example inputs without a tensor, ValueError for tensors that cannot be followed."""
    values = dict(inputs) if isinstance(inputs, Mapping) else inputs
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    if not tensors:
        raise TypeError(
            f"example_inputs must be a tensor, or a tuple or dict of them, got {type(inputs).__name__}; take the inputs of a "
            "batch, next(iter(loader))[0]"
        )
    if kind := next(filter(None, map(_special_kind, tensors)), ""):
        raise ValueError(f"example_inputs holds a {kind} tensor, which no frontend can follow; give a plain tensor, for "
                         "example a padded batch")  # fmt: skip


def _special_kind(x: Tensor) -> str:
    """What kind of tensor an example is that has no sizes or no values of its own; "" for others."""
    kinds = {"nested": x.is_nested, "quantized": x.is_quantized, "fake": isinstance(x, FakeTensor)}
    return next((kind for kind, is_kind in kinds.items() if is_kind), "")


def check_hparams(hparams: object) -> None:
    """Raises TypeError for anything but a list of specs or None, ValueError for an empty list."""
    if isinstance(hparams, Tensor):
        raise TypeError(
            f"hparams is a Tensor of shape {tuple(hparams.shape)}, not a list of specs; inputs go to example_inputs="
        )
    if hparams is not None and not isinstance(hparams, (list, tuple)):
        raise TypeError(f"hparams={hparams!r} must be a list of specs, such as [hp.Dropout()], or None")
    if hparams is not None and not hparams:
        raise ValueError(
            f"hparams={hparams!r} asks for nothing; pass None for the defaults, or a list such as [hp.WeightDecay()]"
        )
    for spec in hparams or ():
        if not isinstance(spec, Spec):
            raise TypeError(f"hparams holds {spec!r}, which is no spec of fxstn.hp; write hp.Dropout() say, in a list")


def check_model(model: object) -> None:
    """Raises TypeError for what is no model or is transformed already.

    Raises ValueError for one that is wrapped for several processes, or has no weights yet.
    """
    if not isinstance(model, nn.Module) or isinstance(model, SelfTuningNetwork):
        raise TypeError(
            f"model must be an nn.Module that is not transformed yet, got {model if isinstance(model, type) else type(model)}; "
            "give the plain model, with its weights"
        )
    refuse_wrapped(model)
    for path, module in model.named_modules():
        if any(map(is_lazy, chain(module.parameters(recurse=False), module.buffers(recurse=False)))):
            where = f"module '{path}', a {type(module).__name__}," if path else f"the model, a {type(module).__name__},"
            raise ValueError(
                f"{where} has no weights before its first forward: run the model on a batch first, model(*inputs)"
            )
