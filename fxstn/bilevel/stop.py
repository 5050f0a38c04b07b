"""Signals that ask a run to end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from fxstn.bilevel.faults import warn_caller
from fxstn.bilevel.workers import is_worker_fault


class Stop:
    """The wish that SIGTERM or Ctrl-C expresses: the run saves and ends at the next step. A second signal ends it at once."""

    def __init__(self) -> None:
        self.signal: int | None = None  # the signal that arrived

    def run(self, enabled: bool, job: Callable[[], None]) -> None:
        """Do a job. Signals are noted meanwhile; one that came too late for the job to end at it ends it afterwards.

        Python lets only the main thread handle signals; elsewhere nothing changes. A worker process of a loader that a signal
        has ended all the same, amid a step, ends the job, too: what was saved last stands.
        """
        if not enabled or threading.current_thread() is not threading.main_thread():
            job()
            return
        try:
            with self._noted():
                job()
        except (
            Exception
        ) as error:  # of a worker, or of a second one, which comes at any time, also in a context's __exit__
            if self.signal is None or not is_worker_fault(error):
                raise
            warn_caller("a worker process of a loader ended at the signal, amid a step; what the run saved last stands")
        if self.signal is not None:
            self.end()

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Inside, signals are noted."""
        before = {number: signal.getsignal(number) for number in (int(signal.SIGINT), int(signal.SIGTERM))}

        def note(number: int, frame: FrameType | None) -> None:
            self.signal = number
            signal.signal(number, before[number] or signal.SIG_DFL)

        self.signal = None
        try:
            for number in before:
                signal.signal(number, note)
            yield
        except Exception as error:
            if is_worker_fault(error):
                with suppress(RuntimeError):  # of another worker
                    time.sleep(1)  # the signal to this process may come after those to the workers
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def end(self) -> None:
        """Raise what the signal would have raised, or SystemExit with the shell's status for SIGTERM."""
        number, self.signal = self.signal, None
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + int(number or signal.SIGTERM))
