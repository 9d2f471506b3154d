"""Programs over the host emulation of CUDA (tests/simt), built by g++ once a test run: plain, ASan+UBSan, TSan.

The scheduler itself is compiled without sanitizers, once; it tells them of its fibers. ``ORDERS`` are
the schedules that every plain build runs under.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIMT = Path(__file__).resolve().parent / "simt"
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fno-strict-aliasing", "-DTSAM_SIMT"]
FLAGS += [f"-I{SIMT}"]
RUNTIME_FLAGS = [*FLAGS, "-O2", "-fPIC", "-Wno-missing-field-initializers"]
BUILDS = {
    "plain": ["-O1"],
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}
ORDERS = (
    {"TSAM_SIMT_ORDER": "forward"},
    {"TSAM_SIMT_ORDER": "reversed"},
    {"TSAM_SIMT_ORDER": "random", "TSAM_SIMT_SEED": "1"},
)


def compile_with(compiler_arguments: list[str | Path]) -> None:
    compiler = shutil.which("g++")
    assert compiler, "g++ is needed, as for building the package itself"
    done = subprocess.run([compiler, *compiler_arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def build(folder: Path, source: Path, name: str) -> Path:
    """The program ``source`` in the build ``name``, in ``folder``; what is there already is not built again."""
    runtime, program = folder / "simt.o", folder / f"{source.stem}-{name}"
    if not runtime.exists():
        compile_with([*RUNTIME_FLAGS, "-c", SIMT / "simt.cpp", "-o", runtime])
    if not program.exists():
        compile_with([*FLAGS, *BUILDS[name], source, runtime, "-o", program])
    return program


def run(program: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of a run; a sanitizer's report ends with 99."""
    sanitizers = {
        "ASAN_OPTIONS": "exitcode=99",
        "UBSAN_OPTIONS": "exitcode=99",
        "TSAN_OPTIONS": "exitcode=99 report_bugs=1",
    }
    done = subprocess.run(
        [program, *arguments],
        env={**os.environ, **sanitizers, **environment},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr
