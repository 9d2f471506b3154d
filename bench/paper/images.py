"""Random crops, flips and cutout of whole batches on their own device, and what is subtracted and divided by.

x -> crop(flip(x)) -> (x/255 - mean)/std -> cutout. Layout: uint8 [n, 3, side, side] in, float32 out, mean and std [3].
Invariant: a function of the batch and of the generator's state alone; the batch itself is not written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


def crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """A window of each image after ``padding`` black pixels at all sides, its place uniform (2 padding + 1)² ways.

    The crop of AlexNet's successors on CIFAR (K. He et al., CVPR 2016, section 4.2). [n, c, h, w], any dtype.
    """
    n, _, height, width = images.shape
    padded = pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    top, left = torch.randint(0, 2 * padding + 1, (2, n), generator=generator, device=images.device)
    row = top[:, None, None] + torch.arange(height, device=images.device)[:, None]
    column = left[:, None, None] + torch.arange(width, device=images.device)
    which = torch.arange(n, device=images.device)[:, None, None]
    return padded[which, row, column].permute(0, 3, 1, 2)


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored left to right with probability 1/2. [n, c, h, w], any dtype."""
    chosen = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def cutout(images: Tensor, size: int, share: float, generator: torch.Generator) -> Tensor:
    """A square of ``size`` pixels set to 0 in each image with probability ``share``, its middle uniform over the image.

    What lies outside the image is lost, so that the square is at least (size/2)² (T. DeVries and G. Taylor,
    arXiv 1708.04552). [n, c, h, w], floating point, normalised: 0 is the mean.
    """
    n, _, height, width = images.shape
    device = images.device
    chosen = torch.rand(n, generator=generator, device=device) < share
    inside = chosen[:, None, None]
    for length, shape in ((height, (n, -1, 1)), (width, (n, 1, -1))):
        first = torch.randint(0, length, (n, 1), generator=generator, device=device) - size // 2
        place = torch.arange(length, device=device)
        inside = inside & ((place >= first) & (place < first + size)).view(shape)
    return images.masked_fill(inside[:, None], 0.0)


def mean_and_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel over all pixels, of values in [0, 1]: float32 [3] each, exact, as it counts the 256 values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([images[:, c].flatten().bincount(minlength=256) for c in range(images.shape[1])]).double()
    counts /= counts.sum(1, keepdim=True)
    mean = counts @ values
    return mean.float(), (counts @ values**2 - mean**2).clamp(min=0).sqrt().float()


@dataclass(frozen=True)
class Augmentation:
    """A batch made ready: with a generator at random, without as it is. ``size``: cutout's square, 0: none."""

    mean: Tensor
    std: Tensor
    padding: int = 4
    size: int = 16
    share: float = 0.5

    def __call__(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """uint8 [n, 3, side, side] to float32."""
        if generator is not None:
            images = crop(flip(images, generator), self.padding, generator)
        mean, std = (x.to(images.device)[:, None, None] for x in (self.mean, self.std))
        ready = (images.float() / 255 - mean) / std.clamp(min=1e-6)
        return ready if generator is None or not self.size else cutout(ready, self.size, self.share, generator)
