"""Which frontend follows a model: the first that works."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch

from fxstn.frontends.interface import Frontend
from fxstn.ir.errors import Diagnostic, TransformError, innermost_user_frame
from fxstn.ir.input_errors import first_line, raised_in

T = TypeVar("T")
_MORE = "; or give example_inputs: then torch.export, and after it the forward as it is, are tried"


@contextmanager
def errors_as_diagnostics(what: str) -> Iterator[None]:
    """Raises TransformError in place of whatever else is raised inside: a reason to try the next frontend.

    what: what fails, for messages. Errors of the device and of memory pass, and those of a spec that refuses a value, such as
    an augmentation of images: no other frontend would mend them.
    """
    try:
        yield
    except (TransformError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and raised_in(error).startswith("fxstn.hp."):
            raise
        source = innermost_user_frame(traceback.format_exc())
        reason = f"{what} fails ({type(error).__name__}: {first_line(error)})"
        remedy = "write that part of the forward with plain torch operations"
        raise TransformError([Diagnostic("", reason, source, remedy)]) from error


def first_that_works(
    frontends: Sequence[type[Frontend]], attempt: Callable[[type[Frontend]], T]
) -> tuple[T, tuple[Diagnostic, ...]]:
    """The result of the first attempt that raises no TransformError, and the problems of the frontends before it.

    Raises TransformError with the problems of all of them where none works. Other errors are the caller's own, and pass; but
    that of a spec which finds nothing in a graph is raised only where no later frontend finds it, once one has failed.
    """
    problems, unmatched = list[Diagnostic](), None
    for frontend in frontends:
        try:
            return attempt(frontend), tuple(problems)
        except TransformError as error:
            name = frontend.name if len(frontends) > 1 else ""
            problems += [replace(problem, frontend=name) for problem in error.problems]
        except ValueError as error:
            if not problems:
                raise
            unmatched = unmatched or error
    raise unmatched or TransformError(problems)


def with_remedy(error: TransformError) -> TransformError:
    """The error of a transform without example inputs, which says that there are further frontends."""
    return TransformError([replace(problem, remedy=problem.remedy + _MORE) for problem in error.problems])
