"""Refuses float tensors of unknown origin in a live run."""

from __future__ import annotations

import linecache
import sys
from types import FrameType

from torch import Tensor

from fxstn.frontends.live.calls import Call, mutated, overwrites
from fxstn.frontends.live.tangent_table import differentiable, owns_memory
from fxstn.frontends.live.tracer import LiveTracer
from fxstn.ir.containers import tensors_in
from fxstn.ir.errors import FRONTEND, LIBRARY, Diagnostic, TransformError, innermost_user_frame, operation_name


def user_frame() -> str:
    """The innermost frame of the forward outside of torch and fxstn, as a stack trace shows it; "" when there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and LIBRARY.search(frame.f_code.co_filename):
        frame = frame.f_back
    caller = frame
    while caller is not None and not FRONTEND.search(caller.f_code.co_filename):
        caller = caller.f_back
    if frame is None or caller is None:  # no frontend runs the frame: it is that of the caller of transform
        return ""
    code = frame.f_code
    line = linecache.getline(code.co_filename, frame.f_lineno).strip()
    return f'File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}\n  {line}\n'


class ConstantGuard(LiveTracer):
    """Refuses a float tensor that it has not seen before, so that a varying value is never taken for a constant.

    problems: what was refused so far.
    """

    problems: list[Diagnostic]

    def is_known(self, x: Tensor) -> bool:
        """Whether the run has seen where x comes from."""
        raise NotImplementedError

    def problem(self, what: str, remedy: str) -> Diagnostic:
        """A problem at the operation that is being carried out."""
        return Diagnostic(self.path, what, innermost_user_frame(user_frame()), remedy)

    def refuse(self, what: str, remedy: str) -> TransformError:
        """The error to raise where a run cannot go on."""
        self.problems.append(self.problem(what, remedy))
        return TransformError(self.problems)

    def check_known(self, name: str, values: object) -> None:
        """Raises TransformError for a float tensor that came about behind the back of torch's Python interface."""
        for x in tensors_in(values):
            if differentiable(x) and not self.is_known(x):
                raise self.refuse(
                    f"{name} gets a tensor of shape {tuple(x.shape)} that no torch operation of this forward made "
                    "(from numpy, TorchScript, a constructor, or a constant that no module holds),",
                    "register constants as buffers, and compute the rest with torch functions",
                )

    def apply(self, call: Call) -> object:
        if overwrites(call):
            self.add_constants(x for x in mutated(call) if owns_memory(x))
        self.check_known(operation_name(call.function), (call.args, call.kwargs))
        return self.observe(call)

    def observe(self, call: Call) -> object:
        """Carry out one operation, all of whose float tensors are known."""
        raise NotImplementedError
