"""Signals that ask a run to end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

from fxstn.bilevel.faults import warn_caller
from fxstn.bilevel.workers import SIGNALS, is_worker_fault, mute_deaths

_KEY = "notes_signals"


class _End(BaseException):
    """Ends a job at a signal."""


class Stop:
    """The wish that SIGTERM or Ctrl-C expresses: the run saves and ends at the next step. A second signal ends it at once."""

    def __init__(self) -> None:
        self.signal: int | None = None  # the signal that arrived

    def run(self, enabled: bool, job: Callable[[], None]) -> None:
        """Do a job. Signals are noted meanwhile. A signal after the job's last step ends the program once the job is done.

        Python lets only the main thread handle signals; elsewhere nothing changes. A worker process of a loader that a signal
        has ended all the same, amid a step, ends the job, too: what was saved last stands.
        """
        heeds, ended = enabled and threading.current_thread() is threading.main_thread(), False
        try:
            with self._note_signals() if heeds else nullcontext():
                job()
        except _End:
            ended = True
        except Exception as error:  # that of a second worker comes at any time, also in the __exit__ of a context
            if self.signal is None or not is_worker_fault(error):
                raise
            warn_caller("a worker process of a loader ended at the signal, amid a step; what the run saved last stands")
        if ended or self.signal is not None:  # with several processes it came to one of them
            self._act(self.signal)

    @contextmanager
    def _note_signals(self) -> Iterator[None]:
        """Inside, signals are noted."""
        handlers = {int(number): signal.getsignal(number) for number in SIGNALS}
        before = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

        def note(number: int, frame: FrameType | None) -> None:
            self.signal = number
            restore()

        setattr(note, _KEY, True)
        self.signal = None
        try:
            for number in before:
                signal.signal(number, note)
            yield
        except Exception as error:
            if is_worker_fault(error):
                unmute = mute_deaths()
                time.sleep(1)  # the signal to this process may come after those to the workers
                if self.signal is None:
                    unmute()
            raise
        finally:
            restore()

    def end(self) -> None:
        """End the job, whose contexts end first."""
        raise _End

    def _act(self, number: int | None) -> None:
        """Do what the signal would have done: call its handler, where it has one. Then raise SystemExit with a shell's status.

        Python's own handler of SIGINT raises KeyboardInterrupt.
        """
        self.signal = None
        mute_deaths()
        handler = None if number is None else signal.getsignal(number)
        if number is not None and callable(handler):
            handler(number, None)
        if getattr(handler, _KEY, False):  # of a run around this one, which ends at its next step
            return
        raise SystemExit(128 + (number or signal.SIGTERM))
