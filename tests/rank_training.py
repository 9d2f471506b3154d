"""One small training that ranks of a pool run together and a single process runs alone, for tests of several ranks.

Rank r of R has the r-th of R equal parts of 12 rows. ``Run`` says what is trained and how; a rank that is alone (R = 1)
gets none of the arguments that several need, and so makes the reference.
Invariant: the net, the rows and the seed depend on nothing but the dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tsam_ext import TSAM

ROWS = 12
OURS = ("reduction", "sync", "weigh_rows", "process_group")  # what only several ranks are told


def small_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """5 features, 3 outputs; the same on every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def rows(dtype: torch.dtype = torch.float64, count: int = ROWS) -> tuple[Tensor, Tensor]:
    """Inputs and targets; the same on every call."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(count, 5, generator=generator), torch.randn(count, 3, generator=generator)
    return x.to(dtype), y.to(dtype)


def share(rank: int, size: int, *tensors: Tensor) -> list[Tensor]:
    """The rank's rows of each tensor."""
    return [tensor.chunk(size)[rank] for tensor in tensors]


def distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def flat(module: nn.Module) -> Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean over rows and outputs."""
    return (prediction - target).square().mean()


class Run:
    """A net, a TSAM and the rank's rows; ``how``: what TSAM is told of the DistributedDataParallel.

    ``how``: "ddp" (model=ddp), "inner" (model=net), "seen" (nothing), "world" (process_group=WORLD), or "plain" (the
    net is not wrapped). ``ddp``: options of DistributedDataParallel.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        options: dict[str, Any],
        *,
        how: str = "ddp",
        dtype: torch.dtype = torch.float64,
        net: nn.Module | None = None,
        ddp: dict[str, Any] | None = None,
        whole_batch: bool = False,
    ) -> None:
        self.net = small_net(dtype) if net is None else net
        self.model: Any = self.net
        self.x, self.y = rows(dtype)
        told: dict[str, Any] = {"num_samples": 3, "tilt": 20.0, "seed": 3, "rho": 0.1, "lr": 0.05, "momentum": 0.9}
        told |= options
        if size == 1:
            told = {key: value for key, value in told.items() if key not in OURS}
        else:
            if not whole_batch:
                self.x, self.y = share(rank, size, self.x, self.y)
            if how != "plain":
                self.model = DistributedDataParallel(self.net, **(ddp or {}))
            if how in ("ddp", "inner"):
                told["model"] = self.model if how == "ddp" else self.net
            elif how == "world":
                told["process_group"] = torch.distributed.group.WORLD
        self.opt = TSAM(self.model.parameters(), torch.optim.SGD, **told)

    def closure(self) -> Tensor:
        """As the documentation shows it."""
        x, y = self.opt.part(self.x, self.y)
        loss = squared_error(self.model(x), y)
        loss.backward()
        return loss

    def train(self, steps: int = 5, *, closure: Callable[[], Any] | None = None) -> tuple[Tensor, list[float]]:
        """The parameters after so many steps, and the losses of the steps."""
        losses = []
        for _ in range(steps):
            loss = self.opt.step(closure or self.closure)
            losses.append(float("nan") if loss is None else float(loss))
            self.opt.zero_grad()
        return flat(self.net), losses


def error_of(call: Callable[[], Any]) -> str:
    """What a call raises, as one line; empty where it raises nothing."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def twin(net: nn.Module) -> nn.Module:
    """A net with buffers of its own on the same parameters."""
    other = copy.deepcopy(net)
    for name, module in net.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            setattr(other.get_submodule(name), key, parameter)
    return other
