"""What a TSAM step computes: SAM and ASAM as exact limits, the oracle, the laws of the estimate.

At radius 0 the optimizer and a hand-written loop differ by rounding alone (float64: 1e-12 after 20
steps). With noise they differ by the kernels' float32 normals, 2^-24 relative a draw: 1e-6.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from flat_options import tsam
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from tsam_ext import reference
from tsam_ext.engine.checks import NOISES
from tsam_ext.reference import ReferenceTSAM

INF = math.inf
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.2, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
}


def sam_step(parameters: list[Tensor], loss: Callable[[], Tensor], rho: float, adaptive: bool) -> None:
    """SAM's gradient into p.grad, ASAM's with eta = 0: ε = rho T²g/‖Tg‖, T = 1 or |θ|. By hand."""
    origin = [p.detach().clone() for p in parameters]
    gradients = torch.autograd.grad(loss(), parameters)
    scales = [o.abs() if adaptive else torch.ones_like(o) for o in origin]
    pairs = list(zip(scales, gradients, strict=True))
    norm = math.sqrt(sum(float(((t * g) ** 2).sum()) for t, g in pairs))
    with torch.no_grad():
        for p, (t, g) in zip(parameters, pairs, strict=True):
            p += rho * t * t * g / norm
    gradients = torch.autograd.grad(loss(), parameters)
    with torch.no_grad():
        for p, o, g in zip(parameters, origin, gradients, strict=True):
            p.copy_(o)
            p.grad = g


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("adaptive", [False, True])
def test_one_sample_without_noise_is_sam(problem, base: str, adaptive: bool) -> None:
    kind, options = BASES[base]
    rho = 2.0 if adaptive else 0.3
    ours, theirs = problem("digits"), problem("digits")
    options_of_ours = {"rho": rho, "adaptive": adaptive, "num_samples": 1, "radius": 0}
    optimizer = tsam(ours.parameters, kind, tilt=7.0, **options_of_ours, **options)
    plain = kind(theirs.parameters, **options)
    losses = []
    for _ in range(20):
        losses.append(theirs.loss().item())
        sam_step(theirs.parameters, theirs.loss, rho, adaptive)
        plain.step()
    assert losses[-1] < 0.7 * losses[0]
    torch.testing.assert_close(ours.train(optimizer, 20), losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.flat(), theirs.flat(), rtol=1e-12, atol=1e-12)


def grouped(task: Any, sampler: str = "ascent") -> list[dict[str, Any]]:
    """Groups with settings of their own: a frozen parameter first, one unperturbed, one without noise."""
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    w1, b1, w2, b2 = task.parameters
    return [
        {"params": [frozen, w1]},
        {"params": [b1], "rho": 0.0, "radius": 5.0},
        {"params": [w2], "radius": 0.4, **({"rho": 0.7} if sampler == "ascent" else {})},
        {"params": [b2], "adaptive": True, "radius": 0.0},
    ]


def run_pair(problem: Any, groups: bool, steps: int = 2, **options: Any) -> tuple[Any, ...]:
    results = []
    for kind in (tsam, ReferenceTSAM):
        task = problem()
        params = grouped(task, options.get("sampler", "ascent")) if groups else task.parameters
        own = {"num_samples": 3} | ({"between": "plain"} if kind is tsam else {})  # the oracle carries nothing
        optimizer = kind(params, lr=0.1, momentum=0.9, seed=0xFEDCBA98_76543210, **own | options)
        results.append((task, task.train(optimizer, steps), optimizer))
    return tuple(results)


@pytest.mark.parametrize("tilt", [0, 1, -3, 20, INF, -INF])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("sampler", ["ascent", "noise"])
def test_tsam_is_the_reference(problem, sampler: str, noise: str, tilt: float) -> None:
    for adaptive, groups, batch, antithetic in itertools.product(
        (False, True), (False, True), ("whole", "split"), (False, True)
    ):
        options = {"adaptive": adaptive, "batch": batch, "antithetic": antithetic, "rho": 0.3}
        (ours, losses, optimizer), (theirs, expected, oracle) = run_pair(
            problem, groups, sampler=sampler, noise=noise, tilt=tilt, **options
        )
        where = f"{options}, groups={groups}"
        tolerance = {
            "rtol": 1e-6,
            "atol": 1e-6,
            "msg": lambda text, where=where: f"{where}: {text}",
        }
        torch.testing.assert_close(losses, expected, **tolerance)
        torch.testing.assert_close(ours.flat(), theirs.flat(), **tolerance)
        torch.testing.assert_close(optimizer.diagnostics.losses, oracle.losses, **tolerance)
        tolerance["rtol"] = tolerance["atol"] = 1e-6 * (1 if math.isinf(tilt) else 1 + abs(tilt))
        torch.testing.assert_close(optimizer.diagnostics.weights, oracle.weights, **tolerance)
        assert ours.calls == theirs.calls


@pytest.mark.parametrize("batch", ["whole", "split"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("tilt", [0, 1, -3, INF])
def test_without_noise_the_reference_is_met_to_rounding(problem, tilt, adaptive, batch) -> None:
    options = {"tilt": tilt, "adaptive": adaptive, "batch": batch, "radius": 0.0, "rho": 0.3}
    (ours, losses, _), (theirs, expected, _) = run_pair(problem, False, steps=5, **options)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.flat(), theirs.flat(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tilt", [0.0, 4.0, -4.0, INF])
def test_the_estimate_is_the_gradient_of_the_tilted_loss(problem, tilt, dtype) -> None:
    """For the sampler noise: p.grad = ∇ (1/t) log mean exp(t L(θ+ε_j)) by ordinary autograd."""
    task = problem(dtype=dtype)
    options = {"sampler": "noise", "radius": 1.5, "num_samples": 4, "tilt": tilt, "seed": 3}
    optimizer = tsam(task.parameters, lr=0.1, **options)
    names = [name for name, _ in task.net.named_parameters()]
    offsets = reference.base_offsets([p.numel() for p in task.parameters])
    twins = [p.detach().clone().requires_grad_() for p in task.parameters]
    losses = []
    for sample in range(4):
        nu = reference.unit_noise(task.parameters, offsets, seed=3, step=0, sample=sample)
        moved = {n: p + 1.5 * v.to(dtype) for n, p, v in zip(names, twins, nu, strict=True)}
        losses.append(cross_entropy(functional_call(task.net, moved, (task.x,)), task.y))
    reference.tilted_loss(torch.stack(losses), tilt).backward()
    optimizer.estimate_gradient(task.closure(optimizer))
    tolerance = {torch.float64: 1e-6, torch.float32: 2e-5}[dtype]  # float32: some 100 roundings of 2^-24
    expected = torch.cat([p.grad.flatten() for p in twins])
    torch.testing.assert_close(task.gradient(), expected, rtol=tolerance, atol=tolerance)
    assert float(optimizer.diagnostics.losses.std()) > 0.05


@pytest.mark.parametrize(("sampler", "per_sample"), [("noise", 1), ("ascent", 2)])
@pytest.mark.parametrize("s", [1, 2, 5])
def test_the_closure_runs_once_a_gradient(problem, sampler: str, per_sample: int, s: int) -> None:
    task = problem()
    optimizer = tsam(task.parameters, lr=0.1, sampler=sampler, num_samples=s, every=3)
    counts = []
    for _ in range(7):
        task.calls.clear()
        task.train(optimizer, 1)
        counts.append(len(task.calls))
        assert all(rows == list(range(12)) for rows in task.calls)
    assert counts == [s * per_sample, 1, 1] * 2 + [s * per_sample]


@pytest.mark.parametrize(("sampler", "per_sample"), [("noise", 1), ("ascent", 2)])
@pytest.mark.parametrize(("n", "s"), [(12, 3), (13, 4), (11, 11), (3, 8), (1, 2)])
def test_a_split_batch_sees_each_row_once(problem, sampler, per_sample, n: int, s: int) -> None:
    task = problem(rows=n)
    options = {"num_samples": s, "batch": "split", "seed": 1}
    optimizer = tsam(task.parameters, lr=0.1, sampler=sampler, **options)
    optimizer.estimate_gradient(task.closure(optimizer))
    used = min(n, s)
    assert len(task.calls) == used * per_sample
    for start in range(per_sample):
        parts = task.calls[start::per_sample]
        assert parts == [list(range(j * n // used, (j + 1) * n // used)) for j in range(used)]
        assert sorted(itertools.chain(*parts)) == list(range(n))
    weights = optimizer.diagnostics.weights
    losses = optimizer.diagnostics.losses
    assert weights.shape == losses.shape == (used,)
    sizes = torch.tensor([len(part) for part in task.calls[::per_sample]])
    torch.testing.assert_close(weights, reference.tilted_weights(losses, 1.0, sizes))


def test_a_split_batch_without_perturbation_or_tilt_is_the_whole_batch(problem) -> None:
    """Parts weigh by their rows, so the mean over parts of 13 rows is the mean over the rows."""
    task = problem(rows=13)
    optimizer = tsam(task.parameters, lr=0.1, rho=0.0, tilt=0.0, batch="split", num_samples=5)
    optimizer.estimate_gradient(task.closure(optimizer))
    gradient = task.gradient()
    task.net.zero_grad()
    task.loss().backward()
    torch.testing.assert_close(gradient, task.gradient(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("batch", ["whole", "split"])
def test_plain_steps_are_the_base_optimizer_s(problem, batch: str) -> None:
    """every=3: steps 1 and 2 take the plain gradient of all rows, step 3 the noise of step 3."""
    ours, theirs = problem(), problem()
    optimizer = tsam(ours.parameters, lr=0.1, momentum=0.9, every=3, between="plain", batch=batch, seed=5)
    ours.train(optimizer, 1)
    plain = torch.optim.SGD(theirs.parameters, lr=0.1, momentum=0.9)
    theirs.net.load_state_dict(ours.net.state_dict())
    plain.load_state_dict(deepcopy(optimizer.base_optimizer.state_dict()))
    for _ in range(2):
        plain.zero_grad()
        loss = theirs.loss()
        loss.backward()
        plain.step()
        assert ours.train(optimizer, 1) == [loss.item()]
        assert ours.holds(theirs.copies())
        assert optimizer.diagnostics.weights.tolist() == [1.0]
        assert optimizer.diagnostics.losses.tolist() == [loss.item()]
    options = {"every": 3, "batch": batch, "rho": 0.3}
    (ours, losses, _), (theirs, expected, _) = run_pair(problem, False, steps=5, **options)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ascent", "noise"])
@pytest.mark.parametrize(("tilt", "choose"), [(INF, max), (-INF, min)])
def test_an_infinite_tilt_takes_one_sample_s_gradient(problem, sampler, tilt, choose) -> None:
    task, seen = problem(), []
    optimizer = tsam(task.parameters, lr=0.1, tilt=tilt, sampler=sampler, radius=1.0, num_samples=5)

    def closure() -> Tensor:
        loss = task.loss()
        loss.backward()
        seen.append((loss.item(), task.gradient().clone()))
        return loss

    first = optimizer.estimate_gradient(closure)
    assert float(first) == seen[0][0]
    samples = seen[1::2] if sampler == "ascent" else seen
    best = choose(samples, key=lambda item: item[0])
    assert torch.equal(task.gradient(), best[1])
    assert float(optimizer.diagnostics.tilted_loss) == best[0]
    assert sorted(optimizer.diagnostics.weights.tolist()) == [0.0] * 4 + [1.0]
    assert float(optimizer.diagnostics.ess) == 1.0


def test_diagnostics_are_the_formulas(problem) -> None:
    task, norms = problem(), []
    optimizer = tsam(task.parameters, lr=0.1, tilt=6.0, rho=0.5, num_samples=4, seed=2)

    def closure() -> Tensor:
        loss = task.loss()
        loss.backward()
        norms.append(float(task.gradient().norm()))
        return loss

    optimizer.step(closure)
    seen = optimizer.diagnostics
    losses = seen.losses
    for name in ("losses", "weights", "gradient_norms"):
        assert getattr(seen, name).shape == (4,)
        assert getattr(seen, name).dtype == torch.float64
    torch.testing.assert_close(seen.weights, reference.tilted_weights(losses, 6.0))
    torch.testing.assert_close(seen.tilted_loss, reference.tilted_loss(losses, 6.0))
    torch.testing.assert_close(seen.ess, 1.0 / seen.weights.square().sum())
    torch.testing.assert_close(seen.gradient_norms, losses.new_tensor(norms[::2]))
    assert 1.0 < float(seen.ess) < 4.0
    assert float(seen.num_nonfinite) == 0


def test_implied_delta_is_the_formula(problem) -> None:
    task = problem()
    optimizer = tsam(task.parameters, lr=0.1, rho=0.3)
    task.train(optimizer, 1)
    told = optimizer.diagnostics
    assert torch.allclose(told.implied_delta, task.flat().numel() / (0.3 * told.gradient_norms))
    optimizer = tsam(grouped(task), lr=0.1, rho=0.3)
    task.train(optimizer, 1)
    assert optimizer.diagnostics.implied_delta.isnan().all()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("where", [{0}, {1}, {3}, {0, 1, 2, 3}])
def test_losses_that_are_not_finite(problem, where: set[int], bad: float, skip: bool) -> None:
    """One makes the whole result NaN; with skip_nonfinite_loss it is as if the sample had not been."""
    task, seen = problem(), []
    options = {"sampler": "noise", "num_samples": 4, "radius": 1.0, "tilt": 3.0}
    optimizer = tsam(task.parameters, lr=0.1, skip_nonfinite_loss=skip, **options)

    def closure() -> Tensor:
        loss = task.loss()
        loss.backward()
        seen.append((loss.detach(), task.gradient().clone()))
        return loss * bad if len(seen) - 1 in where else loss

    optimizer.estimate_gradient(closure)
    kept = [pair for j, pair in enumerate(seen) if j not in where]
    assert int(optimizer.diagnostics.num_nonfinite) == len(where)
    if not skip or not kept:
        assert task.gradient().isnan().all()
        return
    losses, gradients = (torch.stack(column) for column in zip(*kept, strict=True))
    expected = reference.tilted_reduce(losses, gradients, 3.0)
    torch.testing.assert_close(task.gradient(), expected, rtol=1e-12, atol=1e-14)
    weights = optimizer.diagnostics.weights
    assert [j for j in range(4) if weights[j] == 0.0] == sorted(where)
    assert float(weights.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("options", [{"num_samples": 1}, {"every": 2}])
def test_a_step_of_one_gradient_with_a_bad_loss_is_nan(problem, options, buffer: bool, skip: bool, bad: float) -> None:
    """Also where the gradient's own memory is the result, so that nothing else would be written."""
    task = problem()
    optimizer = tsam(task.parameters, lr=0.0, skip_nonfinite_loss=skip, **options)
    task.train(optimizer, 1)  # of every=2 the second step is the plain one
    optimizer.zero_grad(set_to_none=not buffer)

    def closure() -> Tensor:
        loss = task.loss()
        loss.backward()
        return loss * bad

    optimizer.estimate_gradient(closure)
    assert task.gradient().isnan().all()


@pytest.mark.parametrize("sampler", ["noise", "ascent"])
def test_a_gradient_that_is_not_finite_reaches_p_grad(problem, sampler: str) -> None:
    task = problem()
    copies = task.copies()
    optimizer = tsam(task.parameters, lr=0.1, sampler=sampler)

    def closure() -> Tensor:
        loss = task.closure(optimizer)()
        if len(task.calls) == 3:
            task.parameters[0].grad[0, 0] = INF
        return loss

    optimizer.estimate_gradient(closure)
    assert not task.gradient().isfinite().all()
    assert task.holds(copies)


def test_the_same_seed_is_the_same_bits_and_none_asks_torch(problem) -> None:
    def trained(seed: int | None, torch_seed: int) -> Tensor:
        task = problem()
        torch.manual_seed(torch_seed)
        task.train(tsam(task.parameters, lr=0.1, seed=seed, rho=0.3), 2)
        return task.flat()

    assert torch.equal(trained(7, 0), trained(7, 1))
    assert not torch.equal(trained(7, 0), trained(8, 0))
    assert not torch.equal(trained(7, 0), trained(7 + (1 << 32), 0))
    assert torch.equal(trained(None, 0), trained(None, 0))
    assert not torch.equal(trained(None, 0), trained(None, 1))
    torch.manual_seed(0)
    first, second = (tsam(problem().parameters, lr=0.1).seed for _ in range(2))
    assert first != second
    state = torch.random.get_rng_state()
    assert tsam(problem().parameters, lr=0.1, seed=(1 << 64) - 1).seed == (1 << 64) - 1
    assert torch.equal(torch.random.get_rng_state(), state)
