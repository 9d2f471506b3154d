"""What a figure has to be quoted with, and the JSON file that it is kept in."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

import tsam_ext


def environment(settings: dict[str, Any]) -> dict[str, Any]:
    """What a figure has to be quoted with."""
    return {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tsam_ext": tsam_ext.__version__,
        **settings,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def write_json(path: Path, results: Sequence[object], settings: dict[str, Any]) -> None:
    """Everything that was measured, with where and when."""
    rows = [dict(r) if isinstance(r, dict) else vars(r) for r in results]
    text = json.dumps({"environment": environment(settings), "results": rows}, indent=1) + "\n"
    draft = path.with_suffix(".part")
    draft.write_text(text)
    draft.replace(path)  # a kill in mid-write leaves the file of the run before
