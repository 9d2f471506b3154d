"""The machine code of the CUDA library, as cuobjdump prints it: kernels, their accesses, what a loop's turn costs.

Read by tests/cuda_gates.py and ``python -m bench gpu-cost``. No torch here. A float32 kernel's vector loop is the
one with its 128-bit accesses: a turn of it is LANES elements. Invariant: WORDS is the most that any way through a
loop moves; what one launch moves (gpu_cost.py) may be less, and never more.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

LIBRARY = "libtsam_cuda.so"
LANES = 4  # float32 in 16 bytes, normals in a turn of a draw
# float32 arrays that a kernel reads and writes: loads, stores of 16 bytes in its vector path, all branches together.
WORDS = {
    "perturb_chunks<float>": (1, 2),
    "grad_sum_squares<float>": (2, 0),
    "ascend_chunks<float>": (3, 2),
    "displacement_chunks<float>": (3, 0),
    "accumulate_chunks<float>": (2, 1),
    "direction_sums<float>": (2, 0),
    "copy_chunks<float>": (1, 1),
    "weighted_sum<float, float, 4>": (1, 1),
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
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*)((?:\.\w+)*)\s*([^;]*);")
FEW = " few"
INTEGERS = re.compile(r"V?I(ADD|MAD|ABS|MNMX|SETP)|LOP|SHF|LEA|SEL|PRMT|FS(ETP|EL)|FMNMX|BFI|BMSK|SGXT|POPC|FLO")
GLOBAL = ("LDG", "STG", "LD", "ST", "RED", "ATOM", "ATOMG")
LOCAL = ("LDL", "STL")
WIDTH = re.compile(r"\.(128|64|U16|S16|U8|S8)\b")
Key = tuple[str, str]  # kernel, architecture


class SassError(RuntimeError):
    """The machine code cannot be read here; the message says why."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``LDG``, ``.E.128``, and what it is given."""

    address: int
    name: str
    modifiers: str
    operands: str
    guarded: bool = False  # done only where a predicate says so

    @property
    def width(self) -> str:
        """Bits of an access, as cuobjdump names them."""
        found = WIDTH.search(self.modifiers)
        return found[1] if found else "32"

    @property
    def pipe(self) -> str:
        """What executes it: float32, float64, integers (also comparisons and selections of floats), or other."""
        conversion = self.name in ("F2F", "F2I", "I2F", "FRND", "MUFU") and re.search(r"64", self.modifiers)
        if conversion or self.name in ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"):
            return "float64"
        if self.name in ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2"):
            return "float32"
        return "integers" if INTEGERS.match(self.name) else "other"

    @property
    def target(self) -> int | None:
        """Where a branch goes to; None for what is no branch."""
        found = re.search(r"\b0x([0-9a-f]+)", self.operands) if self.name == "BRA" else None
        return int(found[1], 16) if found else None


def output(*command: str | Path) -> str:
    """What a program prints."""
    if shutil.which(command[0]) is None:
        raise SassError(
            f"{command[0]} is not on PATH (pip: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm; binutils: c++filt)"
        )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SassError(f"{' '.join(map(str, command))} exits {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def short(name: str) -> str:
    """``void tsam::cuda::kernel<float, false>(...)`` as ``kernel<float>``, with ``true`` as ``kernel<float> few``.

    The last argument of a kernel over lists says that its table is the one for few tensors.
    """
    found = re.match(r"(?:void )?tsam::cuda::(\w+(?:<.*>)?)\(", name)
    if not found:
        return name
    return re.sub(r", (false|true)>$", lambda table: f">{FEW}" if table[1] == "true" else ">", found[1])


def plain(mangled: Iterable[str]) -> dict[str, str]:
    """The short name of each kernel."""
    names = sorted(set(mangled))
    return dict(zip(names, map(short, output("c++filt", *names).splitlines()), strict=True)) if names else {}


def library_in(path: Path, scratch: Path) -> Path:
    """The CUDA library: the file itself, or what a wheel holds, put into ``scratch``."""
    if not path.is_file():
        raise SassError(f"there is no file {path}")
    if path.suffix != ".whl":
        return path
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(LIBRARY)]
        if not names:
            raise SassError(f"{path.name} holds no {LIBRARY}")
        return Path(wheel.extract(names[0], scratch))


def kernels(listing: Iterable[str]) -> Iterator[tuple[Key, list[Instruction]]]:
    """Each kernel of a listing, by its mangled name; one that is compiled in two files comes twice."""
    architecture, key = "", ("", "")
    code: list[Instruction] = []
    for line in listing:
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            if code:
                yield key, code
            key, code = (match[1], architecture), []
        elif match := INSTRUCTION.search(line):
            code.append(Instruction(int(match[1], 16), match[3], match[4], match[5], match[2] is not None))
    if code:
        yield key, code


def accesses(code: list[Instruction]) -> Counter[str]:
    """How many instructions of each kind and width touch global or local memory."""
    return Counter(f"{i.name}.{i.width}" for i in code if i.name in GLOBAL + LOCAL)


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """What lies between the target of each backward branch and the branch."""
    return [
        [i for i in code if start <= i.address <= branch.address]
        for branch in code
        if (start := branch.target) is not None and start < branch.address
    ]


def fewest(loop: list[Instruction], pipe: str) -> int:
    """Instructions of a pipe on the way through a loop that has the fewest of them: rare cases lie beside it."""
    never = len(loop) + 1
    place = {i.address: n for n, i in enumerate(loop)}
    ahead = [0] * (len(loop) + 1)
    for n in range(len(loop) - 1, -1, -1):
        one, target = loop[n], loop[n].target
        following = ahead[n + 1]
        if target is not None and n + 1 < len(loop):
            # Where it leaves the loop no turn is completed; backwards lies an inner loop.
            taken = following if target <= one.address else ahead[place[target]] if target in place else never
            following = min(taken, following) if one.guarded else taken
        elif one.name == "EXIT" and not one.guarded:
            following = never
        ahead[n] = following + (one.pipe == pipe)
    return ahead[0]


def turn(code: list[Instruction]) -> list[list[Instruction]]:
    """The loops of one turn over LANES elements: the vector loop, and the draw where that is another.

    All branches are in it: more than any one way through. What a call does is not.
    """

    def vector(loop: list[Instruction]) -> int:
        return sum(i.width == "128" for i in loop if i.name in GLOBAL)

    found = loops(code)
    best = max(found, key=lambda loop: (vector(loop), -len(loop)), default=[])
    main = best if vector(best) else []
    # Box-Muller takes a root: no other loop of the kernels' has one without accesses of its own.
    draws = [loop for loop in found if not vector(loop) and any(i.name == "MUFU" for i in loop)]
    if draws and not any(i.name == "MUFU" for i in main):
        return [loop for loop in (main, min(draws, key=len)) if loop]
    return [main] if main else []


@dataclass(frozen=True)
class Cost:
    """Instructions per element: all of a turn; those of float32, integers; of float64 on the usual way."""

    issued: float
    float32: float = 0.0
    integers: float = 0.0
    float64: float = 0.0


def cost(code: list[Instruction]) -> Cost | None:
    """Of a kernel with such a loop."""
    body = turn(code)
    if not body:
        return None
    count = Counter(i.pipe for loop in body for i in loop)
    return Cost(
        count.total() / LANES,
        count["float32"] / LANES,
        count["integers"] / LANES,
        sum(fewest(loop, "float64") for loop in body) / LANES,
    )


def costs(library: Path, architecture: str) -> dict[str, Cost]:
    """What a turn of each kernel costs that has such a loop."""
    code = dict(kernels(output("cuobjdump", "-sass", "-arch", architecture, library).splitlines()))
    names = plain(kernel for kernel, _ in code)
    return {names[kernel]: found for (kernel, _), listing in code.items() if (found := cost(listing))}
