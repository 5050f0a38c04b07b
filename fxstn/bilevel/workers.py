"""Worker processes of a loader: a signal that asks the run to end does not end them, so that the run can finish and save.

SLURM and a terminal's Ctrl-C signal all processes of a run at once. A worker that dies takes the run with it: the next batch
never comes, and torch raises an error in the middle of a step.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from weakref import finalize

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _end_with_parent(parent: int) -> None:
    """End this process when its parent terminates it, as torch's own handler does. What others send is ignored."""
    while True:
        received = signal.sigwaitinfo(SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)


class SurvivingWorker:
    """The worker_init_fn of a DataLoader whose workers outlive SIGINT and SIGTERM, unless their parent sends it.

    init: the user's worker_init_fn.
    """

    def __init__(self, init: Callable[[int], object] | None) -> None:
        self.init = init

    def __call__(self, worker: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        parent = multiprocessing.parent_process()
        if parent is not None and parent.pid is not None:
            threading.Thread(target=_end_with_parent, args=(parent.pid,), daemon=True).start()
        if self.init is not None:
            self.init(worker)


@contextmanager
def _workers_survive(loader: object) -> Iterator[None]:
    """Inside, a loader starts workers that outlive the signals.

    The signals are blocked meanwhile, which a new process inherits: there is no moment at which it could be ended.
    """
    own = loader.worker_init_fn  # type: ignore[attr-defined]
    context = getattr(loader, "multiprocessing_context", None) or multiprocessing
    if context.get_start_method() != "fork":
        resource_tracker.ensure_running()  # its start would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        loader.worker_init_fn = SurvivingWorker(own)  # type: ignore[attr-defined]
        yield
    finally:
        loader.worker_init_fn = own  # type: ignore[attr-defined]
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerPass:
    """A pass over a loader with workers, which end when nobody holds the pass any more.

    Where the iterator is part of a cycle that is collected as garbage, Python closes its queues first. No worker then hears
    that it should end, and torch waits five seconds for each. So the iterator is held from outside of the cycle.

    workers: the processes of the loader. A batch of one that has died may break off: the error then names the death.
    """

    def __init__(self, iterator: Iterator[object], workers: Collection[BaseProcess]) -> None:
        self._iterators = [iterator]
        self._workers = workers
        finalize(self, self._iterators.clear)

    def __iter__(self) -> Iterator[object]:
        return self

    def __next__(self) -> object:
        try:
            return next(self._iterators[0])
        except (OSError, EOFError) as error:
            numbers = {worker.sentinel: worker.pid for worker in self._workers}
            if ended := wait(numbers, timeout=1):  # its sockets close before it has ended
                names = ", ".join(str(numbers[number]) for number in ended if isinstance(number, int))
                raise RuntimeError(f"DataLoader worker {names} ended while it handed over a batch") from error
            raise


def batches_of(loader: Iterable[object]) -> Iterator[object]:
    """A pass over a loader. Its workers, if it has any, outlive SIGINT and SIGTERM where the system can tell who sends them."""
    if (
        not getattr(loader, "num_workers", 0)
        or not hasattr(loader, "worker_init_fn")
        or not hasattr(signal, "sigwaitinfo")
    ):
        return iter(loader)
    before = multiprocessing.active_children()
    with _workers_survive(loader):
        iterator = iter(loader)
    new = [process for process in multiprocessing.active_children() if process not in before]
    return WorkerPass(iterator, new or before)  # persistent workers are those of an earlier pass


def mute_deaths() -> Callable[[], None]:
    """From now on a worker's death raises no error between two instructions. torch's wait for the next batch still finds it.

    A run that ends at a signal ends while its loaders still exist: the death of another worker would end the program with
    torch's error instead. Returns the function that undoes it. Only the main thread may call the two.
    """
    number = getattr(signal, "SIGCHLD", None)  # Windows has none
    handler = None if number is None else signal.getsignal(number)
    if number is None or not callable(handler):
        return lambda: None

    def hear(number: int, frame: FrameType | None) -> None:
        try:
            handler(number, frame)
        except RuntimeError as error:
            if not is_worker_fault(error):
                raise

    def undo() -> None:
        signal.signal(number, handler)

    signal.signal(number, hear)
    return undo


def is_worker_fault(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is torch's of a worker process that died.

    torch raises it when the system reports the death: it may come between any two instructions of the main thread.
    """
    while error is not None:
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
