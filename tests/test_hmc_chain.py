"""What the chain of the sampler hmc carries from step to step: checkpoints, and parameters that come, rest and leave.

Laws: a state that TSAM did not write is refused before anything changes, whatever it holds; a chain goes on only where
every perturbed parameter has a position under the same prior, and starts anew otherwise; |u| <= 1 in the ball, always.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flat_options import tsam
from torch import Tensor

from tsam_ext import _C, TSAM
from tsam_ext.chain import KEPT
from tsam_ext.engine.state import CHAIN_SLOTS, ChainSlot
from tsam_ext.functional import new_state

HMC: dict[str, Any] = {"sampler": "hmc", "lr": 0.1, "rho": 0.5, "seed": 3, "delta": 10.0}


def first_position(optimizer: TSAM, task: Any) -> list[Tensor]:
    """The perturbations at which the next step begins."""
    origin, seen = task.copies(), []

    def closure() -> Tensor:
        if not seen:
            seen.extend(p - o for p, o in zip(task.copies(), origin, strict=True))
        loss = task.loss()
        loss.backward()
        return loss

    optimizer.estimate_gradient(closure)
    return seen


def edited(state: dict[str, Any], *path: Any, to: Any) -> dict[str, Any]:
    state = copy.deepcopy(state)
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return state


def group(name: str) -> tuple[Any, ...]:
    return "param_groups", 0, f"tsam_{name}"


POSITION = ("state", 1, "tsam_position")


BAD: list[tuple[tuple[Any, ...], Any, str]] = [
    (group("log_step_size"), math.nan, "log_step_size: got nan, expected a finite number"),
    (group("log_step_size"), None, "param_groups[0]['tsam_log_step_size']: got None, expected a number or a string"),
    (group("gradient_scale"), "1.0", "gradient_scale: got '1.0'"),
    (group("gradient_scales"), torch.zeros(3), "param_groups[0]['tsam_gradient_scales']: got a tensor of shape (3,)"),
    (group("prior"), "cauchy", "prior: got 'cauchy', expected 'gaussian' or 'ball'"),
    (group("prior"), None, "param_groups[0]['tsam_prior']: got None"),
    (POSITION, 5, "position of parameter 1: got 5, expected a finite torch.float64 tensor of shape (7,)"),
    (POSITION, torch.zeros(2), "position of parameter 1: got a torch.strided torch.float32 tensor of shape (2,)"),
    (POSITION, torch.zeros(7), "position of parameter 1: got a torch.strided torch.float32 tensor of shape (7,)"),
    (POSITION, torch.full((7,), math.inf, dtype=torch.float64), "position of parameter 1: got a position that"),
    (POSITION, torch.zeros(7, dtype=torch.float64).to_sparse(), "position of parameter 1: got a torch.sparse_coo"),
    (POSITION, torch.zeros(7, dtype=torch.float64, device="meta"), "position of parameter 1: got a torch.strided"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD)
def test_a_state_that_was_not_written_here_is_refused(problem, path: Any, value: Any, message: str) -> None:
    task = problem()
    optimizer = tsam(task.parameters, **HMC)
    task.train(optimizer, 1)
    state, before = edited(optimizer.state_dict(), *path, to=value), optimizer.chain_position()
    with pytest.raises((ValueError, TypeError), match=re.escape(f"TSAM: load_state_dict: {message}")):
        optimizer.load_state_dict(state)
    for a, b in zip(before, optimizer.chain_position(), strict=True):
        assert torch.equal(a, b)


def test_no_content_of_the_scalars_reaches_beyond_the_buffers(problem) -> None:
    """The ops take what the array holds for 0, 1 or 2: a wrong number is a wrong sample, not a wrong address."""
    for value in (7.0, -3.0, 1e300, math.nan, math.inf, 0.5):
        task = problem()
        optimizer = tsam(task.parameters, **HMC)
        task.train(optimizer, 1)
        for slot in (ChainSlot.CURRENT, ChainSlot.START):
            optimizer._progress.sampler_state.scalars[slot] = value
        task.train(optimizer, 2)
        assert all(bool(p.isfinite().all()) for p in task.parameters)


@pytest.mark.parametrize("other", ["gaussian", "ball"])
def test_a_chain_goes_on_under_its_own_prior_only(problem, other: str) -> None:
    source = problem()
    saved = tsam(source.parameters, **HMC, prior="gaussian")
    source.train(saved, 3)
    task = problem()
    optimizer = tsam(task.parameters, **HMC, prior=other)
    optimizer.load_state_dict(saved.state_dict())
    step = saved._progress.sampler_state.scalars[ChainSlot.LOG_STEP] if other == "gaussian" else math.log(math.pi / 2)
    assert float(optimizer._progress.sampler_state.scalars[ChainSlot.LOG_STEP]) == float(step)
    assert optimizer._progress.sampler_state.started is (other == "gaussian")
    start = first_position(optimizer, task)
    if other == "gaussian":
        for a, b in zip(start, saved.chain_position(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    else:
        assert float(torch.cat([x.flatten() for x in start]).norm()) <= 0.5


def test_a_state_without_a_chain_starts_one(problem) -> None:
    """A state saved before the first step, or by another sampler, leaves nothing of the chain that was here."""
    for options in ({"sampler": "hmc", "delta": 10.0}, {"sampler": "ascent"}):
        task, twin = problem(), problem()
        unused = tsam(problem().parameters, lr=0.1, rho=0.5, seed=3, **options)
        optimizer = tsam(task.parameters, **{**HMC, "lr": 0.0})
        task.train(optimizer, 3)
        optimizer.load_state_dict(unused.state_dict())
        with pytest.raises(RuntimeError, match="chain_position"):
            optimizer.chain_position()
        begins = first_position(optimizer, task), first_position(tsam(twin.parameters, **HMC), twin)
        for a, b in zip(*begins, strict=True):
            assert torch.equal(a, b)
        assert optimizer.diagnostics.step_size == math.pi / 2


def test_momenta_are_kept_from_step_to_step_and_saved_nowhere(problem) -> None:
    task = problem()
    optimizer = tsam(task.parameters, **HMC)
    task.train(optimizer, 1)
    kept = [momentum.data_ptr() for momentum in optimizer._progress.sampler_state.momenta.values()]
    task.train(optimizer, 1)
    assert len(kept) == len(task.parameters)
    assert kept == [momentum.data_ptr() for momentum in optimizer._progress.sampler_state.momenta.values()]
    assert not copy.deepcopy(optimizer)._progress.sampler_state.momenta
    # They go where their parameters do: frozen ones have none, and another layout has its own.
    task.parameters[0].requires_grad_(False)
    with torch.no_grad():
        task.parameters[2].set_(task.parameters[2].t().contiguous().t())
    task.train(optimizer, 1)
    chain = optimizer._progress.sampler_state
    assert chain.momenta.keys() == chain.positions.keys() == set(task.parameters[1:])
    for parameter, momentum in chain.momenta.items():
        assert momentum.stride() == parameter.stride() == chain.positions[parameter][0].stride()


def test_what_a_state_holds_is_what_lasts(problem) -> None:
    task = problem()
    optimizer = tsam(task.parameters, **{**HMC, "delta": "auto"})
    task.train(optimizer, 3)
    state, chain = optimizer.state_dict(), optimizer._progress.sampler_state
    for saved in state["param_groups"]:
        assert saved["tsam_prior"] == "gaussian"
        for name, slot in KEPT.items():
            assert saved[f"tsam_{name}"] == float(chain.scalars[slot]) != 0.0
    for i, parameter in enumerate(task.parameters):
        assert torch.equal(state["state"][i]["tsam_position"], chain.position(parameter))
        assert not any(name.startswith("tsam") for name in optimizer.base_optimizer.state.get(parameter, {}))


def test_what_is_loaded_is_not_the_base_s(problem) -> None:
    """Bases cast and look for what they know: they see no entry of ours, neither in state nor in groups."""
    source, task = problem(), problem()
    saved = TSAM(source.parameters, torch.optim.Adam, lr=0.01, sampler="hmc", num_samples=3)
    source.train(saved, 2)
    seen: list[Any] = []

    class Watching(torch.optim.Adam):
        def load_state_dict(self, state_dict: Any) -> None:
            seen.append(copy.deepcopy(state_dict))
            super().load_state_dict(state_dict)

    Watching.__name__ = "Adam"
    optimizer = TSAM(task.parameters, Watching, lr=0.01, sampler="hmc", num_samples=3)
    optimizer.load_state_dict(saved.state_dict())
    assert seen[0]["state"].keys() == saved.base_optimizer.state_dict()["state"].keys()
    for entry in (*seen[0]["state"].values(), *seen[0]["param_groups"], *optimizer.base_optimizer.state.values()):
        assert not any(name.startswith("tsam_") for name in entry)
    for mine, theirs in zip(optimizer.chain_position(), saved.chain_position(), strict=True):
        assert torch.equal(mine, theirs)


def in_the_ball(task: Any) -> tuple[Callable[[], Tensor], list[float]]:
    """A closure that notes |ε| over all parameters, frozen ones too."""
    origin, norms = task.copies(), []

    def closure() -> Tensor:
        norms.append(math.sqrt(sum(float((p - o).square().sum()) for p, o in zip(task.copies(), origin, strict=True))))
        loss = task.loss()
        loss.backward()
        return loss

    return closure, norms


@pytest.mark.parametrize("how", ["frozen", "rho"])
@pytest.mark.parametrize("through", ["steps", "checkpoint"])
def test_a_parameter_that_rests_and_moves_again_starts_the_chain_anew(problem, how: str, through: str) -> None:
    """Meanwhile the others may have taken the whole ball: together they would be outside."""
    task = problem()
    w1, b1, w2, b2 = task.parameters
    groups = [{"params": [w1, b1]}, {"params": [w2, b2]}]
    optimizer = tsam(groups, **{**HMC, "lr": 0.0, "delta": 2000.0}, prior="ball")

    def rest(yes: bool) -> None:
        if how == "rho":
            optimizer.param_groups[0]["rho"] = 0.0 if yes else 0.5
        else:
            w1.requires_grad_(not yes)
            b1.requires_grad_(not yes)

    task.train(optimizer, 3)
    rest(True)
    task.train(optimizer, 3)
    assert set(optimizer._progress.sampler_state.positions) == {w2, b2}
    if through == "checkpoint":
        optimizer.load_state_dict(optimizer.state_dict())
    rest(False)
    with pytest.raises(RuntimeError, match=re.escape("param_groups[0]['params'][0] was not perturbed")):
        optimizer.chain_position()
    for _ in range(3):
        closure, norms = in_the_ball(task)
        optimizer.step(closure)
        assert max(norms) <= 0.5 * (1 + 1e-12)
    assert len(optimizer.chain_position()) == 4


def test_looking_at_a_new_parameter_s_perturbation_leaves_no_chain_that_was_never_there(problem) -> None:
    """perturbed() right after a parameter came: the chain starts anew in the next step, from the prior."""
    task = problem()
    optimizer = tsam(task.parameters, **HMC)
    task.train(optimizer, 2)
    extra = torch.nn.Parameter(torch.ones(6, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra]})
    with pytest.raises(RuntimeError, match=re.escape("param_groups[1]['params'][0] was not perturbed")):
        optimizer.chain_position()
    with optimizer.perturbed():
        assert not torch.equal(extra, torch.ones_like(extra))
    assert torch.equal(extra, torch.ones_like(extra))
    assert not optimizer._progress.sampler_state.started
    task.train(optimizer, 1)
    assert len(optimizer.chain_position()) == 5


def test_a_reshaped_parameter_starts_the_chain_anew() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = tsam([parameter], **HMC)

    def closure() -> Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    parameter.data = torch.zeros(5, dtype=torch.float64)
    parameter.grad = None
    optimizer.step(closure)
    assert optimizer.chain_position()[0].shape == (5,)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_tilt_from_a_schedule_is_no_delta(problem, value: float) -> None:
    task = problem()
    optimizer = tsam(task.parameters, **{**HMC, "delta": None}, tilt=lambda step: 1.0 if step < 2 else value)
    task.train(optimizer, 2)
    before = task.copies()
    message = f"TSAM: tilt(2): got {value}, expected a finite tilt, as the sampler is HMC with delta=None"
    with pytest.raises(ValueError, match=re.escape(message)):
        task.train(optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, task.copies(), strict=True))


def test_the_step_size_is_the_saved_one_only_where_it_is_adapted(problem) -> None:
    source = problem()
    saved = tsam(source.parameters, **HMC)
    source.train(saved, 2)
    for options, want in (
        ({"adapt_step_size": False, "step_size": 0.05}, 0.05),
        ({"num_leapfrog_steps": 10}, math.pi / 20),  # the saved one is above this chain's own bound
        ({"step_size": 3.0}, float(saved._progress.sampler_state.scalars[ChainSlot.LOG_STEP].exp())),
    ):
        optimizer = tsam(problem().parameters, **HMC, **options)
        optimizer.load_state_dict(saved.state_dict())
        assert float(optimizer._progress.sampler_state.scalars[ChainSlot.LOG_STEP].exp()) == pytest.approx(
            want, rel=1e-12
        )


def test_a_chain_is_loaded_by_the_sampler_that_has_one(problem) -> None:
    source, task = problem(), problem()
    saved = tsam(source.parameters, **HMC)
    source.train(saved, 2)
    optimizer = tsam(task.parameters, lr=0.1)
    optimizer.load_state_dict(saved.state_dict())
    with pytest.raises(RuntimeError, match="needs a sampler that keeps a chain"):
        optimizer.chain_position()
    assert not any("tsam_position" in entry for entry in optimizer.state_dict()["state"].values())


def test_what_is_saved_can_be_loaded_also_after_a_cast() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = tsam([parameter], **HMC)

    def closure() -> Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    parameter.data, parameter.grad = parameter.data.double(), None
    state = optimizer.state_dict()
    assert state["param_groups"][0]["tsam_resting"] == "0"
    assert not state["state"][0]["tsam_position"].any()
    optimizer.load_state_dict(state)
    optimizer.step(closure)


def test_perturbed_is_where_a_fresh_chain_stands_and_an_exception_leaves_it_nowhere(problem) -> None:
    task = problem()
    optimizer = tsam(task.parameters, **HMC, chain="fresh")
    task.train(optimizer, 2)
    before, origin = optimizer.chain_position(), task.copies()
    with optimizer.perturbed():
        moved = [p - o for p, o in zip(task.copies(), origin, strict=True)]
    for a, b, c in zip(before, optimizer.chain_position(), moved, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=0, atol=1e-12)

    def failing() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)
    with pytest.raises(RuntimeError, match="chain_position"):
        optimizer.chain_position()


def test_numpy_s_numbers_do_not_reach_a_checkpoint(problem, tmp_path) -> None:
    numpy = pytest.importorskip("numpy")
    w1, b1, *rest = problem().parameters
    groups = [{"params": [w1, b1], "rho": numpy.float32(0.25)}, {"params": rest}]
    optimizer = tsam(groups, lr=0.1, rho=numpy.float64(0.05), radius=numpy.float64(0.5), seed=numpy.uint64(2**63 + 5))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["param_groups"][0]["tsam_seed"] == 2**63 + 5
    assert [group["rho"] for group in state["param_groups"]] == [0.25, 0.05]


def test_equal_weights_that_are_meant_are_not_warned_of(problem, recwarn: pytest.WarningsRecorder) -> None:
    task = problem()
    optimizer = tsam(task.parameters, **{**HMC, "delta": None}, tilt=5.0)
    task.train(optimizer, 12)
    assert optimizer.diagnostics.ess == 3.0
    assert not recwarn


def test_counting_a_state_where_no_step_has_begun_is_nan() -> None:
    total, carried = [torch.zeros(5)], [torch.ones(5)]
    chain = torch.zeros(CHAIN_SLOTS, dtype=torch.float64)
    _C.hmc_carry_(total, carried, [torch.ones(5)], chain, new_state(1), True)
    assert total[0].isnan().all() and carried[0].eq(1).all()
