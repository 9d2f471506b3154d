"""What a run is a function of: the settings of the authors' scripts, the grids, the schedule, and the optimizer.

Sources: data sets and nets of T. Li, T. Zhou, J. Bilmes, arXiv 2410.22656, section 5; defaults and grids of the
authors' scripts (github.com/litian96/TSAM); schedule and cutout of the example of github.com/davda54/sam, whose names
these scripts import. What is ours is marked so here; bench/README.md lists what is not known.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

import tsam_ext
from tsam_ext import TSAM

METHODS = ("erm", "sam", "tsam")
MILESTONES = (3, 6, 8)  # tenths of the epochs
DECAY = 0.2


@dataclass(frozen=True)
class Settings:
    """One run but for its seed. ``parts``: 0 for whole batches; ``clip``: 0 for none; ``every``: 1 for each step."""

    data: str
    net: str
    method: str = "erm"
    lr: float = 0.1
    rho: float = 0.05
    tilt: float = 1.0
    radius: float = 1.0
    samples: int = 3
    every: int = 1
    parts: int = 0
    epochs: int = 200
    batch: int = 64
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    label_noise: float = 0.0
    steps_down: bool = True
    clip: float = 0.0
    bf16: bool = False
    compile: bool = False

    @property
    def gradients(self) -> float:
        """Whole-batch gradients per step, on average."""
        full = {"erm": 1, "sam": 2, "tsam": 2 * (1 if self.parts else self.samples)}[self.method]
        return full if self.method == "erm" else (full + self.every - 1) / self.every

    @property
    def shown(self) -> str:
        """What a table says beside the method's name."""
        words = [f"lr {self.lr:g}"]
        if self.method != "erm":
            words.append(f"rho {self.rho:g}")
        if self.method == "tsam":
            words += [f"t {self.tilt:g}", f"radius {self.radius:g}"]
            words.append(f"split in {self.parts}" if self.parts else f"s {self.samples}")
        if self.method != "erm" and self.every > 1:
            words.append(f"every {self.every}")
        return ", ".join(words)


# Beside Settings' own defaults, which are those of the authors' image script. Texts: the values of their text scripts.
USUAL: dict[str, dict[str, Any]] = {
    "cifar10": {},
    "cifar100": {},
    "folder": {},
    "text": {"epochs": 10, "lr": 1e-3, "rho": 0.1, "label_smoothing": 0.0, "steps_down": False, "clip": 1.0},
}
# tilt and radius are the authors', and for texts all. For images lr and rho are ours, around the defaults of their
# script: their grids for CIFAR were not seen.
IMAGE_GRID = {
    "lr": (0.03, 0.1),
    "rho": (0.05, 0.1, 0.2),
    "tilt": (0.0, 1.0, 5.0, 20.0, 100.0, 400.0),
    "radius": (1.0, 10.0, 100.0),
}
TEXT_GRID = {**IMAGE_GRID, "lr": (3e-4, 1e-3, 3e-3), "rho": (0.1,)}
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "cifar10": IMAGE_GRID,
    "cifar100": IMAGE_GRID,
    "folder": IMAGE_GRID,
    "text": TEXT_GRID,
}
OWN = {"erm": ("lr",), "sam": ("lr", "rho"), "tsam": ("lr", "rho", "tilt", "radius", "samples")}


def tries(base: Settings, method: str, grid: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """The product of the values that matter to a method, in the grid's order; the others stay ``base``'s.

    ERM looks at lr alone, SAM at lr and rho; a split batch has one sample a part, so ``samples`` says nothing there.
    """
    names = [name for name in OWN[method] if name in grid and not (name == "samples" and base.parts)]
    method_base = replace(base, method=method)
    return [
        replace(method_base, **dict(zip(names, values, strict=True)))
        for values in itertools.product(*(grid[name] for name in names))
    ]


def rate(settings: Settings, epoch: int) -> float:
    """The learning rate of an epoch, counted from 0: times 0.2 after 3, 6 and 8 tenths of the epochs, or constant."""
    passed = sum(10 * epoch >= tenths * settings.epochs for tenths in MILESTONES) if settings.steps_down else 0
    return settings.lr * DECAY**passed


def optimizer_of(settings: Settings, net: nn.Module, running: nn.Module, seed: int) -> Optimizer:
    """SGD, alone or in TSAM, over ``net``; ``running`` is what is called: the net, compiled, or in a DDP.

    SAM is TSAM with one sample and no noise. ``parts`` samples of a split batch see the rows of a part each.
    """
    base: dict[str, Any] = {"lr": settings.lr, "momentum": settings.momentum, "weight_decay": settings.weight_decay}
    if settings.method == "erm":
        return SGD(net.parameters(), **base)
    options: dict[str, Any] = {"num_samples": 1, "radius": 0.0}
    if settings.method == "tsam":
        options = {"num_samples": settings.samples, "radius": settings.radius, "tilt": settings.tilt}
        if settings.parts:
            options |= {"num_samples": settings.parts, "batch": "split"}
    options |= {"rho": settings.rho, "every": settings.every, "seed": seed, "model": running}
    return TSAM(net.parameters(), SGD, **options, **base)


@dataclass(frozen=True)
class Job:
    """A run: settings, seed, how many rows it trains on and is judged on, and which these are (validation, test)."""

    settings: Settings
    seed: int
    rows: tuple[int, int]
    part: str = "test"

    @property
    def key(self) -> str:
        """Equal for equal runs by these versions of torch and tsam_ext: what a finished run is known by."""
        where = (torch.__version__, tsam_ext.__version__, self.rows, self.part, self.seed)
        return hashlib.sha256(repr((where, sorted(asdict(self.settings).items()))).encode()).hexdigest()[:16]
