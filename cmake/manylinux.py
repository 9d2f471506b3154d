"""Links against the C and C++ libraries that manylinux_2_28 promises, on a machine that has newer ones.

``manylinux.py stubs FOLDER COMPILER`` writes libc.so, libm.so, libstdc++.so and those around them: empty functions
under the names and versions of the machine's own libraries, less all that is above LIMITS. So the linker picks
versions that are there everywhere (log@GLIBC_2.2.5, not log@GLIBC_2.29); at run time the real libraries answer.
``manylinux.py check LIBRARY`` fails if the library asks for more, or for a name that no library of LIMITS and neither
Python nor torch has: a linker leaves those undefined without a word.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# auditwheel's policy for manylinux_2_28 on x86-64, which .ci/run holds against what is built here.
LIMITS = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
# What -lNAME is to find, and the library whose names it has.
LIBRARIES = {
    "c": "libc.so.6",
    "m": "libm.so.6",
    "pthread": "libpthread.so.0",
    "dl": "libdl.so.2",
    "rt": "librt.so.1",
    "stdc++": "libstdc++.so.6",
    "loader": "ld-linux-x86-64.so.2",
}
# glibc 2.32 to 2.34 took these into libc, and left an older version of them under the old names. There they are asked
# for: an older libc does not have them.
MOVED = {"pthread": r"_*pthread_|sem_", "dl": r"dl", "rt": r"aio_|lio_|mq_|shm_|timer_"}
# Names without a version: Python's and those of torch's stable ABI. The libraries that have them are not linked.
FOREIGN = re.compile(r"_?Py|aoti_torch_|torch_")
SECTIONS = {"FUNC": ".text", "IFUNC": ".text", "OBJECT": ".data", "TLS": '.section .tbss,"awT",@nobits'}
KINDS = {"OBJECT": "object", "TLS": "tls_object"}


class Symbol(NamedTuple):
    """A line of a library's dynamic symbol table."""

    name: str
    version: str
    kind: str
    weak: bool
    defined: bool
    default: bool


def symbols(library: str | Path) -> Iterator[Symbol]:
    """The dynamic symbols of a library, as readelf has them."""
    command = ["readelf", "--wide", "--dyn-syms", library]
    table = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    # 1432: 0000000000089380  3821 FUNC    GLOBAL DEFAULT   16 pthread_create@GLIBC_2.2.5
    for kind, bind, index, name, at, version in re.findall(
        r"^ *\d+: [0-9a-f]+ +\w+ +(\w+) +(\w+) +\w+ +(?:\[.*\] +)?(\w+) +([^@\s]+)(@*)(\S*)", table, re.MULTILINE
    ):
        if index != "ABS":  # the versions themselves
            yield Symbol(name, version, kind, bind == "WEAK", index != "UND", at != "@")


def number(version: str) -> tuple[int, ...] | None:
    """GLIBC_2.28 as (2, 28); None if it is above LIMITS or of none of them."""
    family, _, digits = version.rpartition("_")
    found = tuple(int(part) for part in digits.split(".")) if re.fullmatch(r"[\d.]+", digits) else None
    return found if found and found <= LIMITS.get(family, ()) else None


def allowed(short: str, library: str | Path) -> dict[str, dict[str, Symbol]]:
    """For each -lNAME what it gets of a library: a symbol's newest version within LIMITS."""
    best: dict[str, Symbol] = {}
    newest: dict[str, str] = {}
    for symbol in symbols(library):
        if not symbol.defined or symbol.version.endswith("_PRIVATE"):
            continue
        if symbol.default:
            newest[symbol.name] = symbol.version
        old = best.get(symbol.name)
        if (mine := number(symbol.version)) and (old is None or mine > (number(old.version) or ())):
            best[symbol.name] = symbol
    result: dict[str, dict[str, Symbol]] = {short: {}}
    for name, symbol in best.items():
        if name not in newest:
            continue  # kept for old binaries alone
        place = short
        if short == "c" and number(newest[name]) is None:
            moved = [where for where, pattern in MOVED.items() if re.match(pattern, name)]
            if not moved and newest[name] == "GLIBC_2.34":
                continue  # of a library that is not among these
            place = moved[0] if moved else short
        result.setdefault(place, {})[name] = symbol
    return result


def write_stub(folder: Path, compiler: str, short: str, names: dict[str, Symbol]) -> None:
    """One library of empty functions: an assembly file for the names, a version script for their versions."""
    lines: list[str] = []
    versions: dict[str, list[str]] = {}
    for name, symbol in sorted(names.items()):
        kind = KINDS.get(symbol.kind, "function")
        lines += [SECTIONS.get(symbol.kind, ".text"), f".globl {name}", f".type {name},@{kind}", f"{name}: .zero 8"]
        versions.setdefault(symbol.version, []).append(name)
    source, script = folder / f"{short}.s", folder / f"{short}.map"
    source.write_text("\n".join(lines) + '\n.section .note.GNU-stack,"",@progbits\n')
    script.write_text("".join(f"{v} {{ {'; '.join(versions[v])}; }};\n" for v in sorted(versions)))
    options = [f"-Wl,-soname,{LIBRARIES[short]}"] + ([f"-Wl,--version-script={script}"] if versions else [])
    target = folder / (LIBRARIES[short] if short in ("c", "loader") else f"lib{short}.so")
    subprocess.run([compiler, "-shared", "-nostdlib", *options, source, "-o", target], check=True)


def write_stubs(folder: Path, compiler: str) -> None:
    """All of LIBRARIES into ``folder``, for the linker's option -L."""

    def real(name: str) -> str:
        command = [compiler, f"-print-file-name={name}"]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()

    folder.mkdir(parents=True, exist_ok=True)
    stubs: dict[str, dict[str, Symbol]] = {short: {} for short in LIBRARIES}
    for short, library in LIBRARIES.items():
        for place, names in allowed(short, real(library)).items():
            stubs[place].update(names)
    for short, names in stubs.items():
        write_stub(folder, compiler, short, names)
    # As the machine's own libc.so: a few functions come from an archive, __tls_get_addr from the loader.
    loader = folder / LIBRARIES["loader"]
    text = f'GROUP("{folder / LIBRARIES["c"]}" "{real("libc_nonshared.a")}" AS_NEEDED("{loader}"))\n'
    (folder / "libc.so").write_text(text)


def faults(library: Path) -> list[str]:
    """What a library asks for beyond LIMITS, one line for each name."""
    found = []
    for symbol in symbols(library):
        if symbol.defined:
            continue
        if symbol.version:
            if number(symbol.version) is None:
                found.append(f"{symbol.name} asks for {symbol.version}")
        elif not symbol.weak and not FOREIGN.match(symbol.name):
            found.append(f"{symbol.name} is in no library within the limits")
    return found


def main(arguments: list[str]) -> int:
    if len(arguments) == 3 and arguments[0] == "stubs":
        write_stubs(Path(arguments[1]), arguments[2])
        return 0
    if len(arguments) == 2 and arguments[0] == "check":
        if found := faults(Path(arguments[1])):
            print(f"{arguments[1]} is above manylinux_2_28:", *found, sep="\n  ")
        return 1 if found else 0
    print("expected: stubs FOLDER COMPILER, or check LIBRARY", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
