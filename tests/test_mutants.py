"""The mutants themselves, without building any: each entry is well formed, applies, and names a test that exists.

And the script's own judgement, on made-up tables of Python files: what its test does not see is reported as survived,
what it sees as caught, and an entry that does not apply as that. ``python tests/mutants/run.py`` runs them all.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutants.entries import Edit, EntryError, Mutant, part_of, read_mutants, stale

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "mutants"
MUTANTS = read_mutants(FOLDER)
NODE = r"tests/test_\w+\.py::test_\w+(?:\[.+\])?"


def test_there_are_many_and_each_is_one_of_its_kind() -> None:
    assert len(MUTANTS) >= 200
    for mutant in MUTANTS:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", mutant.name), mutant.name
        assert re.fullmatch(r"\S[^\n]*[^\n.]\.", mutant.what), (
            f"{mutant.name}: expected one sentence, got {mutant.what!r}"
        )
        assert re.fullmatch(NODE, mutant.test), f"{mutant.name}: expected a node id, got {mutant.test!r}"
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert len({mutant.edits for mutant in MUTANTS}) == len(MUTANTS)
    for path in FOLDER.glob("*.toml"):
        assert len(path.read_text().splitlines()) <= 400, path.name


def test_each_applies() -> None:
    assert not (found := stale(MUTANTS, ROOT)), f"run.py --check says the same: {found}"


def test_what_does_not_apply_is_said_and_nothing_written(tmp_path: Path) -> None:
    """Old text that is missing, or there twice, or whose file is gone; also where it stands now."""
    package = tmp_path / "python"
    package.mkdir()
    (package / "a.py").write_text("one = 1\r\ntwo = 1\n")
    (package / "b.py").write_text("three = 3\n")

    def said(*edits: tuple[str, str, str]) -> str:
        made_up = Mutant("m", "It is broken.", "tests/test_a.py::test_b", tuple(Edit(*edit) for edit in edits))
        before = [path.read_bytes() for path in sorted(package.iterdir())]
        wrong = "; ".join(stale([made_up], tmp_path).get("m", []))
        assert bool(made_up.apply(tmp_path)) == bool(wrong)
        assert ([path.read_bytes() for path in sorted(package.iterdir())] == before) == bool(wrong)
        return wrong

    fine = ("python/b.py", "three = 3", "three = 4")
    assert said(("python/a.py", "= 1", "= 2")) == "python/a.py: got 2 times, expected once: '= 1'"
    assert said(fine, ("python/a.py", "\n  four = 4\n", "")) == "python/a.py: got 0 times, expected once: 'four = 4'"
    assert said(("python/gone.py", "one", "")).startswith("python/gone.py is not there: 'one'; the text stands in ")
    assert said(("python/a.py", "three", "")).endswith("'three'; the text stands in python/b.py")
    assert said(("python/a.py", "one = 1\r\n", "one = 7\r\n"), ("python/a.py", "= 1", "= 2"), fine) == ""
    assert (package / "a.py").read_bytes() == b"one = 7\r\ntwo = 2\n"
    assert (package / "b.py").read_bytes() == b"three = 4\n"


ENTRY = """[[mutant]]
name = "m"
what = "It is broken."
test = "tests/test_a.py::test_b"
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ENTRY, "m: got"),
        (ENTRY + "edits = []", "m: got"),
        (ENTRY + "file = 'a'\nold = 'b'", "m: got"),
        (ENTRY + "file = 'a'\nold = 'b'\nnew = 'c'\nmore = 'd'", "m: got"),
        (ENTRY + "file = 'a'\nold = 'b'\nnew = 'b'", "new is the same"),
        (ENTRY + "file = 'a'\nold = ' '\nnew = 'b'", "old is empty"),
        (ENTRY + "file = 'a'\nold = 1\nnew = 'b'", "every value is a text"),
        (ENTRY.replace("mutant", "mutants"), "expected .* alone"),
        (ENTRY + "file = ", "t.toml: "),
    ],
)
def test_an_entry_that_is_not_well_formed_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(EntryError, match=said):
        read_mutants(tmp_path)


def test_the_named_tests_exist() -> None:
    names = {mutant.test for mutant in MUTANTS}
    files = sorted({name.split("::")[0] for name in names})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    nodes = {line for line in done.stdout.splitlines() if "::" in line}
    known = nodes | {node.split("[")[0] for node in nodes}
    assert names <= known, sorted(names - known)


FILE = "python/tsam_ext/diagnostics.py"
MADE_UP = {
    "a comment": ("self._report = report", "self._report = report  # from now on"),
    "a wrong column": ("return self._column(0)", "return self._column(1)"),
    "other lines": ("return self._column(7)", "return self._column(1)"),
    "a broken import": ("from . import _ops", "from . import _ops_"),
}
TEST = "tests/test_optim_laws.py::test_diagnostics_are_the_formulas"


def judged(
    tmp_path: Path, *names: str, test: str = TEST, arguments: tuple[str, ...] = ("--no-build", "--jobs", "1")
) -> subprocess.CompletedProcess[str]:
    """The script on made-up mutants of one file."""
    for name in names:
        old, new = MADE_UP[name]
        (tmp_path / f"{name.replace(' ', '-')}.toml").write_text(
            f"""[[mutant]]
name = "{name.replace(" ", "-")}"
what = "It is {name}."
test = "{test}"
file = "{FILE}"
old = '{old}'
new = '{new}'
"""
        )
    command = [sys.executable, FOLDER / "run.py", *arguments, "--tables", tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if "an editable install" in done.stderr:
        pytest.skip("an editable install stands before the copies that the script makes")
    return done


def test_check_lists_what_does_not_apply(tmp_path: Path) -> None:
    done = judged(tmp_path, *MADE_UP, arguments=("--check",))
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.startswith(f"other-lines: does not apply\n  {FILE}: got 0 times, expected once: "), done.stdout
    assert done.stdout.splitlines()[-1] == "4 mutants, 3 apply, 1 do NOT"


def test_what_is_not_caught_is_named_and_ends_with_1(tmp_path: Path) -> None:
    done = judged(tmp_path, *MADE_UP)
    assert done.returncode == 1, done.stdout + done.stderr
    summary = done.stdout.splitlines()[-1]
    assert summary.startswith("4 mutants, 1 caught, 3 NOT: "), done.stdout
    for outcome in ("a-comment (survived)", "other-lines (does not apply)", "a-broken-import (no verdict)"):
        assert outcome in summary


def test_what_is_caught_ends_with_0(tmp_path: Path) -> None:
    done = judged(tmp_path, "a wrong column")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("1 mutants, 1 caught, ")


def test_parts_are_about_even_and_each_mutant_is_in_one() -> None:
    """Below a third of either kind in a half would make that half's run as long as both."""
    for chosen in (MUTANTS, [m for m in MUTANTS if m.compiled]):
        second = sum(part_of(m.name, 2) for m in chosen)
        assert len(chosen) / 3 < second < 2 * len(chosen) / 3
    assert {part_of(m.name, 3) for m in MUTANTS} == {0, 1, 2}
    assert part_of("a-comment", 5) == 3  # the same on every machine and in every year


def test_a_part_is_run_and_the_others_still_have_to_apply(tmp_path: Path) -> None:
    names = [name for name in MADE_UP if name != "a broken import"]
    parts = [part_of(name.replace(" ", "-"), 5) for name in names]
    assert parts[1] not in (parts[0], parts[2])
    arguments = ("--no-build", "--jobs", "1", "--part", f"{parts[1]}/5")
    done = judged(tmp_path, *names, arguments=arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("2 mutants, 1 caught, 1 NOT: other-lines (does not apply), ")
    checked = judged(tmp_path, *names, arguments=("--check", *arguments))
    assert checked.stdout.splitlines()[-1] == "3 mutants, 2 apply, 1 do NOT"


@pytest.mark.parametrize("part", ["2/2", "0/0", "1", "-1/2", "a/b"])
def test_a_part_that_is_none_is_refused(part: str, tmp_path: Path) -> None:
    done = judged(tmp_path, "a wrong column", arguments=(f"--part={part}",))
    assert done.returncode == 2
    assert f"got {part}, expected K/N" in done.stderr


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".ci").is_dir(), reason="no git, or no .ci")
def test_the_half_that_a_commit_runs(tmp_path: Path) -> None:
    """Of .ci/run: by the parity of the number of commits; the first half where that is not known."""
    script = (ROOT / ".ci" / "run").read_text()
    assert '--part "$half/2"' in script
    (choice,) = re.findall(r"^half=0\n.*?^fi$", script, re.DOTALL | re.MULTILINE)

    def half(folder: Path, **environment: str) -> str:
        command = ["/bin/bash", "-euo", "pipefail", "-c", f'{choice}\necho "$half"']
        return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout

    def git(*arguments: str, cwd: Path = tmp_path) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=cwd, check=True, capture_output=True)

    here = {"PATH": os.environ["PATH"], "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    assert half(tmp_path, **here) == "0\n"  # no repository
    git("init", "-q", "full")
    assert half(tmp_path / "full", **here) == "0\n"  # no commit
    for want in "101":
        git("commit", "-q", "--allow-empty", "-m", "m", cwd=tmp_path / "full")
        assert half(tmp_path / "full", **here) == f"{want}\n"
    assert half(tmp_path / "full", PATH="/nowhere") == "0\n"  # no git
    git("clone", "-q", "--depth", "1", f"file://{tmp_path / 'full'}", "shallow")
    assert half(tmp_path / "shallow", **here) == "0\n"


def test_a_named_test_that_fails_without_any_mutant_stops_the_run(tmp_path: Path) -> None:
    done = judged(tmp_path, "a comment", test=f"{TEST}_of_old")
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
