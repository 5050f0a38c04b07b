"""Runs a function in several processes of one gloo group; a group that gets stuck fails."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")  # which imports torch and fxstn once, not in every process
PRELOADED = "tests.test_distributed"  # a name that cannot be imported is left out in silence
CONTEXT.set_forkserver_preload([PRELOADED])


UNCONNECTED = "Unconnected"  # what a process says whose group gloo could not make


class Failed(Exception):
    """What a process raised: (rank, name of the exception, message)."""

    def __init__(self, errors: list[tuple[int, str, str]]) -> None:
        super().__init__("\n".join(f"process {rank}: {name}: {text}" for rank, name, text in errors))
        self.errors = errors


def _begin(function, rank, world, file, pipe, arguments):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{file}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
    except RuntimeError as error:
        pipe.send_bytes(pickle.dumps(((rank, UNCONNECTED, str(error)), None)))
        return
    try:
        pipe.send_bytes(pickle.dumps((None, function(rank, *arguments))))
    except BaseException as error:
        pipe.send_bytes(pickle.dumps(((rank, type(error).__name__, traceback.format_exc()), None)))
    dist.destroy_process_group()


def has_preloaded(rank):
    """Whether this process has what the server should have imported for it."""
    return PRELOADED in sys.modules


def run(world, function, *arguments, seconds=120):
    """What function(rank, *arguments) returns in each process. Raises Failed.

    A group that gloo cannot connect, which now and then a port in use by others is enough for, is made again.
    """
    for _ in range(3):
        outcomes = _outcomes(world, function, arguments, seconds)
        errors = [error for error, _ in outcomes if error is not None]
        if all(name != UNCONNECTED for _, name, _ in errors):
            break
    if errors:
        raise Failed(errors)
    return [value for _, value in outcomes]


def _outcomes(world, function, arguments, seconds):
    """(error, value) of each process; of those until one is not connected."""
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        pipes, started, outcomes = [], [], {}
        for rank in range(world):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(target=_begin, args=(function, rank, world, f"{folder}/group", theirs, arguments))
            process.start()
            theirs.close()
            pipes.append(ours)
            started.append(process)
        try:
            while len(outcomes) < world and all(not error or error[1] != UNCONNECTED for error, _ in outcomes.values()):
                missing = [pipe for rank, pipe in enumerate(pipes) if rank not in outcomes]
                for pipe in wait(missing, max(0.0, deadline - time.monotonic())) or missing:
                    rank = pipes.index(pipe)
                    outcomes[rank] = _received(pipe, rank, deadline)
        finally:
            for process in started:
                process.join(max(0.0, min(5.0, deadline - time.monotonic())))
                process.kill()
                process.join()
    return [outcomes[rank] for rank in sorted(outcomes)]


def _received(pipe, rank, deadline):
    if not pipe.poll(max(0.0, deadline - time.monotonic())):
        return (rank, "Stuck", "no result in time"), None
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return (rank, "Gone", "the process ended without a result"), None
