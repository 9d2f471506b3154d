"""One training run, a function of its job alone, and many of them over worker processes.

A run trains on noisy targets in the order of its seed, with a cosine schedule, and measures on clean test rows (tuning:
on noisy validation rows). Invariant: the result, but for its seconds, does not depend on workers, on other runs or on
their order.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from bench.record import read_json, write_json
from tsam_ext import TSAM, metrics

from .data import Parts, load
from .methods import Method
from .tasks import TASKS, Task

ASCENT = 0.1
OURS, WARNED = "TSAM: ", re.compile("[:0-9]")  # of a warning what comes before its figures
CONSTANTS = ("name", "kind", "gradients", "options")  # of a method, what a run depends on


@dataclass(frozen=True)
class Job:
    """What one run is a function of. ``settings``: lr and what else the optimizer takes; ``watch``: see `Watch`."""

    method: Method
    task: str
    noise: float
    seed: int
    epochs: int
    settings: dict[str, Any]
    on_validation: bool = False
    watch: bool = False

    @property
    def key(self) -> str:
        """Equal for equal jobs: what ``--resume`` goes by."""
        told = asdict(self)
        told["method"] = {name: told["method"][name] for name in CONSTANTS}
        return repr(sorted(told.items()))

    @property
    def cost(self) -> float:
        """Relative time, for the progress bar and for the order of the runs."""
        return self.epochs * self.method.price


@dataclass(frozen=True)
class Result:
    """What a run has found.

    ``curve``: the task's metric at ``marks`` (epochs); ``measures``: all measures of the last epoch; ``gradients``:
    whole-batch gradients; ``seconds`` of training, of processor time; ``seen``: means of the diagnostics over the last
    epoch, if they were watched; ``warned``: how TSAM's warnings begin.
    """

    key: str
    method: str
    task: str
    noise: float
    seed: int
    settings: dict[str, Any]
    marks: list[int]
    curve: list[float]
    measures: dict[str, float]
    gradients: float
    seconds: float
    finite: bool
    seen: dict[str, float] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)

    @property
    def final(self) -> float:
        """The task's metric at the end."""
        return self.curve[-1]


class Watch:
    """Means over the last epoch of what TSAM's diagnostics say, and of the weight on wrong targets.

    ``spread``: standard deviation of the sampled losses; ``wrong_weight``: the share of the tilted weight that lies on
    rows with a wrong target (each part's weight spread evenly over its rows).
    """

    def __init__(self) -> None:
        self.rows: dict[str, list[float]] = {}

    def see(self, optimizer: TSAM, wrong: Tensor) -> None:
        """Looks at the last step."""
        told = optimizer.diagnostics
        weights, n = told.weights.double(), len(wrong)
        s = len(weights)  # sample j sees the rows from ⌊jn/s⌋ to ⌊(j+1)n/s⌋, as TSAM.part cuts
        parts = [wrong[j * n // s : (j + 1) * n // s].double() for j in range(s)]
        shares = (
            torch.stack([part.mean() for part in parts])
            if optimizer.settings.batch == "split"
            else wrong.double().mean()
        )
        found = {
            "ess": told.ess,
            "spread": told.losses.double().std(correction=0),
            "wrong_weight": (weights * shares).sum(),
            "acceptance_rate": told.acceptance_rate,
            "distance": told.distance,
        }
        for name, value in found.items():
            self.rows.setdefault(name, []).append(float(value))

    def means(self) -> dict[str, float]:
        """Means of what is finite."""
        kept = {name: [v for v in values if math.isfinite(v)] for name, values in self.rows.items()}
        return {name: sum(values) / len(values) for name, values in kept.items() if values}


def train(job: Job) -> tuple[nn.Module, Result]:
    """Runs ``job`` in this thread: the trained net and the result."""
    torch.set_num_threads(1)
    task, parts = TASKS[job.task], load(TASKS[job.task].data, job.noise, job.seed)
    model = task.initial(job.seed)
    steps = job.epochs * math.ceil(len(parts.train_x) / task.batch)
    optimizer = job.method.optimizer(model, job.settings, job.seed, steps)
    result = _loop(job, task, parts, model, optimizer)
    if job.watch:
        result.seen.update(flatness(task, model, parts))
    return model, result


def flatness(task: Task, model: nn.Module, parts: Parts) -> dict[str, float]:
    """How far one ascent of length 0.1 lifts the loss over all noisy training rows, and over all clean test rows."""

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return task.loss(net(batch[0]), batch[1])

    rows = {"train ascent": (parts.train_x, parts.train_y), "test ascent": (parts.test_x, parts.test_y)}
    found = {name: metrics.Objective(model, [batch], loss, process_group=None) for name, batch in rows.items()}
    return {name: float(metrics.ascent_sharpness(objective, ASCENT).mean) for name, objective in found.items()}


def _loop(job: Job, task: Task, parts: Parts, model: nn.Module, optimizer: Optimizer) -> Result:
    held = (parts.validation_x, parts.validation_y) if job.on_validation else (parts.test_x, parts.test_y)
    n = len(parts.train_x)
    steps = math.ceil(n / task.batch)
    scheduler = CosineAnnealingLR(optimizer, job.epochs * steps)
    order = torch.Generator().manual_seed(job.seed + 1)
    marks = sorted({max(1, round(job.epochs * k / 10)) for k in range(1, 11)})
    curve, measures, watch = [], {}, Watch()
    total, seconds = torch.zeros(()), 0.0
    for epoch in range(1, job.epochs + 1):
        start = time.process_time()
        permutation = torch.randperm(n, generator=order)
        for first in range(0, n, task.batch):
            rows = permutation[first : first + task.batch]
            closure = _closure(task, model, optimizer, parts.train_x[rows], parts.train_y[rows])
            total += job.method.step(optimizer, closure)
            with warnings.catch_warnings():  # the scheduler looks for a call of its own optimizer's step
                warnings.simplefilter("ignore", UserWarning)
                scheduler.step()
            if job.watch and epoch == job.epochs and isinstance(optimizer, TSAM):
                watch.see(optimizer, parts.wrong[rows])
        seconds += time.process_time() - start
        if epoch in marks:
            measures = task.measure(model, *held)
            curve.append(measures[task.metric])
    finite = math.isfinite(float(total)) and all(map(math.isfinite, measures.values()))
    gradients = job.epochs * steps * job.method.gradients
    shown = (job.method.name, job.task, job.noise, job.seed, job.settings)
    return Result(job.key, *shown, marks, curve, measures, gradients, seconds, finite, watch.means())


def _closure(task: Task, model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        inputs, targets = optimizer.part(x, y) if isinstance(optimizer, TSAM) else (x, y)
        loss = task.loss(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return closure


def train_once(job: Job) -> Result:
    """The result alone, with what TSAM has warned of; other warnings pass."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train(job)[1]
    told = [str(one.message) for one in caught]
    for one in caught:
        if not str(one.message).startswith(OURS):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    mine = [WARNED.split(text.removeprefix(OURS), maxsplit=1)[0] for text in told if text.startswith(OURS)]
    return replace(result, warned=sorted(set(mine)))


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


def complete(jobs: list[Job], path: Path, settings: dict[str, Any], workers: int, *, resume: bool) -> list[Result]:
    """Runs the jobs that ``path`` does not hold yet, keeps all of them there, and returns the results in order.

    Equal jobs run once. With ``resume`` finished runs by the same versions of torch and tsam_ext are kept, also those
    of other jobs; an interrupt leaves the finished ones in the file.
    """
    found = {r.key: r for r in read_results(path)} if resume else {}
    if not found:
        set_aside(path)
    left = {job.key: job for job in jobs if job.key not in found}
    total = sum({job.key: job.cost for job in jobs}.values())
    with tqdm(total=round(total), desc="training", unit_scale=True, disable=None) as bar:
        bar.update(round(total - sum(job.cost for job in left.values())))
        for job, result in run_all(list(left.values()), min(workers, max(1, len(left)))):
            found[result.key] = result
            write_json(path, list(found.values()), settings)
            bar.update(round(job.cost))
            bar.set_postfix_str(f"{job.task}, {job.method.name}: {result.final:.2f}")
    return [found[job.key] for job in jobs]


def set_aside(path: Path) -> None:
    """Keeps a file of results that a new one is about to replace, under the name of one before."""
    if path.exists():
        path.replace(path.with_name(f"{path.stem}-before{path.suffix}"))


def read_results(path: Path) -> list[Result]:
    """The results in a file of `complete`."""
    return [Result(**row) for row in read_json(path)]
