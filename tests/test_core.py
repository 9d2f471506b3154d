"""The core as a C++ program of its own, without torch, on every instruction set that this processor runs.

Invariant: each build reports no failure, and all print the same digests of the noise.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "core" / "core_test.cpp"
FLAGS = ["-O3", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"],
    "sanitized": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover"],
}
NEEDED_CPU_FLAG = {"avx2": "avx2", "avx512": "avx512bw"}


def _runs_here(name: str) -> bool:
    flag = NEEDED_CPU_FLAG.get(name)
    return flag is None or flag in Path("/proc/cpuinfo").read_text()


HERE = [name for name in SETS if _runs_here(name)]
Report = Callable[[str], "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Compiles and runs the program with the flags of a set, once each: a mutant's test needs one alone."""
    compiler = shutil.which("g++")
    assert compiler, "g++ is needed, as for building the package itself"
    folder = tmp_path_factory.mktemp("core")

    @functools.cache
    def of(name: str) -> subprocess.CompletedProcess[str]:
        program = str(folder / name)
        subprocess.run([compiler, *FLAGS, *SETS[name], str(SOURCE), "-o", program], check=True)
        return subprocess.run([program], capture_output=True, text=True, timeout=300)

    return of


@pytest.mark.parametrize("name", HERE)
def test_every_check_of_the_program_passes(name: str, report: Report) -> None:
    done = report(name)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert done.stdout.count("\nok: ") >= 20


def test_the_noise_has_the_same_bits_on_every_instruction_set(report: Report) -> None:
    digests = {name: [line for line in report(name).stdout.splitlines() if line.startswith("digest")] for name in HERE}
    assert len(digests["baseline"]) == 3
    assert all(lines == digests["baseline"] for lines in digests.values()), digests
