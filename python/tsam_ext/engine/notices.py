"""Warnings that point at the line of the user's code, however many of our and torch's frames lie in between.

Invariant: the line named is the innermost one outside this package, torch and the standard library's contextlib.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path

import torch

_FOLDERS = (f"{Path(__file__).parents[1]}{os.sep}", f"{Path(torch.__file__).parent}{os.sep}")


def _is_inside(file: str) -> bool:
    return file.startswith(_FOLDERS) or file == contextlib.__file__


def warn(message: str) -> None:
    """A UserWarning of TSAM at the user's line."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_inside(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"TSAM: {message}", UserWarning, stacklevel=level)
