"""The core as a C++ program of its own, without torch, on every instruction set that this processor runs.

Invariant: each build reports no failure, and all print the same digests of the noise.
"""

from __future__ import annotations

import shutil
import subprocess
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


@pytest.fixture(scope="module")
def reports(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, subprocess.CompletedProcess[str]]:
    compiler = shutil.which("g++")
    assert compiler, "g++ is needed, as for building the package itself"
    folder = tmp_path_factory.mktemp("core")
    done = {}
    for name, flags in SETS.items():
        if _runs_here(name):
            program = str(folder / name)
            subprocess.run([compiler, *FLAGS, *flags, str(SOURCE), "-o", program], check=True)
            done[name] = subprocess.run([program], capture_output=True, text=True, timeout=300)
    return done


def test_every_check_of_the_program_passes(
    reports: dict[str, subprocess.CompletedProcess[str]],
) -> None:
    assert {"baseline", "sanitized"} <= reports.keys()
    for name, report in reports.items():
        assert report.returncode == 0, f"{name}:\n{report.stdout}{report.stderr}"
        assert report.stdout.count("\nok: ") >= 20, name


def test_the_noise_has_the_same_bits_on_every_instruction_set(
    reports: dict[str, subprocess.CompletedProcess[str]],
) -> None:
    digests = {
        name: [line for line in report.stdout.splitlines() if line.startswith("digest")]
        for name, report in reports.items()
    }
    assert len(digests["baseline"]) == 3
    assert all(lines == digests["baseline"] for lines in digests.values()), digests
