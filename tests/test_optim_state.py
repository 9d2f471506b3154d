"""What a TSAM remembers: checkpoints, copies, added groups and schedules.

A run that was saved, loaded elsewhere and continued has the bits of one that never stopped. A state dict that does
not fit is refused with a ValueError before anything changes.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
from typing import Any

import pytest
import torch
from conftest import plain_state
from flat_options import tsam

from tsam_ext import TSAM
from tsam_ext.reference import ReferenceTSAM

BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
}
SETTINGS: list[dict[str, Any]] = [
    {"sampler": "ascent", "rho": 0.3},
    {"sampler": "noise", "radius": 0.5, "every": 3, "antithetic": True},
    {"sampler": "hmc", "delta": 30.0, "rho": 0.5, "num_leapfrog_steps": 2, "every": 2},
    {"sampler": "hmc", "delta": "auto", "prior": "ball", "rho": 0.5},
    {"sampler": "hmc", "delta": 30.0, "rho": 0.5, "num_leapfrog_steps": 2, "recycle": True},
]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("seed", [5, (1 << 64) - 1])
def test_save_load_and_continue(problem, base: str, settings: dict[str, Any], seed: int) -> None:
    kind, options = BASES[base]
    steady, before, after = problem(), problem(), problem()
    whole = tsam(steady.parameters, kind, seed=seed, **settings, **options)
    steady.train(whole, 7)
    first = tsam(before.parameters, kind, seed=seed, **settings, **options)
    before.train(first, 4)
    saved = through_a_file({"net": before.net.state_dict(), "optimizer": first.state_dict()})
    second = tsam(after.parameters, kind, seed=0, **settings, **{**options, "lr": 9.0})
    after.train(second, 1)
    after.net.load_state_dict(saved["net"])
    second.load_state_dict(saved["optimizer"])
    assert plain_state(second) == plain_state(first)
    after.train(second, 3)
    assert after.holds(steady.copies())
    assert second.base_optimizer.param_groups is second.param_groups


def test_state_dict_is_the_base_s_and_numbers_in_each_group(problem) -> None:
    task = problem()
    w1, b1, *rest = task.parameters
    groups = [{"params": [w1, b1], "rho": 0.2}, {"params": rest}]
    optimizer = TSAM(groups, lr=0.1, momentum=0.9, seed=4, tilt=2.5, num_samples=2)
    task.train(optimizer, 3)
    state, base = optimizer.state_dict(), optimizer.base_optimizer.state_dict()
    assert state.keys() == base.keys() == {"state", "param_groups"}
    names = {"version", "noise_scheme", "step", "seed", "base_optimizer", "shapes"}
    for group, plain, shapes in zip(
        state["param_groups"], base["param_groups"], ("(7, 5) (7,)", "(3, 7) (3,)"), strict=True
    ):
        own = {key: group.pop(key) for key in list(group) if key.startswith("tsam_")}
        assert own.keys() == {f"tsam_{name}" for name in names}
        assert (own["tsam_step"], own["tsam_seed"], own["tsam_base_optimizer"]) == (3, 4, "SGD")
        assert own["tsam_shapes"] == shapes
        assert group == plain
        assert not any(key.startswith("tsam") for key in plain)
    assert [(g["rho"], g["radius"], g["adaptive"]) for g in base["param_groups"]] == [
        (0.2, None, False),
        (0.05, None, False),
    ]


def test_saving_needs_no_sync_and_keeps_no_scratch(problem) -> None:
    """The tensors in a saved state are the base's: nothing of the size of a parameter is added."""
    task = problem()
    optimizer = TSAM(task.parameters, lr=0.1, momentum=0.9, num_samples=3)
    task.train(optimizer, 1)

    def tensors(value: Any) -> list[int]:
        if isinstance(value, torch.Tensor):
            return [value.data_ptr()]
        items = value.values() if isinstance(value, dict) else value
        return [t for item in items for t in tensors(item)] if isinstance(value, (dict, list)) else []

    assert tensors(optimizer.state_dict()) == tensors(optimizer.base_optimizer.state_dict())
    assert len(pickle.dumps(optimizer)) < len(pickle.dumps(optimizer.base_optimizer)) + 4000


def changed(state: dict[str, Any], **own: Any) -> dict[str, Any]:
    """A state with numbers of ours replaced in every group."""
    state = copy.deepcopy(state)
    for group in state["param_groups"]:
        group.update({f"tsam_{name}": value for name, value in own.items()})
    return state


def test_a_state_that_does_not_fit_changes_nothing(problem) -> None:
    task, other = problem(), problem()
    optimizer = TSAM(task.parameters, lr=0.1, momentum=0.9, seed=1, num_samples=3)
    task.train(optimizer, 2)
    state = optimizer.state_dict()
    adam = TSAM(other.parameters, torch.optim.AdamW, seed=2, num_samples=3)
    other.train(adam, 1)
    wide = TSAM([torch.nn.Parameter(torch.ones(s)) for s in ((7, 5), (7,), (3, 7), (4,))], lr=0.1, num_samples=3)
    split = TSAM([{"params": [p]} for p in problem().parameters], lr=0.1, num_samples=3)
    before, bits = copy.deepcopy(state), task.copies()
    for bad, what in (
        (adam.state_dict(), "param_groups[0]['tsam_base_optimizer']: got 'AdamW', expected 'SGD'"),
        (wide.state_dict(), "param_groups[0]['tsam_shapes']: got (4,) for parameter 3, expected (3,) as here"),
        (split.state_dict(), "got 4 parameter groups, expected 1 as here"),
        (changed(state, noise_scheme="philox2x32"), "param_groups[0]['tsam_noise_scheme']: got 'philox2x32'"),
        (changed(state, version=99), "param_groups[0]['tsam_version']: got 99, expected 2 as here"),
        ({**state, "tsam": {"version": 1}}, "got a checkpoint of version 1, which an older tsam_ext has written"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"TSAM: load_state_dict: {what}")):
            optimizer.load_state_dict(bad)
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for key, entry in before["state"].items():
            assert torch.equal(after["state"][key]["momentum_buffer"], entry["momentum_buffer"])
    state["param_groups"][0]["lr"] = 7.0
    for broken in ({"step": -1}, {"step": None}, {"seed": 1 << 64}, {"seed": "x"}):
        with pytest.raises((ValueError, TypeError)):
            optimizer.load_state_dict(changed(state, **broken))
        assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    assert task.holds(bits)


def test_groups_that_disagree_are_refused(problem) -> None:
    """Each number stands in every group; one that differs is a state that nobody saved."""
    w1, b1, *rest = problem().parameters
    optimizer = TSAM([{"params": [w1, b1]}, {"params": rest}], lr=0.1, seed=4)
    for name, value in (("step", 7), ("seed", 5), ("step", 0.5)):
        state = optimizer.state_dict()
        state["param_groups"][1][f"tsam_{name}"] = value
        with pytest.raises(ValueError, match=rf"param_groups\[1\]\['tsam_{name}'\]: got {value}, expected"):
            optimizer.load_state_dict(state)
    state = optimizer.state_dict()
    del state["param_groups"][1]["tsam_version"]
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['tsam_version'\]: got None"):
        optimizer.load_state_dict(state)


def test_states_that_nobody_saved_are_refused(problem) -> None:
    task = problem()
    optimizer = TSAM(task.parameters, lr=0.1, momentum=0.9, seed=1, rho=0.3, num_samples=3)
    task.train(optimizer, 1)
    state = optimizer.state_dict()
    for bad, error, message in (
        ({}, ValueError, "got dict, expected a dict with state and param_groups"),
        (None, ValueError, "got None"),
        (edited(state, rho=-3.0), ValueError, "param_groups[0].rho: got -3.0, expected a finite number"),
        (edited(state, adaptive="no"), TypeError, "param_groups[0].adaptive: got 'no'"),
        (
            edited(state, tsam_shapes="(7, 5),(7,),(3, 7),(3,)"),
            ValueError,
            "param_groups[0]['tsam_shapes']: got (7, 5),",
        ),
        (edited(state, tsam_step=torch.tensor(3)), TypeError, "param_groups[0]['tsam_step']: got a tensor of shape ()"),
        (
            {**state, "state": {**state["state"], "0": {"tsam_position": torch.zeros(7, 5)}}},
            ValueError,
            "got tsam_position of parameter '0', expected a parameter of some group",
        ),
    ):
        with pytest.raises(error, match=re.escape(f"TSAM: load_state_dict: {message}")):
            optimizer.load_state_dict(bad)
        assert optimizer.param_groups[0]["rho"] == 0.3
        assert optimizer.state_dict()["param_groups"] == state["param_groups"]


def edited(state: dict[str, Any], **entries: Any) -> dict[str, Any]:
    state = copy.deepcopy(state)
    for group in state["param_groups"]:
        group.update(entries)
    return state


def test_state_of_a_base_that_belongs_to_no_parameter_passes_through(problem) -> None:
    class Counting(torch.optim.SGD):
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, **options)
            self.state["count"] = 3

    task, other = problem(), problem()
    optimizer = TSAM(task.parameters, Counting, lr=0.1, momentum=0.9, sampler="hmc", num_samples=3)
    task.train(optimizer, 1)
    state = optimizer.state_dict()
    assert state["state"]["count"] == 3
    state["state"]["count"] = 7
    loaded = TSAM(other.parameters, Counting, lr=0.1, momentum=0.9, sampler="hmc", num_samples=3)
    loaded.load_state_dict(state)
    assert loaded.state["count"] == 7


def test_entries_that_a_base_has_loaded_by_itself_are_not_saved_again(problem) -> None:
    """A plain base that was given our state keeps what it does not know; a later TSAM neither saves nor loads that."""
    task = problem()
    hmc = TSAM(task.parameters, torch.optim.Adam, lr=0.1, sampler="hmc", seed=5, num_samples=3)
    task.train(hmc, 2)
    plain = torch.optim.Adam(task.parameters, lr=0.1)
    plain.load_state_dict(hmc.state_dict())
    assert "tsam_position" in plain.state[task.parameters[0]]
    optimizer = TSAM(plain, seed=9, num_samples=3)
    state = optimizer.state_dict()
    assert not any("tsam_position" in entry for entry in state["state"].values())
    assert "tsam_prior" not in state["param_groups"][0]
    assert (state["param_groups"][0]["tsam_step"], state["param_groups"][0]["tsam_seed"]) == (0, 9)


def test_a_base_s_state_leaves_each_group_its_settings(problem) -> None:
    w1, b1, *rest = problem().parameters
    optimizer = TSAM([{"params": [w1, b1], "rho": 0.3}, {"params": rest, "adaptive": True}], lr=0.1)
    plain = torch.optim.SGD([{"params": [w1, b1]}, {"params": rest}], lr=0.7)
    optimizer.load_state_dict(plain.state_dict())
    assert [(g["lr"], g["rho"], g["adaptive"]) for g in optimizer.param_groups] == [
        (0.7, 0.3, False),
        (0.7, 0.05, True),
    ]


def test_a_plain_state_dict_of_the_base_loads(problem) -> None:
    """Training starts plain and goes on with TSAM: momentum is taken over, our settings stay."""
    task = problem()
    plain = torch.optim.SGD(task.parameters, lr=0.1, momentum=0.9)
    task.loss().backward()
    plain.step()
    optimizer = TSAM(task.parameters, lr=0.5, momentum=0.9, rho=0.2, seed=6, num_samples=3)
    optimizer.load_state_dict(plain.state_dict())
    (group,) = optimizer.param_groups
    assert (group["lr"], group["rho"], group["radius"], group["adaptive"]) == (0.1, 0.2, None, False)
    assert optimizer.state_dict()["param_groups"][0]["tsam_step"] == 0
    assert optimizer.state[task.parameters[0]]["momentum_buffer"].any()
    task.train(optimizer, 1)


@pytest.mark.parametrize("target", ["tsam", "base"])
def test_loading_into_either_object_keeps_them_together(problem, target: str) -> None:
    task, twin = problem(), problem()
    optimizer, other = (TSAM(t.parameters, lr=0.1, momentum=0.9, seed=1, num_samples=3) for t in (task, twin))
    task.train(optimizer, 1)
    twin.train(other, 1)
    loaded = optimizer if target == "tsam" else optimizer.base_optimizer
    loaded.load_state_dict(loaded.state_dict())
    base = optimizer.base_optimizer
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    for group in other.param_groups:
        group["lr"] = 0.05
    task.train(optimizer, 2)
    twin.train(other, 2)
    assert task.holds(twin.copies())


def test_an_estimate_does_not_survive_loading(problem) -> None:
    task = problem()
    optimizer = TSAM(task.parameters, lr=0.1, num_samples=3)
    optimizer.estimate_gradient(task.closure(optimizer))
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="estimate"):
        optimizer.apply()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("base", BASES)
def test_copies_continue_alike(problem, how: str, base: str) -> None:
    kind, options = BASES[base]
    task = problem()
    optimizer = TSAM(task.parameters, kind, seed=8, rho=0.3, num_samples=3, model=task.net, **options)
    task.train(optimizer, 2)
    pair = (task, optimizer)
    twin, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert isinstance(other, TSAM)
    assert other.param_groups[0]["params"][0] is twin.parameters[0]
    assert other.base_optimizer is not optimizer.base_optimizer
    assert task.train(optimizer, 2) == twin.train(other, 2)
    assert task.holds(twin.copies())
    assert repr(other).startswith("TSAM")


def test_added_groups_train_with_their_settings(problem) -> None:
    """As the oracle with the same groups; the noise of the first group keeps its elements."""
    results = []
    for kind in (TSAM, ReferenceTSAM):
        task = problem()
        w1, b1, w2, b2 = task.parameters
        optimizer = kind([w1, b1], lr=0.1, momentum=0.9, rho=0.3, seed=5, num_samples=3)
        task.train(optimizer, 2)
        base = optimizer if kind is TSAM else optimizer.base_optimizer
        base.add_param_group({"params": [w2], "rho": 0.6, "radius": 0.1, "lr": 0.2})
        base.add_param_group({"params": b2})
        results.append((task.train(optimizer, 2), task.flat(), optimizer))
    (ours, flat, optimizer), (theirs, expected, _) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(flat, expected, rtol=1e-6, atol=1e-6)
    values = [(g["rho"], g["radius"], g["lr"]) for g in optimizer.param_groups]
    assert values == [(0.3, None, 0.1), (0.6, 0.1, 0.2), (0.3, None, 0.1)]
    assert len(optimizer.base_optimizer.param_groups) == 3


@pytest.mark.parametrize("key", ["rho", "radius", "adaptive"])
def test_a_group_s_settings_are_read_afresh_each_step(problem, key: str) -> None:
    """A schedule writes into the group between steps; as the oracle, and other than without the change."""
    results = []
    for kind, change in ((TSAM, True), (ReferenceTSAM, True), (TSAM, False)):
        task = problem()
        optimizer = kind(task.parameters, lr=0.1, rho=0.3, seed=5, num_samples=3)
        task.train(optimizer, 1)
        if change:
            optimizer.param_groups[0][key] = {"rho": 0.9, "radius": 0.05, "adaptive": True}[key]
        task.train(optimizer, 1)
        results.append(task.flat())
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(results[0], results[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["number", "function", "tensor", "tensor function"])
def test_tilt_schedules(problem, form: str) -> None:
    """A function of the completed steps, or a tensor that is read afresh in each."""
    ours, theirs = problem(), problem()
    asked: list[int] = []

    def schedule(step: int) -> float:
        asked.append(step)
        return [0.0, 5.0, -5.0, float("inf")][step]

    tensor = torch.tensor(0.0)
    tilt = {
        "number": 0.0,
        "function": schedule,
        "tensor": tensor,
        "tensor function": lambda step: torch.tensor(schedule(step)),
    }[form]
    optimizer = TSAM(ours.parameters, lr=0.1, tilt=tilt, rho=0.5, seed=3, num_samples=3)
    oracle = ReferenceTSAM(theirs.parameters, lr=0.1, tilt=schedule, rho=0.5, seed=3, num_samples=3)
    for step in range(4):
        if form == "tensor":
            tensor.fill_([0.0, 5.0, -5.0, float("inf")][step])
        asked.clear()
        losses = ours.train(optimizer, 1)
        if "function" in form:
            assert asked == [step]
        expected = theirs.train(oracle, 1)
        if form == "number":
            continue
        torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
        weights = optimizer.diagnostics.weights
        torch.testing.assert_close(weights, oracle.weights, rtol=1e-5, atol=1e-5)
    if form == "number":
        assert optimizer.diagnostics.weights.tolist() == pytest.approx([1 / 3] * 3)


def test_a_schedule_is_asked_in_sampled_steps_alone(problem) -> None:
    task = problem()
    asked: list[int] = []

    def schedule(step: int) -> float:
        asked.append(step)
        return 1.0

    optimizer = TSAM(task.parameters, lr=0.1, tilt=schedule, every=2, num_samples=3)
    task.train(optimizer, 5)
    assert asked == [0, 2, 4]
