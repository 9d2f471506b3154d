"""Chains of ranks that sample for themselves: whose a saved one is, and what goes on from it.

Ranks are processes under gloo (rank_pool.py).
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch
from rank_pool import pool
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tsam_ext import TSAM


def run(rank: int, size: int, sync: str, state: Any = None, steps: int = 3) -> tuple[Any, ...]:
    """Parameters, the chain's ε, what a checkpoint holds and what was warned of, after the steps from ``state``."""
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(4, 2).double()
    if size > 1:
        model = DistributedDataParallel(model)
    x, y = torch.randn(8, 4).double(), torch.randn(8, 2).double()
    if sync == "local":
        x, y = x[rank * 8 // size :][: 8 // size], y[rank * 8 // size :][: 8 // size]
    told: dict[str, Any] = {"sampler": "hmc", "num_samples": 3, "tilt": 5.0, "rho": 0.3, "seed": 2, "model": model}
    told |= {"sync": sync} if size > 1 else {}
    opt = TSAM(model.parameters(), torch.optim.SGD, lr=0.05, **told)
    if state is not None:
        weights, saved = torch.load(io.BytesIO(state), weights_only=True)
        model.load_state_dict(weights if size > 1 else {k.removeprefix("module."): v for k, v in weights.items()})
        opt.load_state_dict(saved)

    def closure() -> Tensor:
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(steps):
            opt.step(closure)
            opt.zero_grad()
    said = [str(w.message) for w in told if "chain starts anew" in str(w.message)]
    packed = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), packed)
    parameters = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    epsilon = torch.cat([e.reshape(-1) for e in opt.chain_position()])
    return parameters, epsilon, packed.getvalue(), said


def go_on(rank: int, size: int, sync: str, states: list[bytes]) -> tuple[Any, ...]:
    return run(rank, size, sync, states[min(rank, len(states) - 1)])


@pytest.mark.parametrize("sync", ["local", "samples"])
def test_each_rank_goes_on_from_its_own_chain(sync: str) -> None:
    whole = pool(2).run(run, 2, sync, None, 6)
    half = pool(2).run(run, 2, sync)
    assert not torch.equal(half[0][1], half[1][1])  # the chains differ, the parameters do not
    assert torch.equal(half[0][0], half[1][0])
    on = pool(2).run(go_on, 2, sync, [state for *_, state, _ in half])
    for (parameters, epsilon, _, said), (expected, there, *_) in zip(on, whole, strict=True):
        assert torch.equal(parameters, expected) and torch.equal(epsilon, there) and said == []


@pytest.mark.parametrize("sync", ["local", "samples"])
def test_a_rank_without_a_chain_of_its_own_begins_one_and_says_so_once(sync: str) -> None:
    (_, _, state, _), *_ = pool(2).run(run, 2, sync)
    mine, others = pool(2).run(go_on, 2, sync, [state])
    assert mine[3] == [] and len(others[3]) == 1 and "1 of 2" in others[3][0]
    assert torch.equal(mine[0], others[0]) and not torch.equal(mine[1], others[1])
    for more in pool(3).run(go_on, 3, sync, [state]):  # another number of ranks: a chain of its own for each
        assert len(more[3]) == 1
    alone = go_on(0, 1, "global", [state])
    assert len(alone[3]) == 1 and bool(alone[0].isfinite().all())


def test_one_chain_of_all_ranks_goes_on_anywhere() -> None:
    first = pool(2).run(run, 2, "global")
    assert torch.equal(first[0][1], first[1][1])
    for size in (1, 2, 3):
        if size == 1:
            results = [go_on(0, 1, "global", [first[0][2]])]
        else:
            results = pool(size).run(go_on, size, "global", [first[0][2]])
        assert all(said == [] for *_, said in results)
        assert all(torch.equal(results[0][0], result[0]) for result in results)
