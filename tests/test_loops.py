"""Loops that people write: each trains right, or says what is wrong, and leaves everything as it was.

The laws: every pass of a step sees the parameters where it is taken, whatever caches them; a loop that makes no
gradient fails; a gradient that somebody else has accumulated is not dropped without a word; what a forward writes is
not undone silently.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flat_options import WAYS, tsam
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from tsam_ext import TSAM


def bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(("name", "form"), [*itertools.product(WAYS, ("step", "loop")), ("sam", "two steps")])
def test_autocast_around_the_step_is_autocast_inside(problem, name: str, form: str) -> None:
    """Autocast keeps its copies of the weights until its outermost block ends; no pass may see those of another."""
    outside, inside = (problem(dtype=torch.float32, rows=32) for _ in range(2))
    ours, twin = (tsam(t.parameters, lr=0.1, rho=0.5, seed=1, **WAYS[name]) for t in (outside, inside))

    def closure() -> Tensor:
        loss = outside.loss()
        loss.backward()
        return loss

    def within() -> Tensor:
        with bf16():
            loss = inside.loss()
        loss.backward()
        return loss

    for _ in range(2):
        with bf16():
            if form == "step":
                ours.step(closure)
            elif form == "loop":
                for sample in ours.samples():
                    with sample:
                        sample.record(closure())
                ours.apply()
            else:
                ours.zero_grad()
                closure()
                ours.first_step(zero_grad=True)
                closure()
                ours.second_step()
            after = outside.loss()
        twin.step(within)
        with bf16():
            assert torch.equal(after, inside.loss()), "what comes after the step sees the step"
        assert outside.holds(inside.copies())
        if form != "two steps" and name in ("ascent", "noise"):
            assert len(set(ours.diagnostics.losses.tolist())) == 3


def test_autocast_around_perturbed_shows_the_perturbation(problem) -> None:
    task = problem(dtype=torch.float32)
    optimizer = tsam(task.parameters, lr=0.1, rho=1.0, seed=0)
    with bf16():
        before = task.loss()
        with optimizer.perturbed():
            assert not torch.equal(task.loss(), before)
        assert torch.equal(task.loss(), before)


def test_autocast_around_an_estimate_and_its_use_shows_the_weights_of_each_moment(problem) -> None:
    """After the estimate those that it has put back, after apply() those of the step."""
    task = problem(dtype=torch.float32)
    optimizer = tsam(task.parameters, lr=0.5, rho=1.0, seed=0)
    with bf16():
        before = task.loss()
        optimizer.estimate_gradient(task.closure(optimizer))
        assert torch.equal(task.loss(), before)
        optimizer.apply()
        after = task.loss()
    with bf16():
        assert torch.equal(after, task.loss())


@pytest.mark.parametrize("name", WAYS)
def test_cached_parametrizations_around_the_step(problem, name: str) -> None:
    outside, inside = problem(), problem()
    for task in (outside, inside):
        weight_norm(task.net[0])
    ours, twin = (tsam(t.parameters, lr=0.1, rho=0.5, seed=1, **WAYS[name]) for t in (outside, inside))
    for _ in range(2):
        with parametrize.cached():
            ours.step(outside.closure(ours))
        twin.step(inside.closure(twin))
        assert outside.holds(inside.copies())


@pytest.mark.parametrize("name", WAYS)
def test_a_loop_that_never_calls_backward_fails(problem, name: str) -> None:
    """The base would decay the weights and train nothing."""
    task = problem()
    optimizer = tsam(task.parameters, torch.optim.AdamW, weight_decay=0.5, **WAYS[name])
    copies, loss = task.copies(), task.loss()
    for closure in (task.loss, lambda: loss, lambda: 1.0):
        with pytest.raises(RuntimeError, match=r"no parameter has got a gradient: .* call backward\(\)"):
            optimizer.step(closure)
        assert task.holds(copies)
        assert not optimizer.state
        assert optimizer.state_dict()["param_groups"][0]["tsam_step"] == 0
    task.train(optimizer, 1)
    copies = task.copies()
    for closure in (lambda: 1.0, lambda: task.loss().detach()):
        with pytest.raises(RuntimeError, match="left no gradient, and its loss has none"):
            optimizer.step(closure)
        assert task.holds(copies)


def test_the_first_half_of_sam_needs_a_gradient(problem) -> None:
    task = problem()
    optimizer = tsam(task.parameters, lr=0.1, **WAYS["sam"])
    with pytest.raises(RuntimeError, match="no parameter has got a gradient"):
        optimizer.first_step()
    task.loss().backward()
    optimizer.first_step()
    task.loss().backward()
    optimizer.second_step()


def test_a_pass_without_gradients_counts_as_zeros_and_is_said_once(problem) -> None:
    """An expert that no row was sent to."""
    task = problem()
    optimizer = tsam(task.parameters, lr=0.1)
    task.train(optimizer, 1)
    stranger = torch.zeros((), requires_grad=True)
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="no gradient, which counts as zeros"):
        optimizer.step(lambda: stranger * 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: stranger * 1.0)
    assert all(p.grad is None for p in task.parameters)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_none_without_a_gradient_is_a_skipped_batch(problem, base: type[torch.optim.Optimizer]) -> None:
    """As if there had been no call: parameters, p.grad, the base's state, step, noise, random numbers, buffers."""
    ours, theirs = problem(dropout=0.3), problem(dropout=0.3)
    optimizer, twin = (tsam(t.parameters, base, lr=0.1, seed=4) for t in (ours, theirs))
    generator = torch.random.get_rng_state()
    ours.train(optimizer, 2)
    after = torch.random.get_rng_state()
    gradients = [p.grad for p in ours.parameters]
    values = ours.gradient()
    before = optimizer.state_dict()["param_groups"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.step(lambda: None) is None
        assert optimizer.estimate_gradient(lambda: None) is None
    assert all(p.grad is g for p, g in zip(ours.parameters, gradients, strict=True))
    assert torch.equal(ours.gradient(), values)
    assert optimizer.state_dict()["param_groups"] == before
    with pytest.raises(RuntimeError, match="needs an estimate"):
        optimizer.step()
    ours.train(optimizer, 1)
    torch.random.set_rng_state(generator)
    theirs.train(twin, 2)
    assert torch.equal(torch.random.get_rng_state(), after)
    theirs.train(twin, 1)
    assert ours.holds(theirs.copies())


def test_who_skips_at_random_draws_anew(problem) -> None:
    """A skipped batch leaves generators as one forward would, or the same number would skip for ever."""
    task, drawn = problem(), []
    optimizer = tsam(task.parameters, lr=0.1)
    task.train(optimizer, 1)
    for _ in range(3):
        optimizer.step(lambda: drawn.append(float(torch.rand(()))))
    assert len(set(drawn)) == 3


def test_a_first_closure_that_forgets_everything_is_told(problem) -> None:
    task = problem()
    optimizer = tsam(task.parameters, lr=0.1)
    with pytest.warns(UserWarning, match="counts as no batch"):
        optimizer.step(lambda: None)


def in_microbatches(task: Any, optimizer: TSAM) -> None:
    task.loss(task.x[:6], task.y[:6]).backward()
    optimizer.step(task.closure(optimizer))


def after_a_step(task: Any, optimizer: TSAM) -> None:
    task.train(optimizer, 1)
    optimizer.zero_grad()
    in_microbatches(task, optimizer)


def on_top_of_ours(task: Any, optimizer: TSAM) -> None:
    task.train(optimizer, 1)
    in_microbatches(task, optimizer)


def into_zeros(task: Any, optimizer: TSAM) -> None:
    for parameter in task.parameters:
        parameter.grad = torch.zeros_like(parameter)
    in_microbatches(task, optimizer)


ACCUMULATES: dict[str, Callable[[Any, TSAM], None]] = {
    "microbatch": in_microbatches,
    "after a step": after_a_step,
    "on top of ours": on_top_of_ours,
    "into zeros": into_zeros,
}


@pytest.mark.parametrize("name", ACCUMULATES)
def test_a_gradient_accumulated_before_the_step_is_said(problem, name: str) -> None:
    task = problem()
    optimizer = tsam(task.parameters, lr=0.1)
    with pytest.warns(UserWarning, match=r"accumulated before the step.*inside the closure"):
        ACCUMULATES[name](task, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        in_microbatches(task, optimizer)


def clipped(task: Any, optimizer: TSAM) -> None:
    optimizer.estimate_gradient(task.closure(optimizer))
    nn.utils.clip_grad_norm_(task.parameters, 0.1)
    optimizer.apply()


def unused(task: Any, optimizer: TSAM) -> None:
    """What a scaler that skips does: the estimate is never applied."""
    optimizer.estimate_gradient(task.closure(optimizer))
    for parameter in task.parameters:
        parameter.grad.mul_(2.0)


def by_another(task: Any, optimizer: TSAM) -> None:
    """What the optimizer of an earlier phase, or the original of a copy, has left in p.grad."""
    earlier = TSAM(task.parameters, lr=0.1, num_samples=3)
    task.train(earlier, 1)
    task.train(TSAM(task.parameters, lr=0.1, num_samples=3), 2)
    original = task.net
    task.net, copied = copy.deepcopy((original, optimizer))
    task.train(copied, 2)
    task.net = original


CLEARS: dict[str, Callable[[Any, TSAM], Any]] = {
    "to none": lambda task, optimizer: (optimizer.zero_grad(), task.train(optimizer, 1)),
    "to zero": lambda task, optimizer: (optimizer.zero_grad(set_to_none=False), task.train(optimizer, 1)),
    "never": lambda task, optimizer: task.train(optimizer, 1),
    "clipped": clipped,
    "unused": unused,
    "by another": by_another,
    "by the model": lambda task, optimizer: (task.net.zero_grad(), task.train(optimizer, 1)),
}


@pytest.mark.parametrize("name", CLEARS)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_a_gradient_that_is_ours_or_cleared_is_no_accumulation(problem, base: Any, name: str) -> None:
    task = problem()
    optimizer = tsam(task.parameters, base, lr=0.1, weight_decay=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            CLEARS[name](task, optimizer)


def test_accumulation_inside_the_closure_is_the_whole_batch(problem) -> None:
    ours, theirs = problem(), problem()
    optimizer, twin = (tsam(t.parameters, lr=0.1, seed=3) for t in (ours, theirs))

    def closure() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for x, y in zip(ours.x.chunk(3), ours.y.chunk(3), strict=True):
            loss = ours.loss(x, y) / 3
            loss.backward()
            total += loss.detach()
        return total

    for _ in range(3):
        optimizer.step(closure)
        theirs.train(twin, 1)
    torch.testing.assert_close(ours.flat(), theirs.flat(), rtol=0, atol=1e-14)


class Bounded(nn.Module):
    """An embedding whose rows forward keeps short, and a head."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.rows = nn.Embedding(6, 4, max_norm=1.0 if how == "max_norm" else None)
        self.head = nn.Linear(4, 2)

    def forward(self, index: Tensor) -> Tensor:
        if self.how == "clamp_":
            with torch.no_grad():
                self.rows.weight.clamp_(-1.0, 1.0)
        return self.head(self.rows(index))


@pytest.mark.parametrize("how", ["max_norm", "clamp_"])
@pytest.mark.parametrize("name", WAYS)
def test_a_parameter_that_forward_writes_is_refused(name: str, how: str) -> None:
    net = Bounded(how)
    index = torch.arange(6)
    optimizer = tsam(net.parameters(), lr=0.1, **WAYS[name])

    def closure() -> Tensor:
        loss = net(index).square().mean()
        loss.backward()
        return loss

    copies = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['params'\]\[0\] was written .*after the step"):
        optimizer.step(closure)
    if name != "sam":  # whose first pass is at the parameters themselves: what it wrote is not undone
        assert all(map(torch.equal, net.parameters(), copies))


def test_writing_what_is_not_perturbed_is_allowed() -> None:
    net = Bounded("max_norm")
    groups = [{"params": net.rows.parameters(), "rho": 0.0}, {"params": net.head.parameters()}]
    optimizer = TSAM(groups, lr=0.1, num_samples=3)

    def closure() -> Tensor:
        loss = net(torch.arange(6)).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    net(torch.arange(6))
    assert float(net.rows.weight.norm(dim=1).max()) <= 1.0 + 1e-5


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints_recompute_the_masks_of_their_pass(problem, reentrant: bool) -> None:
    """Dropout inside a checkpointed block: the same step as without checkpointing."""
    ours, theirs = problem(dropout=0.5), problem(dropout=0.5)
    optimizer, twin = (tsam(t.parameters, lr=0.1, seed=2) for t in (ours, theirs))

    def closure() -> Tensor:
        inputs = ours.x.clone().requires_grad_()
        out = checkpoint(ours.net, inputs, use_reentrant=reentrant)
        loss = nn.functional.cross_entropy(out, ours.y)
        loss.backward()
        return loss

    state = torch.random.get_rng_state()
    for _ in range(2):
        optimizer.step(closure)
    torch.random.set_rng_state(state)
    theirs.train(twin, 2)
    assert ours.holds(theirs.copies())
