"""The mutants as tables: ``[[mutant]]`` entries of the TOML files here, read, checked and applied.

An entry has ``name``, ``what`` (is broken), ``test`` (the node id that must then fail) and ``file``, ``old``, ``new``:
the text ``old`` stands in ``file`` exactly once, and ``new`` takes its place. A mutant of several places has ``edits``,
a list of (``file``, ``old``, ``new``), made in that order. Line numbers play no part.
"""

from __future__ import annotations

import re
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

WORDS = ("name", "what", "test")
PLACE = ("file", "old", "new")
# Tests that compile csrc/core into programs of their own, and never run the extension module.
COMPILE_THEMSELVES = ("tests/test_core.py", "tests/test_drift.py", "tests/test_metropolis.py")


class EntryError(Exception):
    """An entry that is not well formed: no mutant can be made of it."""


@dataclass(frozen=True)
class Edit:
    """``new`` in place of ``old``, which stands in ``file`` exactly once."""

    file: str
    old: str
    new: str

    @property
    def first(self) -> str:
        """The first line of ``old`` that is not blank."""
        return self.old.strip().splitlines()[0]

    def changed(self, text: str) -> str | None:
        """The broken text, or None where ``old`` does not stand exactly once."""
        return text.replace(self.old, self.new) if text.count(self.old) == 1 else None


@dataclass(frozen=True)
class Mutant:
    """One entry: its name, what it breaks, the test that must see it, and the edits that break it."""

    name: str
    what: str
    test: str
    edits: tuple[Edit, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """The files that it changes."""
        return tuple(dict.fromkeys(edit.file for edit in self.edits))

    @property
    def compiled(self) -> bool:
        """Whether the extension module has to be built again; cmake/manylinux.* is off in these builds."""
        if self.test.partition("::")[0] in COMPILE_THEMSELVES:
            return False
        return any(re.match(r"csrc/|cmake/(?!manylinux\.)|CMakeLists\.txt$", file) for file in self.files)

    @property
    def emulated(self) -> bool:
        """Whether it breaks CUDA code, which only a package with emulated CUDA ops runs (tests/simt)."""
        return any(file.startswith("csrc/cuda/") for file in self.files)

    def broken(self, root: Path) -> tuple[dict[str, str], list[str]]:
        """The broken text of each file, and what does not apply: nothing is written."""
        texts: dict[str, str] = {}
        stale = []
        for edit in self.edits:
            path = root / edit.file
            if edit.file not in texts and not path.is_file():
                stale.append(f"{edit.file} is not there: {edit.first!r}")
                continue
            text = texts[edit.file] if edit.file in texts else path.read_bytes().decode()
            changed = edit.changed(text)
            if changed is None:
                stale.append(f"{edit.file}: got {text.count(edit.old)} times, expected once: {edit.first!r}")
            texts[edit.file] = text if changed is None else changed
        return texts, stale

    def apply(self, root: Path) -> list[str]:
        """Breaks the files below ``root``, all or none; what does not apply, empty when it was done."""
        texts, stale = self.broken(root)
        if not stale:
            for file, text in texts.items():
                (root / file).write_bytes(text.encode())
        return stale


def mutant(entry: dict[str, Any], where: str) -> Mutant:
    """An entry as it was read, checked."""
    several = "edits" in entry
    places = entry["edits"] if several else [{key: entry.get(key) for key in PLACE}]
    wanted = {*WORDS, "edits"} if several else {*WORDS, *PLACE}
    if entry.keys() != wanted or not places or any(place.keys() != set(PLACE) for place in places):
        raise EntryError(
            f"{where}: got {sorted(entry)}, expected {', '.join(WORDS)} and {', '.join(PLACE)} or edits of these"
        )
    texts = [entry[word] for word in WORDS] + [place[key] for place in places for key in PLACE]
    if not all(isinstance(text, str) for text in texts):
        raise EntryError(f"{where}: every value is a text")
    if not all(place["old"].strip() and place["old"] != place["new"] for place in places):
        raise EntryError(f"{where}: old is empty, or new is the same")
    return Mutant(entry["name"], entry["what"], entry["test"], tuple(Edit(**place) for place in places))


def read_mutants(folder: Path) -> list[Mutant]:
    """All entries of a folder's tables, file by file."""
    found = []
    for path in sorted(folder.glob("*.toml")):
        try:
            table = tomllib.loads(path.read_text())
        except tomllib.TOMLDecodeError as error:
            raise EntryError(f"{path.name}: {error}") from None
        if table.keys() != {"mutant"}:
            raise EntryError(f"{path.name}: got the tables {sorted(table)}, expected [[mutant]] alone")
        found += [mutant(entry, f"{path.name}: {entry.get('name', i)}") for i, entry in enumerate(table["mutant"])]
    return found


def part_of(name: str, parts: int) -> int:
    """The part that a mutant belongs to, from 0: by its name alone, so that a new entry moves no other one."""
    return zlib.crc32(name.encode()) % parts


def moved(edit: Edit, root: Path) -> list[str]:
    """The other source files in which ``old`` stands exactly once, as after a move from one file to another."""
    sources = (path for part in ("cmake", "csrc", "python") for path in sorted((root / part).rglob("*")))
    files = [path for path in sources if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".cmake")]
    return [str(path.relative_to(root)) for path in files if path.read_text().count(edit.old) == 1]


def stale(mutants: list[Mutant], root: Path) -> dict[str, list[str]]:
    """What does not apply to the sources below ``root``, by name, with the file that has the text now if one has."""
    lines: dict[str, list[str]] = {}
    for one in mutants:
        if reasons := one.broken(root)[1]:
            elsewhere = {file for edit in one.edits for file in moved(edit, root)} - set(one.files)
            lines[one.name] = reasons + [f"the text stands in {file}" for file in sorted(elsewhere)]
    return lines
