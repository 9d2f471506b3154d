"""What a run trains on: rows with labels, a net, and how a batch is made ready; and the two cuts that go before it.

Layout: inputs [n, ...] of any dtype (images uint8, tokens int64), labels int64 [n] in 0..classes-1.
Invariant: label noise and the held-out part are functions of the data alone, the same for all methods and seeds; test
labels are never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

NOISE_SEED, CUT_SEED = 20_241_029, 20_250_713


@dataclass(frozen=True)
class Rows:
    """Inputs [n, ...] and labels int64 [n]."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Rows:
        """The same on a device."""
        return Rows(self.inputs.to(device), self.labels.to(device))

    def take(self, index: Tensor) -> Rows:
        """The rows of an index, int64 [m]."""
        return Rows(self.inputs[index], self.labels[index])


@dataclass(frozen=True)
class Task:
    """A data set and its net.

    ``build`` makes the net from torch's default generator; ``prepare`` makes inputs ready for it, float32 images or
    tokens, at random with a generator (training) and as they are without (evaluation).
    """

    name: str
    train: Rows
    test: Rows
    classes: int
    build: Callable[[], nn.Module]
    prepare: Callable[[Tensor, torch.Generator | None], Tensor]
    note: str = ""


def with_label_noise(task: Task, share: float) -> Task:
    """Each training label is drawn anew with probability ``share``, uniformly over all classes, its own included.

    So a share of (1 - 1/classes) of them is then wrong. ``share`` is from 0 to 1; 0 gives the task itself.
    """
    if not share:
        return task
    generator = torch.Generator().manual_seed(NOISE_SEED)
    labels = task.train.labels
    chosen = torch.rand(len(labels), generator=generator) < share
    drawn = torch.randint(0, task.classes, (len(labels),), generator=generator)
    return replace(task, train=Rows(task.train.inputs, torch.where(chosen, drawn, labels)))


def held_out(task: Task, share: float) -> Task:
    """The task on which settings are chosen: a part of the training rows takes the place of the test rows.

    Raises:
        ValueError: if ``share`` leaves no row to train on, or none to choose by.
    """
    rows = len(task.train)
    kept = round(share * rows)
    if not 0 < kept < rows:
        raise ValueError(f"--holdout: got {share:g} of {rows} training rows, expected at least one row on both sides")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(CUT_SEED))
    return replace(task, train=task.train.take(order[kept:]), test=task.train.take(order[:kept]))
