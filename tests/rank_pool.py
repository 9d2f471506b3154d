"""Processes that torch.distributed connects, for tests; they stay alive between tests, as a start takes seconds.

``pool(n).run(function, *arguments)`` calls ``function(rank, *arguments)`` in each of n processes, under gloo, and gives
the list of what they returned; an exception there fails the test with its traceback. ``function`` is a test file's own.
Invariant: a pool in which a process has raised or died is thrown away.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "torch.distributed", "torch.nn.parallel", "torch._dynamo", "numpy"])
TIMEOUT = 120  # seconds for one call


def serve(
    rank: int, size: int, place: str, folder: str, pipe: connection.Connection, seconds: float, backend: str
) -> None:
    """The body of a process: calls what comes through the pipe until it is closed."""
    sys.path[:0] = [folder, str(Path(folder).parent)]
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{place}", rank=rank, world_size=size, timeout=timedelta(seconds=seconds)
    )
    while True:
        try:
            module, name, arguments = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(rank, *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    os._exit(0)  # groups of tests may be half gone


class Pool:
    """n processes of one world. ``seconds``: how long a collective may take; ``backend``: nccl has a GPU for each."""

    def __init__(self, size: int, seconds: float = 60.0, backend: str = "gloo") -> None:
        self.size, self.broken = size, False
        place = tempfile.mktemp(prefix="ranks-")
        folder = str(Path(__file__).parent)
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = PROCESSES.Pipe()
            arguments = (rank, size, place, folder, there, seconds, backend)
            process = PROCESSES.Process(target=serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the ranks return; those that die give None."""
        for pipe in self.pipes:
            pipe.send((Path(function.__code__.co_filename).stem, function.__name__, arguments))
        results, failures = [], []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(TIMEOUT):
                self.close()
                raise TimeoutError(f"rank {rank} has not answered within {TIMEOUT} s")
            try:
                good, value = pipe.recv()
            except (EOFError, ConnectionResetError):
                good, value, self.broken = True, None, True
            results.append(value)
            if not good:
                failures.append(f"rank {rank}:\n{value}")
        if failures:
            self.close()
            raise AssertionError("\n".join(failures))
        return results

    def close(self) -> None:
        """Ends the processes."""
        self.broken = True
        for process in self.processes:
            process.kill()


@functools.cache
def _pools() -> dict[int, Pool]:
    return {}


def pool(size: int) -> Pool:
    """The pool of that many processes that tests share."""
    pools = _pools()
    if size not in pools or pools[size].broken:
        pools[size] = Pool(size)
    return pools[size]
