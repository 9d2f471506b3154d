"""Runs what takes a GPU, in one command: tests, sanitizer, and times against the others.

The tests marked cuda (results against the CPU's, no sync under torch's sync debug mode, graph capture and replay,
memory), compute-sanitizer's memcheck, racecheck and synccheck on random lists where it is installed, and, by CUDA
events, times of whole training steps and of estimates, ours against the competitors.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tsam_ext import _cuda

from . import step
from .command import add_command, add_nets, add_rounds, cannot_run, command_line, conclude
from .nets import NETS
from .overhead import TASKS, StandIn, make
from .record import environment, keep

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 20
Row = dict[str, Any]


def add_parser(commands: Any) -> None:
    """Adds the command to python -m bench."""
    summary = "run the tests that take a GPU, the sanitizer, and the timings on it"
    parser = add_command(commands, "gpu", run, __doc__, summary=summary)
    add_nets(parser, "--models", ["resnet18", "wrn16-8"], "models whose whole steps are timed")
    add_nets(parser, "--lists", list(NETS), "parameter lists whose estimates are timed")
    add_rounds(parser, ROUNDS)
    parser.add_argument("--no-tests", action="store_true", help="only the timings")


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    why_not = "torch finds none" if not torch.cuda.is_available() else _cuda.cause
    if why_not is not None:
        return cannot_run(options, f"no GPU to run on: {why_not}")
    command = command_line(options)
    device = torch.device("cuda")
    failed = [] if options.no_tests else checks()
    steps = [
        row
        for name in tqdm(options.models, desc="steps", unit="model")
        for row in time_steps(name, device, options.rounds)
    ]
    estimates = [
        row
        for name in tqdm(options.lists, desc="estimates", unit="list")
        for row in time_list(name, device, options.rounds)
    ]
    settings = {
        "command": command,
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "failed": failed,
        "rounds": options.rounds,
    }
    keep(options.out / "gpu", [*steps, *estimates], settings, markdown(steps, estimates, environment(settings)))
    return conclude([*(f"{name}: the check fails" for name in failed), *diverged(steps)])


def checks() -> list[str]:
    """The names of the commands that fail."""
    commands: dict[str, list[str]] = {"tests": [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-ra"]}
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, str(ROOT / "tests" / "simt" / "lists.py"), f"{folder}/lists.pt", "ops:2", "ops:4"]
        if sanitizer := shutil.which("compute-sanitizer"):
            for tool in ("memcheck", "racecheck", "synccheck"):
                commands[tool] = [sanitizer, "--tool", tool, "--error-exitcode", "1", *program]
        else:
            print("compute-sanitizer is not on PATH: left out")
        found = []
        for name, command in commands.items():
            print(f"== {name}: {' '.join(command)}", flush=True)
            done = subprocess.run(command, cwd=ROOT, env={**os.environ, "TSAM_LISTS_DEVICE": "cuda"}, check=False)
            found += [name] if done.returncode else []
    return found


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Time of ``run`` on the device, by events: the host's own work shows only where it is the slower."""
    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) * 1e-3


def repeat(closure: Callable[[], Any], calls: int) -> None:
    """Calls it that many times."""
    for _ in range(calls):
        closure()


def time_list(
    name: str, device: torch.device, rounds: int, clock: Callable[[Callable[[], Any], torch.device], float] = seconds
) -> list[Row]:
    """Estimates on one parameter list, the ways in turns, less the time of the stand-in gradients alone."""
    params: list[Tensor] = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in NETS[name].shapes()]
    closure, rows = StandIn(params, calls=6), []
    for task in TASKS:
        ways = {way: make(way, task, params) for way in ("ours", *(w for w in task.competitors if w != "compiled"))}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(-2, rounds):
            for way, estimator in ways.items():
                closure.begin()
                whole = clock(partial(estimator.estimate_gradient, closure), device)
                calls = closure.calls
                closure.begin()
                alone = clock(partial(repeat, closure, calls), device)
                if turn >= 0:
                    times[way].append(whole - alone)
        rows += [{"list": name, "task": task.name, "way": way, "seconds": found} for way, found in times.items()]
    return rows


def time_steps(
    name: str, device: torch.device, rounds: int, clock: Callable[[Callable[[], Any], torch.device], float] = seconds
) -> list[Row]:
    """Whole training steps of one model, the ways in turns; of those that sample only some, the mean of a cycle."""
    x, y = (t.to(device) for t in NETS[name].batch(step.BATCH))
    ways = {}
    for way in step.WAYS:
        if way != "compiled":
            torch.manual_seed(0)
            model = NETS[name].build().to(device)
            take, count, _ = step.stepper(way, model)
            ways[way] = (take, count, step.Timed(model, x, y))
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(-2, rounds):
        for way, (take, count, closure) in ways.items():
            passed = clock(partial(take, closure), device)
            if turn >= 0:
                times[way].append(passed / count)
    return [
        {"list": name, "task": "step", "way": way, "seconds": times[way], "loss": float(closure.loss)}
        for way, (*_, closure) in ways.items()
    ]


def diverged(steps: list[Row]) -> list[str]:
    """Ways whose last loss is not finite."""
    return [f"{row['list']}: {row['way']}: the loss is not finite" for row in steps if not math.isfinite(row["loss"])]


def markdown(steps: list[Row], estimates: list[Row], where: dict[str, Any]) -> str:
    """The tables and what they have to be quoted with."""
    lines = [
        f"{where['date']}, {where['gpu']}, CUDA {where['cuda']}, torch {where['torch']}, `{where['command']}`, "
        f"medians of {where['rounds']} rounds; checks that failed: {', '.join(where['failed']) or 'none'}.",
        "",
        "| list | what | way | ms | over ours |",
        "|---|---|---|---|---|",
    ]
    for row in (*steps, *estimates):
        same = [r for r in (*steps, *estimates) if (r["list"], r["task"]) == (row["list"], row["task"])]
        ours = next(r for r in same if r["way"] in ("ours", "tsam"))
        ratio = median(a / b for a, b in zip(row["seconds"], ours["seconds"], strict=True))
        shown = "" if row is ours else f"×{ratio:.2f}"
        lines.append(f"| {row['list']} | {row['task']} | {row['way']} | {median(row['seconds']) * 1e3:.3f} | {shown} |")
    return "\n".join(lines) + "\n"
