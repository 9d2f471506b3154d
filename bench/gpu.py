"""One run for whoever has a GPU, in under ten minutes, with a text to post: is it right, and what does it cost?

First every op against the CPU's bits and values; where one differs nothing is timed. Then, the most important first,
whole training steps of ours (also as a CUDA graph), of plain loops, of torch._foreach, of the common SAM wrapper and
of SGD; each op against a floor, its counted bytes over the bandwidth of a copy; estimates on the parameter lists of
models; the host's time of a call; and the competitors under torch.compile. What the budget leaves no time for is left
out, and named. --tests runs before all this, and outside the budget, the tests marked cuda and compute-sanitizer.
"""

from __future__ import annotations

import argparse
import gc
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from tsam_ext import _cuda

from . import calls, gpu_check, gpu_times, step
from .command import above_zero, add_command, add_nets, add_rounds, cannot_run, command_line, conclude, positive
from .gpu_times import Clock, Row
from .nets import NETS
from .overhead import TASKS
from .record import environment, keep

ROUNDS, BUDGET, ELEMENTS = 20, 540.0, 20_000_000
MOST = 45.0  # seconds of rounds in one job, however much of the budget is left
COMPILED, LIBRARY = "compiled", "library"
EAGER = ("erm", "sam", "tsam", "loop", "foreach", "wrapper")
CAPTURED = tuple(way + gpu_times.CAPTURED for way in ("sam", "tsam"))
# Seconds that a job takes before its first round at least; of torch.compile a guess that is meant to be too large.
LEAST, LEAST_COMPILED = 5.0, 90.0


@dataclass(frozen=True)
class Job:
    """A part of the run: ``run`` takes the seconds that its rounds may take; it begins if ``least`` are left."""

    name: str
    run: Callable[[float], list[Row]]
    least: float = LEAST


def add_parser(commands: Any) -> None:
    """Adds the command to python -m bench."""
    summary = "on a GPU: compare every op with the CPU, then time steps, ops and estimates, within a budget"
    parser = add_command(commands, "gpu", run, __doc__, summary=summary)
    add_nets(parser, "--models", ["resnet18", "wrn16-8"], "models whose whole steps are timed")
    add_nets(parser, "--lists", list(NETS), "parameter lists whose estimates are timed")
    add_rounds(parser, ROUNDS)
    parser.add_argument("--budget", type=above_zero, default=BUDGET, help="seconds for all but --tests")
    parser.add_argument("--elements", type=positive, default=ELEMENTS, help="of the lists that ops are timed on")
    parser.add_argument("--batch", type=positive, default=step.BATCH, help="rows per batch of a whole step")
    parser.add_argument("--tests", action="store_true", help="first the tests marked cuda and compute-sanitizer")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="cpu: a trial of this command without a GPU, whose figures mean nothing")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    began, device = time.perf_counter(), torch.device(options.device)
    if device.type == "cuda":
        why_not = "torch finds none" if not torch.cuda.is_available() else _cuda.cause
        if why_not is not None:
            return cannot_run(options, f"no GPU to run on: {why_not}; --device cpu is a trial without one")
    elif options.tests:
        return cannot_run(
            options, "--tests needs a GPU: the tests marked cuda and compute-sanitizer run on nothing else"
        )
    wrong, notes, rows = [f"{name}: the check fails" for name in (gpu_check.longer() if options.tests else [])], [], []
    began = time.perf_counter() if options.tests else began
    print("comparing every op with the CPU's", flush=True)
    wrong += gpu_check.differences(device)
    if wrong:
        notes.append("nothing was timed, as something is wrong")
    else:
        jobs = list(jobs_of(options, Clock(device, options.rounds)))
        with tqdm(jobs, unit="job") as bar:
            for k, job in enumerate(bar):
                bar.set_description(job.name)
                left = options.budget - (time.perf_counter() - began)
                if left < job.least:
                    notes.append(f"left out, as the budget of {options.budget:g} s was spent: {job.name}")
                    continue
                try:
                    rows += [{**row, "job": job.name} for row in job.run(min(MOST, left / (len(jobs) - k)))]
                except Exception as error:  # whatever it is, the other jobs can still run
                    text = f"{job.name}: {gpu_times.first_line(error)}"
                    if COMPILED in job.name:  # torch's own, so nothing of ours is wrong
                        notes.append(f"left out: {text}")
                    else:
                        wrong.append(text)
                gc.collect()
    if find_spec("pytorch_optimizer") is None:
        notes.append(f"left out: {LIBRARY}, which is pytorch_optimizer's SAM, and that is not installed")
    if device.type != "cuda":
        notes.append("left out: the captured steps, as CUDA graphs need a GPU")
    wrong += [f"{row['list']}: {row['task']}: {row['way']}: {reason}" for row in rows if (reason := fault(row))]
    settings = {"command": command_line(options), **machine(device), "wrong": wrong, "notes": notes}
    settings |= {"rounds": options.rounds, "seconds": round(time.perf_counter() - began)}
    keep(options.out / "gpu", rows, settings, markdown(rows, environment(settings)))
    return conclude(wrong)


def jobs_of(options: argparse.Namespace, clock: Clock) -> Iterator[Job]:
    """The most important first."""
    usual = (*EAGER, *(CAPTURED if clock.gpu else ()))
    rest = tuple(way for way in step.WAYS if way not in (*EAGER, COMPILED))
    missing = () if find_spec("pytorch_optimizer") else (LIBRARY,)

    def steps(name: str, ways: tuple[str, ...], allowed: float) -> list[Row]:
        return gpu_times.time_steps(name, ways, clock, allowed, options.batch)

    def estimates(name: str, compiled: bool, allowed: float) -> list[Row]:
        rows = []
        tasks = [task for task in TASKS if not compiled or COMPILED in task.competitors]
        for task in tasks:
            others = [way for way in task.competitors if (way == COMPILED) == compiled and way not in missing]
            rows += gpu_times.time_estimates(name, task, ["ours", *others], clock, allowed / len(tasks))
        return rows

    first, *others = options.models
    yield Job(f"steps of {first}", partial(steps, first, usual))
    yield Job("ops", lambda allowed: gpu_times.time_ops(options.elements, clock, allowed))
    for name in options.lists:
        yield Job(f"estimates on {name}", partial(estimates, name, False))
    for name in others:
        yield Job(f"steps of {name}", partial(steps, name, usual))
    yield Job("the host's time of a call", lambda allowed: gpu_times.time_host(clock))
    yield Job(f"steps of {first}, split and carried", partial(steps, first, ("tsam", *rest)))
    for name in options.models:
        yield Job(f"steps of {name}, compiled", partial(steps, name, ("tsam", COMPILED)), LEAST_COMPILED)
    for name in options.lists:
        yield Job(f"estimates on {name}, compiled", partial(estimates, name, True), LEAST_COMPILED)


def fault(row: Row) -> str:
    """What is wrong with a row; empty if nothing."""
    if not math.isfinite(row.get("loss", 0.0)):
        return "the loss is not finite"
    reason: str = row.get("wrong", "")
    return reason


def machine(device: torch.device) -> dict[str, Any]:
    """Of the GPU: its name, the driver's version as nvidia-smi tells it, and CUDA's."""
    if device.type != "cuda":
        return {"gpu": "none (a trial on the CPU: these times mean nothing)", "driver": "none", "cuda": "none"}
    driver = "unknown"
    if program := shutil.which("nvidia-smi"):
        asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        driver = (done.stdout.split() or [driver])[0]
    return {"gpu": torch.cuda.get_device_name(device), "driver": driver, "cuda": torch.version.cuda}


def markdown(rows: list[Row], where: dict[str, Any]) -> str:
    """The text to post: where and when, what is wrong or left out, a table of each kind."""
    right = "every op agrees with the CPU's" if not where["wrong"] else f"{len(where['wrong'])} WRONG"
    lines = [
        f"{where['gpu']}, driver {where['driver']}, CUDA {where['cuda']}, torch {where['torch']}, tsam_ext "
        f"{where['tsam_ext']}, Python {where['python']}, {where['processor']}, {where['date']}, `{where['command']}`, "
        f"{where['seconds']} s: {right}. Medians of at most {where['rounds']} rounds.",
        "",
        *[f"- WRONG: {line}" for line in where["wrong"]],
        *[f"- {note}" for note in where["notes"]],
    ]
    timed = [row for row in rows if row["seconds"]]
    if ops := [row for row in timed if row["kind"] == "op"]:
        lines += [
            "",
            f"Ops on {ops[0]['list']} float32 elements; the floor is counted bytes over a copy's bandwidth:",
            "",
        ]
        lines += ["| op | words | floor ms | ours ms | over the floor | torch, loop | torch._foreach |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in (row for row in ops if row["way"] == "ours"):
            others = {r["way"]: f"{_ms(r)}, {_over_ours(r, ops)}" for r in ops if r["task"] == row["task"]}
            over = f"{median(row['seconds']) / row['floor']:.2f}" if row["floor"] else ""
            cells = (row["task"], f"{row['words']:g}", f"{row['floor'] * 1e3:.4f}", _ms(row), over)
            lines.append(f"| {' | '.join((*cells, others.get('plain', ''), others.get('foreach', '')))} |")
    for kind, title in (("step", "Whole steps"), ("estimate", "Estimates, without the gradients")):
        if chosen := [row for row in timed if row["kind"] == kind]:
            lines += ["", f"{title}:", "", "| on | what | way | ms | over ours |", "|---|---|---|---|---|"]
            for row in chosen:
                cells = (row["list"], row["task"], row["way"], _ms(row), _over_ours(row, chosen))
                lines.append(f"| {' | '.join(cells)} |")
    if calls_of := {row["task"]: row["seconds"] for row in timed if row["kind"] == "call"}:
        lines += ["", *calls.table(calls_of)]
    return "\n".join(lines) + "\n"


def _ms(row: Row) -> str:
    return f"{median(row['seconds']) * 1e3:.4f}"


def _over_ours(row: Row, rows: list[Row]) -> str:
    """A way's time over that of ours in the same job, round by round."""
    same = [r for r in rows if (r["job"], r["list"], r["task"]) == (row["job"], row["list"], row["task"])]
    ours = next((r for r in same if r["way"] in ("ours", "tsam")), row)
    if ours is row:
        return ""
    return f"×{median(b / a for a, b in zip(ours['seconds'], row['seconds'], strict=True)):.2f}"
