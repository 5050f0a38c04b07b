"""What goes wrong at transform time: collected, and reported all at once."""

from __future__ import annotations

import os
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxstn.ir.node_info import info_of


@dataclass(frozen=True)
class Diagnostic:
    """One thing in the model that cannot be handled.

    where: module path.
    what: the problem.
    source: "file:line: code", or "".
    remedy: what the user can do.
    frontend: the frontend that met the problem; "" where only one was tried.
    """

    where: str
    what: str
    source: str
    remedy: str
    frontend: str = ""

    def __str__(self) -> str:
        place = f"in module '{self.where}'" if self.where else "in the model itself"
        frontend = f"{self.frontend}: " if self.frontend else ""
        return f"{frontend}{self.what} {place}" + (f", {self.source}" if self.source else "") + f"; {self.remedy}"


class ExplainedError(Exception):
    """Base of errors that a page of the docs explains. A traceback ends with its name.

    page: in docs/, with the heading.
    """

    page: ClassVar[str]

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.add_note(f"docs/{self.page} says more.")


class TransformError(ExplainedError, ValueError):
    """The model cannot be transformed. `problems` holds every reason found, not only the first."""

    page = "start/trust.md#limits"

    def __init__(self, problems: list[Diagnostic]) -> None:
        self.problems = problems
        noun = "problem" if len(problems) == 1 else "problems"
        super().__init__(f"{len(problems)} {noun}:\n" + "\n".join(f"  - {problem}" for problem in problems))


class NoResponseError(ValueError):
    """No parameter of the model can respond to the hyperparameters."""


def module_path(node: fx.Node) -> str:
    """Path of the innermost module whose forward made this node; "" for the model itself."""
    return info_of(node).path


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in .*\n\s*(.*)')
FRONTEND = re.compile(r"/fxstn/frontends/")
_CALLER = re.compile(r"/fxstn/((transform|network)\.py|(passes|tools|bilevel)/)")
LIBRARY = re.compile(r"/(torch|fxstn|importlib|unittest)/|/python3[.\d]*/\w+\.py$|^<")


def innermost_user_frame(stack_trace: str) -> str:
    """'file:line: code' of the innermost frame outside torch and fxstn, "" when there is none.

    Frames up to those of transform and the passes are the caller's: they are no part of the model.
    """
    frames = _FRAME.findall(stack_trace)
    begin = max(
        (i for i, frame in enumerate(frames) if _CALLER.search(frame[0])), default=0
    )  # fx may cut the outer frames
    users = [frame for frame in frames[begin:] if not LIBRARY.search(frame[0])]
    if not users:
        return ""
    file, line, code = users[-1]
    return f"{os.path.relpath(file) if file.startswith(os.getcwd()) else file}:{line}: {code.strip()}"


def source_of(node: fx.Node) -> str:
    """Where in the user's code this node comes from."""
    return innermost_user_frame(node.stack_trace or "")


def operation_name(function: Callable[..., Any] | str) -> str:
    """How an operation is called in messages and tables: torch.conv2d, operator.add, F.relu."""
    if isinstance(function, str):
        return f"Tensor.{function}"
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return f"torch.ops.{function}"
    name = getattr(function, "__name__", str(function))
    if isinstance(function, types.MethodWrapperType):  # of a property: Tensor.data.__set__
        return f"Tensor.{getattr(function.__self__, '__name__', '')}.{name}"
    module = getattr(function, "__module__", "") or ""
    if name == "fn":  # torch's boolean_dispatch hides the name behind a closure
        import torch.nn.functional as functional

        name = next((key for key, value in vars(functional).items() if value is function), name)
    if "functional" in module or module in ("torch._C._nn", "torch._jit_internal"):
        return f"F.{name}"
    if type(function).__name__ == "method_descriptor" or module == "torch._tensor":
        return f"Tensor.{name}"
    if module == "_operator":
        return f"operator.{name}"
    in_torch = not module or module.partition(".")[0] == "torch"  # torchvision is not
    return f"torch.{name}" if in_torch else f"{module}.{name}"
