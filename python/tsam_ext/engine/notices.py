"""Warnings that point at the line of the user's code, however many of our and torch's frames lie in between.

Invariant: the line named is the innermost one outside this package, torch and the standard library's contextlib.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

import torch

_INSIDE = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), contextlib.__file__)


def warn(message: str) -> None:
    """A UserWarning of TSAM at the user's line."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"TSAM: {message}", UserWarning, stacklevel=level)
