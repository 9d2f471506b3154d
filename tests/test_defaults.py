"""What a TSAM does where nothing is said: it is SAM, written here by hand in float64.

Laws: θ' = θ − lr ∇L(θ + ρ g/‖g‖) with g = ∇L(θ), two gradients a step. A radius of None is 0 for one sample of
``ascent`` and rho for all else, group by group and step by step; a number is itself. It stays None in a checkpoint, so
what it means is the loading object's to say. A batch is not split into one part.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tsam_ext import TSAM, Ascent, Noise
from tsam_ext.reference import ReferenceTSAM

EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-13}


def test_nothing_said_is_sam_by_hand(problem) -> None:
    """Beside the closure, the two-step form and the reference; 12 steps, in which no warning is due."""
    ours, looped, theirs, hand = (problem() for _ in range(4))
    optimizer, two_steps = (TSAM(t.parameters, torch.optim.SGD, lr=0.1, rho=0.2) for t in (ours, looped))
    oracle = ReferenceTSAM(theirs.parameters, lr=0.1, rho=0.2)
    for _ in range(12):
        grads = torch.autograd.grad(hand.loss(), hand.parameters)
        scale = 0.2 / torch.cat([g.flatten() for g in grads]).norm()
        origin = hand.copies()
        with torch.no_grad():
            for p, g in zip(hand.parameters, grads, strict=True):
                p += scale * g
        grads = torch.autograd.grad(hand.loss(), hand.parameters)
        with torch.no_grad():
            for p, o, g in zip(hand.parameters, origin, grads, strict=True):
                p.copy_(o - 0.1 * g)
        ours.train(optimizer, 1)
        assert torch.allclose(ours.flat(), hand.flat(), **EXACT)
        theirs.train(oracle, 1)
        assert torch.allclose(theirs.flat(), hand.flat(), **EXACT)
        two_steps.zero_grad()
        looped.loss().backward()
        two_steps.first_step(zero_grad=True)
        looped.loss().backward()
        two_steps.second_step()
        assert looped.holds(ours.copies())
    assert len(ours.calls) == 2 * 12
    assert optimizer.settings.num_samples == len(optimizer.diagnostics.weights) == 1


@pytest.mark.parametrize(("every", "adaptive"), [(1, False), (3, False), (1, True)])
def test_the_default_has_the_bits_of_sam_spelt_out(problem, every: int, adaptive: bool) -> None:
    """Whatever the seed, as there is no noise; a checkpoint of it goes on with the same bits."""
    ours, theirs, resumed = problem(), problem(), problem()
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "rho": 0.3, "every": every, "adaptive": adaptive}
    optimizer = TSAM(ours.parameters, seed=1, **options)
    spelt = theirs.train(TSAM(theirs.parameters, seed=2, num_samples=1, radius=0.0, **options), 7)
    assert ours.train(optimizer, 4) == spelt[:4]
    state = copy.deepcopy(optimizer.state_dict())
    assert state["param_groups"][0]["radius"] is None
    resumed.net.load_state_dict(copy.deepcopy(ours.net.state_dict()))
    other = TSAM(resumed.parameters, seed=3, **options)
    other.load_state_dict(state)
    assert ours.train(optimizer, 3) == resumed.train(other, 3) == spelt[4:]
    assert ours.holds(theirs.copies()) and resumed.holds(theirs.copies())


def lengths(optimizer: TSAM, parameters: list[Tensor], sample: int = 0) -> list[float]:
    """‖ε‖ of each parameter by noise alone, as there is no gradient."""
    before = [p.detach().clone() for p in parameters]
    with optimizer.perturbed(sample), torch.no_grad():
        return [float((p - b).norm()) for p, b in zip(parameters, before, strict=True)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (0.0, 0.0)),
        ({"num_samples": 1, "radius": None}, (0.0, 0.0)),
        ({"every": 4}, (0.0, 0.0)),
        ({"radius": 0.7}, (0.7, 0.7)),
        ({"radius": lambda step: 0.7 - step}, (0.7, 0.7)),
        ({"num_samples": 2}, (0.3, 0.6)),
        ({"num_samples": 2, "batch": "split"}, (0.3, 0.6)),
        ({"num_samples": 2, "radius": 0.0}, (0.0, 0.0)),
        ({"sampler": Noise("rademacher")}, (0.3, 0.6)),
        ({"sampler": Noise("rademacher"), "num_samples": 3}, (0.3, 0.6)),
    ],
)
def test_a_radius_that_is_not_given(options: dict[str, Any], expected: tuple[float, float]) -> None:
    """rademacher: each of the 12 elements moves by radius/√12. The third group sets a radius of its own, or none."""
    first, second, third = (nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(3))
    groups: list[dict[str, Any]] = [
        {"params": [first], "rho": 0.3},
        {"params": [second], "rho": lambda step: 0.6 + step},
        {"params": [third], "radius": 0.2},
    ]
    if options.get("radius") and not callable(options["radius"]):
        groups[0]["radius"] = groups[1]["radius"] = options["radius"]
    optimizer = TSAM(groups, lr=0.1, seed=0, **{"sampler": Ascent("rademacher")} | options)
    found = lengths(optimizer, [first, second, third])
    assert found == pytest.approx([length * math.sqrt(4 / 12) for length in (*expected, 0.2)], rel=1e-6)


def test_a_chain_of_one_sample_has_its_scale(problem) -> None:
    """hmc has no radius; with one sample too it moves by rho."""
    task = problem()
    optimizer = TSAM(task.parameters, lr=0.0, rho=0.5, seed=1, sampler="hmc", tilt=0.0)
    task.train(optimizer, 3)
    moved = torch.cat([e.flatten() for e in optimizer.chain_position()]).norm()
    assert 0.25 < moved < 0.75
    assert optimizer.settings.default_radius is None


def test_a_loaded_radius_of_none_is_what_the_loading_object_says(problem) -> None:
    saved, task = problem(), problem()
    state = TSAM(saved.parameters, lr=0.1, rho=0.3).state_dict()
    optimizer = TSAM(task.parameters, lr=0.1, num_samples=2, sampler=Ascent("sphere"), rho=0.1)
    optimizer.load_state_dict(state)
    assert math.hypot(*lengths(optimizer, task.parameters, 1)) == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize("sampler", ["ascent", "noise"])
@pytest.mark.parametrize("options", [{}, {"num_samples": 1}])
def test_a_batch_is_not_split_into_one_part(problem, sampler: str, options: dict[str, Any]) -> None:
    base = torch.optim.SGD(problem().parameters, lr=0.1)
    before = copy.deepcopy(base.state_dict())
    refused = r"^TSAM: num_samples: got 1, expected 2 or more, .* as batch is 'split'"
    with pytest.raises(ValueError, match=refused):
        TSAM(base, batch="split", sampler=sampler, **options)
    assert base.state_dict() == before and "rho" not in base.defaults
    TSAM(base, batch="split", sampler=sampler, num_samples=2, every=2)


def test_a_chain_takes_no_part_however_many_samples(problem) -> None:
    for num_samples in (1, 3):
        with pytest.raises(ValueError, match=r"^TSAM: batch: got 'split', expected 'whole', as the sampler is HMC"):
            TSAM(problem().parameters, lr=0.1, batch="split", sampler="hmc", num_samples=num_samples)


@pytest.mark.parametrize(
    ("options", "heard"),
    [
        ({"tilt": 20.0}, True),
        ({"tilt": lambda step: -0.1 * step}, True),
        ({"tilt": -2.0, "sampler": "noise"}, True),
        ({}, False),
        ({"tilt": 0.0}, False),
        ({"tilt": 20.0, "num_samples": 2}, False),
        ({"tilt": 20.0, "sampler": "hmc"}, False),
    ],
)
def test_a_tilt_that_one_sample_cannot_have_is_heard_of(problem, options: dict[str, Any], heard: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        TSAM(problem().parameters, lr=0.1, **options)
    assert ["num_samples is 1" in str(one.message) for one in caught] == [True] * heard
    assert all(one.filename == __file__ for one in caught)
