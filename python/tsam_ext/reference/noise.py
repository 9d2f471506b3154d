"""Noise as a pure function of (seed, step, sample, purpose, element), in float64.

Philox4x32-10, key = seed (low word first), counter = (quad low, quad high, step, purpose << 28 |
sample), quad = element // 4. Its words x give the quad's normals √(-2 ln((x0 + ½)/2³²)) (cos, sin)
(2π x1/2³²), and the same of x2, x3. Element = base + storage position; a parameter's base is the
running total of the sizes before it, each rounded up to a multiple of 4. For signs the counter begins with
the block, element // 128, in place of the quad: sign e is bit e % 32 of word (e % 128) // 32 of its
block, +1 for 0 and -1 for 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PERTURBATION, MOMENTUM, ACCEPT, BALL_RADIUS, ROUNDING, SIGNS = range(6)
MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the product of two 32-bit numbers, without leaving int64."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    return (high + (low >> 16)) >> 16, ((high << 16) + low) & MASK


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        counter: four int64 tensors of one shape holding 32-bit words, word 0 first.
        key: two 32-bit words, low word first.

    Returns:
        Four int64 tensors of that shape holding 32-bit words.
    """
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(MULTIPLIERS[0], x0)
        high1, low1 = _multiply(MULTIPLIERS[1], x2)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return x0, x1, x2, x3


def random_words(quads: Tensor, seed: int, step: int, sample: int, purpose: int) -> tuple[Tensor, ...]:
    """The four random words of each quad of elements."""
    counter = [quads & MASK, (quads >> 32) & MASK]
    counter += [torch.full_like(quads, word) for word in (step & MASK, purpose << 28 | sample)]
    return philox4x32(counter, (seed & MASK, (seed >> 32) & MASK))


def normal(
    numel: int,
    base: int,
    seed: int,
    step: int,
    sample: int,
    purpose: int = PERTURBATION,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normals of the elements base, ..., base + numel - 1; float64, shape ``[numel]``."""
    quads = torch.arange(base // 4, (base + numel + 3) // 4, device=device)
    x0, x1, x2, x3 = (word.double() for word in random_words(quads, seed, step, sample, purpose))
    lanes = []
    for even, odd in ((x0, x1), (x2, x3)):
        # u is a float32 by definition, next to 1 too: it decides the few radii below 0.01.
        u = ((even.float().double() + 0.5) * 2.0**-32).float().double()
        length = torch.sqrt(-2.0 * torch.log(u))
        angle = 2.0 * math.pi * odd * 2.0**-32
        lanes += [length * torch.cos(angle), length * torch.sin(angle)]
    return torch.stack(lanes, 1).flatten()[base % 4 : base % 4 + numel]


def signs(numel: int, base: int, seed: int, step: int, sample: int, device: torch.device | str = "cpu") -> Tensor:
    """1 or -1 for each of the elements base, ..., base + numel - 1; float64, shape ``[numel]``."""
    blocks = torch.arange(base // 128, (base + numel + 127) // 128, device=device)
    words = torch.stack(random_words(blocks, seed, step, sample, SIGNS), 1)
    bits = (words[:, :, None] >> torch.arange(32, device=device)) & 1
    return (1 - 2 * bits).flatten()[base % 128 : base % 128 + numel].double()


def uniform(seed: int, step: int, sample: int, purpose: int = BALL_RADIUS) -> float:
    """One uniform number in (0, 1): (x3 + ½)/2³² of element 2⁶⁴ - 1."""
    quad = torch.tensor([(1 << 62) - 1])
    return (float(random_words(quad, seed, step, sample, purpose)[3]) + 0.5) * 2.0**-32


def base_offsets(sizes: Sequence[int]) -> list[int]:
    """Element index at which each parameter starts, from the sizes of all parameters in order."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + (size + 3) // 4 * 4)
    return offsets[:-1]


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all the tensors together; 0-dim float64."""
    zero = torch.zeros((), dtype=torch.float64)
    squares = [torch.linalg.vector_norm(t, dtype=torch.float64).square() for t in tensors]
    return sum(squares, zero).sqrt()


def noise_scale(z: Sequence[Tensor], noise: str, draw_uniform: Callable[[], float]) -> Tensor:
    """What makes ν of the normals or signs z over a list: 1/√d, 1/‖z‖ or U^(1/d)/‖z‖; 0-dim float64."""
    dimension = sum(part.numel() for part in z)
    if noise in ("gaussian", "rademacher"):
        return torch.tensor(float(dimension), dtype=torch.float64).rsqrt()
    factor = draw_uniform() ** (1.0 / dimension) if noise == "ball" else 1.0
    return factor / global_norm(z)


def unit_noise(
    parameters: Sequence[Tensor],
    offsets: Sequence[int],
    *,
    seed: int,
    step: int,
    sample: int,
    noise: str = "gaussian",
    antithetic: bool = False,
) -> list[Tensor]:
    """ν over a list of dense tensors: z/√d, z/‖z‖, z/‖z‖ U^(1/d) or ±1/√d, d and the norm of all together.

    Returns:
        float64 tensors of the shapes and strides of ``parameters``: the number of element base + i
        lies at storage position i. With ``antithetic`` an odd sample is minus the one before.
    """
    drawn = sample & ~1 if antithetic else sample
    z = []
    for p, base in zip(parameters, offsets, strict=True):
        draw = signs if noise == "rademacher" else normal
        stored = draw(p.numel(), base, seed, step, drawn, device=p.device)
        z.append(torch.as_strided(stored, p.shape, p.stride()))
    scale = noise_scale(z, noise, lambda: uniform(seed, step, drawn))
    if antithetic and sample % 2 == 1:
        scale = -scale
    return [scale * part for part in z]
