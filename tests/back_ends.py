"""What two back ends make of the same random lists and training runs (simt/lists.py), and whether they agree.

Noise and elementwise results have the same bits; what depends on a sum agrees to rounding of the storage type.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

PROGRAM = Path(__file__).parent / "simt" / "lists.py"
# Two units in the last place: a sum's rounding may move a coefficient, which may move a result by one.
TOLERANCE = {torch.float32: 3e-7, torch.float64: 1e-12, torch.bfloat16: 2**-7, torch.float16: 2**-9}
# After twelve steps of training, by the parameters' dtype.
TRAINED = {"torch.float32": 1e-5, "torch.float64": 1e-10}
Lists = dict[str, list[Tensor]]
Results = dict[str, Lists]


def results(folder: Path, jobs: Iterable[str], **environment: str) -> tuple[str, Results]:
    """The module's path and what it makes of the jobs, in a process of its own."""
    file = folder / "results.pt"
    done = subprocess.run(
        [sys.executable, PROGRAM, file, *jobs],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: tuple[str, Results] = torch.load(file)
    return found


def agree(got: Lists, expected: Lists, *, training: bool) -> None:
    """Fails where the two differ by more than they may."""
    assert got.keys() == expected.keys()
    for name, tensors in expected.items():
        for i, (mine, theirs) in enumerate(zip(got[name], tensors, strict=True)):
            assert mine.dtype == theirs.dtype
            tolerance = TRAINED[name] if training else 0.0 if name.endswith("bits") else TOLERANCE[mine.dtype]
            torch.testing.assert_close(
                mine, theirs, rtol=tolerance, atol=tolerance, equal_nan=True,
                msg=lambda message, name=name, i=i: f"{name}[{i}]: {message}",
            )  # fmt: skip
