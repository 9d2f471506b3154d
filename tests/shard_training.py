"""A small regression over sharded parameters, for tests of ranks: in several processes, or in one on all rows.

The net has 7 and 3 rows, so that over 2, 3 and 4 ranks some shards are uneven, and over 4 one is empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from tsam_ext import HMC, TSAM, Ascent, Noise

CASES: dict[str, dict[str, Any]] = {
    "ascent": {},
    "noise": {"sampler": "noise"},
    "sphere": {"sampler": Ascent(noise="sphere")},
    "ball": {"sampler": Noise(noise="ball")},
    "adaptive": {"adaptive": True},
    "SAM": {"num_samples": 1, "radius": 0.0},
    "every": {"every": 2},
    "hmc": {"sampler": "hmc"},
    "hmc ball": {"sampler": HMC(prior="ball", num_leapfrog_steps=2)},
    "hmc recycled": {"sampler": HMC(delta="auto", recycle=True, num_leapfrog_steps=2)},
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def rows(rank: int, size: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 5, generator=generator), torch.randn(12, 3, generator=generator)
    n = 12 // size
    return x[rank * n :][:n].to(dtype), y[rank * n :][:n].to(dtype)


def sharded(size: int, **options: Any) -> nn.Sequential:
    model = net()
    if size > 1:
        for layer in (model[0], model[2], model):
            fully_shard(layer, **options)
    return model


def train(
    model: nn.Sequential, opt: TSAM, rank: int, size: int, *, steps: int, stale: bool = False
) -> tuple[Tensor, list[float]]:
    """The whole parameters after the steps, and the losses; ``stale``: with evaluations that gather parameters."""
    x, y = rows(rank, size)
    losses = []
    for step in range(steps):

        def closure() -> Tensor:
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        if stale and step == 1:
            with torch.no_grad():
                model(x)
            with opt.perturbed(), torch.no_grad():
                model(x)
        losses.append(float(opt.step(closure)))
        opt.zero_grad()
    return whole(model), losses


def whole(model: nn.Module) -> Tensor:
    parameters = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in parameters])


def tsam(net: nn.Module, base: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> TSAM:
    told = {"num_samples": 3, "rho": 0.1, "tilt": 20.0, "seed": 3, "model": net}
    return TSAM(net.parameters(), base, lr=0.02, **told | options)
