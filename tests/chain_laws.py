"""Two densities prior(ε) e^(δ L(ε)) whose law is known, and the statistics that a chain on them is judged by.

Quadratic, gaussian prior: ε ~ N(m, Λ⁻¹), Λ = (d/ρ²) I - δ A, Λ m = -δ A b, in closed form. DoubleWell, ball prior: two
modes in a disc, against rejection sampling. ``worst`` thins a chain until its autocorrelation is below 0.05 and divides
each of at most ten statistics by the limit that it exceeds with probability 1e-7: below 1 is right but for 1e-6.
Layout: draws are float64, [n, d], one after another. Losses and gradients come in Python numbers too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from flat_options import tsam
from torch import Tensor

# 2 exp(-2 x²) = 1e-7 at 2.90 and P(|z| > x) = 1e-7 at 5.33; a correlation of 0.05 widens both by √(1.05/0.95).
KOLMOGOROV, NORMAL = 3.05, 5.61


def thinned(draws: Tensor) -> Tensor:
    """Every k-th draw, k the first at which no coordinate and no square has an autocorrelation of 0.05."""
    x = torch.cat([draws, draws.square()], 1)
    x = (x - x.mean(0)) / x.std(0)
    lag = 1
    while float((x[lag:] * x[:-lag]).mean(0).max()) > 0.05:
        lag += 1
    assert len(draws) // lag >= 500, f"only every draw number {lag} is independent"
    return draws[::lag]


def kolmogorov(x: Tensor, y: Tensor) -> float:
    """√(nm/(n+m)) sup |F_n - G_m| of two samples."""
    n, m = len(x), len(y)
    both = torch.cat([x, y]).sort().values
    f, g = (torch.searchsorted(sample.sort().values, both, right=True) / len(sample) for sample in (x, y))
    return math.sqrt(n * m / (n + m)) * float((f.double() - g.double()).abs().max())


def kolmogorov_normal(x: Tensor) -> float:
    """√n sup |F_n - Φ|."""
    n, x = len(x), x.sort().values
    phi, grid = 0.5 * torch.erfc(-x / math.sqrt(2)), torch.arange(n, dtype=torch.float64) / n
    return math.sqrt(n) * float(torch.maximum((phi - grid).abs(), (phi - grid - 1 / n).abs()).max())


class Quadratic:
    """L = (ε - b)ᵀ A (ε - b)/2 in three dimensions, one curvature negative."""

    prior, dimension = "gaussian", 3

    def __init__(self, delta: float, rho: float = 1.2) -> None:
        self.delta, self.rho = delta, rho
        self.A = torch.tensor([[1.0, 0.4, 0.0], [0.4, -0.6, 0.2], [0.0, 0.2, 0.3]], dtype=torch.float64)
        self.b = torch.tensor([0.2, -0.7, 0.5], dtype=torch.float64)
        precision = 3 / rho**2 * torch.eye(3, dtype=torch.float64) - delta * self.A
        self.root = torch.linalg.cholesky(precision).T  # fails where the density cannot be normalised
        self.mean = torch.linalg.solve(precision, -delta * self.A @ self.b)

    def loss(self, eps: Tensor) -> Tensor:
        """L of one ε or of many."""
        at = eps - self.b.to(eps.dtype)
        return 0.5 * (at @ self.A.to(eps.dtype) * at).sum(-1)

    def at(self, x: float, y: float, z: float) -> tuple[float, list[float]]:
        """L and ∇L in Python numbers."""
        u, v, w = x - 0.2, y + 0.7, z - 0.5
        gradient = [u + 0.4 * v, 0.4 * u - 0.6 * v + 0.2 * w, 0.2 * v + 0.3 * w]
        return 0.5 * (u * gradient[0] + v * gradient[1] + w * gradient[2]), gradient

    def gradient(self, eps: Tensor) -> Tensor:
        """∇L."""
        return (eps - self.b.to(eps.dtype)) @ self.A.to(eps.dtype)

    @property
    def mean_gradient(self) -> Tensor:
        """E ∇L."""
        return self.gradient(self.mean)

    def worst(self, draws: Tensor) -> float:
        """The largest of nine statistics, each divided by its limit."""
        white = (thinned(draws) - self.mean) @ self.root.T
        columns = [*white.T, white.sum(1) / math.sqrt(3), (white[:, 0] - white[:, 1]) / math.sqrt(2)]
        found = [kolmogorov_normal(column) / KOLMOGOROV for column in columns]
        # The distribution function of χ² with 3 degrees of freedom, made normal.
        square = white.square().sum(1)
        chi = torch.erf((square / 2).sqrt()) - (2 * square / math.pi).sqrt() * torch.exp(-square / 2)
        found.append(kolmogorov_normal(torch.special.ndtri(chi.clamp(1e-15, 1 - 1e-15))) / KOLMOGOROV)
        found += [abs(float(column.mean())) * math.sqrt(len(white)) / NORMAL for column in white.T]
        return max(found)


class DoubleWell:
    """L = -6 (ε₀² - 0.16)² + 0.9 ε₁ + 0.4 ε₀ on the disc of radius ρ: two modes, both far from alike."""

    prior, dimension = "ball", 2

    def __init__(self, delta: float, rho: float = 0.8, draws: int = 100_000) -> None:
        self.delta, self.rho = delta, rho
        generator = torch.Generator().manual_seed(77)
        z = torch.rand(40 * draws, 2, generator=generator, dtype=torch.float64) * 2 - 1
        eps = rho * z[z.square().sum(1) <= 1]
        exponent = delta * self.loss(eps)
        # The largest of 3e6 stands for the maximum: no draw was above it.
        keep = torch.rand(len(eps), generator=generator, dtype=torch.float64) < (exponent - exponent.max()).exp()
        self.exact = eps[keep][:draws]
        assert len(self.exact) > draws / 4

    def loss(self, eps: Tensor) -> Tensor:
        """L of one ε or of many."""
        return -6 * (eps[..., 0].square() - 0.16).square() + 0.9 * eps[..., 1] + 0.4 * eps[..., 0]

    def at(self, x: float, y: float) -> tuple[float, list[float]]:
        """L and ∇L in Python numbers."""
        well = x * x - 0.16
        return -6 * well * well + 0.9 * y + 0.4 * x, [0.4 - 24 * x * well, 0.9]

    def gradient(self, eps: Tensor) -> Tensor:
        """∇L."""
        first = 0.4 - 24 * eps[..., 0] * (eps[..., 0].square() - 0.16)
        return torch.stack([first, torch.full_like(first, 0.9)], -1)

    @property
    def mean_gradient(self) -> Tensor:
        """E ∇L, to one part in 300."""
        return self.gradient(self.exact).mean(0)

    def worst(self, draws: Tensor) -> float:
        """The largest of eight statistics, each divided by its limit."""
        columns = []
        for eps in (thinned(draws), self.exact):
            products = [eps[:, 0].square(), eps[:, 0] * eps[:, 1]]
            columns.append([*eps.T, eps.norm(dim=1), self.loss(eps), *products])
        pairs = list(zip(*columns, strict=True))
        found = [kolmogorov(x, y) / KOLMOGOROV for x, y in pairs[:4]]
        for x, y in (*pairs[:2], *pairs[4:]):
            deviation = math.sqrt(float(x.var()) / len(x) + float(y.var()) / len(y))
            found.append(abs(float(x.mean() - y.mean())) / deviation / NORMAL)
        return max(found)


def steps_on(density: Quadratic | DoubleWell, steps: int, **options: Any) -> Iterator[tuple[tsam, Tensor]]:
    """TSAM after each step on a density, whose θ stays, with the step's gradient estimate."""
    parameter = torch.nn.Parameter(torch.zeros(density.dimension, dtype=torch.float64))
    settings = {"num_samples": 1, "delta": density.delta, "tilt": density.delta, "prior": density.prior, **options}
    optimizer = tsam([parameter], lr=0.0, rho=density.rho, sampler="hmc", **settings)

    def closure() -> Tensor:
        loss, gradient = density.at(*parameter.tolist())
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        return torch.tensor(loss, dtype=torch.float64)

    for _ in range(steps):
        optimizer.step(closure)
        assert parameter.grad is not None
        yield optimizer, parameter.grad.clone()
