"""The search for settings: every method tries as many, on noisy validation rows and seeds that no comparison uses.

The grid of a method is learning rates times its own values (methods.py). The best is the highest mean metric over the
seeds; a run whose loss is not finite counts as the worst that there is. Invariant: no test row is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .methods import Method
from .report import mean_and_error
from .run import Job, Result
from .tasks import TASKS

SEEDS = (901, 902, 903)
Settings = dict[str, Any]


@dataclass(frozen=True)
class Tried:
    """One setting of a method: the metric on validation rows, mean and standard error over the seeds."""

    method: str
    settings: Settings
    mean: float
    error: float


def jobs_of(method: Method, task: str, noise: float, seeds: Sequence[int], epochs: int) -> list[Job]:
    """The runs of a search, setting by setting."""
    grid = [{"lr": rate * TASKS[task].rate, **own} for rate in method.rates for own in method.own]
    return [Job(method, task, noise, seed, epochs, setting, True) for setting in grid for seed in seeds]


def search(
    methods: Sequence[Method],
    task: str,
    noise: float,
    seeds: Sequence[int],
    epochs: int,
    run: Callable[[list[Job]], list[Result]],
) -> dict[str, list[Tried]]:
    """What was tried for each method, the best first."""
    jobs = [job for m in methods for job in jobs_of(m, task, noise, seeds, epochs)]
    by_key = {result.key: result for result in run(jobs)}
    worst = float("-inf") if TASKS[task].higher else float("inf")
    found: dict[str, list[Tried]] = {}
    for method in methods:
        mine = jobs_of(method, task, noise, seeds, epochs)
        for i in range(0, len(mine), len(seeds)):
            results = [by_key[job.key] for job in mine[i : i + len(seeds)]]
            finals = [r.final if r.finite else worst for r in results]
            mean, error = mean_and_error(finals) if worst not in finals else (worst, float("nan"))
            found.setdefault(method.name, []).append(Tried(method.name, mine[i].settings, mean, error))
        found[method.name].sort(key=lambda tried: -tried.mean if TASKS[task].higher else tried.mean)
    return found


def at_an_edge(best: Settings, tried: Sequence[Tried]) -> list[str]:
    """The settings whose best value is the smallest or the largest of three or more that were tried, and above 0."""
    found = []
    for name, value in best.items():
        values = sorted({t.settings[name] for t in tried if isinstance(t.settings.get(name), int | float)})
        if len(values) > 2 and value in (values[0], values[-1]) and value != 0:
            found.append(f"{name} {value:g}")
    return found
