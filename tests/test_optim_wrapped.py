"""TSAM under wrappers that copy an optimizer's ``__dict__``, as Lightning, Fabric and Accelerate do.

Law: whichever of wrapper and wrapped is called, both have taken the step; so nothing that changes between two steps may
be an attribute that a method of TSAM binds anew.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
from flat_options import tsam

from tsam_ext import TSAM

SAMPLERS: dict[str, dict[str, Any]] = {
    "ascent": {},
    "every": {"every": 2},
    "noise": {"sampler": "noise"},
    "hmc": {"sampler": "hmc", "delta": 3.0},
}


def wrapped(optimizer: TSAM) -> Any:
    """An object of a class made from TSAM's, with a copy of its ``__dict__``."""
    shell = type("Wrapped", (TSAM,), {}).__new__(type("Wrapped", (TSAM,), {}))
    shell.__dict__ = dict(optimizer.__dict__)
    return shell


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_wrapper_and_wrapped_are_one(problem, sampler: str) -> None:
    """Steps by turns through either are the steps of one optimizer, and so are loading and estimating."""
    task, twin = problem(), problem()
    inner, alone = (tsam(t.parameters, lr=0.1, seed=3, rho=0.3, **SAMPLERS[sampler]) for t in (task, twin))
    outer = wrapped(inner)
    for optimizer in (outer, inner, outer, outer, inner):
        task.train(optimizer, 1)
        twin.train(alone, 1)
        assert task.holds(twin.copies())
    state = copy.deepcopy(outer.state_dict())
    assert state["param_groups"] == alone.state_dict()["param_groups"]
    outer.estimate_gradient(task.closure(outer))
    inner.apply()
    alone.estimate_gradient(twin.closure(alone))
    alone.apply()
    inner.load_state_dict(state)
    alone.load_state_dict(state)
    with pytest.raises(RuntimeError, match="estimate"):
        outer.step()
    task.train(outer, 2)
    twin.train(alone, 2)
    assert task.holds(twin.copies())
    assert outer.diagnostics is inner.diagnostics
    assert outer.seed == inner.seed == 3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_attribute_is_bound_anew(problem, sampler: str) -> None:
    task = problem()
    optimizer = tsam(task.parameters, lr=0.1, seed=3, model=task.net, **SAMPLERS[sampler])
    before = dict(vars(optimizer))
    task.train(optimizer, 2)
    for sample in optimizer.samples():
        with sample:
            loss = task.loss()
            loss.backward()
            sample.record(loss)
    optimizer.apply()
    with optimizer.perturbed():
        pass
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    if sampler == "ascent":
        sam = tsam(task.parameters, lr=0.1, radius=0.0, num_samples=1)
        first = dict(vars(sam))
        task.loss().backward()
        sam.first_step(zero_grad=True)
        task.loss().backward()
        sam.second_step()
        assert all(vars(sam)[name] is value for name, value in first.items())
    assert vars(optimizer).keys() == before.keys()
    for name, value in before.items():
        assert vars(optimizer)[name] is value, name
