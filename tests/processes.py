"""Runs a function in several processes of one gloo group; a group that gets stuck fails."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")  # which imports torch and fxstn once, not in every process
CONTEXT.set_forkserver_preload(["fxstn", "tests.test_distributed"])


class Failed(Exception):
    """What a process raised: (rank, name of the exception, message)."""

    def __init__(self, errors: list[tuple[int, str, str]]) -> None:
        super().__init__("\n".join(f"process {rank}: {name}: {text}" for rank, name, text in errors))
        self.errors = errors


def _begin(function, rank, world, file, pipe, arguments):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        pipe.send_bytes(pickle.dumps((None, function(rank, *arguments))))
    except BaseException as error:
        pipe.send_bytes(pickle.dumps(((rank, type(error).__name__, traceback.format_exc()), None)))
    dist.destroy_process_group()


def run(world, function, *arguments, seconds=120):
    """What function(rank, *arguments) returns in each process. Raises Failed."""
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        pipes, started = [], []
        for rank in range(world):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(target=_begin, args=(function, rank, world, f"{folder}/group", theirs, arguments))
            process.start()
            theirs.close()
            pipes.append(ours)
            started.append(process)
        try:
            outcomes = [_received(pipe, rank, deadline) for rank, pipe in enumerate(pipes)]
        finally:
            for process in started:
                process.join(max(0.0, min(5.0, deadline - time.monotonic())))
                process.kill()
                process.join()
    if errors := [error for error, _ in outcomes if error is not None]:
        raise Failed(errors)
    return [value for _, value in outcomes]


def _received(pipe, rank, deadline):
    if not pipe.poll(max(0.0, deadline - time.monotonic())):
        return (rank, "Stuck", "no result in time"), None
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return (rank, "Gone", "the process ended without a result"), None
