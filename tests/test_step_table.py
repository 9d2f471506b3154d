"""The table of a step is the last step's where nothing has changed, and made afresh where anything has.

The law: a step goes by the groups and parameters as they are when it begins, as if each table were made anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tsam_ext import TSAM
from tsam_ext.settings import GROUP_KEYS
from tsam_ext.table import Table

NAMES = dict(zip(GROUP_KEYS, GROUP_KEYS, strict=True))
Groups = list[dict[str, Any]]


def groups_of(parameters: list[list[Tensor]]) -> Groups:
    return [{"params": each, "rho": 0.5, "radius": None, "adaptive": False, "maximize": False} for each in parameters]


def some_groups() -> Groups:
    torch.manual_seed(0)
    shapes = [[(4, 3), (3,)], [(6, 1), (5,)]]
    groups = groups_of([[nn.Parameter(torch.randn(shape)) for shape in group] for group in shapes])
    groups[0]["params"].append(nn.Parameter(torch.ones(3), requires_grad=False))
    return groups


def first(groups: Groups) -> Tensor:
    parameter: Tensor = groups[0]["params"][0]
    return parameter


def beside(groups: Groups) -> list[Tensor]:
    parameters: list[Tensor] = groups[0]["params"][1:]
    return parameters


def set_data(place: int, change: Callable[[Tensor], Tensor]) -> Callable[[Groups], None]:
    def run(groups: Groups) -> None:
        group, index = divmod(place, 2)
        parameter = groups[group]["params"][index]
        parameter.data = change(parameter.data)

    return run


@torch.no_grad()
def set_to(parameter: Tensor, other: Tensor) -> None:
    parameter.set_(other)


class Sub(nn.Parameter):
    """Not one of the types that a table is kept for."""


CHANGES: dict[str, Callable[[Groups], Any]] = {
    "rho": lambda groups: groups[1].update(rho=0.25),
    "rho of zero": lambda groups: groups[1].update(rho=0.0),
    "a function for rho": lambda groups: groups[1].update(rho=lambda step: 0.1),
    "radius": lambda groups: groups[0].update(radius=0.5 + 2**-50),
    "adaptive": lambda groups: groups[0].update(adaptive=True),
    "maximize": lambda groups: [group.update(maximize=True) for group in groups],
    "frozen": lambda groups: first(groups).requires_grad_(False),
    "frozen instead of another": lambda groups: [p.requires_grad_(not p.requires_grad) for p in beside(groups)],
    "a new group": lambda groups: groups.extend(groups_of([[nn.Parameter(torch.ones(2))]])),
    "a group less": lambda groups: groups.pop(),
    "a parameter less": lambda groups: groups[0]["params"].pop(),
    "another parameter": lambda groups: groups[0]["params"].__setitem__(1, nn.Parameter(torch.ones(3))),
    "another group's": lambda groups: groups[1]["params"].insert(0, groups[0]["params"].pop()),
    "the other order": lambda groups: groups[0]["params"].reverse(),
    "dtype": set_data(0, lambda data: data.to(torch.bfloat16)),
    "shape": set_data(0, lambda data: torch.cat([data, data])),
    "strides": set_data(0, lambda data: data.t().contiguous().t()),
    "a column that is a row": set_data(2, lambda data: data.t()),
    "device": lambda groups: torch.utils.swap_tensors(first(groups), nn.Parameter(torch.empty(4, 3, device="meta"))),
    "swapped": lambda groups: torch.utils.swap_tensors(first(groups), nn.Parameter(torch.ones(4, 3).double())),
    "set_": lambda groups: set_to(first(groups), torch.ones(2, 3)),
    "class": lambda groups: setattr(first(groups), "__class__", Sub),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_any_change_is_seen(name: str) -> None:
    groups = some_groups()
    known = Table.of(groups, NAMES, 0)
    assert Table.of(groups, NAMES, 1, known=known) is known
    CHANGES[name](groups)
    seen = Table.of(groups, NAMES, 1, known=known)
    assert seen is not known
    fresh = Table.of(groups, NAMES, 1)
    assert seen == fresh
    assert (seen.moved, seen.strides, seen.places) == (fresh.moved, fresh.strides, fresh.places)


def test_a_function_is_asked_in_each_step() -> None:
    groups = some_groups()
    groups[0]["rho"] = lambda step: 0.5 if step < 2 else 0.25
    known = Table.of(groups, NAMES, 0)
    assert Table.of(groups, NAMES, 1, known=known) is known
    assert Table.of(groups, NAMES, 2, known=known).rho == [0.25, 0.25, 0.5, 0.5]


def test_another_optimizer_s_parameters_are_seen() -> None:
    groups, other = some_groups(), nn.Parameter(torch.ones(4))
    known = Table.of(groups, NAMES, 0)
    seen = Table.of(groups, NAMES, 0, [other], known=known)
    assert seen is not known and seen.own == 4 and seen.parameters[4] is other
    assert Table.of(groups, NAMES, 0, [other], known=seen) is seen
    assert Table.of(groups, NAMES, 0, [nn.Parameter(torch.ones(4))], known=seen) is not seen


@pytest.mark.parametrize("kind", [torch.complex64, torch.float32])
def test_what_has_no_memory_of_its_own_is_made_anew(kind: torch.dtype) -> None:
    """The real pairs of a complex parameter are a view, which ends with the memory it looks at."""
    groups = groups_of([[nn.Parameter(torch.ones(3, dtype=kind))]])
    known = Table.of(groups, NAMES, 0)
    assert (Table.of(groups, NAMES, 0, known=known) is known) is (not kind.is_complex)


IN_TRAINING: dict[str, Callable[[TSAM], Any]] = {
    "rho": lambda optimizer: optimizer.param_groups[0].update(rho=0.3),
    "radius": lambda optimizer: optimizer.param_groups[0].update(radius=0.01),
    "adaptive": lambda optimizer: optimizer.param_groups[0].update(adaptive=True),
    "frozen": lambda optimizer: optimizer.param_groups[0]["params"][0].requires_grad_(False),
    "layout": lambda optimizer: set_data(0, lambda data: data.t().contiguous().t())(optimizer.param_groups),
    "memory": lambda optimizer: set_data(0, torch.clone)(optimizer.param_groups),
    "nothing": lambda optimizer: None,
}


TRAINED = [(name, sampler) for name in IN_TRAINING for sampler in ("ascent", "noise", "hmc")]
TRAINED = [each for each in TRAINED if each not in {("radius", "hmc"), ("layout", "hmc")}]  # of which hmc has neither


@pytest.mark.parametrize(("name", "sampler"), TRAINED)
def test_training_goes_on_as_if_each_table_were_new(problem, name: str, sampler: str) -> None:
    results = []
    for anew in (False, True):
        task = problem()
        optimizer = TSAM(task.parameters, lr=0.1, sampler=sampler, seed=3, num_samples=3)
        for step in range(4):
            if step == 2:
                IN_TRAINING[name](optimizer)
            if anew:
                optimizer._progress.table = optimizer._progress.scratch.last = None
            task.train(optimizer, 1)
        results.append(task.flat())
    assert torch.equal(*results)


def test_copies_are_the_step_s_own(problem) -> None:
    """The memory for copies is looked up once for a table, and a step's list of them is not the next step's."""
    task = problem()
    optimizer = TSAM(task.parameters, lr=0.1, seed=3, num_samples=3)
    task.train(optimizer, 2)
    scratch = optimizer._progress.scratch
    assert scratch.last is not None and scratch.last[0] is optimizer._progress.table
    with optimizer.perturbed():
        assert optimizer._progress.inside is not None
        own = optimizer._progress.inside.origin.copies
        assert own is not scratch.last[1] and list(own) == list(scratch.last[1])
        assert all(own[i] is copy for i, copy in scratch.last[1].items())
