"""Stochastic rounding of float32 to bfloat16 and float16, in float64.

|x| = (k + f) ulp with 0 ≤ f < 1; the result is k + 1 ulp where f + u ≥ 1, else k ulp, with the sign of x: E = x.
u is the element's random word / 2³², cut to as many bits as f has: 16 (bfloat16), 13 (float16), 21 (float16 below
2⁻¹⁴, where ulp is 2⁻²⁴ and f is cut to 21 bits too). The word of element e: word e mod 4 of Philox' block e // 4.
Infinite where rounding to nearest is; else the largest value is the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .noise import ROUNDING, random_words

FRACTION = {torch.bfloat16: 7, torch.float16: 10}  # bits of a significand behind the point


def round_stochastically(x: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """x (float32) in ``dtype``, by one random word (int64, below 2³²) per element."""
    info = torch.finfo(dtype)
    exact = x.double().abs()
    exponent = torch.frexp(exact)[1] - 1  # 2^exponent <= |x|
    lowest = -126 if dtype == torch.bfloat16 else -14
    ulp = torch.ldexp(torch.ones_like(exact), exponent.clamp(min=lowest) - FRACTION[dtype])
    cut = (16, 16) if dtype == torch.bfloat16 else (21, 13)
    cells = torch.where(exact < 2.0**-14, 2.0 ** cut[0], 2.0 ** cut[1]).double()
    k = torch.floor(exact / ulp)
    f = torch.floor((exact / ulp - k) * cells) / cells
    u = torch.floor(words.double() / 2.0**32 * cells) / cells
    rounded = torch.clamp((k + (f + u >= 1.0)) * ulp, max=info.max)
    rounded = torch.copysign(rounded, x.double()).to(dtype)
    nearest = x.to(dtype)
    return torch.where(nearest.isfinite(), rounded, nearest)


def rounding_words(numel: int, base: int, seed: int, step: int, sample: int, device: torch.device | str) -> Tensor:
    """The random words of the elements base, ..., base + numel - 1; int64, shape ``[numel]``."""
    quads = torch.arange(base // 4, (base + numel + 3) // 4, device=device)
    words = torch.stack(random_words(quads, seed, step, sample, ROUNDING), 1).flatten()
    return words[base % 4 : base % 4 + numel]


def write(
    position: Sequence[Tensor],
    values: Sequence[Tensor],
    offsets: Sequence[int],
    *,
    rounding: str,
    seed: int = 0,
    step: int = 0,
    sample: int = 0,
) -> None:
    """position = values, rounded: 16-bit tensors with ``rounding="stochastic"`` by words of that ``sample``.

    ``sample`` is 2j for the noise of sample j, 2j + 1 for its ascent, and 0 for "hmc".
    """
    for tensor, value, base in zip(position, values, offsets, strict=True):
        if rounding == "nearest" or tensor.dtype not in FRACTION:
            tensor.copy_(value)
            continue
        stored = rounding_words(tensor.numel(), base, seed, step, sample, tensor.device)
        words = torch.as_strided(stored, tensor.shape, tensor.stride())
        tensor.copy_(round_stochastically(value.float(), words, tensor.dtype))
