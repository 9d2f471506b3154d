"""The mutants themselves, without building any: each patch is well formed, applies, and names a test that exists.

And the script's own judgement, on made-up patches of Python files: what its test does not see is reported as survived,
what it sees as caught, and a patch that does not apply as that. ``python tests/mutants/run.py`` runs them all.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "mutants"
PATCHES = sorted(FOLDER.glob("*.patch"))
NODE = r"tests/test_\w+\.py::test_\w+(?:\[.+\])?"
HEADER = re.compile(rf"\S[^\n]*[^\n.]\.\nTest: ({NODE})\n\n--- a/(\S+)\n\+\+\+ b/(\S+)\n@@")


needs_patch = pytest.mark.skipif(shutil.which("patch") is None, reason="the program patch is not there")


def named_test(patch: Path) -> str:
    header = HEADER.match(patch.read_text())
    assert header, f"{patch.name}: expected a sentence, 'Test: <node id>', an empty line and one file's diff"
    return header[1]


def test_there_are_many_and_their_names_are_unique() -> None:
    assert len(PATCHES) >= 25
    for patch in PATCHES:
        assert re.fullmatch(r"\d{3}-[a-z0-9]+(-[a-z0-9]+)*", patch.stem), patch.name
    for column in (0, 1):  # the numbers, and the names behind them
        assert len({patch.stem.split("-", 1)[column] for patch in PATCHES}) == len(PATCHES)
    assert len({patch.read_text().split("\n--- a/")[1] for patch in PATCHES}) == len(PATCHES)


@needs_patch
def test_each_applies(tmp_path: Path) -> None:
    for part in ("cmake", "csrc", "python"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for patch in PATCHES:
        header = HEADER.match(patch.read_text())
        assert header, patch.name
        assert header[2] == header[3], patch.name
        command = ["patch", "-p1", "--batch", "--forward", "--fuzz=0", "--dry-run", "-i", patch]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{patch.name}\n{done.stdout}{done.stderr}"


def test_the_named_tests_exist() -> None:
    names = {named_test(patch) for patch in PATCHES}
    files = sorted({name.split("::")[0] for name in names})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    nodes = {line for line in done.stdout.splitlines() if "::" in line}
    known = nodes | {node.split("[")[0] for node in nodes}
    assert names <= known, sorted(names - known)


MADE_UP = {
    "a comment": ("self._num_rows = 0\n", "self._num_rows = 0  # none yet\n"),
    "a wrong column": ("return self._column(0)\n", "return self._column(1)\n"),
    "other lines": ("return self._column(7)\n", "return self._column(1)\n"),
    "a broken import": ("import warnings\n", "import warnings_\n"),
}
TEST = "tests/test_optim_laws.py::test_diagnostics_are_the_formulas"


def made_up_patch(name: str) -> str:
    """Of python/tsam_ext/metrics.py, in the form of a diff with no context."""
    old, new = MADE_UP[name]
    lines = (ROOT / "python" / "tsam_ext" / "metrics.py").read_text().splitlines()
    number = next((i for i, line in enumerate(lines, 1) if line.strip() == old.strip()), 1)
    indent = " " * (len(lines[number - 1]) - len(lines[number - 1].lstrip()))
    file = "python/tsam_ext/metrics.py"
    diff = f"--- a/{file}\n+++ b/{file}\n@@ -{number} +{number} @@\n-{indent}{old}+{indent}{new}"
    return f"It is {name}.\nTest: {TEST}\n\n{diff}"


def judged(tmp_path: Path, *names: str) -> subprocess.CompletedProcess[str]:
    for name in names:
        (tmp_path / f"{name.replace(' ', '-')}.patch").write_text(made_up_patch(name))
    command = [sys.executable, FOLDER / "run.py", "--no-build", "--jobs", "1", "--patches", tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if "an editable install" in done.stderr:
        pytest.skip("an editable install stands before the copies that the script makes")
    return done


@needs_patch
def test_what_is_not_caught_is_named_and_ends_with_1(tmp_path: Path) -> None:
    done = judged(tmp_path, *MADE_UP)
    assert done.returncode == 1, done.stdout + done.stderr
    summary = done.stdout.splitlines()[-1]
    assert summary.startswith("4 mutants, 1 caught, 3 NOT: "), done.stdout
    for outcome in ("a-comment (survived)", "other-lines (does not apply)", "a-broken-import (no verdict)"):
        assert outcome in summary


@needs_patch
def test_what_is_caught_ends_with_0(tmp_path: Path) -> None:
    done = judged(tmp_path, "a wrong column")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("1 mutants, 1 caught, ")


def test_a_named_test_that_fails_without_any_patch_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "one.patch").write_text(made_up_patch("a comment").replace(TEST, f"{TEST}_of_old"))
    done = subprocess.run(
        [sys.executable, FOLDER / "run.py", "--no-build", "--patches", tmp_path],
        capture_output=True, text=True,
    )  # fmt: skip
    if "an editable install" in done.stderr:
        pytest.skip("an editable install stands before the copies that the script makes")
    assert done.returncode == 2
    assert "on the unbroken copy" in done.stderr


def test_exit_codes_are_not_lost_between_threads(tmp_path: Path) -> None:
    """Four threads, and reading a code takes a while: each gets its own processes' codes, also after a signal."""
    script = tmp_path / "codes.py"
    script.write_text(
        f"""import os, signal, sys, time
from multiprocessing import forkserver
from concurrent.futures import ThreadPoolExecutor
sys.path.insert(0, {str(FOLDER)!r})
import run

def end(code):
    if code == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(5.0 if code is None else 0.0)
    os._exit(code)

if __name__ == "__main__":
    codes = [1, 3, 9, 0] * 10 + [None]
    read = forkserver.read_signed
    forkserver.read_signed = lambda fd: time.sleep(0.05) or read(fd)
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda code: run.exit_code(end, (code,), 30.0 if code is not None else 0.2), codes))
    assert got == [-9 if code == 9 else code for code in codes], got
"""
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
