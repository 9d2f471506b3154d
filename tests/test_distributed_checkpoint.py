"""TSAM in torch.distributed.checkpoint: get and set_optimizer_state_dict, nested and flat, without a process group.

Laws: asking a fresh optimizer for its state changes nothing; a round trip into a fresh one, through memory or files,
goes on with the bits of a run that never stopped; the base never sees an entry of ours.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import plain_state
from flat_options import tsam
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from tsam_ext import TSAM

BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"lr": torch.tensor(0.01)}),
}
SAMPLERS: dict[str, dict[str, Any]] = {
    "ascent": {"sampler": "ascent", "rho": 0.3, "radius": 0.1},
    "carried": {"sampler": "ascent", "rho": 0.3, "every": 4},
    "hmc": {"sampler": "hmc", "delta": "auto", "rho": 0.5},
    "ball": {"sampler": "hmc", "delta": 30.0, "rho": 0.5, "prior": "ball", "num_leapfrog_steps": 2, "every": 2},
}
FORMS = {"nested": None, "flat": StateDictOptions(flatten_optimizer_state_dict=True)}


def build(task: Any, base: str, sampler: str, seed: int = 5) -> TSAM:
    """Two groups, of which the second rests in its own way."""
    w1, b1, *rest = task.parameters
    kind, options = BASES[base]
    groups = [{"params": [w1, b1], "lr": copy.copy(options["lr"])}, {"params": rest, "adaptive": True}]
    return tsam(groups, kind, seed=seed, **SAMPLERS[sampler], **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_continues(problem, form: str, base: str, sampler: str, dtype: torch.dtype) -> None:
    steady, before, after = (problem(dtype=dtype) for _ in range(3))
    whole = build(steady, base, sampler)
    steady.train(whole, 5)
    first = build(before, base, sampler)
    before.train(first, 3)
    options = FORMS[form]
    weights, state = get_state_dict(before.net, first, options=options)
    saved = copy.deepcopy((weights, state))
    second = build(after, base, sampler, seed=0)
    set_state_dict(after.net, second, model_state_dict=saved[0], optim_state_dict=saved[1], options=options)
    assert plain_state(second) == plain_state(first)
    after.train(second, 2)
    before.train(first, 2)
    assert after.holds(steady.copies())
    assert before.holds(steady.copies())
    for entry in (*second.base_optimizer.state.values(), *second.base_optimizer.state_dict()["param_groups"]):
        assert not any(name.startswith("tsam_") for name in entry)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_round_trip_through_files_continues(problem, form: str, sampler: str, tmp_path) -> None:
    """Loaded in place, as the files are: so the fresh optimizer has to have room for all that was saved."""
    steady, before, after = (problem(dtype=torch.bfloat16) for _ in range(3))
    whole, first = build(steady, "adamw", sampler), build(before, "adamw", sampler)
    steady.train(whole, 5)
    before.train(first, 3)
    options = FORMS[form]
    weights, state = get_state_dict(before.net, first, options=options)
    dcp.save({"weights": weights, "state": state}, checkpoint_id=tmp_path, no_dist=True)
    second = build(after, "adamw", sampler, seed=0)
    weights, state = get_state_dict(after.net, second, options=options)
    loaded = {"weights": weights, "state": state}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        after.net, second, model_state_dict=loaded["weights"], optim_state_dict=loaded["state"], options=options
    )
    after.train(second, 2)
    assert after.holds(steady.copies())
    assert plain_state(second) == plain_state(whole)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_asking_a_fresh_optimizer_changes_nothing(problem, form: str, base: str, sampler: str) -> None:
    """No learning rate is left at 0, no gradient behind, no step counted; and the run has the bits of one not asked."""
    task, twin = problem(), problem()
    optimizer, other = build(task, base, sampler), build(twin, base, sampler)
    bits, rates = task.copies(), [float(group["lr"]) for group in optimizer.param_groups]
    for _ in range(2):
        state = get_optimizer_state_dict(task.net, optimizer, options=FORMS[form])
    assert [float(group["lr"]) for group in optimizer.param_groups] == rates
    assert all(p.grad is None for p in task.parameters)
    assert task.holds(bits)
    groups = state["param_groups"] if form == "nested" else [state]
    steps = [value for group in groups for key, value in group.items() if key.endswith("tsam_step")]
    assert steps
    assert not any(steps)
    if base in ("sgd", "momentum"):  # Adam's own steps have been counted, as they are without us
        task.train(optimizer, 2)
        twin.train(other, 2)
        assert task.holds(twin.copies())


@pytest.mark.parametrize("what", ["lr", "gradient", "state"])
def test_other_steps_without_an_estimate_still_raise(problem, what: str) -> None:
    """A warm-up from lr 0 in a loop that ignores closures is no priming, nor is anything after it."""
    task = problem()
    optimizer = TSAM(task.parameters, lr=0.1 if what == "lr" else 0.0, momentum=0.9, num_samples=3)
    for p in task.parameters:
        p.grad = torch.ones_like(p) if what == "gradient" else torch.zeros_like(p)
    if what == "state":
        optimizer.step()
    bits = task.copies()
    with pytest.raises(RuntimeError, match=r"step\(\) without a closure needs an estimate"):
        optimizer.step()
    assert task.holds(bits)


def test_a_base_without_a_learning_rate_is_not_primed(problem) -> None:
    """Nothing says then that its step has no effect."""

    class Fixed(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> None:
            raise AssertionError("not to be called")

    task = problem()
    with pytest.raises(RuntimeError, match="needs an estimate"):
        TSAM(task.parameters, Fixed).step()


def test_asking_inside_the_first_pass_does_not_step_the_base(problem) -> None:
    """The parameters stand elsewhere then, and a base may make its state from where they are."""

    class Averaging(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for p in (p for group in self.param_groups for p in group["params"]):
                self.state[p].setdefault("average", p.detach().clone())
            return super().step()

    task = problem()
    optimizer = TSAM(task.parameters, Averaging, lr=0.1, rho=0.3, seed=1, num_samples=3)
    states: list[Any] = []

    def closure() -> torch.Tensor:
        states.append(get_optimizer_state_dict(task.net, optimizer))
        loss = task.loss()
        loss.backward()
        return loss

    origin = task.copies()
    optimizer.step(closure)
    assert all(not state["state"] and state["param_groups"][0]["lr"] == 0.1 for state in states)
    for p, bits in zip(task.parameters, origin, strict=True):
        assert torch.equal(optimizer.state[p]["average"], bits)


def test_resting_and_frozen_parameters(problem) -> None:
    """One with rho 0 has room in a checkpoint, none that is frozen; neither is a part of the chain afterwards."""
    states, bits = [], []
    for stopped in (False, True):
        task = problem()
        w1, b1, w2, b2 = task.parameters
        b2.requires_grad_(False)

        def make(w1: torch.Tensor = w1, b1: torch.Tensor = b1, w2: torch.Tensor = w2, b2: torch.Tensor = b2) -> TSAM:
            groups = [{"params": [w1]}, {"params": [b1, w2, b2], "rho": 0.0}]
            return tsam(groups, torch.optim.AdamW, lr=0.01, seed=4, **SAMPLERS["hmc"])

        optimizer = make()
        task.train(optimizer, 3)
        if stopped:
            state = get_optimizer_state_dict(task.net, optimizer)
            assert "tsam_position" not in state["state"].get("3.bias", {})
            assert not state["state"]["0.bias"]["tsam_position"].any()
            assert state["param_groups"][0]["tsam_resting"] == "1 2 3"
            optimizer = make()
            set_optimizer_state_dict(task.net, optimizer, state)
        optimizer.param_groups[1]["rho"] = 0.5  # now others move: the chain starts anew
        task.train(optimizer, 2)
        states.append(plain_state(optimizer))
        bits.append(task.copies())
    assert states[0] == states[1]
    assert all(torch.equal(a, b) for a, b in zip(*bits, strict=True))


def test_the_state_shown_is_the_base_s_and_what_the_sampler_keeps(problem) -> None:
    """Reading shows both, writing reaches the base, asking for what is not there makes nothing."""
    task = problem()
    first, *_ = task.parameters
    optimizer = tsam(task.parameters, torch.optim.Adam, lr=0.01, **SAMPLERS["hmc"])
    base = optimizer.base_optimizer
    assert not optimizer.state
    assert optimizer.state.get(first) is None
    assert first not in optimizer.state
    assert not base.state
    task.train(optimizer, 1)
    entry = optimizer.state[first]
    assert set(entry) == {"step", "exp_avg", "exp_avg_sq", "tsam_position"}
    saved = optimizer.state_dict()["state"][0]["tsam_position"]
    assert torch.equal(entry["tsam_position"], saved)
    for held, shown in list(optimizer.state.items()):  # as trainers move a state between devices
        optimizer.state[held] = {key: value.clone() for key, value in shown.items()}
    entry = optimizer.state[first]
    entry["exp_avg"] = torch.zeros_like(first)
    entry["tsam_position"] = torch.zeros_like(first)
    assert not base.state[first]["exp_avg"].any()
    assert set(base.state[first]) == {"step", "exp_avg", "exp_avg_sq"}
    assert torch.equal(optimizer.state[first]["tsam_position"], saved)
    del optimizer.state[first]
    assert first not in base.state
    assert len(optimizer.state) == len(base.state) == 3
    assert "exp_avg" in repr(optimizer.state)


def test_groups_name_what_a_checkpoint_holds_and_a_new_one_may_be_a_copy(problem) -> None:
    task = problem()
    *most, last = task.parameters
    optimizer = tsam(most, lr=0.1, **SAMPLERS["hmc"])
    saved = optimizer.state_dict()["param_groups"][0]
    live = optimizer.param_groups[0]
    assert live.keys() == saved.keys()
    assert {value for key, value in live.items() if key.startswith("tsam_")} == {None}
    optimizer.add_param_group({**live, "params": [last]})
    assert optimizer.param_groups[1].keys() == live.keys()
    with pytest.raises(ValueError, match="tsam_step: got 3, expected no such key"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "tsam_step": 3})
    assert "tsam_" not in repr(optimizer)
