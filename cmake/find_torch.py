"""Finds the folder of an installed torch without importing it, and prints it.

Looked at in this order; the first torch that has the stable headers and is new enough wins:
  1. TSAM_TORCH_DIR (the folder that holds torch's include/; if set, nothing else is looked at)
  2. the Python that runs the build
  3. the same Python with -E (pip hides an environment's packages from a build through PYTHONPATH)
  4. the Pythons of $VIRTUAL_ENV and $CONDA_PREFIX
  5. every python3 and python on PATH
The wheel is not tied to the torch it was built on, so any of them is as good as another.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MINIMUM = "2.10"

# Where a Python would import torch from: finding the package does not run it.
_LOCATE = (
    "import importlib.util as u; s = u.find_spec('torch'); "
    "print(s.submodule_search_locations[0] if s and s.submodule_search_locations else '')"
)


class Search(NamedTuple):
    """The folder of the torch to build on, or None and what was seen instead."""

    folder: Path | None
    seen: tuple[str, ...]


def version_of(folder: Path) -> tuple[int, int] | None:
    """(major, minor) of the torch in ``folder``, or None if it has no stable headers."""
    headers = folder / "include" / "torch"
    if not (headers / "csrc" / "stable" / "library.h").is_file():
        return None
    try:
        text = (headers / "headeronly" / "version.h").read_text()
    except OSError:
        return None  # the file came with 2.9
    major, minor = (re.search(rf"define\s+TORCH_VERSION_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR"))
    return (int(major[1]), int(minor[1])) if major and minor else None


def _installed_here() -> str:
    spec = importlib.util.find_spec("torch")
    return (spec.submodule_search_locations or [""])[0] if spec else ""


def _installed_for(python: Path) -> str:
    try:
        done = subprocess.run([python, "-E", "-c", _LOCATE], capture_output=True, text=True, timeout=60, cwd="/")
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _pythons() -> Iterator[Path]:
    yield Path(sys.executable)
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if os.environ.get(name):
            yield Path(os.environ[name], "bin", "python")
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        for name in ("python3", "python"):
            if folder and os.access(Path(folder, name), os.X_OK):
                yield Path(folder, name)


def _candidates() -> Iterator[str]:
    yield _installed_here()
    asked = set()
    for python in _pythons():
        # Not resolved: an environment's python is a link, and the link's folder is what names it.
        if python not in asked:
            asked.add(python)
            yield _installed_for(python)


def search() -> Search:
    """Goes through the places named above."""
    minimum = tuple(int(part) for part in MINIMUM.split("."))
    given = os.environ.get("TSAM_TORCH_DIR")
    seen: list[str] = []
    for place in [given] if given else _candidates():
        if not place:
            continue
        version = version_of(Path(place))
        if version is not None and version >= minimum:
            return Search(Path(place), tuple(seen))
        what = "too old" if version is None else "version {}.{}".format(*version)
        what = "no torch with stable headers" if given and version is None else what
        if f"{place} ({what})" not in seen:
            seen.append(f"{place} ({what})")
    return Search(None, tuple(seen))


def require() -> Path:
    """The folder, or an exit with one sentence that says what to do."""
    found = search()
    if found.folder is None:
        seen = f" (found only {', '.join(found.seen)})" if found.seen else ""
        raise SystemExit(
            f"tsam_ext needs torch >= {MINIMUM} to build and found none{seen}: install it into "
            "this environment, activate the environment that has it, or set TSAM_TORCH_DIR to the "
            "folder of the torch package."
        )
    return found.folder


if __name__ == "__main__":
    print(require())
