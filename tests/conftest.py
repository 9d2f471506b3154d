"""A few small problems that the optimizer's tests share, each with its data and a closure.

A Problem is built from a seed alone, so two of the same kind are bit-equal twins: one goes through
the code under test, the other through the oracle or an undisturbed run. ``mlp``: 12 rows of 5 random
features; ``digits``: 96 real 8x8 digits; both with cross-entropy and in float64 by default.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tsam_ext import _cuda


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Which tests make sense on the package at hand: the CPU's ops, or CUDA's on the CPU (tests/simt/run.py)."""
    emulated = "TSAM_EMULATED" in os.environ
    no_gpu = "no CUDA device here" if not torch.cuda.is_available() else _cuda.cause
    for item in items:
        host_only = item.get_closest_marker("host_only")
        if emulated and host_only:
            item.add_marker(pytest.mark.skip(reason=f"on emulated CUDA: {host_only.args[0]}"))
        if no_gpu and item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=f"not run: {no_gpu}"))
        if not emulated and item.get_closest_marker("emulated"):
            item.add_marker(pytest.mark.skip(reason="python tests/simt/run.py builds what it needs"))


class Problem:
    """A net with its data. ``calls`` holds the row numbers that each run of a closure saw."""

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor) -> None:
        self.net, self.x, self.y = net, x, y
        self.rows = torch.arange(len(x))
        self.calls: list[list[int]] = []

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.net.parameters())

    def loss(self, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        return cross_entropy(self.net(self.x if x is None else x), self.y if y is None else y)

    def closure(self, optimizer: Any) -> Callable[[], Tensor]:
        """The closure that the documentation shows, on the optimizer's part of the batch."""

        def closure() -> Tensor:
            x, y, rows = optimizer.part(self.x, self.y, self.rows)
            self.calls.append(rows.tolist())
            loss = self.loss(x, y)
            loss.backward()
            return loss

        return closure

    def train(self, optimizer: Any, steps: int) -> list[float]:
        """Runs ``steps`` whole steps; returns their losses."""
        closure = self.closure(optimizer)
        return [float(optimizer.step(closure)) for _ in range(steps)]

    def copies(self) -> list[Tensor]:
        """The parameters as they are now."""
        return [p.detach().clone() for p in self.parameters]

    def flat(self) -> Tensor:
        """All parameters in one vector of their dtype."""
        return torch.cat([p.detach().flatten() for p in self.parameters])

    def gradient(self) -> Tensor:
        """All gradients in one vector, zero where p.grad is None."""
        zero = torch.zeros_like
        return torch.cat([(zero(p) if p.grad is None else p.grad).flatten() for p in self.parameters])

    def holds(self, copies: list[Tensor]) -> bool:
        """Whether every parameter has the bits of ``copies``."""
        return all(torch.equal(p, c) for p, c in zip(self.parameters, copies, strict=True))


def _mlp(*, dtype: torch.dtype = torch.float64, rows: int = 12, dropout: float = 0.0) -> Problem:
    layers = [nn.Linear(5, 7), nn.Tanh(), nn.Dropout(dropout), nn.Linear(7, 3)]
    net = nn.Sequential(*layers).to(dtype)
    return Problem(net, torch.randn(rows, 5).to(dtype), torch.randint(0, 3, (rows,)))


def _digits(*, dtype: torch.dtype = torch.float64) -> Problem:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    net = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).to(dtype)
    return Problem(net, torch.tensor(x[:96] / 16.0, dtype=dtype), torch.tensor(y[:96]))


def plain_state(optimizer: Any) -> Any:
    """TSAM's own part of a state dict with lists for tensors, so that two can be compared."""
    state = optimizer.state_dict()
    entries = [*state["param_groups"], *(state["state"].get(i, {}) for i in range(64))]

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.tolist()
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    return [{k: plain(v) for k, v in entry.items() if k.startswith("tsam_")} for entry in entries]


BUILDERS: dict[str, Callable[..., Problem]] = {"mlp": _mlp, "digits": _digits}


def _problem(kind: str = "mlp", *, seed: int = 0, **options: Any) -> Problem:
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    built = BUILDERS[kind](**options)
    torch.random.set_rng_state(state)
    return built


@pytest.fixture
def problem() -> Callable[..., Problem]:
    """``problem(kind, seed=0, **options)`` builds a Problem; equal arguments give bit-equal twins."""
    torch.manual_seed(12345)
    return _problem
