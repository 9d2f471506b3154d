"""Microbatches in no_sync() inside a pass in which TSAM has yet to find the DistributedDataParallel.

Laws: the step is that of a TSAM which was given the module; the module's settings are as before; a no_sync() around a
whole step is refused on all ranks, and moves nothing.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from rank_pool import pool
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from tsam_ext import TSAM

SETTINGS: dict[str, Any] = {"num_samples": 3, "rho": 0.3, "radius": 0.5, "tilt": 5.0}
WAYS: dict[str, dict[str, Any]] = {
    "ascent": {},
    "noise": {"sampler": "noise", "rho": 0.0},
    "local": {"sync": "local"},
}


def train(rank: int, way: str, *, given: bool, around: bool = False) -> tuple[torch.Tensor, bool, str]:
    """The weights after two steps of two microbatches, whether the module reduces gradients, and what was raised."""
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(5, 3))
    x, y = torch.randn(2, 12, 5)[rank], torch.randint(0, 3, (2, 12))[rank]
    named = {"model": model} if given else {}
    optimizer = TSAM(model.parameters(), lr=0.5, seed=1, **{**SETTINGS, **WAYS[way], **named})

    def closure() -> torch.Tensor:
        total = torch.zeros(())
        for i, (rows, labels) in enumerate(zip(x.split(6), y.split(6), strict=True)):
            with nullcontext() if i else model.no_sync():
                loss = cross_entropy(model(rows), labels) / 2
                loss.backward()
            total += loss.detach()
        return total

    raised = ""
    for _ in range(2):
        optimizer.zero_grad()
        with model.no_sync() if around else nullcontext():
            try:
                optimizer.step(closure)
            except RuntimeError as error:
                raised = str(error)
    weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    return weights, model.require_backward_grad_sync, raised


def pair(rank: int, way: str) -> list[Any]:
    return [train(rank, way, given=given) for given in (False, True)]


def refused(rank: int, way: str) -> Any:
    torch.manual_seed(0)
    before = torch.nn.utils.parameters_to_vector(torch.nn.Linear(5, 3).parameters()).detach()
    return before, train(rank, way, given=False, around=True)


@pytest.mark.parametrize("way", WAYS)
def test_a_module_that_is_found_in_no_sync_steps_as_one_that_was_given(way: str) -> None:
    results = pool(2).run(pair, way)
    for found, given in results:
        assert found[1:] == given[1:] == (True, "")
        assert torch.equal(found[0], given[0])
        assert torch.equal(found[0], results[0][0][0])


@pytest.mark.parametrize("way", WAYS)
def test_no_sync_around_a_step_is_refused_where_the_module_is_found(way: str) -> None:
    for before, (weights, reduces, raised) in pool(2).run(refused, way):
        assert "no_sync()" in raised and reduces
        assert torch.equal(weights, before)
