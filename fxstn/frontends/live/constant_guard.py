"""What a run that remembers something about every tensor has in common: nothing unseen goes by, mutations are found."""

from __future__ import annotations

import linecache
import sys
from typing import Any

from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from fxstn.frontends.live.containers import tensors_in
from fxstn.frontends.live.tracer import Call, Following
from fxstn.ir.errors import LIBRARY, Diagnostic, TransformError, innermost_user_frame, operation_name

_HARMLESS = {"requires_grad_", "retain_grad_", "share_memory_"}


def user_frame() -> str:
    """The innermost frame outside of torch and fxstn, as a stack trace shows it; "" when there is none."""
    frame: Any = sys._getframe(1)
    while frame is not None and LIBRARY.search(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return ""
    code = frame.f_code
    line = linecache.getline(code.co_filename, frame.f_lineno).strip()
    return f'File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}\n  {line}\n'


def mutated(call: Call) -> list[Tensor]:
    """The tensors that an operation writes into, as far as its spelling or its schema tells."""
    if call.spelled is not None and call.spelled.in_place:
        return list(tensors_in(call.args[:1]))
    if call.kwargs.get("out") is not None:
        return list(tensors_in(call.kwargs["out"]))
    if isinstance(call.original, (OpOverload, OpOverloadPacket)):
        return list(tensors_in(_written(call)))
    if call.spelled is not None or getattr(call.original, "__name__", "") in _HARMLESS:
        return []
    return list(tensors_in(call.args[:1]))


def _written(call: Call) -> list[Any]:
    """Arguments that an operator's schema marks as written into."""
    operator: Any = call.original
    schemas = (
        [operator._schema]
        if isinstance(operator, OpOverload)
        else [getattr(operator, name)._schema for name in operator.overloads()]
    )
    for schema in schemas:
        names = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        if names:
            given = dict(zip((a.name for a in schema.arguments), call.args, strict=False)) | call.kwargs
            return [value for name, value in given.items() if name in names]
    return []


class ConstantGuard(Following):
    """Refuses a float tensor that it has not seen being made: followed or refused, never taken for a constant."""

    problems: list[Diagnostic]

    def known(self, x: Tensor) -> bool:
        raise NotImplementedError

    def problem(self, what: str, remedy: str) -> Diagnostic:
        """A problem at the operation that is being carried out."""
        return Diagnostic(self.path, what, innermost_user_frame(user_frame()), remedy)

    def refuse(self, what: str, remedy: str) -> TransformError:
        """The error to raise where a run cannot go on."""
        self.problems.append(self.problem(what, remedy))
        return TransformError(self.problems)

    def check_seen(self, name: str, values: Any) -> None:
        """Raises TransformError for a float tensor that came about behind the back of torch's Python interface."""
        for x in tensors_in(values):
            if not (self.known(x) or not (x.is_floating_point() or x.is_complex())):
                raise self.refuse(
                    f"{name} gets a tensor of shape {tuple(x.shape)} that no torch operation of this forward made "
                    "(from numpy, TorchScript, a constructor, or a constant that no module holds),",
                    "register constants as buffers, and compute the rest with torch functions",
                )

    def apply(self, call: Call) -> Any:
        self.check_seen(operation_name(call.function), (call.args, call.kwargs))
        return self.observe(call)

    def observe(self, call: Call) -> Any:
        raise NotImplementedError
