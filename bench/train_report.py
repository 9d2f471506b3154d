"""From results to what a person reads: the table, the verdict, the picture; and back from a file.

Differences are paired by seed: data, label noise, order and initial weights are the same for all methods of a seed.
Standard errors are sample standard deviations over √seeds.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from .record import chart, environment
from .run import Result
from .training_methods import Method

Finals = dict[str, dict[int, float]]


def finals(results: list[Result]) -> Finals:
    """Last accuracy by method and seed."""
    found: Finals = {}
    for result in results:
        found.setdefault(result.method, {})[result.seed] = result.accuracy[-1]
    return found


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (NaN for a single value)."""
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
    return float(np.mean(values)), error


def paired(scores: Finals, method: str, baseline: str) -> tuple[float, float]:
    """Mean and standard error of the differences over the seeds that both have."""
    seeds = sorted(scores[method].keys() & scores[baseline].keys())
    return mean_and_error([scores[method][seed] - scores[baseline][seed] for seed in seeds])


def table(results: list[Result], methods: list[Method]) -> str:
    """The table as text."""
    scores = finals(results)
    seconds = {m.name: float(np.mean([r.seconds for r in results if r.method == m.name])) for m in methods}
    head = ("method", "test accuracy %", "minus ERM", "minus SAM", "gradients/step", "seconds")
    rows = [head]
    for m in methods:
        cells = [m.name, "{:.2f} ± {:.2f}".format(*mean_and_error(list(scores[m.name].values())))]
        for baseline in ("ERM", "SAM"):
            known = baseline in scores and m.name != baseline
            cells.append("{:+.2f} ± {:.2f}".format(*paired(scores, m.name, baseline)) if known else "")
        rows.append((*cells, f"{m.gradients:.3g}", f"{seconds[m.name]:.1f}"))  # type: ignore[arg-type]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def diverged(results: list[Result]) -> list[str]:
    """Runs whose loss has not stayed finite."""
    return [f"{r.method}, seed {r.seed}: the loss is not finite" for r in results if not r.finite]


def behind(results: list[Result]) -> list[str]:
    """Methods that do not beat ERM by more than two standard errors."""
    scores, found = finals(results), []
    for method in scores:
        if method != "ERM" and "ERM" in scores:
            difference, error = paired(scores, method, "ERM")
            if not difference > 2 * error:
                found.append(f"{method} minus ERM is {difference:+.2f} ± {error:.2f}: not above two standard errors")
    return found


def picture(results: list[Result], methods: list[Method], path: Path, title: str) -> None:
    """Curves with a band of one standard error, and each seed's final accuracy, paired, beside them."""
    scores = finals(results)
    with chart(path, 2, (11, 4.6), width_ratios=(3, 2)) as (left, right):
        for i, m in enumerate(methods):
            curves = np.array([r.accuracy for r in results if r.method == m.name])
            epochs = next(r.epochs for r in results if r.method == m.name)
            center = curves.mean(0)
            error = curves.std(0, ddof=1) / len(curves) ** 0.5 if len(curves) > 1 else np.zeros_like(center)
            cost = f"{m.gradients:.3g} gradient{'s' if m.gradients > 1 else ''}/step"
            left.plot(epochs, center, color=f"C{i}", marker="o", markersize=3, label=f"{m.name} ({cost})")
            left.fill_between(epochs, center - error, center + error, color=f"C{i}", alpha=0.2, linewidth=0)
            values = list(scores[m.name].values())
            right.plot([i] * len(values), values, "o", color=f"C{i}", zorder=3)
            right.plot([i - 0.25, i + 0.25], [np.mean(values)] * 2, color=f"C{i}", linewidth=2)
        for seed in sorted({r.seed for r in results}):
            line = [scores[m.name].get(seed, np.nan) for m in methods]
            right.plot(range(len(methods)), line, color="0.8", linewidth=0.8, zorder=1)
        left.set(xlabel="epoch", ylabel="test accuracy (%)", title=title)
        left.legend(frameon=False, fontsize=7)
        right.set(title="last epoch, one line per seed", xticks=range(len(methods)))
        right.set_xticklabels([m.name for m in methods], rotation=30, ha="right", fontsize=7)
        for axes in (left, right):
            axes.grid(axis="y", color="0.92")


def read_json(path: Path) -> list[Result]:
    """The results in a file of write_json by these versions of torch and tsam_ext; none if it is not there."""
    if not path.exists():
        return []
    found, here = json.loads(path.read_text()), environment({})
    if any(found["environment"][key] != here[key] for key in ("torch", "tsam_ext")):
        return []
    return [Result(**row) for row in found["results"]]
