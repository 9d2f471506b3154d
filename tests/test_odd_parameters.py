"""Parameters out of the ordinary: complex, fake, on meta, frozen of any kind, gradients of another precision.

The laws: a complex parameter is two real ones per element; what is frozen is nobody's business; a gradient keeps its
precision.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from flat_options import tsam
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

from tsam_ext import HMC, TSAM

SAMPLERS: dict[str, dict[str, Any]] = {
    "ascent": {},
    "adaptive": {"adaptive": True},
    "noise": {"sampler": "noise", "noise": "sphere"},
    "hmc": {"sampler": "hmc", "delta": 4.0, "num_leapfrog_steps": 2},
    "sam": {"num_samples": 1, "radius": 0.0},
}


class Fourier:
    """|x w| − b, with w complex or as pairs of reals."""

    def __init__(self, *, pairs: bool) -> None:
        torch.manual_seed(0)
        weight = torch.randn(4, 3, dtype=torch.complex128)
        self.weight = Parameter(torch.view_as_real(weight).clone() if pairs else weight)
        self.bias = Parameter(torch.randn(3, dtype=torch.float64))
        self.x = torch.randn(8, 4, dtype=torch.complex128)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.weight, self.bias]

    def closure(self) -> Tensor:
        weight = self.weight if self.weight.is_complex() else torch.view_as_complex(self.weight)
        loss = ((self.x @ weight).abs() - self.bias).square().mean()
        loss.backward()
        return loss

    def flat(self) -> Tensor:
        return torch.cat([torch.view_as_real(p).flatten() if p.is_complex() else p.flatten() for p in self.parameters])


@pytest.mark.parametrize("cleared", ["none", "zero", "never"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_complex_parameter_is_two_real_ones_per_element(name: str, cleared: str) -> None:
    ours, theirs = Fourier(pairs=False), Fourier(pairs=True)
    optimizer, twin = (
        tsam(p.parameters, lr=0.1, momentum=0.9, rho=0.3, seed=1, **SAMPLERS[name]) for p in (ours, theirs)
    )
    for _ in range(3):
        for one, problem in ((optimizer, ours), (twin, theirs)):
            if cleared != "never":
                one.zero_grad(set_to_none=cleared == "none")
            one.step(problem.closure)
        torch.testing.assert_close(ours.flat(), theirs.flat(), rtol=0, atol=1e-13)
        assert ours.weight.grad is not None and ours.weight.grad.dtype == torch.complex128
    with optimizer.perturbed(), twin.perturbed():
        torch.testing.assert_close(ours.flat(), theirs.flat(), rtol=0, atol=1e-13)


def test_a_chain_over_complex_parameters_is_saved_and_shown() -> None:
    ours, resumed = Fourier(pairs=False), Fourier(pairs=False)
    optimizer = TSAM(ours.parameters, lr=0.1, seed=1, sampler=HMC(delta=4.0), num_samples=3)
    for _ in range(2):
        optimizer.step(ours.closure)
    assert [e.dtype for e in optimizer.chain_position()] == [torch.complex128, torch.float64]
    other = TSAM(resumed.parameters, lr=0.1, seed=9, sampler=HMC(delta=4.0), num_samples=3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for p, q in zip(resumed.parameters, ours.parameters, strict=True):
            p.copy_(q)
    optimizer.step(ours.closure)
    other.step(resumed.closure)
    assert torch.equal(ours.flat(), resumed.flat())


def test_complex_parameters_return_after_an_exception() -> None:
    problem = Fourier(pairs=False)
    optimizer = TSAM(problem.parameters, lr=0.1, num_samples=3)
    before, calls = problem.flat(), []

    def closure() -> Tensor:
        calls.append(1)
        loss = problem.closure()
        if len(calls) == 4:
            raise KeyError
        return loss

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert torch.equal(problem.flat(), before)


def test_frozen_parameters_may_be_anything() -> None:
    torch.manual_seed(0)
    net, twin = nn.Linear(3, 4), nn.Linear(3, 4)
    twin.load_state_dict(net.state_dict())
    odd = [
        torch.ones(3, dtype=torch.int8),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3, 1).expand(3, 4),
        torch.ones(3).to(torch.float8_e4m3fn),
        torch.eye(3).to_sparse(),
        torch.ones(2, device="meta"),
    ]
    frozen = [Parameter(tensor, requires_grad=False) for tensor in odd]
    optimizer = TSAM([*net.parameters(), *frozen], lr=0.1, seed=0, num_samples=3)
    plain = TSAM(twin.parameters(), lr=0.1, seed=0, num_samples=3)
    x = torch.randn(5, 3)
    for one, module in ((optimizer, net), (plain, twin)):

        def closure(module: nn.Module = module) -> Tensor:
            loss: Tensor = module(x).square().mean()
            loss.backward()
            return loss

        one.step(closure)
    assert all(map(torch.equal, net.parameters(), twin.parameters()))


@pytest.mark.parametrize("sampler", ["ascent", "noise", "hmc"])
def test_fake_tensors_take_a_step(sampler: Any) -> None:
    """What tools that estimate memory do."""
    with FakeTensorMode():
        net = nn.Linear(3, 4)
        optimizer = TSAM(net.parameters(), lr=0.1, sampler=sampler, num_samples=3)
        x = torch.randn(5, 3)

        def closure() -> Tensor:
            loss: Tensor = net(x).square().mean()
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        assert loss.shape == ()


@pytest.mark.parametrize("sampler", ["ascent", "hmc"])
def test_parameters_on_meta_are_held_and_not_stepped(sampler: Any) -> None:
    with torch.device("meta"):
        net = nn.Linear(3, 4)
    optimizer = TSAM(net.parameters(), lr=0.1, sampler=sampler, num_samples=3)
    with pytest.raises(ValueError, match=r"^TSAM: params: got tensors on meta, expected tensors in memory"):
        optimizer.step(lambda: net(torch.ones(2, 3, device="meta")).mean())


class Upcast(torch.autograd.Function):
    """A bfloat16 weight in float32, whose gradient stays float32."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("name", ["ascent", "noise", "sam"])
def test_a_gradient_in_float32_of_a_bfloat16_parameter_keeps_its_precision(name: str, held: bool) -> None:
    torch.manual_seed(0)
    weight = Parameter(torch.randn(40, 3).bfloat16())
    weight.grad_dtype = torch.float32
    weight.grad = torch.zeros(40, 3) if held else None
    room, x, seen = weight.grad, torch.randn(8, 40), []
    optimizer = tsam([weight], lr=0.1, seed=1, rho=0.3, **SAMPLERS[name])

    def closure() -> Tensor:
        loss = (x @ Upcast.apply(weight)).square().mean()
        loss.backward()
        assert weight.grad is not None
        seen.append(weight.grad.clone())
        return loss

    optimizer.estimate_gradient(closure)
    counted = seen if name == "noise" else seen[1::2]
    mean = sum(w * g for w, g in zip(optimizer.diagnostics.weights, counted, strict=True))
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, mean.float(), rtol=1e-6, atol=1e-6)
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())
    assert weight.grad is room or not held
