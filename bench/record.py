"""What a figure has to be quoted with, and how results are kept: a JSON file, a Markdown text, a picture.

Layout of the JSON: {"environment": date, machine, versions, settings of the command; "results": one dict per row}.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch

import tsam_ext
from tsam_ext import _C

from .command import command_line

BUSY = 0.5  # a load average above this is somebody else's, and times are not this machine's best


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


def begin(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of a command that times something, taken before it does: also how busy the machine is."""
    where = {"command": command_line(options), "isa": _C.__isa__, "threads": torch.get_num_threads()}
    return {**where, "load": os.getloadavg()[0]}


def heading(where: dict[str, Any], details: str = "") -> str:
    """One sentence: date, machine, kernels, torch, command, load."""
    busy = " (others use this machine: do not quote)" if where["load"] > BUSY else ""
    return (
        f"{where['date']}, {where['processor']}, {where['threads']} threads, {where['isa']} kernels, torch "
        f"{where['torch']}, `{where['command']}`{details}, load average {where['load']:.1f} at the start{busy}."
    )


def write_json(path: Path, results: Sequence[object], settings: dict[str, Any]) -> None:
    """Everything that was measured, with where and when."""
    rows = [dict(r) if isinstance(r, dict) else vars(r) for r in results]
    text = json.dumps({"environment": environment(settings), "results": rows}, indent=1) + "\n"
    draft = path.with_suffix(".part")
    draft.write_text(text)
    draft.replace(path)  # a kill in mid-write leaves the file of the run before


def read_json(path: Path) -> list[dict[str, Any]]:
    """The results in a file of `write_json` by these versions of torch and tsam_ext; none if it is not there."""
    if not path.exists():
        return []
    stored, here = json.loads(path.read_text()), environment({})
    if any(stored["environment"][key] != here[key] for key in ("torch", "tsam_ext")):
        return []
    return list(stored["results"])


def keep(
    stem: Path,
    results: Sequence[object],
    settings: dict[str, Any],
    text: str,
    picture: Callable[[Path], None] | None = None,
) -> None:
    """Writes stem.json, stem.md and, where there is a picture, stem.png; prints the text."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_json(stem.with_suffix(".json"), results, settings)
    stem.with_suffix(".md").write_text(text)
    if picture is not None:
        picture(stem.with_suffix(".png"))
    print(f"\n{text}\nfiles: {stem}.json, .md{'' if picture is None else ', .png'}")


@contextmanager
def chart(path: Path, columns: int, size: tuple[float, float], **layout: Any) -> Iterator[list[Any]]:
    """The axes of a picture with ``columns`` panels, which is written at the end of the block."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, columns, figsize=size, layout="constrained", squeeze=False, **layout)
    for axes in panels[0]:
        axes.spines[["top", "right"]].set_visible(False)
    yield list(panels[0])
    figure.savefig(path, dpi=120)
    plt.close(figure)
