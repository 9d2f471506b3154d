"""One training run, a function of its job alone, and many of them over worker processes.

A run trains on noisy labels in the order of its seed and measures accuracy on clean test labels (tuning: on noisy
validation labels). Invariant: the result does not depend on workers, on other runs or on their order.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tsam_ext import TSAM

from .data import load
from .training_methods import BATCH, Method, initial


@dataclass(frozen=True)
class Job:
    """What one run is a function of."""

    method: Method
    seed: int
    data: str
    label_noise: float
    epochs: int
    learning_rate: float
    on_validation: bool = False

    @property
    def key(self) -> str:
        """Equal for equal jobs: what ``--resume`` goes by."""
        return repr(sorted(asdict(self).items()))

    @property
    def cost(self) -> int:
        """Whole-batch gradients, for the progress bar."""
        return round(self.epochs * self.method.gradients)


@dataclass(frozen=True)
class Result:
    """Accuracy at ``epochs`` (curve), seconds of training, and whether the loss stayed finite."""

    key: str
    method: str
    seed: int
    epochs: list[int]
    accuracy: list[float]
    seconds: float
    finite: bool
    ess: float | None


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right predictions, in percent."""
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean()) * 100


def train_once(job: Job) -> Result:
    """Runs ``job`` in this thread."""
    torch.set_num_threads(1)
    images = load(job.data, job.label_noise, job.seed)
    held_x, held_y = images.test_x, images.test_y
    if job.on_validation:
        held_x, held_y = images.validation_x, images.validation_y
    model = initial(images.train_x.shape[-1], job.seed)
    optimizer = job.method.optimizer(model, job.learning_rate, job.seed)
    order = torch.Generator().manual_seed(job.seed + 1)
    marks = sorted({max(1, round(job.epochs * k / 10)) for k in range(1, 11)})
    curve, finite, seconds = [], True, 0.0
    n = len(images.train_x)
    for epoch in range(1, job.epochs + 1):
        start = time.perf_counter()
        permutation = torch.randperm(n, generator=order)
        total = torch.zeros(())
        for first in range(0, n, BATCH):
            rows = permutation[first : first + BATCH]
            total += _step(model, optimizer, images.train_x[rows], images.train_y[rows])
        seconds += time.perf_counter() - start
        finite = finite and math.isfinite(float(total))
        if epoch in marks:
            curve.append(accuracy(model, held_x, held_y))
    ess = float(optimizer.diagnostics.ess) if isinstance(optimizer, TSAM) else None
    return Result(job.key, job.method.name, job.seed, marks, curve, seconds, finite, ess)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()

    def closure() -> Tensor:
        inputs, labels = optimizer.part(x, y) if isinstance(optimizer, TSAM) else (x, y)
        loss = cross_entropy(model(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    step: Any = optimizer.step  # torch annotates closures as returning float
    loss = step(closure)
    return torch.as_tensor(loss).detach()


def _begin_worker() -> None:
    """An interrupt is the parent's to handle, and a worker does not outlive its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_all(jobs: list[Job], workers: int, run: Callable[[Job], Result] = train_once) -> Iterator[tuple[Job, Result]]:
    """Runs the jobs over ``workers`` processes and yields each as it ends; the longest start first."""
    jobs = sorted(jobs, key=lambda job: -job.cost)
    if workers == 1:
        for job in jobs:
            yield job, run(job)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    waiting: dict[Future[Result], Job] = {pool.submit(run, job): job for job in jobs}
    try:
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield waiting.pop(future), future.result()
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
