"""What nvcc made of the kernels, looked up in the library itself: registers, local memory, accesses to global memory.

``python tests/cuda_gates.py WHEEL_OR_LIBRARY`` needs cuobjdump and nvdisasm on PATH (pip: nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm); ``--write`` makes cuda_accesses.txt anew, for a change of a kernel that means to change it.
For each kernel and architecture: no spill and no stack frame, registers at most REGISTERS; the vector path of a float32
kernel moves the words that its formula needs in 128-bit accesses; and all accesses are those of the table, so that one
more scalar access fails. The table holds for the nvcc that it names: with another one it is not looked at, and said so.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import sass  # noqa: E402
from bench.sass import WORDS, Key, output  # noqa: E402

TABLE = Path(__file__).with_name("cuda_accesses.txt")
ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")
REGISTERS = 64  # four blocks of 256 threads on an SM
OF_ONE_TENSOR = ("weighted_sum", "leapfrog_chunks", "kick_chunks")  # without a table
# Three blocks, rather than a spill (csrc/cuda/device.cuh).
MORE_REGISTERS = {
    "hmc_pass<double": (("sm_100", "sm_120"), 80),
    "hmc_pass<tsam::StochasticBFloat16": (("sm_100", "sm_120"), 80),
    "hmc_pass<tsam::StochasticFloat16": (("sm_100", "sm_120"), 80),
    "perturb_chunks<tsam::StochasticFloat16>": (("sm_75",), 72),
}


def resources(library: Path) -> dict[Key, dict[str, int]]:
    """REG, STACK and LOCAL of each kernel on each architecture."""
    found: dict[Key, dict[str, int]] = {}
    architecture = kernel = ""
    for line in output("cuobjdump", "-res-usage", library).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            kernel = match[1]
        elif "REG:" in line:
            found[kernel, architecture] = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
    return found


def accesses(library: Path) -> dict[Key, Counter[str]]:
    """The accesses of each kernel on each architecture."""
    return {key: sass.accesses(code) for key, code in sass.kernels(output("cuobjdump", "-sass", library).splitlines())}


def table(counts: dict[Key, Counter[str]]) -> list[str]:
    """One line for each kernel and set of accesses, with the architectures that have it.

    A kernel for few tensors is left out where its accesses are those for many.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for (kernel, architecture), count in counts.items():
        if kernel.endswith(sass.FEW) and counts[kernel.removesuffix(sass.FEW), architecture] == count:
            continue
        text = " ".join(f"{name}={count[name]}" for name in sorted(count))
        groups.setdefault((kernel, text), []).append(architecture)
    return sorted(f"{kernel} | {' '.join(sorted(where, key=ARCHITECTURES.index))} | {text}"
                  for (kernel, text), where in groups.items())  # fmt: skip


def wrong(usage: dict[Key, dict[str, int]], counts: dict[Key, Counter[str]]) -> list[str]:
    """What the kernels break of the laws that hold for every compiler."""
    faults = []
    kernels = sorted({kernel for kernel, _ in usage})
    for kernel in kernels:
        for architecture in ARCHITECTURES:
            key = kernel, architecture
            if key not in usage:
                faults.append(f"{kernel} is not there for {architecture}")
                continue
            if usage[key]["STACK"] or usage[key]["LOCAL"]:
                faults.append(f"{kernel} on {architecture} uses local memory: {usage[key]}")
            either = kernel.removesuffix(sass.FEW)
            where, more = MORE_REGISTERS.get(either.partition(",")[0], ((), 0))
            if usage[key]["REG"] > (more if architecture in where else REGISTERS):
                faults.append(f"{kernel} on {architecture} takes {usage[key]['REG']} registers")
            loads, stores = WORDS.get(either, (0, 0))
            if counts[key]["LDG.128"] < loads or counts[key]["STG.128"] < stores:
                faults.append(f"{kernel} on {architecture} has less than {loads} loads and {stores} stores of 16 bytes")
    wanted = [kernel + table for kernel in WORDS for table in ("", sass.FEW)]
    both = [kernel for kernel in wanted if kernel.removesuffix(sass.FEW).partition("<")[0] not in OF_ONE_TENSOR]
    faults += [f"{kernel} is not in the library" for kernel in [*WORDS, *both] if kernel not in kernels]
    return faults


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("--write", action="store_true", help="make the table anew")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            library = sass.library_in(options.library, Path(scratch))
            usage, counts = resources(library), accesses(library)
        except sass.SassError as error:
            print(error)
            return 1
    plain = sass.plain(kernel for kernel, _ in usage)
    usage = {(plain[kernel], architecture): value for (kernel, architecture), value in usage.items()}
    counts = {(plain[kernel], architecture): value for (kernel, architecture), value in counts.items()}
    release = re.findall(r"release (\S+),", output("nvcc", "--version"))[0]
    faults, lines = wrong(usage, counts), [f"nvcc {release}", *table(counts)]
    if options.write:
        TABLE.write_text("\n".join(lines) + "\n")
    expected = TABLE.read_text().splitlines()
    if expected[0] != lines[0]:
        print(f"NOT COMPARED: {TABLE.name} is of {expected[0]}, this is nvcc {release}")
    else:
        faults += [f"- {line}" for line in sorted(set(expected) - set(lines))]
        faults += [f"+ {line}" for line in sorted(set(lines) - set(expected))]
    most = max(value["REG"] for value in usage.values())
    print(f"{len(plain)} kernels for {len(ARCHITECTURES)} architectures, at most {most} registers")
    print("\n".join(faults) or "no local memory, and global memory as in the table")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
