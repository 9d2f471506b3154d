"""Whether the ops do on a GPU what they do on the CPU: before anything is timed, and what takes longer.

Random lists of every kind, each op on them, and short training runs (tests/simt/lists.py), in a process per device.
Noise and elementwise results have the same bits, and what depends on a sum agrees to rounding (tests/back_ends.py).
Runs from a checkout, as the programs are the tests'.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
LISTS = ROOT / "tests" / "simt" / "lists.py"
JOBS = ("ops:3", "train:ascent", "ops:0", "ops:1", "ops:4", "train:noise", "train:hmc")
TRIAL = ("ops:3",)  # where there is no GPU, to see that this module works
TOOLS = ("memcheck", "racecheck", "synccheck")


def differences(device: torch.device) -> list[str]:
    """What the ops on ``device`` do otherwise than on the CPU, a line for each result of a job; empty if nothing."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        back_ends: Any = importlib.import_module("back_ends")
    finally:
        sys.path.pop(0)
    jobs, found = JOBS if device.type == "cuda" else TRIAL, []
    for where in (device.type, "cpu"):
        with tempfile.TemporaryDirectory() as folder:
            try:
                found.append(back_ends.results(Path(folder), jobs, TSAM_LISTS_DEVICE=where)[1])
            except AssertionError as error:  # with what the process has printed
                return [f"the ops on {where} cannot be run: {(str(error).strip().splitlines() or [''])[-1]}"]
    lines = []
    for job in jobs:
        got, expected = (results[job] for results in found)
        for name in expected:
            try:
                back_ends.agree({name: got[name]}, {name: expected[name]}, training=job.startswith("train"))
            except (AssertionError, KeyError) as error:
                lines.append(f"{job}: {' '.join(str(error).split())[:200]}")
    return lines


def longer() -> list[str]:
    """The tests marked cuda, and compute-sanitizer where it is installed: the names of the commands that fail."""
    commands: dict[str, list[str]] = {"tests": [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-ra"]}
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, str(LISTS), f"{folder}/lists.pt", "ops:2", "ops:4"]
        if sanitizer := shutil.which("compute-sanitizer"):
            for tool in TOOLS:
                commands[tool] = [sanitizer, "--tool", tool, "--error-exitcode", "1", *program]
        else:
            print("compute-sanitizer is not on PATH: left out")
        failed = []
        for name, command in commands.items():
            print(f"== {name}: {' '.join(command)}", flush=True)
            done = subprocess.run(command, cwd=ROOT, env={**os.environ, "TSAM_LISTS_DEVICE": "cuda"}, check=False)
            failed += [name] if done.returncode else []
        return failed
