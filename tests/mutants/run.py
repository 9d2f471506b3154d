"""Breaks a copy of the project in many small ways, one at a time, and demands that a named test sees each.

A mutant is an entry of a table here (entries.py): what is broken, a test, and the text to put in place of another. All
named tests pass on the unbroken copy first; then each must fail (not merely error) on the broken one. Nothing outside
scratch is written. ``--check`` only says whether each entry still applies to the sources. ``--part K/N`` runs one part
of N (entries.py's part_of: by name, whatever else is in the tables), and still demands that every entry applies.
Exit codes: 0 all mutants caught, 1 some not (they are named), 2 cannot run, 130 interrupted.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import multiprocessing.connection
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from entries import EntryError, Mutant, part_of, read_mutants, stale
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("csrc", "python", "tests", "bench", "cmake", "CMakeLists.txt", "pyproject.toml", "README.md")
SECONDS = 900  # for one build or one test
# No bit depends on these flags: fused multiply-adds are spelled out, and nothing is contracted (cmake/flags.cmake).
QUICK_BUILD = ("-DTSAM_BASELINE_ONLY=ON", "-DTSAM_CUDA=OFF", "-DTSAM_PRECOMPILE=ON")
QUICK_BUILD += ("-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-Og -march=native")
# A process that has imported these, and nothing of ours, is forked for each test: several times cheaper than a new one.
WARM = ["hypothesis", "numpy", "pytest", "scipy.stats", "torch", "torch._dynamo", "torch.func"]
PROCESSES = multiprocessing.get_context("forkserver")
# Starting a process also collects the exit codes of all others: without this, two threads may read one code twice.
ONE_AT_A_TIME = threading.Lock()


class CannotRunError(Exception):
    """What keeps the whole run from saying anything about any mutant."""


@dataclass
class Verdict:
    """``caught`` and ``crashed`` are as wanted; every other outcome makes the run fail."""

    mutant: Mutant
    outcome: str
    detail: str = ""
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return self.outcome in ("caught", "crashed")


def run(command: Sequence[str | Path], cwd: Path) -> tuple[int | None, str]:
    """Exit code (None: out of time) and output of a command."""
    try:
        done = subprocess.run(
            command, cwd=cwd, timeout=SECONDS, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"out of time after {SECONDS} s: {' '.join(map(str, command))}"
    except FileNotFoundError:
        raise CannotRunError(f"{command[0]} is needed and not there") from None
    return done.returncode, done.stdout


def must(command: Sequence[str | Path], cwd: Path) -> str:
    """As :func:`run`, for commands without which nothing can be said."""
    code, output = run(command, cwd)
    if code != 0:
        raise CannotRunError(f"{' '.join(map(str, command))} failed:\n{output[-4000:]}")
    return output


def copy_tree(to: Path) -> None:
    """The tracked and the new files of the checkout; without git, what a build and the tests need."""
    code, top = run(["git", "rev-parse", "--show-toplevel"], ROOT) if shutil.which("git") else (1, "")
    if code == 0 and Path(top.strip()).resolve() == ROOT:
        listed = must(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT)
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():  # a tracked file may have been deleted
                (to / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, to / name)
        return
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "build", ".*")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, to / name)


def run_pytest(tree: Path, log: Path, emulated: bool, arguments: list[str]) -> None:
    """The body of a test process: pytest in a copy of the project, on the package of that copy."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(tree)
    sys.path.insert(0, str(tree / "python"))
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(tree / "python"), "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("TSAM_ISA", "TSAM_EMULATED", "PYTEST_ADDOPTS"):
        os.environ.pop(name, None)
    os.environ |= {"TSAM_EMULATED": "1"} if emulated else {}
    import pytest

    sys.exit(int(pytest.main(arguments)))


def exit_code(target: Callable[..., None], arguments: tuple[object, ...], seconds: float) -> int | None:
    """Runs a function in a process of its own: its exit code, negative after a signal, or None when out of time."""
    process = PROCESSES.Process(target=target, args=arguments)
    with ONE_AT_A_TIME:
        process.start()
    in_time = multiprocessing.connection.wait([process.sentinel], seconds)
    with ONE_AT_A_TIME:
        if not in_time:
            process.kill()
        process.join()
        return process.exitcode if in_time else None


@dataclass
class Scratch:
    """A copy of the project that is broken, tested and put back: ``tree`` beside the unbroken ``pristine``.

    Putting back restores sources, objects and build logs with their times, so that the next build makes exactly what
    its own mutant touches.
    """

    folder: Path
    build_jobs: int
    emulated: bool = False
    tree: Path = field(init=False)
    digest: str = ""

    def __post_init__(self) -> None:
        self.tree = self.folder / "tree"

    @property
    def module(self) -> Path:
        """The extension module beside the copied package."""
        found = list((self.tree / "python" / "tsam_ext").glob("_C*.so"))
        if len(found) != 1:
            raise CannotRunError(f"expected one extension module in the copied package, got {found}")
        return found[0]

    def prepare(self, prebuilt: Path | None) -> None:
        """Copies the project and builds it, or takes the extension module ``prebuilt``."""
        self.tree.mkdir(parents=True)
        copy_tree(self.tree)
        package = self.tree / "python" / "tsam_ext"
        if prebuilt is not None:
            shutil.copy2(prebuilt, package / prebuilt.name)
        else:
            pybind11 = must([sys.executable, "-m", "pybind11", "--cmakedir"], self.folder).strip()
            must(
                [
                    "cmake", "-S", self.tree, "-B", self.tree / "build", "-G", "Ninja",
                    f"-Dpybind11_DIR={pybind11}", f"-DPython_EXECUTABLE={sys.executable}",
                    f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}", *QUICK_BUILD,
                    *(["-DTSAM_EMULATE_CUDA=ON"] if self.emulated else []),
                ],
                self.folder,
            )  # fmt: skip
            must(self._ninja, self.folder)
        self.digest = self._digest()
        shutil.copytree(self.tree, self.folder / "pristine", symlinks=True)
        where = must([sys.executable, "-c", "from importlib.util import *; print(find_spec('tsam_ext').origin)"],
                     self.tree / "python").strip()  # fmt: skip
        if not Path(where).resolve().is_relative_to(self.tree.resolve()):
            raise CannotRunError(f"Python imports tsam_ext from {where} (an editable install?), not from the copy")

    @property
    def _ninja(self) -> list[str | Path]:
        return ["ninja", "-C", self.tree / "build", "-j", str(self.build_jobs), "_C"]

    def _digest(self) -> str:
        return hashlib.sha256(self.module.read_bytes()).hexdigest()

    def test(self, nodes: Sequence[str]) -> tuple[int | None, int, int, str]:
        """Runs tests on the copy: exit code, failures, errors, output."""
        report = self.folder / "report.xml"
        report.unlink(missing_ok=True)
        arguments = ["-q", "-x", "--tb=short", "-p", "no:cacheprovider", "--hypothesis-seed=0", f"--junit-xml={report}"]
        log = self.folder / "log.txt"
        code = exit_code(run_pytest, (self.tree, log, self.emulated, [*arguments, *nodes]), SECONDS)
        output = log.read_text(errors="replace") if log.is_file() else ""
        failures = errors = 0
        if report.is_file():
            for suite in ElementTree.parse(report).getroot().iter("testsuite"):
                failures += int(suite.get("failures", 0))
                errors += int(suite.get("errors", 0))
        return code, failures, errors, output

    def judge(self, mutant: Mutant) -> Verdict:
        """Breaks the copy, rebuilds it where needed, runs the named test, puts the copy back."""
        start = time.monotonic()
        try:
            outcome, detail = self._judge(mutant)
        finally:
            self._put_back(mutant)
        return Verdict(mutant, outcome, detail, time.monotonic() - start)

    def _judge(self, mutant: Mutant) -> tuple[str, str]:
        if stale := mutant.apply(self.tree):
            return "does not apply", "\n".join(stale)
        if mutant.compiled:
            code, output = run(self._ninja, self.folder)
            if code != 0:
                return "does not build", output[-4000:]
            if self._digest() == self.digest:
                return "changes nothing that is built", ""
        code, failures, errors, output = self.test([mutant.test])
        if code == 0:
            return "survived", output[-2000:]
        if code is not None and code < 0:
            return "crashed", f"signal {-code}"
        if code == 1 and failures > 0 and errors == 0:
            return "caught", ""
        return "no verdict", f"exit code {code}, {failures} failed, {errors} errors\n{output[-4000:]}"

    def _put_back(self, mutant: Mutant) -> None:
        pristine = self.folder / "pristine"
        for file in mutant.files:
            if (pristine / file).is_file():
                shutil.copy2(pristine / file, self.tree / file)
            else:
                (self.tree / file).unlink(missing_ok=True)
        if mutant.compiled:
            restore(pristine / "build", self.tree / "build")
            shutil.copy2(pristine / self.module.relative_to(self.tree), self.module)


def restore(pristine: Path, folder: Path) -> None:
    """Makes a folder as it was copied, with the times; reads only what changed (a precompiled header is large)."""
    for parent, _, names in os.walk(folder):
        for name in names:
            original = pristine / Path(parent, name).relative_to(folder)
            if not original.exists():
                Path(parent, name).unlink()
    for parent, _, names in os.walk(pristine):
        for name in names:
            original, copy = Path(parent, name), folder / Path(parent, name).relative_to(pristine)
            now, then = copy.stat() if copy.exists() else None, original.stat()
            if now is None or (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
                shutil.copy2(original, copy)


def in_parallel(scratches: list[Scratch], task: Callable[[int, Scratch], None]) -> None:
    with ThreadPoolExecutor(len(scratches)) as pool:
        for done in [pool.submit(task, i, scratch) for i, scratch in enumerate(scratches)]:
            done.result()


def unbroken(scratches: list[Scratch], mutants: list[Mutant]) -> None:
    """Demands that the named tests pass where nothing is broken; each scratch runs its share."""
    names = sorted({mutant.test for mutant in mutants})

    def share(i: int, scratch: Scratch) -> None:
        if nodes := names[i :: len(scratches)]:
            code, *_, output = scratch.test(nodes)
            if code != 0:
                raise CannotRunError(f"on the unbroken copy pytest ends with {code}:\n{output[-4000:]}")

    in_parallel(scratches, share)


def judge_all(scratches: list[Scratch], mutants: list[Mutant]) -> list[Verdict]:
    free: queue.Queue[Scratch] = queue.Queue()
    for scratch in scratches:
        free.put(scratch)
    stop = threading.Event()

    def task(mutant: Mutant) -> Verdict | None:
        if stop.is_set():
            return None
        scratch = free.get()
        try:
            return scratch.judge(mutant)
        finally:
            free.put(scratch)

    verdicts: list[Verdict] = []
    with ThreadPoolExecutor(len(scratches)) as pool, tqdm(total=len(mutants), unit="mutant", disable=None) as bar:
        try:
            # The slow ones, which have to be built, first: the end is then shared evenly.
            futures = [pool.submit(task, mutant) for mutant in sorted(mutants, key=lambda m: not m.compiled)]
            for done in as_completed(futures):
                if verdict := done.result():
                    verdicts.append(verdict)
                    if not verdict.good:
                        tqdm.write(f"{verdict.mutant.name}: {verdict.outcome}", file=sys.stdout)
                    bar.update()
        except BaseException:
            stop.set()
            raise
    return verdicts


def report(verdicts: list[Verdict], seconds: float, slowest: int) -> int:
    """Prints what was not caught, the slowest if asked, and one line of counts; returns the exit code."""
    bad = sorted((v for v in verdicts if not v.good), key=lambda v: v.mutant.name)
    for verdict in bad:
        mutant = verdict.mutant
        print(f"\n{mutant.name}: {verdict.outcome}\n  {mutant.what}\n  {mutant.test}\n{verdict.detail}".rstrip())
    for verdict in sorted(verdicts, key=lambda v: -v.seconds)[:slowest]:
        print(f"{verdict.seconds:6.1f} s  {verdict.mutant.name}")
    crashed = [v.mutant.name for v in verdicts if v.outcome == "crashed"]
    named = f" ({', '.join(crashed)} by a crash)" if crashed else ""
    wrong = f", {len(bad)} NOT: {', '.join(f'{v.mutant.name} ({v.outcome})' for v in bad)}" if bad else ""
    print(f"{len(verdicts)} mutants, {len(verdicts) - len(bad)} caught{named}{wrong}, {seconds:.0f} s")
    return 1 if bad else 0


def check(mutants: list[Mutant]) -> int:
    """Prints each entry that does not apply to the checkout, with its file and the first line of its old text."""
    found = stale(mutants, ROOT)
    for name, reasons in found.items():
        print("\n  ".join([f"{name}: does not apply", *reasons]))
    print(f"{len(mutants)} mutants, {len(mutants) - len(found)} apply" + (f", {len(found)} do NOT" if found else ""))
    return 1 if found else 0


def part(text: str) -> tuple[int, int]:
    """K/N of the command line: part K of N, counted from 0."""
    if not (found := re.fullmatch(r"(\d+)/(\d+)", text)) or not int(found[1]) < int(found[2]):
        raise argparse.ArgumentTypeError(f"got {text}, expected K/N with K from 0 to N - 1, as 0/2")
    return int(found[1]), int(found[2])


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Proves that each mutant of a folder makes its named test fail.")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="copies worked on at once (default: 2)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names to run, as '*tilt*' or a part of a name")
    parser.add_argument("--part", type=part, default=(0, 1), metavar="K/N",
                        help="run part K of N, from 0; the others only have to apply (default: all)")  # fmt: skip
    parser.add_argument("--tables", type=Path, default=Path(__file__).parent, metavar="FOLDER",
                        help="where the TOML files are (default: beside this script)")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="only list the entries that no longer apply; no build")
    parser.add_argument("--no-build", action="store_true",
                        help="take the installed extension module; for mutants that need no build")  # fmt: skip
    parser.add_argument("--slowest", type=int, default=0, metavar="N", help="print the N slowest mutants")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        pattern = options.only if re.search(r"[*?\[]", options.only) else f"*{options.only}*"
        matching = [m for m in read_mutants(options.tables) if fnmatch.fnmatch(m.name, pattern)]
        number, parts = options.part
        mutants = [m for m in matching if part_of(m.name, parts) == number]
        if not mutants or options.jobs < 1:
            raise CannotRunError(f"no mutant matches in {options.tables}" if not mutants else "--jobs is below 1")
        if options.check:
            return check(matching)
        left_out = stale([m for m in matching if m not in mutants], ROOT)
        verdicts = [Verdict(m, "does not apply", "\n".join(left_out[m.name])) for m in matching if m.name in left_out]
        prebuilt = None
        if options.no_build:
            if compiled := [m.name for m in mutants if m.compiled]:
                raise CannotRunError(f"--no-build, but these need a build: {', '.join(compiled)}")
            found = must([sys.executable, "-c", "import tsam_ext._C as c; print(c.__file__)"], ROOT / "tests")
            prebuilt = Path(found.strip().splitlines()[-1])
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            PROCESSES.set_forkserver_preload(WARM)
            for emulated in (False, True):
                group = [m for m in mutants if m.emulated == emulated]
                jobs = min(options.jobs, len(group))
                build_jobs = max(1, (os.cpu_count() or 1) // max(1, jobs))
                scratches = [Scratch(Path(folder, f"{emulated}-{i}"), build_jobs, emulated) for i in range(jobs)]
                if group:
                    in_parallel(scratches, lambda _, scratch: scratch.prepare(prebuilt))
                    unbroken(scratches, group)
                    verdicts += judge_all(scratches, group)
        return report(verdicts, time.monotonic() - start, options.slowest)
    except (CannotRunError, EntryError) as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
