"""The rises of tsam_ext.metrics: by noise, by one ascent on groups of rows, and the tilted mean over noise.

Laws: on a quadratic the mean rise on a sphere is r² tr(H)/(2n); an ascent's is worked by hand, group by group; the
tilted objective is the plain formula over the losses at TSAM's own noise, the mean at t = 0 and an extreme at t = ±inf.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from rank_training import rows, small_net, squared_error
from test_metrics import SPECTRA, net_objective, quadratic
from torch import Tensor, nn

from tsam_ext import TSAM, Noise, metrics


@pytest.mark.parametrize("noise", ["sphere", "gaussian", "rademacher"])
def test_the_average_rise_of_a_quadratic(noise: str) -> None:
    """Noise of second moment 1/n: r² tr(H)/(2n), to 5.5 standard errors, one in 2e7."""
    matrix, objective = quadratic(SPECTRA[0][0])
    found = metrics.average_sharpness(objective, 0.7, noise=noise, num_samples=500, seed=2)
    assert abs(found.mean - 0.49 * float(matrix.trace()) / (2 * len(matrix))) < 5.5 * found.standard_error
    assert found.standard_error == pytest.approx(float(found.samples.std()) / math.sqrt(500))
    assert len(found.samples) == 500


def test_a_sphere_s_rise_is_exact_where_the_hessian_is_round() -> None:
    x = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    objective = metrics.Objective.of_function(lambda: 1.5 * x.square().sum(), [x])
    assert metrics.average_sharpness(objective, 0.2, noise="sphere", num_samples=3).mean == pytest.approx(0.06)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_noise_is_that_of_the_optimizer(adaptive: bool) -> None:
    """The losses are those at the positions where TSAM puts samples of its first step, frozen parameters or not."""
    net, objective = net_objective()
    x, y = rows()
    for frozen in (False, True):
        net[0].bias.requires_grad_(not frozen)
        objective = metrics.Objective(net, [(x, y)], lambda net, b: squared_error(net(b[0]), b[1]))
        opt = TSAM(net.parameters(), lr=0.1, rho=0.3, num_samples=3, adaptive=adaptive, sampler=Noise("sphere"), seed=9)
        expected = []
        for sample in range(3):
            with opt.perturbed(sample), torch.no_grad():
                expected.append(float(squared_error(net(x), y)))
        found = metrics.tilted_objective(objective, 1.0, 0.3, num_samples=3, noise="sphere", adaptive=adaptive, seed=9)
        torch.testing.assert_close(found.losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_tilted_objective_and_its_limits() -> None:
    _, objective = net_objective()

    def at(tilt: float) -> Any:
        return metrics.tilted_objective(objective, tilt, 2.0, num_samples=6, seed=1)

    losses = at(1.0).losses
    for tilt in (-3.0, 0.5, 20.0):
        found = at(tilt)
        assert found.value == pytest.approx(float((tilt * losses).exp().mean().log() / tilt))
        weights = (tilt * losses).softmax(0)
        assert found.ess == pytest.approx(1.0 / float(weights.square().sum()))
    assert at(0.0).value == pytest.approx(float(losses.mean()))
    assert at(0.0).ess == pytest.approx(6.0)
    assert at(1e-9).value == pytest.approx(float(losses.mean()))
    assert (at(math.inf).value, at(math.inf).ess) == (float(losses.max()), 1.0)
    assert (at(-math.inf).value, at(-math.inf).ess) == (float(losses.min()), 1.0)
    average = metrics.average_sharpness(objective, 2.0, num_samples=6, seed=1)
    centre = float(metrics.surface(objective, [0.0]).losses)
    torch.testing.assert_close(average.samples + centre, losses)


def risen(net: nn.Module, x: Tensor, y: Tensor, rho: float, adaptive: bool) -> float:
    """L(θ + ρ D (D g)/‖D g‖) − L(θ), by hand."""
    moved = copy.deepcopy(net)
    loss = squared_error(moved(x), y)
    gradients = torch.autograd.grad(loss, list(moved.parameters()))
    scales = [p.detach().abs() if adaptive else torch.ones_like(p) for p in moved.parameters()]
    length = torch.stack([(d * g).norm() for d, g in zip(scales, gradients, strict=True)]).norm()
    with torch.no_grad():
        for p, d, g in zip(moved.parameters(), scales, gradients, strict=True):
            p += rho * d * d * g / length
        return float(squared_error(moved(x), y) - loss)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("size", "expected"), [(None, (5, 4, 3)), (2, (2, 2, 1, 2, 2, 2, 1)), (4, (4, 1, 4, 3))])
def test_the_ascent_s_rise_by_hand(size: int | None, expected: tuple[int, ...], adaptive: bool) -> None:
    net, objective = net_objective()
    x, y = rows()
    groups = zip(x.split(expected), y.split(expected), strict=True)
    rises = torch.tensor([risen(net, *group, 0.2, adaptive) for group in groups], dtype=torch.float64)
    found = metrics.ascent_sharpness(objective, 0.2, group_size=size, adaptive=adaptive)
    torch.testing.assert_close(found.samples, rises)
    weights = torch.tensor(expected, dtype=torch.float64) / 12
    assert found.mean == pytest.approx(float(weights @ rises))
    count = len(expected)
    error = (weights * (rises - weights @ rises)).norm() * math.sqrt(count / (count - 1))
    assert found.standard_error == pytest.approx(float(error))


def test_an_ascent_of_no_gradient_stays() -> None:
    x = torch.zeros(3, requires_grad=True)
    objective = metrics.Objective.of_function(lambda: x.square().sum(), [x])
    assert metrics.ascent_sharpness(objective, 0.5).mean == 0.0


def test_dropout_s_masks_are_the_same_below_and_above() -> None:
    """In training mode the loss is one function within a metric: at radius 0 nothing rises."""
    x, y = rows()
    net = nn.Sequential(small_net(), nn.Dropout(0.5), nn.BatchNorm1d(3)).double()
    objective = metrics.Objective(
        net, list(zip(x.split(4), y.split(4), strict=True)), lambda n, b: squared_error(n(b[0]), b[1])
    )
    before = torch.random.get_rng_state()
    assert metrics.ascent_sharpness(objective, 0.0, group_size=2).samples.abs().max() == 0.0
    assert metrics.average_sharpness(objective, 0.0, num_samples=2).samples.abs().max() == 0.0
    assert metrics.ascent_sharpness(objective, 0.1, group_size=2).mean > 0.0
    assert torch.equal(torch.random.get_rng_state(), before)
