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
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

TABLE = Path(__file__).with_name("cuda_accesses.txt")
ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")
REGISTERS = 64  # four blocks of 256 threads on an SM
# Three blocks, rather than a spill (csrc/cuda/device.cuh).
MORE_REGISTERS = {"hmc_pass": (("sm_100", "sm_120"), 80)}
# float32 arrays that a kernel reads and writes: loads, stores of 16 bytes in its vector path, all branches together.
WORDS = {
    "perturb_chunks<float>": (1, 2),
    "grad_sum_squares<float>": (2, 0),
    "ascend_chunks<float>": (3, 2),
    "accumulate_chunks<float>": (2, 1),
    "copy_chunks<float>": (1, 1),
    "weighted_sum<float>": (1, 1),
    "leapfrog_chunks<float>": (5, 2),
    "kick_chunks<float>": (3, 1),
    "hmc_place_chunks<float>": (2, 3),
    "hmc_last_kick<float>": (3, 0),
    "hmc_carry_chunks<float>": (2, 2),
    "hmc_pass<float, (tsam::cuda::HmcPassKind)0, false>": (5, 3),
    "hmc_pass<float, (tsam::cuda::HmcPassKind)0, true>": (3, 3),
    "hmc_pass<float, (tsam::cuda::HmcPassKind)1, false>": (4, 1),
    "hmc_pass<float, (tsam::cuda::HmcPassKind)1, true>": (3, 1),
    "hmc_pass<float, (tsam::cuda::HmcPassKind)2, false>": (4, 3),
    "hmc_pass<float, (tsam::cuda::HmcPassKind)2, true>": (3, 3),
}
ACCESS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(LDG|STG|LD|ST|LDL|STL|RED|ATOMG?)((?:\.\w+)*)\s")
WIDTH = re.compile(r"\.(128|64|U16|S16|U8|S8)\b")
Key = tuple[str, str]  # kernel, architecture


def output(*command: str | Path) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def short(name: str) -> str:
    """``void tsam::cuda::kernel<float>(...)`` as ``kernel<float>``."""
    found = re.match(r"(?:void )?tsam::cuda::(\w+(?:<.*>)?)\(", name)
    return found[1] if found else name


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
    """How many instructions of each kind and width touch global or local memory."""
    found: dict[Key, Counter[str]] = {}
    architecture = ""
    counts: Counter[str] = Counter()
    for line in output("cuobjdump", "-sass", library).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            counts = found[match[1], architecture] = Counter()
        elif match := ACCESS.search(line):
            width = WIDTH.search(match[2])
            counts[match[1] + "." + (width[1] if width else "32")] += 1
    return found


def table(counts: dict[Key, Counter[str]]) -> list[str]:
    """One line for each kernel and set of accesses, with the architectures that have it."""
    groups: dict[tuple[str, str], list[str]] = {}
    for (kernel, architecture), count in counts.items():
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
            where, more = MORE_REGISTERS.get(kernel.partition("<")[0], ((), 0))
            if usage[key]["REG"] > (more if architecture in where else REGISTERS):
                faults.append(f"{kernel} on {architecture} takes {usage[key]['REG']} registers")
            loads, stores = WORDS.get(kernel, (0, 0))
            if counts[key]["LDG.128"] < loads or counts[key]["STG.128"] < stores:
                faults.append(f"{kernel} on {architecture} has less than {loads} loads and {stores} stores of 16 bytes")
    faults += [f"{kernel} is not in the library" for kernel in WORDS if kernel not in kernels]
    return faults


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("--write", action="store_true", help="make the table anew")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        library = options.library
        if library.suffix == ".whl":
            with zipfile.ZipFile(library) as wheel:
                names = [name for name in wheel.namelist() if name.endswith("libtsam_cuda.so")]
                if not names:
                    print(f"{library.name} holds no libtsam_cuda.so")
                    return 1
                library = Path(wheel.extract(names[0], scratch))
        usage, counts = resources(library), accesses(library)
    mangled = sorted({kernel for kernel, _ in usage})
    plain = dict(zip(mangled, map(short, output("c++filt", *mangled).splitlines()), strict=True))
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
    print(f"{len(mangled)} kernels for {len(ARCHITECTURES)} architectures, at most {most} registers")
    print("\n".join(faults) or "no local memory, and global memory as in the table")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
