"""Times each op against the same work in torch, and against what the memory can do.

Ways: ours, plain torch in a Python loop over the tensors, torch._foreach_*, torch.compile; taken in turns, each call
on cold caches, after a check that all compute the same. A C++ program of ours measures the floor before, between and
after.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from tsam_ext import _C

from . import floor
from .command import add_command, add_no_compile, add_rounds, cannot_run, conclude, positive, rounds_of
from .op_cases import cases, sizes_of
from .op_check import Case, Way, disagreement
from .record import begin, chart, environment, heading, keep

ELEMENTS, ROUNDS, FLOOR_REPEATS, BETWEEN_REPEATS = 10_000_000, 20, 20, 4
QUICK_ELEMENTS, QUICK_ROUNDS, QUICK_FLOOR_REPEATS = 1_000_000, 3, 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WAYS = {"ours": "ours", "plain": "torch, loop", "foreach": "torch._foreach", "compiled": "torch.compile"}
# Targets, where the kernels are the AVX-512 ones.
NOISE_SPEEDUP = 6.0
OVER_FLOOR = 1.35


@dataclass(frozen=True)
class Row:
    """One op: ``seconds`` per call by way, one per round; ``roof``: the read roofline's seconds, if it has one."""

    name: str
    words: float
    draws: int
    moved_bytes: float
    floor: float
    seconds: dict[str, list[float]]
    judged: str = ""
    roof: float = 0.0

    def best(self, way: str = "ours") -> float:
        """The shortest time."""
        return min(self.seconds[way])

    def ratio(self, way: str) -> tuple[float, float, float]:
        """Median and quartiles of a way's time over ours, round by round."""
        pairs = [b / a for a, b in zip(self.seconds["ours"], self.seconds[way], strict=True)]
        low, middle, high = np.quantile(pairs, (0.25, 0.5, 0.75))
        return float(middle), float(low), float(high)

    def over_floor(self, way: str = "ours") -> float:
        """The shortest time over the floor; NaN for ops on a few numbers."""
        return self.best(way) / self.floor if self.floor else float("nan")

    def over_read(self, way: str = "ours") -> float:
        """The shortest time over the read roofline; NaN for ops that write."""
        return self.best(way) / self.roof if self.roof else float("nan")


def add_parser(commands: Any) -> None:
    """Adds the command to python -m bench."""
    parser = add_command(
        commands,
        "ops",
        run,
        __doc__,
        summary="time every op against plain torch, torch._foreach, torch.compile and the memory's bandwidth",
        targets=f"with AVX-512 kernels and {ELEMENTS:,} float32 elements, perturb_ is {NOISE_SPEEDUP:g} times as "
        f"fast as plain torch; grad_norm_, ascend_ and accumulate_ take at most {OVER_FLOOR} times the floor",
    )
    parser.add_argument("--elements", type=positive, help="elements of all tensors together "
                        f"(default: {ELEMENTS:,}; with --quick {QUICK_ELEMENTS:,})")  # fmt: skip
    parser.add_argument("--tensors", type=positive, help="so many tensors of one size (default: ResNet-18's 62)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of parameters and gradients")
    add_rounds(parser, ROUNDS, QUICK_ROUNDS)
    parser.add_argument("--ops", nargs="+", metavar="NAME", help="only ops whose name contains one of these")
    add_no_compile(parser)
    parser.add_argument("--quick", action="store_true", help="few elements and rounds, no torch.compile, no targets")


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    elements = options.elements or (QUICK_ELEMENTS if options.quick else ELEMENTS)
    judged = not options.quick and elements >= ELEMENTS and options.dtype == "float32" and _C.__isa__ == "avx512"
    if options.strict and not judged:
        return cannot_run(options, f"--strict takes AVX-512 kernels, {ELEMENTS:,} float32 elements or more, no --quick")
    try:
        with torch.no_grad():
            return _run(options, elements, judged)
    except floor.FloorError as error:
        return cannot_run(options, error)


def _run(options: argparse.Namespace, elements: int, judged: bool) -> int:
    rounds, dtype = rounds_of(options), DTYPES[options.dtype]
    repeats = QUICK_FLOOR_REPEATS if options.quick else FLOOR_REPEATS
    sizes = sizes_of(elements, options.tensors)
    wanted = [c for c in cases(sizes, dtype) if not options.ops or any(name in c.name for name in options.ops)]
    if not wanted:
        return cannot_run(options, f"no op's name contains {' or '.join(options.ops)}")
    settings = begin(options)
    program = floor.Program()
    cache = floor.cache_bytes()
    size = floor.array_bytes(cache, floor.physical_memory())
    scratch = torch.ones(2 * cache // 4)
    bandwidths, rates, seconds, notes = [program.bandwidths(size, repeats)], [floor.draw_rate(repeats)], [], []
    with tqdm(wanted, unit="op") as bar:
        for case in bar:
            bar.set_description(case.name)
            ways = case.ways()
            if case.compiled and not (options.no_compile or options.quick):
                compiled, note = compile_way(case)
                notes += [note] if note else []
                ways |= {"compiled": compiled} if compiled else {}
            for name, way in ways.items():
                if wrong := disagreement(case, way, dtype):
                    return conclude([f"{case.name}: {WAYS[name]} computes something else: {wrong}"])
            seconds.append(measure(case, ways, rounds, scratch))
            if not options.quick:  # one slow phase of the machine must not make the floor easy
                bandwidths.append(program.bandwidths(size, BETWEEN_REPEATS))
                rates.append(floor.draw_rate(BETWEEN_REPEATS))
    bandwidths.append(program.bandwidths(size, repeats))
    rates.append(floor.draw_rate(repeats))
    limits = floor.combined(program, size, bandwidths, rates)
    rows = [row_of(c, s, limits, elements, dtype) for c, s in zip(wanted, seconds, strict=True)]

    settings |= {"elements": elements, "tensors": len(sizes), "dtype": options.dtype, "rounds": rounds}
    settings |= {"floor": vars(limits), "notes": notes}
    stem = options.out / (
        "ops" + ("-quick" if options.quick else "") + ("" if dtype == torch.float32 else f"-{options.dtype}")
    )
    title = f"{elements:,} {options.dtype} in {len(sizes)} tensors, {_C.__isa__}"
    keep(stem, rows, settings, markdown(rows, environment(settings)), lambda path: picture(rows, path, title))
    if not judged:
        print(f"no targets: they take AVX-512 kernels, {ELEMENTS:,} float32 elements or more, and not --quick")
        return 0
    return conclude([], missed(rows), strict=options.strict)


def compile_way(case: Case) -> tuple[Way | None, str]:
    """The compiled way after its first call, or none and the reason."""
    assert case.compiled is not None
    torch._dynamo.reset()
    way: Way = torch.compile(case.compiled, fullgraph=True, dynamic=False)
    try:
        case.reset()
        way()
    except Exception as error:  # whatever it is, the other ways can still be timed
        lines = str(error).strip().splitlines() or [""]
        return None, f"{case.name}: torch.compile failed: {type(error).__name__}: {lines[0]}"
    return way, ""


def measure(case: Case, ways: dict[str, Way], rounds: int, scratch: torch.Tensor) -> dict[str, list[float]]:
    """Seconds per call, the ways in turns; before each call of a large op, reading ``scratch`` empties the caches."""
    case.reset()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, rounds):
        for name, way in ways.items():
            if case.calls == 1:
                scratch.sum()
            start = time.perf_counter()
            for _ in range(case.calls):
                way()
            passed = (time.perf_counter() - start) / case.calls
            if turn >= 0:
                found[name].append(passed)
    return found


def row_of(case: Case, seconds: dict[str, list[float]], limits: floor.Floor, elements: int, dtype: torch.dtype) -> Row:
    """A case's times with its floor."""
    moved = case.moved_bytes(elements, dtype)
    bound, roof = limits.seconds(moved, case.draws * elements), limits.read_seconds(moved) if case.reads else 0.0
    return Row(case.name, case.words, case.draws, moved, bound, seconds, case.judged, roof)


def missed(rows: list[Row]) -> list[str]:
    """The targets that are not reached; ops left out with --ops are not judged."""
    found = []
    for row in rows:
        if row.judged == "noise" and not row.ratio("plain")[0] >= NOISE_SPEEDUP:
            found.append(
                f"{row.name} is {row.ratio('plain')[0]:.2f} times as fast as plain torch, wanted {NOISE_SPEEDUP:g}"
            )
        if row.judged == "memory" and not row.over_floor() <= OVER_FLOOR:
            found.append(f"{row.name} takes {row.over_floor():.2f} times the floor, allowed {OVER_FLOOR}")
    return found


def _cell(row: Row, way: str, unit: float) -> str:
    if way not in row.seconds:
        return ""
    return f"{row.best(way) * unit:.2f}, ×{{:.2f}} [{{:.2f}}, {{:.2f}}]".format(*row.ratio(way))


def markdown(rows: list[Row], where: dict[str, Any]) -> str:
    """The tables and what they have to be quoted with."""
    limits = where["floor"]
    ways = [way for way in WAYS if way != "ours" and any(way in row.seconds for row in rows)]
    titles = " | ".join(WAYS[way] for way in ways)
    shown_runs = (("before", limits["runs"][0]), ("after", limits["runs"][-1]))
    details = f": {where['elements']:,} {where['dtype']} elements in {where['tensors']} tensors"
    details += f", {where['rounds']} rounds"
    lines = [
        heading(where, details),
        "",
        f"Floor: {limits['bandwidth'] / 1e9:.1f} GB/s ({limits['stores']}; {limits['array_bytes'] >> 20} MiB arrays; "
        + "; ".join(f"{when}: " + ", ".join(f"{k} {v:.1f}" for k, v in run.items()) for when, run in shown_runs)
        + f"), {limits['draw_rate'] / 1e9:.2f} G normals/s. Roofline of passes that only read (ours/read): "
        f"{limits['read_bandwidth'] / 1e9:.1f} GB/s.",
        "",
        "Best time of a call; then its time over ours, median and quartiles of the rounds.",
        "",
    ]
    large, small = [r for r in rows if r.floor], [r for r in rows if not r.floor]
    if large:
        head = "op | words | floor ms | ours ms | ours/floor | ours/read | GB/s"
        lines += [f"| {head} | {titles} |", "|---" * (7 + len(ways)) + "|"]
    for r in large:
        numbers = f"{r.words:g} | {r.floor * 1e3:.2f} | {r.best() * 1e3:.2f} | {r.over_floor():.2f}"
        numbers += f" | {r.over_read():.2f}" if r.roof else " | "
        cells = " | ".join(_cell(r, way, 1e3) for way in ways)
        lines.append(f"| {r.name} | {numbers} | {r.moved_bytes / r.best() / 1e9:.1f} | {cells} |")
    shown = [way for way in ways if any(way in row.seconds for row in small)]
    if small:
        titles = " | ".join(f"{WAYS[way]} µs" for way in shown)
        lines += ["", f"| op on a few numbers | ours µs | {titles} |", "|---" * (2 + len(shown)) + "|"]
    for r in small:
        lines.append(f"| {r.name} | {r.best() * 1e6:.2f} | " + " | ".join(_cell(r, way, 1e6) for way in shown) + " |")
    lines += ["", *where["notes"]] if where["notes"] else []
    return "\n".join(lines) + "\n"


def picture(rows: list[Row], path: Path, title: str) -> None:
    """Bars of time over floor, an op a group."""
    rows = [row for row in rows if row.floor]
    ways = [way for way in WAYS if any(way in row.seconds for row in rows)]
    width = 0.8 / max(1, len(ways))
    with chart(path, 1, (10, 4.5)) as (axes,):
        for i, way in enumerate(ways):
            shown = [(k, row) for k, row in enumerate(rows) if way in row.seconds]
            places = [k + (i - (len(ways) - 1) / 2) * width for k, _ in shown]
            bars = axes.bar(places, [row.over_floor(way) for _, row in shown], width, label=WAYS[way])
            axes.bar_label(bars, fmt="%.1f", fontsize=6, padding=1)
        axes.axhline(1.0, color="0.3", linewidth=0.8)
        axes.set(ylabel="best time / floor", title=title, yscale="log", xticks=range(len(rows)))
        axes.set_xticklabels([row.name for row in rows], rotation=25, ha="right", fontsize=8)
        axes.legend(frameon=False, loc="upper right")
