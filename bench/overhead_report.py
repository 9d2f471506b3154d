"""From timed estimates to what a person reads: the tables, the targets that are missed, and the picture.

Times are the best of the rounds; ratios are taken round by round, median and quartiles. Targets on the floor are judged
by the best time, those on ratios by the median.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import calls
from .baselines import ForeachTSAM
from .record import chart, heading

WAYS = {
    "ours": "tsam_ext",
    "loop": "TSAM, loops over tensors",
    "foreach": "TSAM, torch._foreach",
    "compiled": "TSAM, torch.compile",
    "wrapper": "SAM, the wrapper's flow",
    "library": "pytorch_optimizer.SAM",
}
# Targets: what ours may take, in floors, with AVX-512 and AVX2 kernels; and how much longer others have to take.
OVER_FLOOR = {"ascent": (1.35, 1.6), "ascent, sphere": (1.5, 1.8), "SAM": (1.2, 1.5), "hmc": (1.35, 1.6)}
SPEEDUP = {"loop": 12.0, "foreach": 5.0, "compiled": 2.0}
SMALL_SPEEDUP = {"loop": 20.0}
BANDWIDTH_SHARE = 0.7  # what each pass of the foreach way should reach of the bandwidth


@dataclass
class Row:
    """What was measured of one way; ``seconds`` of an estimate without its gradients, one per round."""

    list_name: str
    task: str
    way: str
    elements: int
    words: int
    floor: float
    floor_then: float = 0.0  # by the bandwidth right before and right after
    seconds: list[float] = field(default_factory=list)
    calls: int = 0
    syncs: int = 0
    extra_memory: float = 0.0  # in units of the parameters' bytes
    passes: dict[str, list[float]] = field(default_factory=dict)  # the foreach way's, seconds of each call

    @property
    def best(self) -> float:
        """The shortest time."""
        return min(self.seconds)

    def ratio(self, ours: Row) -> tuple[float, float, float]:
        """Median and quartiles of this way's time over ours, round by round."""
        low, middle, high = np.quantile(np.array(self.seconds) / np.array(ours.seconds), (0.25, 0.5, 0.75))
        return float(middle), float(low), float(high)


def ours_of(rows: list[Row], row: Row) -> Row:
    """Our row of the same list and task."""
    return next(r for r in rows if (r.list_name, r.task, r.way) == (row.list_name, row.task, "ours"))


def missed(rows: list[Row], isa: str) -> list[str]:
    """The targets that are not reached."""
    found = []
    for row in rows:
        where = f"{row.list_name}, {row.task}"
        small = row.list_name == "mlp"
        if row.way == "ours" and not small and isa in ("avx512", "avx2") and row.task in OVER_FLOOR:
            allowed = OVER_FLOOR[row.task][0 if isa == "avx512" else 1]
            if not row.best / row.floor <= allowed:
                found.append(f"{where}: {row.best / row.floor:.2f} times the floor, allowed {allowed}")
        wanted = (SMALL_SPEEDUP if small else SPEEDUP).get(row.way, 0.0) if row.task == "ascent" else 0.0
        ratio = row.ratio(ours_of(rows, row))[0]
        if not ratio >= wanted:
            found.append(f"{where}: {WAYS[row.way]} takes {ratio:.2f} times as long as ours, wanted {wanted:g}")
    return found


def markdown(rows: list[Row], where: dict[str, Any]) -> str:
    """The tables and what they have to be quoted with."""
    limits = where["floor"]
    details = f", {where['rounds']} rounds"
    lines = [
        f"{heading(where, details)} Floor: {limits['bandwidth'] / 1e9:.1f} GB/s, "
        f"{limits['draw_rate'] / 1e9:.2f} G normals/s.",
        "",
        "| list | estimate | way | ms | over ours [quartiles] | over floor | over floor then | words | extra memory | "
        "op calls | syncs |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = "" if row.way == "ours" else "×{:.2f} [{:.2f}, {:.2f}]".format(*row.ratio(ours_of(rows, row)))
        words = str(row.words) if row.way in ("ours", "foreach", "compiled") else ""
        counted = f"{row.extra_memory:.2f} P | {row.calls} | {row.syncs}" if row.calls else " |  | "
        lines.append(
            f"| {row.list_name} | {row.task} | {WAYS[row.way]} | {row.best * 1e3:.2f} | {ratio} | "
            f"{row.best / row.floor:.2f} | {row.best / row.floor_then:.2f} | {words} | {counted} |"
        )
    lines += ["", *pass_table(rows, limits["bandwidth"]), "", *calls.table(where["calls"])]
    return "\n".join(lines) + "\n"


def pass_table(rows: list[Row], bandwidth: float) -> list[str]:
    """Each pass of the foreach way: GB/s, and those below the share of the bandwidth that a good pass reaches."""
    shown = [row for row in rows if row.way == "foreach" and row.list_name != "mlp" and row.task == "ascent"]
    if not shown:
        return []
    lines = [f"Passes of {WAYS['foreach']}, GB/s (share of {bandwidth / 1e9:.1f}):", "", "| pass | words |"]
    lines[-1] += "".join(f" {row.list_name} |" for row in shown)
    lines.append("|---" * (2 + len(shown)) + "|")
    for name, words in ForeachTSAM.WORDS.items():
        rates = [4 * words * row.elements / min(row.passes[name]) for row in shown]
        cells = "".join(
            f" {rate / 1e9:.1f} ({rate / bandwidth:.2f}{', below' if rate < BANDWIDTH_SHARE * bandwidth else ''}) |"
            for rate in rates
        )
        lines.append(f"| {name} | {words} |{cells}")
    return lines


def picture(rows: list[Row], path: Path) -> None:
    """Bars of time over floor, one panel per estimate."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    names = list(dict.fromkeys(row.list_name for row in rows))
    with chart(path, len(tasks), (3.2 * len(tasks), 3.6)) as panels:
        for axes, task in zip(panels, tasks, strict=True):
            ways = list(dict.fromkeys(row.way for row in rows if row.task == task))
            width = 0.8 / len(ways)
            for i, way in enumerate(ways):
                found = {row.list_name: row.best / row.floor for row in rows if (row.task, row.way) == (task, way)}
                places = [names.index(name) + (i - (len(ways) - 1) / 2) * width for name in found]
                bars = axes.bar(places, list(found.values()), width, label=WAYS[way])
                axes.bar_label(bars, fmt="%.1f", fontsize=5, padding=1)
            axes.axhline(1.0, color="0.3", linewidth=0.8)
            axes.set(title=task, yscale="log", xticks=range(len(names)))
            axes.set_xticklabels(names, rotation=30, ha="right", fontsize=7)
            axes.legend(frameon=False, fontsize=6)
        panels[0].set_ylabel("best time / floor")
