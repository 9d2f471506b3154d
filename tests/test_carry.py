"""The direction that a full step leaves for the steps between: laws of ``every`` with ``between="carry"``.

v = (A - (A.G / G.G) G) / |G| after a full step, g + |g| v at a later one (MATHEMATICS 7), G the mean of the samples'
first gradients, which the tests collect themselves from the ``samples()`` loop.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from tsam_ext import HMC, TSAM, Ascent, Noise
from tsam_ext.reference import add_direction, take_direction

EXACT = {"rtol": 1e-11, "atol": 1e-13}  # float64: sums in another order


def carried(optimizer: TSAM) -> Tensor:
    """v as a checkpoint has it, in one vector."""
    state = optimizer.state_dict()["state"]
    return torch.cat([state[i]["tsam_carry"].flatten() for i in sorted(state)])


def full_step(task: Any, optimizer: TSAM) -> tuple[Tensor, Tensor]:
    """One step by hand; the mean of the samples' first gradients by their rows, and the tilted gradient."""
    firsts: dict[int, tuple[int, Tensor]] = {}
    for sample in optimizer.samples():
        with sample:
            x, y = optimizer.part(task.x, task.y)
            loss = task.loss(x, y)
            loss.backward()
            sample.record(loss)
            firsts.setdefault(sample.index, (len(x), task.gradient().clone()))
    tilted = task.gradient().clone()
    rows = sum(n for n, _ in firsts.values())
    plain = sum((n / rows * gradient for n, gradient in firsts.values()), torch.zeros_like(tilted))
    optimizer.apply()
    return plain, tilted


CASES: dict[str, dict[str, Any]] = {
    "SAM": {"num_samples": 1, "radius": 0.0},
    "samples": {"num_samples": 3, "tilt": 20.0},
    "uneven parts": {"num_samples": 5, "tilt": -3.0, "batch": "split", "radius": 0.0},
    "adaptive": {"num_samples": 2, "adaptive": True, "rho": 0.5},
    "sphere, antithetic": {"num_samples": 2, "sampler": Ascent(noise="sphere", antithetic=True)},
    "noise": {"num_samples": 3, "sampler": "noise", "tilt": 50.0, "between": "carry"},
    "noise, parts": {"num_samples": 4, "sampler": Noise(), "tilt": 5.0, "between": "carry", "batch": "split"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_the_steps_between_add_what_the_full_one_had_beside_the_plain_gradient(problem, options: Any) -> None:
    task = problem()
    optimizer = TSAM(task.parameters, seed=1, **{"rho": 0.2, "lr": 0.1, "every": 3} | options)
    for _ in range(2):
        plain, tilted = full_step(task, optimizer)
        v = take_direction(plain, tilted)
        assert torch.allclose(carried(optimizer), v, **EXACT)
        assert v.norm() > 1e-3
        assert abs(v @ plain) < 1e-12 * plain.norm()  # orthogonal
        gamma = v.norm()  # |tilted - c plain| / |plain|
        assert torch.allclose(optimizer.diagnostics.carried_ratio, gamma, rtol=1e-9)
        for _ in range(2):
            grad = torch.cat([g.flatten() for g in torch.autograd.grad(task.loss(), task.parameters)])
            task.calls.clear()
            optimizer.estimate_gradient(task.closure(optimizer))
            assert len(task.calls) == 1
            assert len(task.calls[0]) == len(task.x)  # of a split batch too
            assert torch.allclose(task.gradient(), add_direction(grad, v), **EXACT)
            assert "carried_ratio" not in optimizer.diagnostics.to_dict()
            assert optimizer.diagnostics.carried_ratio.isnan()
            optimizer.apply()


def test_a_chain_carries_against_the_mean_of_the_gradients_that_it_counts(problem) -> None:
    """Without an accept test these are the last of each trajectory. At delta=tilt their mean is the gradient."""
    task = problem()
    options: dict[str, Any] = {"num_samples": 3, "every": 2, "rho": 0.5, "lr": 0.1, "between": "carry", "tilt": 4.0}
    sampler = HMC(delta=1.0, num_leapfrog_steps=2, metropolis=False)
    optimizer, counted = TSAM(task.parameters, seed=1, sampler=sampler, **options), []
    for sample in optimizer.samples():
        with sample:
            loss = task.loss()
            loss.backward()
            sample.record(loss)
            if not sample.probe:
                counted.append(task.gradient().clone())
    v = take_direction(torch.stack(counted[1::2]).mean(0), task.gradient())
    optimizer.apply()
    assert torch.allclose(carried(optimizer), v, **EXACT)
    assert v.norm() > 1e-3
    other = problem()
    inert = TSAM(other.parameters, seed=1, sampler="hmc", **options)
    other.train(inert, 1)
    assert carried(inert).count_nonzero() == 0


def test_a_chain_under_a_loss_scale_carries_the_same(problem) -> None:
    """Its gradients are divided, what p.grad gets is not."""
    found = []
    for scale in (1.0, 1024.0):
        task, scaler = problem(), torch.tensor(scale, dtype=torch.float64)
        options: dict[str, Any] = {
            "num_samples": 3,
            "every": 2,
            "rho": 0.5,
            "lr": 0.1,
            "between": "carry",
            "tilt": 40.0,
        }
        optimizer = TSAM(task.parameters, seed=1, sampler=HMC(delta=1.0), scaler=scaler, **options)

        def closure(task: Any = task, scaler: Tensor = scaler) -> Tensor:
            loss = task.loss()
            (scaler * loss).backward()
            return loss.detach()

        optimizer.estimate_gradient(closure)
        found.append((carried(optimizer), task.gradient() / scale))
    assert found[0][0].norm() > 1e-3
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine, theirs, **EXACT)


@pytest.mark.parametrize("between", ["carry", "plain", None])
def test_with_every_step_full_nothing_changes(problem, between: Any) -> None:
    ours, theirs = problem(), problem()
    optimizer = TSAM(ours.parameters, lr=0.1, seed=1, between=between, num_samples=3)
    twin = TSAM(theirs.parameters, lr=0.1, seed=1, num_samples=3)
    assert ours.train(optimizer, 4) == theirs.train(twin, 4)
    assert ours.holds(theirs.copies())
    assert not any("tsam_carry" in entry for entry in optimizer.state_dict()["state"].values())


@pytest.mark.parametrize(("sampler", "carries"), [("ascent", True), ("noise", False), ("hmc", False)])
def test_the_default_is_to_carry_what_an_ascent_has_found(problem, sampler: Any, carries: bool) -> None:
    first, second, plain = problem(), problem(), problem()
    options: dict[str, Any] = {"num_samples": 3, "every": 2, "sampler": sampler, "tilt": 5.0, "rho": 0.3}
    options |= {"lr": 0.1, "seed": 1}
    default = first.train(TSAM(first.parameters, **options), 4)
    named = second.train(TSAM(second.parameters, between="carry" if carries else "plain", **options), 4)
    assert default == named
    assert (default == plain.train(TSAM(plain.parameters, between="plain", **options), 4)) is not carries


def test_the_scale_of_the_loss_changes_nothing(problem) -> None:
    """Neither a constant factor nor one that changes between a full step and the next, as a loss scale does."""
    ours, theirs = problem(), problem()
    optimizers = [TSAM(t.parameters, lr=0.1, seed=1, every=3, tilt=0.0, rho=0.3, num_samples=3) for t in (ours, theirs)]
    for step, scale in enumerate((1024.0, 2.0, 0.25, 1.0, 4096.0)):
        for task, optimizer, factor in zip((ours, theirs), optimizers, (scale, 1.0), strict=True):

            def closure(task: Any = task, factor: float = factor) -> Tensor:
                (factor * task.loss()).backward()
                return task.loss().detach()

            optimizer.estimate_gradient(closure)
            for p in task.parameters:
                p.grad /= factor  # a power of two
            optimizer.apply()
        assert ours.holds(theirs.copies()), step
    assert torch.equal(*map(carried, optimizers))


def test_parameters_that_come_and_go(problem) -> None:
    """What appears after the full step adds nothing, nor does what freezes; the norm is over those that train."""
    task = problem()
    first, second, *_ = task.parameters
    second.requires_grad_(False)
    optimizer = TSAM(task.parameters, lr=0.1, seed=1, every=4, rho=0.3, num_samples=3)
    task.train(optimizer, 1)
    v = carried(optimizer)
    first.requires_grad_(False)
    second.requires_grad_(True)
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra]})

    def loss() -> Tensor:
        return task.loss() + (extra**2).sum()

    def closure() -> Tensor:
        value = loss()
        value.backward()
        return value

    trained = [p for p in (*task.parameters, extra) if p.requires_grad]
    grads = torch.autograd.grad(loss(), trained)
    optimizer.zero_grad()
    optimizer.estimate_gradient(closure)
    norm = torch.cat([g.flatten() for g in grads]).norm()
    assert first.grad is None
    for p, grad in zip(trained, grads, strict=True):
        if p is second or p is extra:
            assert torch.equal(p.grad, grad)
    last = task.parameters[-1]
    expected = grads[-2] + norm * v[-last.numel() :].view_as(last)
    assert torch.allclose(last.grad, expected, **EXACT)
    optimizer.apply()


def test_a_full_step_that_fails_is_taken_again(problem) -> None:
    ours, theirs = problem(), problem()
    optimizer, twin = (TSAM(t.parameters, lr=0.1, seed=1, every=2, num_samples=2) for t in (ours, theirs))
    ours.train(optimizer, 2)
    theirs.train(twin, 2)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ValueError("no batch")
        loss = ours.loss()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="no batch"):
        optimizer.step(closure)
    assert ours.train(optimizer, 3) == theirs.train(twin, 3)
    assert ours.holds(theirs.copies())


@pytest.mark.parametrize("skip", [True, False])
def test_a_sample_that_is_skipped_leaves_both_means(problem, skip: bool) -> None:
    """Its loss after the ascent is infinite. Without skipping the gradient is NaN, and nothing is carried."""
    task, count = problem(), 0
    optimizer = TSAM(task.parameters, lr=0.1, seed=1, every=2, skip_nonfinite_loss=skip, rho=0.3, num_samples=3)
    firsts = []
    for sample in optimizer.samples():
        with sample:
            count += 1
            loss = task.loss()
            loss.backward()
            if sample.probe and sample.index != 1:
                firsts.append(task.gradient().clone())
            sample.record(float("inf") if count == 4 else loss)
    tilted = task.gradient().clone()
    optimizer.step_base()
    v = take_direction(torch.stack(firsts).mean(0), tilted)
    assert torch.allclose(carried(optimizer), v, **EXACT)
    assert bool(v.count_nonzero()) is skip


def test_a_failed_step_lets_go_of_a_probe_that_waits(problem) -> None:
    task, seen = problem(), []
    optimizer = TSAM(task.parameters, lr=0.1, seed=1, every=2, skip_nonfinite_loss=True, num_samples=3)

    def closure() -> Tensor:
        if seen:
            raise ValueError("no batch")
        loss = task.loss()
        loss.backward()
        seen.extend(weakref.ref(p.grad) for p in task.parameters)
        return loss

    with pytest.raises(ValueError, match="no batch"):
        optimizer.step(closure)
    gc.collect()
    assert all(ref() is None for ref in seen)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_full_step_without_a_usable_gradient_carries_nothing(problem, value: float) -> None:
    task = problem()
    optimizer = TSAM(task.parameters, lr=0.0, seed=1, every=2, rho=0.3, radius=0.3, num_samples=1)

    def spoiled() -> Tensor:
        loss = task.loss()
        loss.backward()
        for p in task.parameters:
            p.grad.flatten()[0] = value
            if value == 0.0:
                p.grad.zero_()
        return loss

    optimizer.step(spoiled)
    assert carried(optimizer).count_nonzero() == 0
    for p in task.parameters:
        p.data.nan_to_num_(0.1)
    grad = torch.cat([g.flatten() for g in torch.autograd.grad(task.loss(), task.parameters)])
    optimizer.estimate_gradient(task.closure(optimizer))
    assert torch.equal(task.gradient(), grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """v is kept in float32, of a complex parameter as two reals an element."""
    torch.manual_seed(0)
    made = torch.float32 if not dtype.is_complex else dtype
    w, x = nn.Parameter(torch.randn(6, 4, dtype=made).to(dtype)), torch.randn(10, 6, dtype=made).to(dtype)
    optimizer = TSAM([w], lr=0.0, seed=1, every=2, rho=1.0, num_samples=1, radius=0.0)

    def closure() -> Tensor:
        loss = ((x @ w).abs().float() ** 3).mean()
        loss.backward()
        return loss

    def real(t: Tensor) -> Tensor:
        return (torch.view_as_real(t) if t.is_complex() else t).flatten().double()

    grads = []
    for sample in optimizer.samples():
        with sample:
            sample.record(closure())
            grads.append(real(w.grad).clone())
    optimizer.apply()
    kept = optimizer.state_dict()["state"][0]["tsam_carry"]
    assert kept.dtype == torch.float32
    v = take_direction(grads[0], grads[1])
    assert torch.allclose(kept.flatten().double(), v, rtol=1e-3, atol=1e-5)
    optimizer.estimate_gradient(closure)
    tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-9}.get(dtype, 1e-5)
    expected = add_direction(grads[0], v)
    assert torch.allclose(real(w.grad), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert (real(w.grad) - grads[0]).norm() > 4 * tolerance * grads[0].norm()


def test_gradients_of_another_optimizer_get_nothing_of_it() -> None:
    """v is this optimizer's; its norms too."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(9, 4).double(), torch.randint(0, 3, (9,))
    optimizer = TSAM(net[0].parameters(), lr=0.1, seed=1, every=2, rho=0.5, model=net, num_samples=3)

    def closure() -> Tensor:
        loss = cross_entropy(net(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    net[2].zero_grad()
    grads = torch.autograd.grad(cross_entropy(net(x), y), list(net.parameters()))
    own = torch.cat([g.flatten() for g in grads[:2]])
    optimizer.estimate_gradient(closure)
    assert all(torch.equal(p.grad, g) for p, g in zip(net[2].parameters(), grads[2:], strict=True))
    found = torch.cat([p.grad.flatten() for p in net[0].parameters()])
    assert torch.allclose(found, add_direction(own, carried(optimizer)), **EXACT)


def test_maximizing_is_minimizing_the_negative(problem) -> None:
    ours, theirs = problem(), problem()
    options: dict[str, Any] = {"lr": 0.1, "seed": 1, "every": 3, "rho": 0.3, "num_samples": 3}
    optimizer, twin = TSAM(ours.parameters, maximize=True, **options), TSAM(theirs.parameters, **options)

    def closure() -> Tensor:
        loss = -ours.loss()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    theirs.train(twin, 5)
    assert all(torch.allclose(a, b, **EXACT) for a, b in zip(ours.parameters, theirs.parameters, strict=True))


def test_the_memory_is_one_copy_of_the_parameters() -> None:
    """Kept between steps beside the scratch: v. The first probe's own memory becomes it."""
    w = nn.Parameter(torch.randn(1000, 10))
    optimizer = TSAM([w], lr=0.1, every=3, num_samples=2, rho=0.3, seed=1)
    places = []

    def closure() -> Tensor:
        loss = mse_loss(w, torch.ones_like(w)) * w.abs().mean()
        loss.backward()
        places.append(w.grad.data_ptr())
        return loss

    optimizer.step(closure)
    kept = optimizer.state_dict()["state"][0]["tsam_carry"]
    assert kept.data_ptr() == places[0]
    w.grad = None
    optimizer.step(closure)
    assert optimizer.state_dict()["state"][0]["tsam_carry"].data_ptr() == places[0]


@pytest.mark.parametrize(("value", "error"), [("both", ValueError), (1, TypeError)])
def test_other_settings_are_refused(value: Any, error: type[Exception]) -> None:
    with pytest.raises((error, ValueError, TypeError), match="TSAM: between: got"):
        TSAM([nn.Parameter(torch.zeros(1))], every=2, between=value)
    with pytest.raises(ValueError, match=r"param_groups\[0\]\.between"):
        TSAM([{"params": [nn.Parameter(torch.zeros(1))], "between": "carry"}])
