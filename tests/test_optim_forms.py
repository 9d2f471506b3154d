"""The ways to write a step: closure, estimate and apply, samples(), SAM's halves, perturbed().

All are one estimate, so all give the same bits: twins that start from the same bits are compared.
Invariant: whatever a form does wrong, it raises, and the parameters are what they were.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flat_options import tsam
from torch import Tensor

from tsam_ext import TSAM, reference
from tsam_ext.engine.checks import NOISES

SETTINGS: list[dict[str, Any]] = [
    {"sampler": "noise"},
    {"sampler": "ascent"},
    {"sampler": "ascent", "num_samples": 1, "radius": 0.0},
    {"sampler": "ascent", "batch": "split", "tilt": math.inf},
    {"sampler": "noise", "every": 2, "antithetic": True},
]


def pair(problem: Any, **options: Any) -> tuple[Any, ...]:
    """Two twins, each with its optimizer."""
    options = {"lr": 0.1, "momentum": 0.9, "rho": 0.3, "seed": 1, **options}
    first, second = problem(), problem()
    return first, tsam(first.parameters, **options), second, tsam(second.parameters, **options)


def loop(task: Any, optimizer: TSAM) -> list[float]:
    losses = []
    for sample in optimizer.samples():
        with sample:
            x, y = optimizer.part(task.x, task.y)
            loss = task.loss(x, y)
            loss.backward()
            sample.record(loss)
            losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("options", SETTINGS)
def test_the_samples_loop_is_the_closure(problem, options: dict[str, Any]) -> None:
    ours, optimizer, theirs, twin = pair(problem, **options)
    for _ in range(3):
        losses = loop(ours, optimizer)
        optimizer.apply()
        before = len(theirs.calls)
        assert theirs.train(twin, 1) == losses[:1]
        assert len(losses) == len(theirs.calls) - before
        assert ours.holds(theirs.copies())
        assert torch.equal(optimizer.diagnostics.losses, twin.diagnostics.losses)


def test_several_backward_calls_accumulate(problem) -> None:
    """Two halves of the batch, one backward each, in the loop; the same sums in a closure."""
    ours, optimizer, theirs, twin = pair(problem)

    def halves(task: Any) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for rows in (slice(0, 6), slice(6, 12)):
            loss = task.loss(task.x[rows], task.y[rows]) / 2
            loss.backward()
            total += loss.detach()
        return total

    for _ in range(3):
        for sample in optimizer.samples():
            with sample:
                sample.record(halves(ours))
        optimizer.apply()
        twin.step(lambda: halves(theirs))
        assert ours.holds(theirs.copies())
    theirs.net.load_state_dict(problem().net.state_dict())
    whole = tsam(theirs.parameters, lr=0.1, momentum=0.9, rho=0.3, seed=1)
    theirs.train(whole, 3)
    torch.testing.assert_close(ours.flat(), theirs.flat(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", SETTINGS)
def test_estimate_then_apply_is_step(problem, options: dict[str, Any]) -> None:
    ours, optimizer, theirs, twin = pair(problem, **options)
    for _ in range(3):
        copies = ours.copies()
        loss = optimizer.estimate_gradient(ours.closure(optimizer))
        assert ours.holds(copies)
        assert (loss.requires_grad, loss.shape) == (False, ())
        optimizer.step()
        assert [float(loss)] == theirs.train(twin, 1)
        assert ours.holds(theirs.copies())


def test_estimating_twice_gives_the_same_gradient_and_one_step(problem) -> None:
    ours, optimizer, theirs, twin = pair(problem)
    optimizer.estimate_gradient(ours.closure(optimizer))
    first = ours.gradient().clone()
    optimizer.estimate_gradient(ours.closure(optimizer))
    assert torch.equal(ours.gradient(), first)
    optimizer.apply()
    theirs.train(twin, 1)
    assert ours.holds(theirs.copies())
    assert optimizer.state_dict()["param_groups"][0]["tsam_step"] == 1


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_closure_may_zero_and_may_return_a_number(problem, set_to_none: bool) -> None:
    ours, optimizer, theirs, twin = pair(problem)

    def closure() -> float:
        optimizer.zero_grad(set_to_none)
        loss = ours.loss()
        loss.backward()
        return loss.item()

    for _ in range(3):
        assert [float(optimizer.step(closure))] == theirs.train(twin, 1)
        assert ours.holds(theirs.copies())


def test_the_returned_loss_is_the_first_pass_s_own_value(problem) -> None:
    """Also where every pass leaves its loss in the same tensor, which the next pass then overwrites."""
    ours, optimizer, theirs, twin = pair(problem)
    memory = torch.zeros((), dtype=torch.float64)

    def closure() -> Tensor:
        loss = ours.loss()
        loss.backward()
        return memory.copy_(loss.detach())

    assert [float(optimizer.step(closure))] == theirs.train(twin, 1)
    assert float(memory) == float(twin.diagnostics.losses[-1])


def test_step_without_an_estimate_raises(problem) -> None:
    task = problem()
    optimizer = tsam(task.parameters, lr=0.1)
    copies = task.copies()
    for call in (optimizer.step, optimizer.apply):
        with pytest.raises(RuntimeError, match="estimate"):
            call()
    task.loss().backward()  # a plain gradient is no estimate
    with pytest.raises(RuntimeError, match=r"step\(closure\)"):
        optimizer.step()
    assert task.holds(copies)
    task.train(optimizer, 1)
    with pytest.raises(RuntimeError):
        optimizer.step()  # each estimate serves one step
    optimizer.estimate_gradient(task.closure(optimizer))
    optimizer.apply()


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_break_restores_and_leaves_no_estimate(problem, stop: int) -> None:
    ours, optimizer, theirs, twin = pair(problem)
    copies, moved = ours.copies(), []
    for k, sample in enumerate(optimizer.samples()):
        with sample:
            moved.append(not ours.holds(copies))
            loss = ours.loss()
            loss.backward()
            sample.record(loss)
        if k == stop:
            break
    assert any(moved)
    assert ours.holds(copies)
    assert all(p.grad is None for p in ours.parameters)
    with pytest.raises(RuntimeError):
        optimizer.apply()
    assert ours.train(optimizer, 2) == theirs.train(twin, 2)
    assert ours.holds(theirs.copies())


def test_misuse_of_the_loop_raises_and_restores(problem) -> None:
    task = problem()
    optimizer = tsam(task.parameters, lr=0.1)
    copies = task.copies()

    def no_record() -> None:
        for sample in optimizer.samples():
            with sample:
                task.loss().backward()

    def no_with() -> None:
        for _ in optimizer.samples():
            task.loss().backward()

    def vector() -> None:
        for sample in optimizer.samples():
            with sample:
                sample.record(torch.zeros(2))

    for misuse, error in ((no_record, "record"), (no_with, "with sample"), (vector, "loss")):
        with pytest.raises((RuntimeError, ValueError), match=error):
            misuse()
        assert task.holds(copies)

    async def waits() -> float:
        return 1.0

    def forgets() -> None:
        task.loss().backward()

    returns = ("2.0", "'2.0'"), ((1.0, 2.0), "tuple"), (True, "True"), ({"loss": 1.0}, "dict")
    closures = [(lambda value=value: value, what) for value, what in returns]
    for closure, what in [*closures, (waits, "coroutine"), (forgets, "None")]:
        match = rf"^TSAM: loss: got {what}, expected a floating-point tensor of one element or a number \(a closure has"
        with pytest.raises(TypeError, match=match):
            optimizer.step(closure)
        assert task.holds(copies)
    old = next(iter(optimizer.samples()))
    task.train(optimizer, 1)
    with pytest.raises(RuntimeError), old:
        pass


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("zero_grad", [False, True])
def test_two_halves_of_sam_are_one_step(problem, adaptive: bool, zero_grad: bool) -> None:
    options = {"num_samples": 1, "radius": 0.0, "adaptive": adaptive}
    ours, optimizer, theirs, twin = pair(problem, **options)
    for _ in range(3):
        optimizer.zero_grad()
        loss = ours.loss()
        loss.backward()
        optimizer.first_step(zero_grad=True)
        assert not ours.holds(theirs.copies())
        ours.loss().backward()
        optimizer.second_step(zero_grad=zero_grad)
        assert (ours.parameters[0].grad is None) == zero_grad
        assert theirs.train(twin, 1) == [float(loss.detach())]
        assert ours.holds(theirs.copies())
    assert optimizer.state_dict()["param_groups"][0]["tsam_step"] == 3
    with pytest.raises(RuntimeError, match="first_step"):
        optimizer.second_step()


NOT_SAM: list[dict[str, Any]] = [
    {},
    {"num_samples": 1, "radius": 0.05},
    {"num_samples": 2, "radius": 0.0},
    {"sampler": "noise", "num_samples": 1},
]


@pytest.mark.parametrize("options", NOT_SAM)
def test_the_two_halves_need_sam(problem, options: dict[str, Any]) -> None:
    task = problem()
    optimizer = tsam(task.parameters, lr=0.1, **options)
    copies = task.copies()
    task.loss().backward()
    for half in (optimizer.first_step, optimizer.second_step):
        with pytest.raises(RuntimeError, match=r"samples\(\)"):
            half()
    assert task.holds(copies)


@pytest.mark.parametrize("noise", NOISES)
def test_perturbed_shows_the_noise_and_restores(problem, noise: str) -> None:
    """The noise that the oracle draws; a second time the same; bit-identical after exceptions too."""
    task = problem()
    options = {"sampler": "noise", "noise": noise, "radius": 1.5, "seed": 9}
    optimizer = tsam(task.parameters, lr=0.1, **options)
    copies = task.copies()
    offsets = reference.base_offsets([p.numel() for p in task.parameters])
    nu = reference.unit_noise(task.parameters, offsets, seed=9, step=0, sample=0, noise=noise)
    for _ in range(2):
        with optimizer.perturbed():
            inside = task.copies()
            assert torch.is_grad_enabled()
        for p, o, v in zip(inside, copies, nu, strict=True):
            torch.testing.assert_close(p, o + 1.5 * v, rtol=1e-6, atol=1e-6)
        assert task.holds(copies)
    with pytest.raises(KeyError), optimizer.perturbed():
        raise KeyError
    assert task.holds(copies)
    with torch.no_grad(), optimizer.perturbed():
        pass
    ours = problem()
    twin = tsam(ours.parameters, lr=0.1, **options)
    assert task.train(optimizer, 2) == ours.train(twin, 2)  # looking changed nothing
    assert task.holds(ours.copies())


def test_perturbed_cannot_be_entered_twice_or_stepped_in(problem) -> None:
    """Either works or raises; in both cases the parameters come back bit for bit."""
    task = problem()
    optimizer = tsam(task.parameters, lr=0.0, sampler="noise", radius=1.0, seed=9)
    copies = task.copies()
    attempts = [
        lambda: optimizer.perturbed(1).__enter__(),
        lambda: task.train(optimizer, 1),
        lambda: next(iter(optimizer.samples())),
    ]
    for attempt in attempts:
        try:
            with optimizer.perturbed():
                inside = task.copies()
                try:
                    attempt()
                finally:
                    assert task.holds(inside)
        except RuntimeError as error:
            assert "perturbed" in str(error)  # noqa: PT017
        assert task.holds(copies)


def test_perturbed_ascends_along_gradients_that_exist(problem) -> None:
    """SAM's point θ + rho g/‖g‖ from p.grad, which stays; θ itself without gradients."""
    task = problem()
    optimizer = tsam(task.parameters, lr=0.1, rho=0.4, radius=0.0)
    theta = task.flat()
    with optimizer.perturbed():
        assert torch.equal(task.flat(), theta)
    task.loss().backward()
    gradient = task.gradient().clone()
    with optimizer.perturbed():
        moved = theta + 0.4 * gradient / gradient.norm()
        torch.testing.assert_close(task.flat(), moved, rtol=1e-12, atol=1e-14)
    assert torch.equal(task.flat(), theta)
    assert torch.equal(task.gradient(), gradient)


def test_part_takes_what_a_batch_is_made_of(problem) -> None:
    task = problem()
    optimizer = tsam(task.parameters, lr=0.1, batch="split", sampler="noise")
    x, names = torch.arange(12.0), [f"row {i}" for i in range(12)]
    assert torch.equal(optimizer.part(x), x)  # outside a step: everything
    seen = []

    def loss(*_: object) -> Tensor:
        value = task.loss()
        value.backward()
        return value

    def closure() -> Tensor:
        part, labels = optimizer.part(x, names)
        seen.append((part.tolist(), labels))
        return loss()

    optimizer.estimate_gradient(closure)
    assert seen[1] == ([4.0, 5.0, 6.0, 7.0], ["row 4", "row 5", "row 6", "row 7"])
    copies = task.copies()
    with pytest.raises(ValueError, match=r"part.*11 rows.*12"):
        optimizer.step(lambda: optimizer.part(x, x[1:]) and loss())
    with pytest.raises(TypeError, match="part"):
        optimizer.part()
    with pytest.raises(RuntimeError, match="part"):
        optimizer.step(loss)  # a split batch that nobody split
    passes = iter([True, False])
    with pytest.raises(RuntimeError, match=r"opt\.part.*in each pass"):  # or in its first pass only
        optimizer.step(lambda: loss(next(passes) and optimizer.part(x)))
    lengths = iter([12, 10])
    with pytest.raises(ValueError, match=r"10 rows.*12"):
        optimizer.step(lambda: loss(optimizer.part(x[: next(lengths)])))
    assert task.holds(copies)
