"""Steps of TSAM on half-precision parameters: where they go, what is said of it, and that they come back.

Laws: each pass sees the parameters where the reference has them, bit for bit but where a float32 in between was rounded
otherwise; a chain's loss is one function of x; θ is back bit for bit; to nearest and for float32 nothing changes; the
diagnostics are what a pass sees; the derivative along the ascent is right in the mean at twenty million elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flat_options import tsam
from torch import Tensor, nn

from tsam_ext import TSAM, Diagnostics
from tsam_ext.engine import spread
from tsam_ext.reference import ReferenceTSAM

HALVES = (torch.bfloat16, torch.float16)
halves = pytest.mark.parametrize("dtype", HALVES)
SAMPLERS: dict[str, dict[str, Any]] = {
    "ascent": {"num_samples": 3},
    "antithetic": {"num_samples": 4, "antithetic": True, "noise": "rademacher"},
    "adaptive": {"num_samples": 2, "adaptive": True, "rho": 2.0},
    "sam": {"num_samples": 1, "radius": 0.0},
    "noise": {"sampler": "noise", "num_samples": 3},
    "hmc": {"sampler": "hmc", "num_samples": 3, "num_leapfrog_steps": 2, "delta": 5.0},
    "fresh hmc": {"sampler": "hmc", "num_samples": 2, "chain": "fresh", "prior": "ball", "delta": 5.0},
}
samplers = pytest.mark.parametrize("sampler", SAMPLERS)


class Task:
    """A loss of two parameters, linear and bounded, that keeps where they were at each pass."""

    def __init__(self, dtype: torch.dtype, sizes: tuple[int, ...] = (4001, 60)) -> None:
        generator = torch.Generator().manual_seed(1)
        self.parameters = [nn.Parameter((0.1 * torch.randn(n, generator=generator)).to(dtype)) for n in sizes]
        self.directions = [torch.randn(n, generator=generator) for n in sizes]
        self.seen: list[list[Tensor]] = []

    def __call__(self) -> Tensor:
        self.seen.append([p.detach().clone() for p in self.parameters])
        pairs = zip(self.parameters, self.directions, strict=True)
        loss = sum(((p.float() * v).sum() for p, v in pairs), torch.zeros(())).mul(0.01).tanh()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss


def bits(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().view(torch.uint8).clone() for t in tensors]


@halves
@samplers
def test_each_pass_is_where_the_reference_has_it(sampler: str, dtype: torch.dtype) -> None:
    """Bit for bit, but for the few elements whose float32 value the reference rounds otherwise, by one unit."""
    mine, theirs = Task(dtype), Task(dtype)
    options = {"lr": 0.0, "rho": 0.5, "seed": 5, "rounding": "stochastic", **SAMPLERS[sampler]}
    ours, reference = tsam(mine.parameters, **options), ReferenceTSAM(theirs.parameters, **options)
    for _ in range(2):
        ours.step(mine)
        reference.step(theirs)
    assert len(mine.seen) == len(theirs.seen)
    for got, expected in zip(mine.seen, theirs.seen, strict=True):
        for a, b in zip(got, expected, strict=True):
            other = a != b
            assert float(other.float().mean()) < 0.05  # by other words about a third
            torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    assert any(not torch.equal(a[0], mine.seen[0][0]) for a in mine.seen[1:])


@halves
@samplers
def test_the_parameters_are_back_bit_for_bit(sampler: str, dtype: torch.dtype) -> None:
    task = Task(dtype)
    before = bits(task.parameters)
    opt = tsam(task.parameters, lr=0.0, seed=5, rounding="stochastic", **{"rho": 0.5} | SAMPLERS[sampler])
    for _ in range(2):
        opt.estimate_gradient(task)
        assert all(map(torch.equal, bits(task.parameters), before))
    with opt.perturbed():
        assert not all(map(torch.equal, bits(task.parameters), before))
    assert all(map(torch.equal, bits(task.parameters), before))

    def fails() -> Tensor:
        task()
        raise KeyError

    with pytest.raises(KeyError):
        opt.step(fails)
    assert all(map(torch.equal, bits(task.parameters), before))


@samplers
def test_float32_parameters_do_not_look_at_it(sampler: str) -> None:
    found = []
    for rounding in ("nearest", "stochastic"):
        task = Task(torch.float32)
        opt = tsam(task.parameters, lr=0.1, seed=5, rounding=rounding, **{"rho": 0.5} | SAMPLERS[sampler])
        for _ in range(2):
            opt.step(task)
        found.append([*task.seen[-1], *(p.detach() for p in task.parameters)])
        assert not any("realised" in name for name in opt.diagnostics.to_dict())
        assert math.isnan(float(opt.diagnostics.realised_norm))
    assert all(map(torch.equal, *found))


def test_to_nearest_a_draw_is_the_nearest_to_what_float32_has() -> None:
    """What was before there was a choice."""
    for dtype in HALVES:
        half, wide = Task(dtype), Task(torch.float32)
        for p, q in zip(half.parameters, wide.parameters, strict=True):
            q.data.copy_(p.data)
        for task in (half, wide):
            tsam(task.parameters, lr=0.0, rho=0.5, seed=5, sampler="noise", rounding="nearest").step(task)
        for a, b in zip(half.seen, wide.seen, strict=True):
            assert all(torch.equal(mine, theirs.to(dtype)) for mine, theirs in zip(a, b, strict=True))


@pytest.mark.parametrize("prior", ["gaussian", "ball"])
@halves
def test_a_chain_that_comes_back_finds_the_same_parameters(prior: str, dtype: torch.dtype) -> None:
    """A drift of almost no length: x stays, and so does each bit of θ, in every trajectory of a step.

    In the next step the words are others.
    """
    task = Task(dtype)
    options = {"num_samples": 3, "num_leapfrog_steps": 2, "step_size": 1e-12, "adapt_step_size": False, "delta": 0.0}
    opt = tsam(task.parameters, lr=0.0, rho=0.5, seed=5, rounding="stochastic", sampler="hmc", prior=prior, **options)
    opt.step(task)
    first = list(task.seen)
    assert len(first) == 7
    assert all(torch.equal(a, b) for seen in first for a, b in zip(seen, first[0], strict=True))
    opt.step(task)
    assert not torch.equal(task.seen[-1][0], first[0][0])


def displacement(task: Task, before: list[Tensor], adaptive: bool, rho: float) -> tuple[float, float]:
    """‖(θ-θ₀)/D‖ at the last pass, and along the gradient of the pass before it, over rho."""
    change = torch.cat([a.double() - b.double() for a, b in zip(task.seen[-1], before, strict=True)])
    origin, direction = torch.cat([b.double() for b in before]), torch.cat(task.directions).double()
    d = origin.abs() if adaptive else torch.ones_like(origin)
    moved = torch.where(change == 0.0, 0.0, change / d)
    direction = d * direction
    return float(moved.norm()), float(moved @ direction / direction.norm() / rho)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if "hmc" not in name])
@halves
def test_the_diagnostics_are_what_the_last_pass_sees(sampler: str, dtype: torch.dtype, rounding: str) -> None:
    task = Task(dtype)
    before = [p.detach().clone() for p in task.parameters]
    options = {"rho": 0.02, **SAMPLERS[sampler]}
    opt = tsam(task.parameters, lr=0.0, seed=5, rounding=rounding, **options)
    opt.step(task)
    norm, share = displacement(task, before, options.get("adaptive", False), options["rho"])
    assert float(opt.diagnostics.realised_norm) == pytest.approx(norm, rel=1e-9)
    names = opt.diagnostics.to_dict()
    assert "realised_norm" in names
    if options.get("sampler") == "noise":
        assert math.isnan(float(opt.diagnostics.realised_ascent))
        assert "realised_ascent" not in names
    else:  # gradients of half precision turn a little away from the exact direction
        assert float(opt.diagnostics.realised_ascent) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("sampler", ["hmc", "fresh hmc"])
def test_a_chain_is_measured_at_its_last_pass(sampler: str) -> None:
    task = Task(torch.bfloat16)
    before = [p.detach().clone() for p in task.parameters]
    opt = tsam(task.parameters, lr=0.0, seed=5, rho=0.02, rounding="stochastic", **SAMPLERS[sampler])
    opt.step(task)
    assert float(opt.diagnostics.realised_norm) == pytest.approx(displacement(task, before, False, 1.0)[0], rel=1e-9)


def test_of_mixed_parameters_the_half_ones_are_measured() -> None:
    """Beside a wide one, a frozen one, and one that no loss sees; and over several devices as on one."""
    wide = nn.Parameter(torch.ones(50))
    unseen = nn.Parameter(torch.ones(30, dtype=torch.float16))

    def step(places: dict[Tensor, int] | None, patch: pytest.MonkeyPatch) -> tuple[Diagnostics, float]:
        task = Task(torch.bfloat16, (300, 200))
        before = [p.detach().clone() for p in task.parameters]
        options = {"rho": 0.1, "radius": 0.1, "num_samples": 1, "rounding": "stochastic"}
        opt = tsam([*task.parameters, wide, unseen], lr=0.0, seed=5, **options)
        gone: list[float] = []

        def closure() -> Tensor:
            gone.append(float((unseen.detach().double() - 1.0).norm()))
            return task()

        with patch.context() as local:
            if places is not None:
                local.setattr(spread, "place_of", lambda tensor: 1 if tensor.shape == (200,) else 0)
            opt.step(closure)
        return opt.diagnostics, math.hypot(displacement(task, before, False, 1.0)[0], gone[-1])

    with pytest.MonkeyPatch.context() as patch:
        alone, norm = step(None, patch)
        apart, _ = step({}, patch)
    assert float(alone.realised_norm) == pytest.approx(norm, rel=1e-9)
    for name in ("realised_norm", "realised_ascent"):
        assert float(getattr(alone, name)) == pytest.approx(float(getattr(apart, name)), rel=1e-9)
    assert float(alone.realised_ascent) == pytest.approx(1.0, abs=0.2)


def test_refusals() -> None:
    p = [nn.Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match="TSAM: rounding: got 'up', expected 'nearest' or 'stochastic'"):
        TSAM(p, lr=0.1, rounding="up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one value for all groups"):
        TSAM([{"params": p, "rounding": "stochastic"}], lr=0.1)


SCALE: list[tuple[str, Callable[[float], bool]]] = [
    ("nearest", lambda share: share < 0.5),
    ("stochastic", lambda share: abs(share - 1.0) < 0.005),
]


@pytest.mark.slow
@pytest.mark.host_only("twenty million elements")
@pytest.mark.parametrize(("rounding", "right"), SCALE)
def test_the_derivative_along_the_ascent_at_twenty_million_elements(rounding: str, right: Any) -> None:
    """L(θ+ε) - L(θ) of a linear loss over rho ‖∇L‖, at weights of 0.02: 1 but for rounding.

    An element's rounding error is at most 2^-12 below 2^-4, in the mean over the weights about 3e-5 in size: along one
    direction as much, over rho 6e-4. The tolerance is eight of these.
    """
    n, rho = 20_000_000, 0.05
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter((0.02 * torch.randn(n, generator=generator)).bfloat16())
    direction = torch.randn(n, generator=generator).bfloat16()
    opt = TSAM([weight], lr=0.0, rho=rho, num_samples=1, radius=0.0, seed=1, rounding=rounding)  # type: ignore[arg-type]
    origin, along = weight.detach().clone(), []

    def closure() -> Tensor:
        with torch.no_grad():
            change = (weight.float() - origin.float()).double()
            along.append(float(change @ direction.double()) / (rho * float(direction.double().norm())))
        weight.grad = direction.clone()
        return torch.zeros(())

    opt.step(closure)
    assert along[0] == 0.0
    assert right(along[1]), along[1]
    assert float(opt.diagnostics.realised_ascent) == pytest.approx(along[1], rel=1e-6)
    assert torch.equal(weight.detach(), origin)
