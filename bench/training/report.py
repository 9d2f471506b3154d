"""From results to what a person reads: paired differences, claims corrected for their number, tables, the picture.

Differences are paired by seed: data, noise, order and initial weights are the same for all methods of a seed. Errors
are standard errors, sample standard deviations over √seeds. Claims are two-sided paired t tests, corrected by Holm's
method (Scandinavian Journal of Statistics, 1979): the chance of any false claim among all of them is at most 5%.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from scipy.stats import ttest_rel

from bench.record import chart

from .run import Result
from .tasks import TASKS

Key = TypeVar("Key", bound=Hashable)
Scores = dict[str, dict[int, float]]
LEVEL = 0.05
LESS_IS_BETTER = ("nll", "scaled nll", "mse", "mae")


def scores_of(results: Sequence[Result], measure: str | None = None) -> Scores:
    """By method and seed the last epoch's measure; None: the task's metric."""
    found: Scores = {}
    for r in results:
        found.setdefault(r.method, {})[r.seed] = r.final if measure is None else r.measures[measure]
    return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (NaN for a single value)."""
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
    return float(np.mean(values)), error


def shared(scores: Scores, method: str, baseline: str) -> tuple[list[float], list[float]]:
    """The scores of both, over the seeds that both have."""
    seeds = sorted(scores[method].keys() & scores[baseline].keys())
    return [scores[method][s] for s in seeds], [scores[baseline][s] for s in seeds]


def paired(scores: Scores, method: str, baseline: str) -> tuple[float, float]:
    """Mean and standard error of method minus baseline."""
    one, other = shared(scores, method, baseline)
    return mean_and_error([a - b for a, b in zip(one, other, strict=True)])


def chance(scores: Scores, method: str, baseline: str) -> float:
    """Two-sided p of the paired t test; 1 where it cannot be made (one seed, or no difference at all)."""
    one, other = shared(scores, method, baseline)
    if len(one) < 2 or one == other:
        return 1.0
    value = float(ttest_rel(one, other).pvalue)
    return 1.0 if np.isnan(value) else value


def holm(chances: dict[Key, float]) -> dict[Key, float]:
    """p values corrected for their number: the i-th smallest of m times m − i + 1, never falling, at most 1."""
    corrected: dict[Key, float] = {}
    worst = 0.0
    for i, name in enumerate(sorted(chances, key=lambda name: chances[name])):
        worst = max(worst, min(1.0, (len(chances) - i) * chances[name]))
        corrected[name] = worst
    return {name: corrected[name] for name in chances}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose source is aligned too."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in [head, *rows]
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def told(mean: float, error: float, digits: int = 2, sign: str = "") -> str:
    """A mean and its error."""
    return f"{mean:{sign}.{digits}f} ± {error:.{digits}f}"


def table(results: Sequence[Result], prices: dict[str, float], baseline: str = "SAM") -> str:
    """One task: the metric and the likelihoods, each with its paired difference to ``baseline``; gradients, seconds.

    Bold: p below 5%, corrected for all differences of the table.
    """
    task = TASKS[results[0].task]
    measures = [task.metric, *(m for m in ("nll", "scaled nll") if m in results[0].measures and m != task.metric)]
    scores = {measure: scores_of(results, measure) for measure in measures}
    names = list(scores[task.metric])
    others = [name for name in names if baseline in names and name != baseline]
    corrected = holm({(name, m): chance(scores[m], name, baseline) for name in others for m in measures})
    rows = []
    for name in names:
        cells = [name]
        for measure in measures:
            digits = 4 if measure in ("mse", "mae") else 2
            cells.append(told(*mean_and_error(list(scores[measure][name].values())), digits))
            if baseline in names:
                gain = told(*paired(scores[measure], name, baseline), digits, "+") if name in others else ""
                cells.append(f"**{gain}**" if corrected.get((name, measure), 1.0) < LEVEL else gain)
        seconds = float(np.mean([r.seconds for r in results if r.method == name]))
        rows.append([*cells, f"{prices[name]:.3g}", f"{seconds:.1f}"])
    heads = ["method"]
    for measure in measures:
        heads.append(
            measure.replace("nll", "NLL").replace("iou", "IoU") + (" %" if measure not in LESS_IS_BETTER else "")
        )
        heads += [f"minus {baseline}"] if baseline in names else []
    return markdown([*heads, "gradients/step", "seconds"], rows)


def warned(results: Sequence[Result]) -> list[str]:
    """What TSAM has warned of, and in how many runs of each method."""
    runs = Counter((r.task, r.method, text) for r in results for text in r.warned)
    return [
        f"{task}, {method}, {count} runs warned: {text.strip()} ..." for (task, method, text), count in runs.items()
    ]


def diverged(results: Sequence[Result]) -> list[str]:
    """Runs whose loss has not stayed finite."""
    return [f"{r.task}, {r.method}, seed {r.seed}: the loss is not finite" for r in results if not r.finite]


def impossible(results: Sequence[Result]) -> list[str]:
    """Measures that no run can have: a share outside 0 to 100, an error below 0."""
    found = []
    for r in results:
        for name, value in r.measures.items():
            top = float("inf") if name in LESS_IS_BETTER else 100.0
            if not 0.0 <= value <= top and r.finite:
                found.append(f"{r.task}, {r.method}, seed {r.seed}: {name} is {value}")
    return found


def behind(results: Sequence[Result], method: str, baseline: str, measure: str) -> list[str]:
    """The target that ``method`` is better than ``baseline`` by more than two standard errors, where it is missed."""
    scores = scores_of(results, measure)
    if method not in scores or baseline not in scores:
        return []
    difference, error = paired(scores, method, baseline)
    difference = -difference if measure in LESS_IS_BETTER else difference
    if difference > 2 * error:
        return []
    gain = told(difference, error, sign="+")
    return [f"{method} is better than {baseline} in {measure} by {gain}: not above two standard errors"]


def picture(results: Sequence[Result], path: Path, title: str) -> None:
    """Curves with a band of one standard error; beside them each seed's final metric and its NLL, paired."""
    metric, names = TASKS[results[0].task].metric, list(scores_of(results))
    measures = [metric, *(["nll"] if "nll" in results[0].measures and metric != "nll" else [])]
    with chart(
        path, 1 + len(measures), (5 + 4 * len(measures), 4.6), width_ratios=(3, *(2 for _ in measures))
    ) as panels:
        left, *others = panels
        for name in names:
            mine = [r for r in results if r.method == name]
            curves = np.array([r.curve for r in mine])
            mean, error = curves.mean(0), curves.std(0, ddof=1 if len(curves) > 1 else 0) / len(curves) ** 0.5
            (line,) = left.plot(mine[0].marks, mean, marker="o", markersize=3, label=name)
            left.fill_between(mine[0].marks, mean - error, mean + error, alpha=0.2, color=line.get_color())
        for axes, measure in zip(others, measures, strict=True):
            scores = scores_of(results, measure)
            for seed in sorted({r.seed for r in results}):
                axes.plot([scores[name].get(seed, np.nan) for name in names], color="0.8", linewidth=0.8, zorder=1)
            for i, name in enumerate(names):
                axes.plot([i] * len(scores[name]), list(scores[name].values()), "o", color=f"C{i}", markersize=5)
            axes.set(
                title=f"last epoch, test {measure.replace('nll', 'NLL')}, one line per seed", xticks=range(len(names))
            )
            axes.title.set_fontsize(9)
            axes.set_xticklabels(names, rotation=30, ha="right", fontsize=7)
        left.set(xlabel="epoch", ylabel=f"test {metric}", title=title)
        left.legend(frameon=False, fontsize=7)
        for axes in panels:
            axes.grid(axis="y", color="0.92")
