"""The drifts and the accept test of csrc/core, compiled into a small shared library for ctypes.

Layout: a drift is five doubles (a, b, c, d, reflections), a chain the slots of metropolis.h. Invariant: no arithmetic
but the dot products that the kernels are going to take.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
SOURCE = Path(__file__).parent / "core" / "drift_library.cpp"
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
SANITIZED = ["-O1", "-fsanitize=undefined,float-cast-overflow,float-divide-by-zero"]
D, U32, I64 = ctypes.c_double, ctypes.c_uint32, ctypes.c_int64
DOUBLES, FLOATS = (np.ctypeslib.ndpointer(t, flags="C_CONTIGUOUS") for t in (np.float64, np.float32))
SIGNATURES = {
    "rotation": [D, DOUBLES],
    "ball": [D, D, D, D, DOUBLES],
    "apply_float1": [DOUBLES, I64, FLOATS, FLOATS],
    "apply_float_lanes": [DOUBLES, I64, FLOATS, FLOATS],
    "apply_double1": [DOUBLES, I64, DOUBLES, DOUBLES],
    "chain_slots": [],
    "create": [DOUBLES, D],
    "begin": [DOUBLES, D, D],
    "launch": [DOUBLES],
    "kick": [DOUBLES, D, D, D],
    "land": [DOUBLES, D, ctypes.c_uint64, U32, U32],
    "accept_uniform": [ctypes.c_uint64, U32, U32],
    "adapt": [DOUBLES],
}


class Core:
    """The library, with drifts on whole arrays of starts."""

    def __init__(self, path: Path, flags: list[str]) -> None:
        compiler = shutil.which("g++")
        assert compiler, "g++ is needed, as for building the package itself"
        subprocess.run([compiler, *FLAGS, *flags, str(SOURCE), "-o", str(path)], check=True)
        self.library = ctypes.CDLL(str(path))
        for name, types in SIGNATURES.items():
            function = getattr(self.library, name)
            function.argtypes = types
            function.restype = {"accept_uniform": D, "land": ctypes.c_int, "chain_slots": ctypes.c_int}.get(name)

    def coefficients(self, uu: float, uv: float, vv: float, h: float) -> Array:
        out = np.empty(5)
        self.library.ball(uu, uv, vv, h, out)
        return out

    def ball(self, u: Array, v: Array, h: Array) -> tuple[Array, Array, Array]:
        """u', v' and the numbers of reflections."""
        u, v, counts = u.copy(), v.copy(), np.empty(len(u))
        dots = [(x * y).sum(1) for x, y in ((u, u), (u, v), (v, v))]
        for i, (*products, time) in enumerate(zip(*dots, h, strict=True)):
            map = self.coefficients(*products, time)
            self.library.apply_double1(map, u.shape[1], u[i], v[i])
            counts[i] = map[4]
        return u, v, counts

    def rotate(self, x: Array, p: Array, h: float) -> tuple[Array, Array]:
        x, p, map = x.copy(), p.copy(), np.empty(5)
        self.library.rotation(h, map)
        self.library.apply_double1(map, x.size, x, p)
        return x, p

    def chain(self, log_step: float = 0.0, delta: float = 0.0, loss: float = 0.0) -> Array:
        s = np.full(self.library.chain_slots(), np.nan)
        self.library.create(s, log_step)
        self.library.begin(s, delta, loss)
        return s

    def propose(self, s: Array, energy: float, loss: float, trajectory: int = 0, seed: int = 1, step: int = 2) -> bool:
        """A trajectory whose kicks add ``energy``, to a state with the given loss."""
        self.library.launch(s)
        self.library.kick(s, 1.0, energy, 0.0)
        return bool(self.library.land(s, loss, seed, step, trajectory))
