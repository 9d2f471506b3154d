"""tsam_ext.hmc.sample: that it draws from the density it is given, apart from any training.

Laws: a chain that starts at an exact draw ends at one (Kolmogorov-Smirnov over independent chains, each p-value fails
once in 1e7); one transition is the textbook's formula; the energy error is of order 2. Seeds are fixed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from tsam_ext import hmc
from tsam_ext.integrators import substeps
from tsam_ext.reference.noise import ACCEPT, MOMENTUM, normal, signs, uniform
from tsam_ext.walk import Jitter

COVARIANCE = torch.tensor([[1.0, 0.9], [0.9, 1.5]], dtype=torch.float64)
PRECISION, FACTOR = COVARIANCE.inverse(), torch.linalg.cholesky(COVARIANCE)
FIXED: dict[str, Any] = {"adapt_step_size": False, "burn_in": 0}


def normal_density(x: list[Tensor]) -> Tensor:
    return -0.5 * sum(t.double().square().sum() for t in x)


def gaussian(x: list[Tensor]) -> Tensor:
    """The correlated gaussian, its two components in two tensors."""
    z = torch.cat(x)
    return -0.5 * ((PRECISION * z).sum(1) * z).sum()  # no BLAS call: its threads are slow when others run


def banana(x: list[Tensor]) -> Tensor:
    """x ~ N(0, 1), y given x ~ N(x², 1)."""
    return -0.5 * (x[0][0].square() + (x[0][1] - x[0][0].square()).square())


def gumbel(x: list[Tensor]) -> Tensor:
    return -(x[0] + (-x[0]).exp()).sum()


def exact_gaussian(z: Tensor) -> list[Tensor]:
    return list((FACTOR * z).sum(1).split(1))


def exact_banana(z: Tensor) -> list[Tensor]:
    return [torch.stack([z[0], z[1] + z[0].square()])]


def exact_gumbel(z: Tensor) -> list[Tensor]:
    return [-(-torch.special.log_ndtr(z[:1])).log()]


def of_gaussian(draws: Tensor) -> Tensor:
    return torch.linalg.solve(FACTOR, draws.T).T


def of_banana(draws: Tensor) -> Tensor:
    return torch.stack([draws[:, 0], draws[:, 1] - draws[:, 0].square()], 1)


def of_gumbel(draws: Tensor) -> Tensor:
    return torch.special.ndtri((-(-draws).exp()).exp())


# Density, an exact draw from two normals, the normals of a draw, and a coarse step size.
TARGETS = {
    "gaussian": (gaussian, exact_gaussian, of_gaussian, 0.9),
    "banana": (banana, exact_banana, of_banana, 0.7),
    "gumbel": (gumbel, exact_gumbel, of_gumbel, 1.3),
}


def p_values(target: str, chains: int = 500, **options: Any) -> list[float]:
    """Of normality: of each component and of the squared norm, over chains from independent exact draws."""
    density, exact, of, step_size = TARGETS[target]
    starts = torch.randn(chains, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    settings = {**FIXED, "num_samples": 1, "burn_in": 3, "num_leapfrog_steps": 2, "step_size": step_size, **options}
    ends = [torch.cat(hmc.sample(density, exact(z), seed=i, **settings).draws, 1) for i, z in enumerate(starts)]
    normals = of(torch.cat(ends))
    components = [float(stats.kstest(column.numpy(), "norm").pvalue) for column in normals.T]
    squares = normals.square().sum(1)
    return [*components, float(stats.kstest(squares.numpy(), "chi2", args=(normals.shape[1],)).pvalue)]


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("gaussian", {}),
        ("banana", {"inverse_mass": 1.5}),
        ("gumbel", {}),
        ("gumbel", {"integrator": hmc.MCLACHLAN, "step_size": 2.0, "num_leapfrog_steps": 1}),
    ],
)
@pytest.mark.host_only("thousands of steps, each of ten launches and more")
def test_exact_draws_stay_exact(target: str, options: dict[str, Any]) -> None:
    assert min(p_values(target, **options)) > 1e-7


@pytest.mark.parametrize("target", ["gaussian", "gumbel"])
@pytest.mark.host_only("thousands of steps, each of ten launches and more")
def test_without_metropolis_a_coarse_step_is_biased_and_a_fine_one_is_not(target: str) -> None:
    assert min(p_values(target, metropolis=False)) < 1e-7
    assert min(p_values(target, metropolis=False, chains=200, step_size=0.05)) > 1e-7


def t_statistic(values: Tensor, mean: float, batches: int = 40) -> float:
    """Of the mean of a correlated series, from batch means; beyond 7 once in 1e7 with 39 degrees of freedom."""
    means = values.double().reshape(batches, -1).mean(1)
    return float((means.mean() - mean) / (means.std() / math.sqrt(batches)))


@pytest.mark.host_only("thousands of steps, each of ten launches and more")
def test_one_long_chain_finds_the_moments_from_a_far_start() -> None:
    start = [torch.tensor([30.0], dtype=torch.float64), torch.tensor([-20.0], dtype=torch.float64)]
    trace = hmc.sample(gaussian, start, num_samples=2000, burn_in=300, num_leapfrog_steps=4, seed=2)
    x, y = (draws[:, 0] for draws in trace.draws)
    for values, mean in ((x, 0.0), (y, 0.0), (x * x, 1.0), (y * y, 1.5), (x * y, 0.9)):
        assert abs(t_statistic(values, mean)) < 7.0
    assert 0.65 < float(trace.acceptance_rate.mean()) < 0.95  # adaptation ended near its target
    lp = torch.stack([gaussian([a, b]) for a, b in zip(*trace.draws, strict=True)])
    torch.testing.assert_close(trace.log_density, lp, rtol=1e-12, atol=1e-12)


@pytest.mark.host_only("thousands of steps, each of ten launches and more")
def test_a_density_may_end_at_a_wall() -> None:
    """e^-x on [0, 1]: -inf outside rejects, even as a constant without a gradient."""

    def density(x: list[Tensor]) -> Tensor:
        return -x[0].sum() if 0.0 <= float(x[0].detach()) <= 1.0 else torch.tensor(-math.inf)

    start = [torch.full((1,), 0.5, dtype=torch.float64)]
    trace = hmc.sample(density, start, num_samples=2000, step_size=0.15, num_leapfrog_steps=3, seed=4, **FIXED)
    x = trace.draws[0][:, 0]
    assert x.min() >= 0.0
    assert x.max() <= 1.0
    assert trace.diverging.any()
    assert not trace.diverging.all()
    assert trace.log_density.isfinite().all()
    assert (trace.acceptance_rate[trace.diverging] == 0.0).all()
    assert abs(t_statistic(x, (math.e - 2.0) / (math.e - 1.0))) < 7.0
    assert abs(t_statistic(x * x, (2.0 * math.e - 5.0) / (math.e - 1.0))) < 7.0


def textbook(
    density: Callable[[list[Tensor]], Tensor], x: Tensor, p: Tensor, h: float, integrator: Any, steps: int
) -> tuple[Tensor, float]:
    """The end of a trajectory and its energy error, in float64, step by step and with absolute energies."""

    def at(x: Tensor) -> tuple[float, Tensor]:
        leaf = x.detach().requires_grad_()
        value = density([leaf])
        return float(value.detach()), torch.autograd.grad(value, leaf)[0]

    def energy(x: Tensor, p: Tensor) -> float:
        return 0.5 * float(p @ p) - at(x)[0]

    before = energy(x, p)
    for _ in range(steps):
        for i, coefficient in enumerate(integrator):
            if i % 2 == 0:
                p = p + coefficient * h * at(x)[1]
            else:
                x = x + coefficient * h * p
    return x, energy(x, p) - before


def factor(seed: int, transition: int, jitter: float) -> float:
    """Of the step size, 1 + jitter (2u - 1): u has 32 random signs as its bits, the first one as the highest."""
    bits = (signs(32, 32 * transition, seed, 0, 0) < 0.0).tolist()
    u = sum(bit * 0.5 ** (k + 1) for k, bit in enumerate(bits)) + 0.5**33
    return 1.0 + jitter * (2.0 * u - 1.0)


@pytest.mark.parametrize("transition", [0, 511, 512, 2**32 - 2])
def test_the_jitter_of_a_transition_is_its_formula(transition: int) -> None:
    assert Jitter(0.5, 9).at(transition) == factor(9, transition, 0.5)


@pytest.mark.parametrize("jitter", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("integrator", [hmc.LEAPFROG, hmc.MCLACHLAN, (0.1, 0.3, 0.4, 0.4, 0.4, 0.3, 0.1)])
def test_a_transition_is_the_textbook_s(integrator: tuple[float, ...], jitter: float) -> None:
    x, h, seed = torch.tensor([0.4, -0.3], dtype=torch.float64), 0.3, 9
    settings = {**FIXED, "num_samples": 6, "num_leapfrog_steps": 3, "step_size": h, "seed": seed}
    trace = hmc.sample(banana, [x], integrator=integrator, step_size_jitter=jitter, **settings)
    for k in range(6):
        p = normal(2, 0, seed, k, 0, MOMENTUM)
        proposal, error = textbook(banana, x, p, factor(seed, k, jitter) * h, integrator, 3)
        assert float(trace.energy_error[k]) == pytest.approx(error, abs=1e-5)  # momenta are float32
        assert float(trace.acceptance_rate[k]) == pytest.approx(min(1.0, math.exp(-error)), abs=1e-5)
        x = proposal if math.log(uniform(seed, k, 0, ACCEPT)) < -error else x
        torch.testing.assert_close(trace.draws[0][k], x, rtol=0, atol=1e-5)


def energy_error(**options: Any) -> float:
    """Root mean square over 40 trajectories of length 1.6 from one point each."""
    x = torch.tensor([0.5, -0.8], dtype=torch.float64)
    settings = {**FIXED, **options, "num_samples": 1, "step_size_jitter": 0.0}
    errors = [hmc.sample(banana, [x], seed=i, **settings).energy_error for i in range(40)]
    return float(torch.cat(errors).square().mean().sqrt())


@pytest.mark.parametrize(("integrator", "steps"), [(hmc.LEAPFROG, 16), (hmc.MCLACHLAN, 8)])
def test_the_energy_error_is_of_order_two(integrator: tuple[float, ...], steps: int) -> None:
    coarse, fine = (
        energy_error(integrator=integrator, step_size=1.6 / n, num_leapfrog_steps=n) for n in (steps, 2 * steps)
    )
    assert coarse / fine == pytest.approx(4.0, rel=0.05)


def test_the_minimum_norm_integrator_errs_less_at_the_same_cost() -> None:
    leapfrog = energy_error(step_size=0.1, num_leapfrog_steps=16)
    minimum_norm = energy_error(integrator=hmc.MCLACHLAN, step_size=0.2, num_leapfrog_steps=8)
    assert minimum_norm < 0.5 * leapfrog


@pytest.mark.parametrize(("integrator", "stages"), [(hmc.LEAPFROG, 1), (hmc.MCLACHLAN, 2)])
def test_what_it_costs(integrator: tuple[float, ...], stages: int) -> None:
    calls = []

    def density(x: list[Tensor]) -> Tensor:
        calls.append(1)
        return normal_density(x)

    options = {"num_samples": 4, "burn_in": 3, "thin": 2, "num_leapfrog_steps": 5}
    hmc.sample(density, [torch.zeros(2)], seed=0, integrator=integrator, **options)
    assert len(calls) == 1 + (3 + 2 * 4) * 5 * stages
    pairs, last = substeps(integrator, 5)
    assert sum(kick for kick, _ in pairs) + last == pytest.approx(5.0)
    assert sum(drift for _, drift in pairs) == pytest.approx(5.0)


def mixed() -> list[Tensor]:
    shapes = [((2, 3), torch.float32), ((), torch.float64), ((5,), torch.bfloat16), ((0, 4), torch.float32)]
    return [*(torch.ones(shape, dtype=dtype) for shape, dtype in shapes), torch.ones(3, 2).half().T]


def test_a_seed_gives_the_same_bits() -> None:
    def run(seed: int | None) -> list[Tensor]:
        trace = hmc.sample(normal_density, mixed(), num_samples=5, burn_in=5, seed=seed)
        return [*trace.draws, trace.log_density, trace.energy_error]

    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = run(2**64 - 1), run(2**64 - 1), run(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    unnamed = run(None)
    assert not torch.equal(unnamed[0], run(None)[0])
    torch.manual_seed(3)
    assert torch.equal(unnamed[0], run(None)[0])


@pytest.mark.host_only("thousands of steps, each of ten launches and more")
def test_tensors_of_mixed_shapes_and_dtypes() -> None:
    trace = hmc.sample(normal_density, mixed(), num_samples=600, burn_in=100, num_leapfrog_steps=4, seed=5)
    for draws, start in zip(trace.draws, mixed(), strict=True):
        assert draws.shape == (600, *start.shape)
        assert draws.dtype == start.dtype
    for draws in trace.draws:
        if draws.numel():
            flat = draws.double().reshape(600, -1)
            assert abs(t_statistic(flat.mean(1), 0.0)) < 7.0
            assert abs(t_statistic(flat.square().mean(1), 1.0)) < 7.0
    # The log density is that of the draws themselves, in their own precision.
    lp = torch.stack([normal_density([draws[k] for draws in trace.draws]) for k in range(600)])
    torch.testing.assert_close(trace.log_density, lp, rtol=1e-12, atol=1e-12)


def test_inverse_mass_is_a_change_of_units() -> None:
    """With powers of two bit for bit: N(0, 4) at inverse mass 16 from 2 x is twice N(0, 1) at 4 from x."""
    options: dict[str, Any] = {"num_samples": 20, "burn_in": 10, "num_leapfrog_steps": 3, "seed": 6}
    x = [torch.ones(3), torch.ones(2)]
    one = hmc.sample(normal_density, x, inverse_mass=[4.0, 1.0], **options)
    two = hmc.sample(lambda x: normal_density([x[0] / 2, x[1]]), [2 * x[0], x[1]], inverse_mass=[16.0, 1.0], **options)
    assert torch.equal(2 * one.draws[0], two.draws[0])
    assert torch.equal(one.draws[1], two.draws[1])
    assert not torch.equal(one.draws[0], hmc.sample(normal_density, x, **options).draws[0])


def test_thin_keeps_every_kth_draw_and_the_step_size_moves_in_burn_in_alone() -> None:
    options: dict[str, Any] = {"num_leapfrog_steps": 3, "burn_in": 7, "seed": 1}
    every = hmc.sample(normal_density, [torch.ones(2)], num_samples=9, **options)
    third = hmc.sample(normal_density, [torch.ones(2)], num_samples=3, thin=3, **options)
    assert torch.equal(every.draws[0][2::3], third.draws[0])
    assert torch.equal(every.energy_error[2::3], third.energy_error)
    assert every.step_size == third.step_size
    accepted = hmc.sample(normal_density, [torch.ones(2)], num_samples=1, **{**options, "step_size": 1e-4})
    assert accepted.step_size == pytest.approx(1e-4 * math.exp(7 * 0.05 * 0.2), rel=1e-6)
    fixed = hmc.sample(normal_density, [torch.ones(2)], num_samples=1, adapt_step_size=False, **options)
    assert fixed.step_size == pytest.approx(0.1, rel=1e-15)


@pytest.mark.parametrize("metropolis", [True, False])
def test_a_huge_step_diverges_and_is_reported(metropolis: bool) -> None:
    def quartic(x: list[Tensor]) -> Tensor:
        return -x[0].pow(4).sum()

    x = [torch.ones(2, dtype=torch.float64)]
    trace = hmc.sample(quartic, x, num_samples=5, step_size=1e60, metropolis=metropolis, seed=0, **FIXED)
    assert trace.diverging.all()
    assert torch.equal(trace.draws[0], torch.ones(5, 2, dtype=torch.float64))
    trace = hmc.sample(quartic, x, num_samples=5, step_size=0.01, seed=0, **FIXED)
    assert not trace.diverging.any()


@pytest.mark.parametrize("error", [None, ValueError("mine"), KeyboardInterrupt()])
@pytest.mark.parametrize("stop", [1, 8, 9])
def test_the_caller_s_tensors_and_gradients_are_left_alone(error: BaseException | None, stop: int) -> None:
    weight, x = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    version, calls = x._version, []

    def density(position: list[Tensor]) -> Tensor:
        calls.append(position[0])
        position.append(torch.zeros(()))  # the list is the callee's own
        if len(calls) == stop and error is not None:
            raise error
        return -(position[0].square() * weight).sum()

    if error is None:
        hmc.sample(density, [x], num_samples=2, burn_in=2)
    else:
        with pytest.raises(type(error)) as caught:
            hmc.sample(density, [x], num_samples=2, burn_in=2)
        assert caught.value is error
    assert torch.equal(x, torch.ones(2))
    assert x._version == version
    assert x.grad is None
    assert weight.grad is None
    assert all(tensor.data_ptr() != x.data_ptr() for tensor in calls)


def test_it_runs_where_autograd_is_off() -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            trace = hmc.sample(normal_density, [torch.ones(2)], num_samples=2, burn_in=2)
        assert trace.draws[0].isfinite().all()
        assert not trace.draws[0].is_inference()


def test_one_gradient_for_several_tensors_and_none_for_what_drops_out() -> None:
    """Autograd hands out one expanded tensor for both; from the third call on the density is constant."""
    calls: list[int] = []

    def density(x: list[Tensor]) -> Tensor:
        calls.append(1)
        return -(x[0] + x[1]).sum().square() if len(calls) < 3 else torch.tensor(0.0)

    h = 0.125
    settings = {**FIXED, "num_samples": 1, "num_leapfrog_steps": 3, "step_size": h, "metropolis": False}
    trace = hmc.sample(density, [torch.ones(4), torch.ones(4)], seed=2, step_size_jitter=0.0, **settings)
    p = torch.stack([normal(4, base, 2, 0, 0, MOMENTUM) for base in (0, 4)])
    x, p = torch.ones(2, 4, dtype=torch.float64), p - 0.5 * h * 2.0 * 8.0
    x = x + h * p
    p = p - h * 2.0 * x.sum()
    torch.testing.assert_close(torch.cat(trace.draws).double(), x + 2 * h * p, rtol=1e-5, atol=1e-5)


def test_a_chain_that_never_moves_stays_where_its_log_density_is() -> None:
    """The start goes through units of √inverse_mass, which rounds it."""
    x = torch.linspace(0.1, 1.0, 50)
    settings = {**FIXED, "num_samples": 2, "step_size": 1e30, "inverse_mass": 3.0}
    trace = hmc.sample(normal_density, [x], seed=0, **settings)
    torch.testing.assert_close(trace.draws[0][1], x, rtol=1e-6, atol=0)
    assert float(trace.log_density[1]) == float(normal_density([trace.draws[0][1]]))


def test_the_dictionary_is_arviz_s() -> None:
    trace = hmc.sample(normal_density, mixed(), num_samples=3, burn_in=1, seed=0)
    found = trace.to_dict()
    assert list(found["posterior"]) == ["x0", "x1", "x2", "x3", "x4"]
    assert found["posterior"]["x0"].shape == (1, 3, 2, 3)
    assert (found["posterior"]["x2"][0] == trace.draws[2].float().numpy()).all()
    shapes = {name: values.shape for name, values in found["sample_stats"].items()}
    assert shapes == dict.fromkeys(("lp", "acceptance_rate", "diverging", "energy_error"), (1, 3))
    assert found["sample_stats"]["diverging"].dtype == bool
    assert list(trace.to_dict(["a", "b", "c", "d", "e"])["posterior"]) == ["a", "b", "c", "d", "e"]
    for names in (["a"], ["a"] * 5):
        with pytest.raises(ValueError, match=r"names: got \[.*\], expected 5 different names"):
            trace.to_dict(names)


def test_progress_shows_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"num_samples": 2, "burn_in": 3, "seed": 0}
    silent = hmc.sample(normal_density, [torch.ones(2)], **options)
    assert capsys.readouterr() == ("", "")
    shown = hmc.sample(normal_density, [torch.ones(2)], progress=True, **options)
    assert "5/5" in capsys.readouterr().err
    assert torch.equal(silent.draws[0], shown.draws[0])
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="progress: got True without the package tqdm, expected False, or tqdm inst"):
        hmc.sample(normal_density, [torch.ones(2)], progress=True, **options)
