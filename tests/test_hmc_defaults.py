"""What tsam_ext.hmc.sample does by itself: it mixes with its defaults, says where rounding decides, takes one tensor.

Laws: effective sample sizes of N(0, 1) and of other scales; a density that raises outside its support is sampled like
one that is -inf there; nothing is said of a run in order. Each statistical bound fails less than once in 1e6.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from tsam_ext import hmc

SCALES = torch.logspace(0, 1, 5)
PRECISION = torch.tensor([[1.0, 0.9], [0.9, 1.5]]).inverse()
FIXED: dict[str, Any] = {"adapt_step_size": False, "burn_in": 0}


def normal(x: Tensor) -> Tensor:
    return -0.5 * x.square().sum()


def scaled(x: Tensor) -> Tensor:
    return -0.5 * (x / SCALES).square().sum()


def correlated(x: Tensor) -> Tensor:
    return -0.5 * ((PRECISION * x).sum(1) * x).sum()


def effective_size(values: Tensor) -> float:
    """n over the autocorrelation time; sums of pairs up to the first negative one, made to fall (Geyer 1992)."""
    n, centred = len(values), values.double() - values.double().mean()
    spectrum = torch.fft.rfft(centred, 2 * n)
    correlation = torch.fft.irfft(spectrum.abs().square(), 2 * n)[:n]
    pairs = (correlation / correlation[0]).unfold(0, 2, 2).sum(1)
    negative = (pairs < 0.0).nonzero()
    pairs = torch.cummin(pairs[: int(negative[0])] if len(negative) else pairs, 0).values
    return n / float((2.0 * pairs.sum() - 1.0).clamp(min=1.0 / math.log10(n)))


@pytest.mark.host_only("thousands of steps, each of ten launches and more")
def test_with_all_defaults_a_normal_variable_is_sampled_well() -> None:
    """Means of log ESS over four chains: 6.59 and 5.68 with deviations of 0.07 and 0.11 in 20,000 simulated chains.

    The bounds are 8 and 6 deviations away; that of the standard deviation, of 0.021, is 5.3.
    """
    draws = torch.stack([hmc.sample(normal, torch.zeros(1), seed=seed).draws[:, 0] for seed in range(4)])
    assert math.prod(effective_size(x) for x in draws) ** 0.25 > 400.0
    assert math.prod(effective_size(x.square()) for x in draws) ** 0.25 > 150.0
    assert 0.89 < float(draws.double().square().mean().sqrt()) < 1.12


@pytest.mark.parametrize(("density", "scales"), [(scaled, SCALES), (correlated, torch.tensor([1.0, math.sqrt(1.5)]))])
@pytest.mark.host_only("thousands of steps, each of ten launches and more")
def test_several_scales_and_correlation_are_sampled_too(density: Any, scales: Tensor) -> None:
    """The smallest ESS of x and of x², with medians of 350 and more and of 185 and more over simulated chains."""
    draws = hmc.sample(density, torch.zeros(len(scales)), seed=3).draws / scales
    for x in draws.T:
        assert effective_size(x) > 120.0
        assert effective_size(x.square()) > 40.0
        assert 0.7 < float(x.std()) < 1.35


def test_without_jitter_a_trajectory_of_one_period_stays_where_it_is() -> None:
    """The mean of cos over phases between π and 3π is 0; at one period of the leapfrog itself it is 1."""
    steps = 12
    h = 2.0 * math.sin(math.pi / steps)  # cos(2π/steps) = 1 - h²/2
    settings: dict[str, Any] = {**FIXED, "num_samples": 400, "num_leapfrog_steps": steps, "step_size": h, "seed": 1}
    start = torch.ones(1, dtype=torch.float64)
    still = hmc.sample(normal, start, step_size_jitter=0.0, **settings)
    torch.testing.assert_close(still.draws, start.expand(400, 1), rtol=0, atol=1e-5)
    moves = hmc.sample(normal, start, **settings).draws[:, 0]
    assert abs(float((moves[1:] * moves[:-1]).mean() / moves.square().mean())) < 6.0 / math.sqrt(400)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rounding_is_the_spacing_of_the_density_s_dtype(dtype: torch.dtype) -> None:
    trace = hmc.sample(lambda x: (normal(x) + 20.0).to(dtype), torch.ones(2), num_samples=5, burn_in=0, seed=0)
    assert torch.equal(trace.rounding, trace.log_density.abs() * torch.finfo(dtype).eps)
    assert trace.log_density.dtype == torch.float64


MESSAGE = r"TSAM: hmc.sample: the rounding of the log density moves the energy error by about 11.9\d \(Trace.rounding\)"


@pytest.mark.host_only("thousands of steps, each of ten launches and more")
def test_a_density_whose_rounding_decides_is_told_of_once() -> None:
    settings: dict[str, Any] = {"burn_in": 0, "seed": 0, "num_samples": 20}

    def large(x: Tensor) -> Tensor:
        return normal(x) + 1e8

    with pytest.warns(UserWarning, match=MESSAGE) as told:
        trace = hmc.sample(large, torch.zeros(1), **settings)
    assert (len(told), told[0].filename) == (1, __file__)
    assert "Compute the log density in float64, or leave a constant out of it." in str(told[0].message)
    assert float(trace.rounding.mean()) == pytest.approx(1e8 * 2.0**-23, rel=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hmc.sample(lambda x: normal(x.double()) + 1e8, torch.zeros(1), **settings)
        hmc.sample(large, torch.zeros(1), metropolis=False, **settings)  # without an accept test it decides nothing
        hmc.sample(lambda x: normal(x) + 1e6, torch.zeros(1), **settings)  # 0.12


def test_one_tensor_is_taken_and_given_back_without_a_list() -> None:
    start = torch.ones(2, 3, requires_grad=True)
    settings: dict[str, Any] = {"num_samples": 4, "burn_in": 3, "seed": 5}
    bare = hmc.sample(normal, start, inverse_mass=2.0, **settings)
    listed = hmc.sample(lambda x: normal(x[0]), [start], inverse_mass=2.0, **settings)
    assert bare.draws.shape == (4, 2, 3)
    assert torch.equal(bare.draws, listed.draws[0])
    assert torch.equal(bare.energy_error, listed.energy_error)
    assert list(bare.to_dict()["posterior"]) == ["x"]
    assert list(bare.to_dict(["y"])["posterior"]) == ["y"]
    assert bare.to_dict()["posterior"]["x"].shape == (1, 4, 2, 3)
    assert torch.equal(start, torch.ones(2, 3))
    assert hmc.sample(lambda x: -x * x, torch.ones(()), **settings).draws.shape == (4,)


def test_raising_outside_the_support_is_minus_infinity_there() -> None:
    """With one step per trajectory bit for bit."""

    def raises(x: Tensor) -> Tensor:
        if x.min() < 0.0:
            raise ValueError("negative")
        return -x.sum()

    def minus_infinity(x: Tensor) -> Tensor:
        return -x.sum() if x.min() >= 0.0 else torch.tensor(-math.inf)

    settings: dict[str, Any] = {**FIXED, "num_samples": 200, "num_leapfrog_steps": 1, "step_size": 0.7, "seed": 3}
    found = hmc.sample(raises, torch.ones(2), on_error="reject", **settings)
    want = hmc.sample(minus_infinity, torch.ones(2), **settings)
    for name in ("draws", "log_density", "acceptance_rate", "diverging"):
        assert torch.equal(getattr(found, name), getattr(want, name)), name
    assert 0 < found.errors == int(found.diverging.sum()) < 200
    assert want.errors == 0
    assert found.energy_error[found.diverging].isnan().all()
    with pytest.raises(ValueError, match="negative"):
        hmc.sample(raises, torch.ones(2), **settings)


@pytest.mark.host_only("thousands of steps, each of ten launches and more")
def test_a_density_that_raises_on_the_way_is_sampled_exactly() -> None:
    """e^-x on [0, 1], several steps per trajectory: the way back from its end passes the same point that raises.

    Batch means of 50: beyond 7 once in 1e7 with 39 degrees of freedom.
    """

    class OutsideError(Exception):
        pass

    def density(x: Tensor) -> Tensor:
        if not 0.0 <= float(x.detach()) <= 1.0:
            raise OutsideError
        return -x.sum()

    settings: dict[str, Any] = {**FIXED, "num_samples": 2000, "step_size": 0.15, "num_leapfrog_steps": 3, "seed": 4}
    trace = hmc.sample(density, torch.full((1,), 0.5, dtype=torch.float64), on_error="reject", **settings)
    assert 100 < trace.errors == int(trace.diverging.sum())
    x = trace.draws[:, 0]
    for values, mean in ((x, (math.e - 2.0) / (math.e - 1.0)), (x * x, (2.0 * math.e - 5.0) / (math.e - 1.0))):
        means = values.reshape(40, -1).mean(1)
        assert abs(float((means.mean() - mean) / (means.std() / math.sqrt(40)))) < 7.0


def test_a_run_in_which_all_raises_says_so() -> None:
    calls = 0

    def density(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise RuntimeError(f"call {calls}")
        return normal(x)

    message = (
        "TSAM: hmc.sample: log_density raised in each of the 7 transitions, and the chain never moved. "
        "The first exception: RuntimeError: call 2"
    )
    with pytest.warns(UserWarning, match=message) as told:
        trace = hmc.sample(density, torch.ones(2), num_samples=4, burn_in=3, on_error="reject", seed=0)
    assert (len(told), told[0].filename) == (1, __file__)
    assert (trace.errors, calls) == (7, 8)
    assert trace.diverging.all()
    assert torch.equal(trace.draws, torch.ones(4, 2))
    assert trace.step_size == pytest.approx(0.1 * math.exp(-3 * 0.05 * 0.8), rel=1e-12)
    with pytest.raises(RuntimeError, match="call 9"):  # at the start
        hmc.sample(density, torch.ones(2), on_error="reject")


def test_an_exception_in_the_backward_pass_rejects_and_a_wrong_result_never_does() -> None:
    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            if calls == 3:
                raise ArithmeticError
            return grad

    calls = 0

    def density(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return normal(Raises.apply(x)) if calls != late else x

    late = 0
    trace = hmc.sample(density, torch.ones(2), num_samples=5, burn_in=0, on_error="reject", seed=0)
    assert (trace.errors, trace.diverging.tolist()) == (1, [True, False, False, False, False])
    calls, late = 10, 14
    with pytest.raises(ValueError, match=r"log_density: got a torch.float32 tensor of shape \(2,\)"):
        hmc.sample(density, torch.ones(2), num_samples=5, burn_in=0, on_error="reject", seed=0)


def test_a_run_in_order_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace = hmc.sample(normal, torch.ones(2), num_samples=4, burn_in=3, seed=0)
    assert (trace.errors, trace.interrupted, len(trace)) == (0, False, 4)
    assert float(trace.rounding.max()) < 1e-5
