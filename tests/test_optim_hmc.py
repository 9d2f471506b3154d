"""The sampler hmc as an optimizer: what it calls, counts, weighs, restores, reports and refuses.

That it samples the right density is in test_hmc_exact.py, that it computes the formulas in test_hmc_parity.py.
Laws here: 1 + N (burn_in + s) closure calls; weights softmax((tilt - delta) L). What grows with the dimension is in
test_hmc_scale.py, exceptions are in test_optim_restore.py, checkpoints in test_optim_state.py.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flat_options import tsam
from torch import Tensor

from tsam_ext.engine.state import CHAIN_SLOTS, ChainSlot

HMC: dict[str, Any] = {"sampler": "hmc", "lr": 0.1, "rho": 0.5, "seed": 3}
PRIORS = ["gaussian", "ball"]


def counting(task: Any, calls: list[float]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        loss = task.loss()
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    return closure


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize(("n", "s", "burn_in"), [(1, 1, 0), (1, 3, 0), (3, 2, 0), (2, 2, 3)])
@pytest.mark.parametrize("delta", [1.0, 1e6])  # the second is rejected nearly always
def test_the_closure_runs_once_a_gradient(problem, prior: str, n: int, s: int, burn_in: int, delta: float) -> None:
    task, calls = problem(), []
    options = {"num_leapfrog_steps": n, "num_samples": s, "burn_in": burn_in, "delta": delta, "prior": prior}
    optimizer = tsam(task.parameters, **HMC, **options)
    for step in range(1, 4):
        optimizer.step(counting(task, calls))
        assert len(calls) == step * (1 + n * (burn_in + s))
    if delta == 1e6:
        assert optimizer.diagnostics._of_chain(ChainSlot.ACCEPTED) < s + burn_in


def test_a_sample_is_the_chain_s_state_after_each_trajectory_and_the_start_is_none(problem) -> None:
    """The losses that the step counts, against those that the closure saw and the decisions read afterwards."""
    task, calls = problem(), []
    optimizer = tsam(task.parameters, **HMC, num_samples=6, delta=300.0, tilt=2.0, adapt_step_size=False)
    optimizer.step(counting(task, calls))
    losses, energies = optimizer.diagnostics.losses.tolist(), optimizer.diagnostics.energy_errors.tolist()
    current, accepted = calls[0], 0
    for proposal, loss in zip(calls[1:], losses, strict=True):
        accepted += loss == proposal
        current = proposal if loss == proposal else current
        assert loss == current
    assert 0 < accepted < 6  # else this shows nothing
    assert accepted == int(optimizer.diagnostics._of_chain(ChainSlot.ACCEPTED))
    rate = sum(min(1.0, math.exp(-e)) for e in energies) / 6
    assert float(optimizer.diagnostics.acceptance_rate) == pytest.approx(rate, rel=1e-12)
    weights = ((2.0 - 300.0) * (optimizer.diagnostics.losses - losses[0])).softmax(0)
    assert torch.allclose(optimizer.diagnostics.weights, weights, rtol=1e-9)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("burn_in", [0, 2])
def test_the_gradient_is_the_weighted_mean_at_the_chain_s_states(problem, prior: str, burn_in: int) -> None:
    task, seen = problem(), []

    def closure() -> Tensor:
        loss = task.loss()
        loss.backward()
        seen.append((float(loss.detach()), [p.grad.clone() for p in task.parameters]))
        return loss

    options = {"num_samples": 4, "num_leapfrog_steps": 2, "delta": 20.0, "tilt": 25.0, "burn_in": burn_in}
    optimizer = tsam(task.parameters, **HMC, **options, prior=prior)
    for _ in range(3):
        seen.clear()
        optimizer.estimate_gradient(closure)
        by_loss = dict(seen)
        losses, weights = optimizer.diagnostics.losses, optimizer.diagnostics.weights
        for k, p in enumerate(task.parameters):
            want = sum(w * by_loss[float(loss)][k] for w, loss in zip(weights, losses, strict=True))
            torch.testing.assert_close(p.grad, want, rtol=1e-12, atol=1e-14)
        optimizer.apply()


def test_delta_follows_the_tilt_unless_told(problem) -> None:
    task = problem()
    for options, want in (({"tilt": 7.0}, 7.0), ({"tilt": 7.0, "delta": -2.0}, -2.0), ({"tilt": float}, 0.0)):
        optimizer = tsam(task.parameters, **HMC, **options)
        task.train(optimizer, 1)
        assert optimizer.diagnostics.delta == want
    tensor = torch.tensor(4.0)
    optimizer = tsam(task.parameters, **HMC, delta=tensor)
    task.train(optimizer, 1)
    tensor.fill_(5.0)
    task.train(optimizer, 1)
    assert optimizer.diagnostics.delta == 5.0


def test_automatic_delta_is_the_rule(problem) -> None:
    """delta_scale √d / |T∇L| with the norm a running mean over the steps' first gradients."""
    task, norms = problem(), []
    d = task.flat().numel()
    optimizer = tsam(task.parameters, **HMC, delta="auto", delta_scale=1.5, adaptive=True)
    for _ in range(30):
        start = task.copies()
        first: list[float] = []

        def closure(start: list[Tensor] = start, first: list[float] = first) -> Tensor:
            loss = task.loss()
            loss.backward()
            if not first:
                squares = [(0.5 * o.abs() * p.grad).square().sum() for o, p in zip(start, task.parameters, strict=True)]
                first.append(float(sum(squares)) ** 0.5)
            return loss

        optimizer.step(closure)
        norms.append(first[0])
        mean = 0.0
        for k, norm in enumerate(norms):
            mean += (norm - mean) / min(k + 1, 20)
        assert float(optimizer.diagnostics.delta) == pytest.approx(1.5 * d**0.5 / mean, rel=1e-9)


def test_the_chain_goes_on_from_step_to_step_and_restarts_where_it_is_unknown(problem) -> None:
    task = problem()
    optimizer = tsam(task.parameters, **HMC, delta=0.0, num_samples=1)
    task.train(optimizer, 1)
    before = optimizer.chain_position()
    start: list[Tensor] = []

    def closure() -> Tensor:
        if not start:
            start.extend(task.copies())
        loss = task.loss()
        loss.backward()
        return loss

    origin = task.copies()
    optimizer.step(closure)
    for s, o, e in zip(start, origin, before, strict=True):
        torch.testing.assert_close(s, o + e, rtol=1e-14, atol=1e-14)
    position = optimizer.chain_position()
    assert not any(torch.equal(a, b) for a, b in zip(before, position, strict=True))
    with optimizer.perturbed():
        moved = [p - o for p, (_, o) in zip(task.copies(), optimizer._progress.scratch.values(), strict=True)]
    for a, b in zip(moved, position, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    extra = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra]})
    task.train(optimizer, 1)
    assert len(optimizer.chain_position()) == len(before) + 1


def test_fresh_chains_start_from_the_prior(problem) -> None:
    task, starts = problem(), []
    optimizer = tsam(task.parameters, **HMC, chain="fresh", delta=0.0, num_samples=1)
    for _ in range(2):
        calls: list[Tensor] = []

        def closure(calls: list[Tensor] = calls) -> Tensor:
            calls.append(task.flat())
            loss = task.loss()
            loss.backward()
            return loss

        origin = task.flat()
        optimizer.step(closure)
        starts.append(calls[0] - origin)
    noise = tsam(task.parameters, lr=0.0, rho=0.5, seed=3, sampler="noise", num_samples=1)
    with noise.perturbed():
        inside = task.flat()
    assert not torch.allclose(starts[0], starts[1])
    # The prior's draw is that of the sampler `noise`, step and sample alike.
    torch.testing.assert_close(starts[0], inside - task.flat(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_proposal_whose_loss_is_not_finite_is_rejected(problem, bad: float) -> None:
    task, calls = problem(), []

    def closure() -> Tensor:
        loss = task.loss()
        loss.backward()
        calls.append(float(loss.detach()))
        return loss * bad if len(calls) == 3 else loss

    optimizer = tsam(task.parameters, **HMC, delta=1.0, num_samples=3)
    optimizer.step(closure)
    losses = optimizer.diagnostics.losses
    assert losses.isfinite().all()
    assert losses[1] == losses[0]
    assert optimizer.diagnostics.num_divergent == 1
    assert all(p.grad.isfinite().all() for p in task.parameters)


def test_other_groups_frozen_and_unused_parameters(problem) -> None:
    task = problem()
    frozen = torch.nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
    unused = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    still, *moving = task.parameters
    groups = [{"params": [*moving, unused, frozen]}, {"params": [still], "rho": 0.0}]
    seen: list[list[Tensor]] = []

    def closure() -> Tensor:
        seen.append([p.detach().clone() for p in (still, frozen, unused, *moving)])
        loss = task.loss()
        loss.backward()
        return loss

    optimizer = tsam(groups, **HMC, delta=1.0)
    before = [p.detach().clone() for p in (still, frozen, unused, *moving)]
    optimizer.estimate_gradient(closure)
    for values in seen:
        assert torch.equal(values[0], before[0])
        assert torch.equal(values[1], before[1])
        assert not any(torch.equal(a, b) for a, b in zip(values[2:], before[2:], strict=True))
    assert still.grad is not None
    assert unused.grad is None
    assert frozen.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_parameters(problem, dtype: torch.dtype) -> None:
    task = problem(dtype=dtype)
    before = task.copies()
    optimizer = tsam(task.parameters, **{**HMC, "lr": 0.0}, num_leapfrog_steps=2, delta=1.0)
    task.train(optimizer, 3)
    assert task.holds(before)
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in task.parameters)
    assert optimizer.chain_position()[0].dtype == dtype


def test_the_step_size_moves_towards_its_target_and_no_further(problem) -> None:
    task = problem()
    optimizer = tsam(task.parameters, **HMC, delta=0.0)
    task.train(optimizer, 3)
    assert float(optimizer.diagnostics.step_size) == pytest.approx(math.pi / 2, rel=1e-12)
    optimizer = tsam(task.parameters, **HMC, delta=0.0, step_size=0.5)
    task.train(optimizer, 3)
    assert float(optimizer.diagnostics.step_size) == pytest.approx(0.5 * math.exp(3 * 0.05 * 0.2), rel=1e-12)
    optimizer = tsam(task.parameters, **HMC, delta=1e7)
    for _ in range(3):
        before = float(optimizer.diagnostics.step_size)
        task.train(optimizer, 1)
        rate = float(optimizer.diagnostics.acceptance_rate)
        if not math.isnan(before):
            assert float(optimizer.diagnostics.step_size) == pytest.approx(before * math.exp(0.05 * (rate - 0.8)))
    fixed = tsam(task.parameters, **HMC, delta=1e7, adapt_step_size=False)
    task.train(fixed, 2)
    assert float(fixed.diagnostics.step_size) == pytest.approx(math.pi / 2, rel=1e-12)


def test_another_sampler_has_nothing_to_say_of_a_chain(problem) -> None:
    task = problem()
    other = tsam(task.parameters, lr=0.1)
    task.train(other, 1)
    assert other.diagnostics.acceptance_rate.isnan()
    assert other.diagnostics.energy_errors.isnan().all()


PROGRAM = """
import hashlib, sys, torch
from tsam_ext import HMC, TSAM, _C
torch.set_num_threads(int(sys.argv[1]))
digest = hashlib.sha256()
for prior in ("gaussian", "ball"):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in (70_001, 13, 1, 140_000)]
        def closure():
            for i, p in enumerate(params):
                p.grad = torch.ones_like(p).mul_(1 + i)
            return params[1].detach().double().sum()
        optimizer = TSAM(params, lr=0.1, sampler=HMC(delta=3.0, num_leapfrog_steps=2, prior=prior), rho=0.5, seed=5,
                         adaptive=True)
        for _ in range(2):
            optimizer.step(closure)
        for tensor in (*params, *optimizer.chain_position(), optimizer._progress.sampler_state.scalars):
            digest.update(tensor.detach().view(torch.uint8).numpy().tobytes())
print(_C.__isa__, digest.hexdigest())
"""


def test_the_same_bits_on_every_instruction_set_and_thread_count() -> None:
    flags = Path("/proc/cpuinfo").read_text()
    sets = ["baseline", *(["avx2"] if "avx2" in flags else []), *(["avx512"] if "avx512bw" in flags else [])]
    digests = set()
    for isa in sets:
        for threads in ("1", "3") if isa == sets[-1] else ("2",):
            environment = {**os.environ, "TSAM_ISA": isa}
            command = [sys.executable, "-c", PROGRAM, threads]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr
            ran, digest = done.stdout.split()
            assert ran == isa
            digests.add(digest)
    assert len(digests) == 1
    assert digests != {hashlib.sha256().hexdigest()}


def test_the_slots_are_those_of_the_header() -> None:
    text = (Path(__file__).parents[1] / "csrc" / "core" / "metropolis.h").read_text()
    slots = {name: int(value) for name, value in re.findall(r"\bk(\w+) = (\d+)[,\s]", text)}
    for name, value in vars(ChainSlot).items():
        if not name.startswith("_"):
            assert slots["".join(part.capitalize() for part in name.split("_"))] == value
    assert slots["Chain"] == CHAIN_SLOTS


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"batch": "split"}, ValueError, "batch: got 'split', expected 'whole', as the sampler is HMC"),
    ({"radius": 0.1}, ValueError, "radius: got 0.1, expected None (the scale is rho), as the sampler is HMC"),
    ({"same_masks": False}, ValueError, "same_masks: got False, expected True, as the sampler is HMC"),
    ({"tilt": math.inf}, ValueError, "tilt: got inf, expected a finite tilt, as the sampler is HMC with delta=None"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_settings_that_mean_nothing_are_refused(problem, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(f"TSAM: {message}")):
        tsam(problem().parameters, **{**HMC, **options})


def test_chain_position_is_refused_where_there_is_none(problem) -> None:
    task = problem()
    for optimizer in (tsam(task.parameters, **HMC), tsam(task.parameters, lr=0.1)):
        with pytest.raises(RuntimeError, match="chain_position"):
            optimizer.chain_position()


def test_burn_in_is_not_counted(problem) -> None:
    """The losses and the mean are those of the last s trajectories; a longer run without burn-in has them last."""
    found = []
    for s, burn_in in ((5, 0), (2, 3)):
        task = problem()
        optimizer = tsam(task.parameters, **HMC, num_samples=s, burn_in=burn_in, delta=300.0, tilt=300.0)
        optimizer.estimate_gradient(counting(task, []))
        found.append((optimizer.diagnostics.losses[-2:], optimizer.diagnostics.num_nonfinite, task.gradient()))
    assert torch.equal(found[0][0], found[1][0])
    assert found[1][0].isfinite().all()
    assert found[1][1] == 0
    assert not torch.allclose(found[0][2], found[1][2])
