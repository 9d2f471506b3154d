"""Curvature and surfaces of tsam_ext.metrics against whole Hessians, known quadratics and plain evaluation.

Laws: eigenvalues with their multiplicities, vectors and residuals are those of the whole Hessian, for any k up to n;
the trace is right to its standard error, and exact for a diagonal Hessian; a surface is the loss at its points.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rank_training import rows, small_net, squared_error
from torch import Tensor, nn
from torch.func import functional_call, hessian

from tsam_ext import functional, metrics

# Eigenvalues of a quadratic, and the k asked for: several equal, negative ones, rank 2 of 12, all zero, all equal.
SPECTRA = [
    ([9.0, 5.0, 5.0, 5.0, *[2.0] * 15, -3.0], 5),
    ([-7.0, -7.0, -1.0, 0.0, 4.0, 4.0], 6),
    ([3.0, -2.0, *[0.0] * 10], 3),
    ([0.0] * 5, 2),
    ([2.0] * 8, 8),
    ([4.0], 1),
]


def quadratic(values: list[float], narrow: torch.dtype = torch.float64) -> tuple[Tensor, metrics.Objective]:
    """½ xᵀHx + cᵀx with these eigenvalues in a random basis, x in two tensors, one of them ``narrow``; and H."""
    generator = torch.Generator().manual_seed(len(values))
    basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator)).Q
    matrix = basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T
    slope = torch.randn(len(values), dtype=torch.float64, generator=generator)
    split = len(values) // 2
    x = [torch.ones(split, dtype=torch.float64), torch.ones(len(values) - split, dtype=narrow)]

    def function() -> Tensor:
        whole = torch.cat([part.double() for part in x])
        return 0.5 * whole @ matrix @ whole + slope @ whole

    return matrix, metrics.Objective.of_function(function, [part.requires_grad_() for part in x])


def net_objective(loss: Callable[..., Tensor] = squared_error, splits: Any = (5, 4, 3)) -> tuple[nn.Module, Any]:
    """The small net in float64 on 12 rows, in uneven batches."""
    net, (x, y) = small_net(), rows()
    batches = list(zip(x.split(splits), y.split(splits), strict=True))
    return net, metrics.Objective(net, batches, lambda net, batch: loss(net(batch[0]), batch[1]))


def whole_hessian(net: nn.Module) -> Tensor:
    """That of the mean over all rows, [n, n]."""
    x, y = rows()
    names, shapes = zip(*((name, p.shape) for name, p in net.named_parameters()), strict=True)
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        placed = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return squared_error(functional_call(net, placed, (x,)), y)

    found: Tensor = hessian(loss)(flat)
    return found


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])


@pytest.mark.parametrize(("values", "k"), SPECTRA)
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_eigenvalues_of_a_quadratic(values: list[float], k: int, which: Any) -> None:
    _, objective = quadratic(values)
    found = metrics.hessian_eigenvalues(objective, k, which=which, tolerance=1e-9)
    keys: dict[str, Callable[[float], float]] = {"largest": lambda x: -x, "smallest": lambda x: x}
    expected = torch.tensor(sorted(values, key=keys.get(which, lambda x: -abs(x)))[:k], dtype=torch.float64)
    shown = found.eigenvalues if which != "magnitude" else found.eigenvalues.abs()
    torch.testing.assert_close(shown, expected if which != "magnitude" else expected.abs(), rtol=0, atol=1e-9)
    assert found.converged
    assert found.products <= len(values)


@pytest.mark.parametrize("k", [1, 5, 66])
def test_eigenvectors_are_those_of_the_whole_hessian(k: int) -> None:
    net, objective = net_objective()
    matrix = whole_hessian(net)
    assert objective.num_elements == len(matrix) == 66
    found = metrics.hessian_eigenvalues(objective, k, eigenvectors=True, tolerance=1e-6)
    torch.testing.assert_close(found.eigenvalues, torch.linalg.eigvalsh(matrix).flip(0)[:k])
    assert found.eigenvectors is not None
    vectors = torch.stack([flat(vector) for vector in found.eigenvectors], 1)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(k, dtype=torch.float64))
    residuals = (matrix @ vectors - vectors * found.eigenvalues).norm(dim=0)
    assert float(residuals.max()) <= 1e-6 * float(torch.linalg.eigvalsh(matrix).abs().max()) + 1e-9


def test_a_basis_stays_orthogonal_where_products_are_nearly_parallel() -> None:
    """All products of a block lie along the first eigenvector, but for 1e-9 of their length."""
    _, objective = quadratic([1.0, 1e-9, *[0.0] * 10])
    found = metrics.hessian_eigenvalues(objective, 4, eigenvectors=True, tolerance=1e-12)
    assert found.eigenvectors is not None
    vectors = torch.stack([flat(vector) for vector in found.eigenvectors])
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(found.eigenvalues[1]) == pytest.approx(1e-9, rel=1e-5)


def test_what_ends_early_says_so_and_its_residuals_are_true() -> None:
    net, objective = net_objective()
    seen: list[tuple[int, int]] = []
    with pytest.warns(UserWarning, match=r"after 8 products .* of 3 residuals are above 1e-08"):
        found = metrics.hessian_eigenvalues(
            objective, 3, max_products=9, block_size=2, tolerance=1e-8, eigenvectors=True,
            progress=lambda *args: seen.append(args),
        )  # fmt: skip
    assert (found.products, found.converged) == (8, False)
    assert seen == [(done, 9) for done in range(1, 9)]
    assert found.eigenvectors is not None
    vectors = torch.stack([flat(vector) for vector in found.eigenvectors], 1)
    residuals = (whole_hessian(net) @ vectors - vectors * found.eigenvalues).norm(dim=0)
    torch.testing.assert_close(found.residuals, residuals)
    assert float(residuals.min()) > 1e-3  # so that the line above says something


def test_a_seed_decides_everything() -> None:
    _, objective = net_objective()
    first, second = (metrics.hessian_eigenvalues(objective, 2, seed=4) for _ in range(2))
    assert torch.equal(first.eigenvalues, second.eigenvalues)
    assert torch.equal(first.residuals, second.residuals)
    other = metrics.hessian_eigenvalues(objective, 2, seed=5)
    assert not torch.equal(first.eigenvalues, other.eigenvalues)


def test_the_trace() -> None:
    """One sample of signs is exact where the Hessian is diagonal; else 5.5 standard errors, one in 2e7."""
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, -4.0, 9.0], dtype=torch.float64)
    diagonal = metrics.Objective.of_function(lambda: 0.5 * (weights * x.square()).sum(), [x])
    found = metrics.hessian_trace(diagonal, 1)
    assert found.mean == 6.0
    assert math.isnan(found.standard_error)
    matrix, objective = quadratic(SPECTRA[0][0])
    found = metrics.hessian_trace(objective, 400)
    assert abs(found.mean - float(matrix.trace())) < 5.5 * found.standard_error
    spread = 2.0 * float((matrix - matrix.diag().diag()).square().sum()) / 400
    assert found.standard_error == pytest.approx(math.sqrt(spread), rel=0.25)


def test_a_linear_loss_has_no_curvature() -> None:
    x = torch.ones(5, requires_grad=True)
    linear = metrics.Objective.of_function(x.sum, [x])
    assert metrics.hessian_trace(linear, 2).mean == 0.0
    found = metrics.hessian_eigenvalues(linear, 3, block_size=1)
    assert found.eigenvalues.tolist() == found.residuals.tolist() == [0.0, 0.0, 0.0]


def test_mixed_dtypes_and_frozen_parameters() -> None:
    """x in float64 and float32 has the Hessian of both in float64, but for rounding; a frozen part leaves its block."""
    values = SPECTRA[0][0]
    matrix, objective = quadratic(values, torch.float32)
    assert {p.dtype for p in objective.parameters} == {torch.float64, torch.float32}
    found = metrics.hessian_eigenvalues(objective, 3)
    torch.testing.assert_close(found.eigenvalues, torch.tensor([9.0, 5.0, 5.0], dtype=torch.float64), rtol=1e-5, atol=0)
    objective.parameters[0].requires_grad_(False)
    (rest,) = [p for p in objective.parameters if p.requires_grad]
    again = metrics.Objective.of_function(lambda: objective.loss(None), [objective.parameters[0], rest])
    found = metrics.hessian_eigenvalues(again, 5)
    exact = torch.linalg.eigvalsh(matrix[10:, 10:]).flip(0)[:5]
    torch.testing.assert_close(found.eigenvalues, exact, rtol=1e-5, atol=1e-5)
    assert again.base == [12]  # after ten elements, rounded up to a multiple of 4


def test_batches_count_by_their_rows() -> None:
    alike = [net_objective(splits=splits)[1] for splits in ((12,), (5, 4, 3), (1, 11))]
    for metric in (
        lambda o: metrics.hessian_eigenvalues(o, 2).eigenvalues,
        lambda o: metrics.hessian_trace(o, 3).samples,
        lambda o: metrics.average_sharpness(o, 0.5, num_samples=3).samples,
        lambda o: metrics.tilted_objective(o, 5.0, 0.5, num_samples=3).losses,
    ):
        found = [metric(objective) for objective in alike]
        torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found[2], found[0], rtol=1e-9, atol=1e-12)


def test_rows_may_count_as_the_user_says() -> None:
    net, (x, y) = small_net(), rows()
    batches = [{"x": x[:4], "y": y[:4], "tokens": 3}, {"x": x[4:], "y": y[4:], "tokens": 1}]
    objective = metrics.Objective(
        net, batches, lambda net, b: squared_error(net(b["x"]), b["y"]), rows=lambda b: b["tokens"]
    )
    value = metrics.surface(objective, [0.0]).losses
    with torch.no_grad():
        expected = [float(squared_error(net(b["x"]), b["y"])) for b in batches]
    assert float(value) == pytest.approx(0.75 * expected[0] + 0.25 * expected[1])


@pytest.mark.parametrize("filter_normalised", [True, False])
def test_a_surface_is_the_loss_at_its_points(filter_normalised: bool) -> None:
    net, objective = net_objective()
    x, y = rows()
    origin = [p.detach().clone() for p in net.parameters()]
    axes = (torch.tensor([-1.0, 0.0, 0.5]), [0.0, 2.0])
    drawn = [[torch.randn_like(p) for p in origin] for _ in range(2)]
    drawn[0][0][3] = 0.0
    found = metrics.surface(objective, *axes, directions=drawn, filter_normalised=filter_normalised)
    assert found.losses.shape == (3, 2)
    for direction, used in zip(drawn, found.directions, strict=True):
        for d, p, u in zip(direction, origin, used, strict=True):
            if not filter_normalised:
                expected = d
            elif p.dim() < 2:
                expected = torch.zeros_like(p)
            else:
                lengths = [(float(row.norm()), float(one.norm())) for row, one in zip(p, d, strict=True)]
                scale = torch.tensor([row / one if one else 0.0 for row, one in lengths], dtype=p.dtype)
                expected = d * scale[:, None]
            torch.testing.assert_close(u, expected)
    for (i, a), (j, b) in itertools.product(enumerate(axes[0]), enumerate(axes[1])):
        with torch.no_grad():
            places = [p + a * u + b * v for p, u, v in zip(origin, *found.directions, strict=True)]
            named = dict(zip(dict(net.named_parameters()), places, strict=True))
            expected = squared_error(functional_call(net, named, (x,)), y)
        torch.testing.assert_close(found.losses[i, j], expected.double())


def test_a_random_line_is_seeded_noise_and_zero_is_the_point_itself() -> None:
    net, objective = net_objective()
    lines = [metrics.surface(objective, [0.0, 1.0], seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(lines[0].losses, lines[1].losses)
    assert lines[0].losses[1] != lines[2].losses[1]
    assert lines[0].losses[0] == lines[2].losses[0]
    drawn = metrics.surface(objective, [0.0], seed=3, filter_normalised=False).directions[0]
    base = 0
    for p, d in zip(net.parameters(), drawn, strict=True):
        expected = functional.perturb(torch.zeros_like(p), 1.0, seed=3, draw=0, base=base) * math.sqrt(p.numel() / 66)
        torch.testing.assert_close(d, expected.detach(), rtol=1e-6, atol=0)
        base += (p.numel() + 3) // 4 * 4
