"""What the machine can do at best: its memory's bandwidth and the kernels' own draw rate; floors of passes from both.

bench/floor.cpp is built when it is needed and run with as many threads as torch has, on arrays of at least eight
times the last-level cache. Bandwidth = real bytes over the best time, in words per element: copy 2, triad 3, in-place
add 3; read 1, which is no part of the floor but the roofline of passes that write nothing.
Floor of a pass = the larger of its bytes over bandwidth and its draws over draw rate.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from tsam_ext import _ops
from tsam_ext.engine.state import new_state

SOURCE = Path(__file__).with_name("floor.cpp")
WORDS = {"copy": 2, "triad": 3, "add": 3, "read": 1}  # in the order of floor.cpp
READ = "read"
WORD = 4  # bytes
CACHES = 8  # an array is at least so many last-level caches long
FALLBACK_CACHE = 32 << 20
DRAWN = 1 << 19  # normals a thread in one timing of the draw rate: these stay in the caches


class FloorError(RuntimeError):
    """The floor cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Floor:
    """Bytes per second (``read_bandwidth``: with nothing written) and normals per second.

    What they were taken from is in ``runs``: GB/s by kernel, one dict per run.
    """

    bandwidth: float
    read_bandwidth: float
    draw_rate: float
    stores: str
    array_bytes: int
    runs: tuple[dict[str, float], ...]

    def seconds(self, moved_bytes: float, draws: float) -> float:
        """The floor of a pass that moves so many bytes and draws so many normals."""
        return max(moved_bytes / self.bandwidth, draws / self.draw_rate)

    def read_seconds(self, moved_bytes: float) -> float:
        """The roofline of a pass that only reads so many bytes: no kernel of floor.cpp that only reads was faster."""
        return moved_bytes / self.read_bandwidth


def cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Size of the last-level cache, from the kernel, else from getconf, else 32 MiB."""
    found = []
    for index in folder.glob("index*"):
        text = (index / "size").read_text().strip()
        scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        found.append(int(text.rstrip("KMG")) * scale)
    if found:
        return max(found)
    for name in ("SC_LEVEL4_CACHE_SIZE", "SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE"):
        if name in os.sysconf_names and os.sysconf(name) > 0:
            return os.sysconf(name)
    return FALLBACK_CACHE


def array_bytes(cache: int, memory: int) -> int:
    """Bytes of each of the three arrays: eight caches, in whole mebibytes."""
    wanted = -(-CACHES * cache >> 20) << 20
    if 3 * wanted > memory // 2:
        raise FloorError(f"three arrays of {wanted >> 20} MiB ({CACHES} times the cache) do not fit in half the memory")
    return wanted


def bytes_moved(kernel: str, elements: int) -> int:
    """Real bytes that one run of a kernel of floor.cpp reads and writes."""
    return WORDS[kernel] * WORD * elements


class Program:
    """floor.cpp, built for this processor and loaded."""

    def __init__(self) -> None:
        compiler = shutil.which("g++")
        if compiler is None:
            raise FloorError("no g++ found: the bandwidth floor is a C++ program of ours; install g++ and run again")
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / "floor.so"
            flags = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
            done = subprocess.run(
                [compiler, *flags, str(SOURCE), "-o", str(built)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise FloorError(f"g++ cannot build {SOURCE}:\n{done.stderr}")
            self._library = ctypes.CDLL(str(built))  # stays mapped when the file is gone
        self._library.floor_stores.restype = ctypes.c_char_p
        self._library.floor_measure.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]

    @property
    def stores(self) -> str:
        """The kind of stores that it uses, in words."""
        text: bytes = self._library.floor_stores()
        return text.decode()

    def seconds(self, elements: int, threads: int, repeats: int) -> dict[str, list[float]]:
        """Times of each run of each kernel."""
        times = (ctypes.c_double * (len(WORDS) * repeats))()
        code = self._library.floor_measure(elements, threads, repeats, times)
        if code:
            reason = {1: "no memory for its arrays", 2: "its results are wrong", 3: "an argument is wrong"}[code]
            raise FloorError(f"floor.cpp: {reason} (elements {elements}, threads {threads}, repeats {repeats})")
        return {kernel: list(times[i * repeats : (i + 1) * repeats]) for i, kernel in enumerate(WORDS)}

    def bandwidths(self, size: int, repeats: int) -> dict[str, float]:
        """Best bytes per second of each kernel on arrays of ``size`` bytes, with torch's number of threads."""
        elements = size // WORD
        times = self.seconds(elements, torch.get_num_threads(), repeats)
        return {kernel: bytes_moved(kernel, elements) / min(found) for kernel, found in times.items()}


def draw_rate(repeats: int) -> float:
    """Normals per second of the kernels, from tensors that stay in the caches: the highest of two ways to see it.

    One draw and its stores; and the second draw of ``sphere``, which touches no memory, as the difference to it.
    """
    n = DRAWN * torch.get_num_threads()
    position, saved, state = torch.zeros(n), torch.zeros(n), new_state(1, torch.device("cpu"))
    best = {0: float("inf"), 1: float("inf")}
    for turn in range(repeats + 1):
        for noise in best:
            start = time.perf_counter()
            _ops.perturb_([position], [saved], state, [1.0], [False], [0], 1, turn, 0, noise, n, False, False)
            passed = time.perf_counter() - start
            best[noise] = min(best[noise], passed) if turn else best[noise]
    return n / max(min(best[0], best[1] - best[0]), best[0] / 2)  # noise in the difference cannot double the rate


def physical_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def combined(program: Program, size: int, runs: list[dict[str, float]], rates: list[float]) -> Floor:
    """The floor from all runs: the highest of everything seen, before, between and after the ops."""
    shown = tuple({kernel: value / 1e9 for kernel, value in run.items()} for run in runs)
    floor = max(value for run in runs for kernel, value in run.items() if kernel != READ)
    return Floor(floor, max(run[READ] for run in runs), max(rates), program.stores, size, shown)
