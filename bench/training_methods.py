"""The methods of the main job, their settings, and how the settings were chosen.

Chosen once with ``python -m bench train --tune`` (bench/README.md prints its table): by accuracy on the noisy labels
of validation images, on seeds that the job does not use; first the learning rate, at ERM's optimum on a grid from
0.01 up, then, at that rate, each method's own settings. Below 0.01 ERM does better by never fitting the wrong labels
(early stopping, in effect), and nothing beats it there: bench/README.md has those figures too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from tsam_ext import TSAM

LEARNING_RATE = 0.01
MOMENTUM = 0.9
BATCH = 64
EPOCHS = 40
WIDTH = 16


@dataclass(frozen=True)
class Method:
    """A name, TSAM's settings (None: the base optimizer alone) and what a step costs.

    ``usual``: whether the job runs it where nobody names methods.
    """

    name: str
    options: dict[str, Any] | None
    gradients: float  # whole-batch gradients per step, on average
    usual: bool = True

    def optimizer(self, model: nn.Module, learning_rate: float, seed: int) -> Optimizer:
        """A fresh optimizer for ``model``."""
        base: dict[str, Any] = {"lr": learning_rate, "momentum": MOMENTUM}
        if self.options is None:
            return SGD(model.parameters(), **base)
        return TSAM(model.parameters(), SGD, seed=seed, **self.options, **base)


SAM: dict[str, Any] = {"num_samples": 1, "radius": 0.0, "rho": 0.1}
SPLIT: dict[str, Any] = {"num_samples": 4, "batch": "split", "rho": 0.1, "radius": 1.0, "tilt": 1.0}


def carried(name: str, options: dict[str, Any], every: int, **more: Any) -> Method:
    """A method of two gradients a step that samples each ``every``-th step alone, its settings otherwise unchanged."""
    return Method(f"{name} every {every}", {**options, "every": every, "between": "carry"}, 1 + 1 / every, **more)


METHODS = (
    Method("ERM", None, 1),
    Method("SAM", SAM, 2),
    carried("SAM", SAM, 2),
    carried("SAM", SAM, 3),
    carried("SAM", SAM, 5),
    Method("SAM every 3 plain", {**SAM, "every": 3, "between": "plain"}, 1 + 1 / 3, usual=False),
    Method("TSAM", {"num_samples": 3, "rho": 0.1, "radius": 1.0, "tilt": 1.0}, 6),
    Method("TSAM split", SPLIT, 2),
    carried("TSAM split", SPLIT, 3),
)


def grid() -> dict[str, list[dict[str, Any]]]:
    """What ``--tune`` tries for each method, at ERM's learning rate."""
    sam = [{"num_samples": 1, "radius": 0.0, "rho": rho} for rho in (0.05, 0.1, 0.17, 0.3)]
    moves = [(0.1, 0.1), (0.1, 1.0), (0.17, 1.0)]
    tsam = [{"num_samples": 3, "rho": rho, "radius": radius, "tilt": 1.0} for rho, radius in moves]
    split = [
        {"num_samples": 4, "batch": "split", "rho": rho, "radius": radius, "tilt": 1.0}
        for rho in (0.05, 0.1)
        for radius in (0.0, 1.0)
    ]
    return {"SAM": sam, "TSAM": tsam, "TSAM split": split}


LEARNING_RATES = (0.01, 0.02, 0.05, 0.1)


def network(side: int) -> nn.Module:
    """A small convolutional net with GroupNorm for images of ``side`` × ``side``."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        return [convolution, nn.AvgPool2d(2), nn.GroupNorm(4, outputs), nn.ReLU()]

    rest = side // 4
    layers = [*block(1, WIDTH), *block(WIDTH, 2 * WIDTH), nn.Flatten(), nn.Linear(2 * WIDTH * rest * rest, 10)]
    return nn.Sequential(*layers)


def initial(side: int, seed: int) -> nn.Module:
    """The net with the initial weights of ``seed``, the same for every method."""
    torch.manual_seed(seed)
    return network(side)
