"""The direction that is carried between full steps, over several ranks: as in one process on all their rows.

The laws: under "global" and "samples" parameters are one process's; under "local" the direction is made of the means
over ranks of their gradients; ranks keep the same bits; sharded parameters and their checkpoints carry shards of it.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_pool import pool
from rank_training import Run, distance, squared_error
from shard_training import net, sharded, train, tsam
from torch import Tensor

from tsam_ext import HMC, Noise
from tsam_ext.reference import take_direction

CARRY: dict[str, Any] = {"every": 3, "between": "carry", "rho": 0.3}
SAM = {"num_samples": 1, "radius": 0.0}
GLOBAL: list[dict[str, Any]] = [
    SAM,
    {"num_samples": 3},
    {"num_samples": 2, "between": "plain"},
    {"num_samples": 2, "skip_nonfinite_loss": True},
    {"sampler": "noise", "tilt": 200.0},
    {"sampler": Noise(noise="sphere"), "num_samples": 1},
    {"sampler": HMC(delta=1.0), "tilt": 200.0},
]
WAYS = list(itertools.product(GLOBAL, ("tail", "manual")))
SAMPLES: list[dict[str, Any]] = [{"num_samples": 3}, {"sampler": "noise", "num_samples": 4, "tilt": 200.0}, SAM]
STEPS = 8


def all_global(rank: int, size: int, ways: list[tuple[dict[str, Any], str]]) -> list[Any]:
    return [Run(rank, size, {**CARRY, **options, "reduction": way}).train(STEPS) for options, way in ways]


@pytest.mark.parametrize("size", [2, 3])
def test_global_carries_what_one_process_carries(size: int) -> None:
    ways = WAYS if size == 2 else WAYS[::3]
    ranks = pool(size).run(all_global, size, ways)
    for (options, way), *found in zip(ways, *ranks, strict=True):
        alone = Run(0, 1, {**CARRY, **options}).train(STEPS)
        other = Run(0, 1, {**CARRY, **options, "between": "carry" if "between" in options else "plain"}).train(STEPS)
        assert distance(found[0][0], alone[0]) < 1e-12, (options, way)
        seen = distance(other[0], alone[0]) > 1e-6
        assert seen or options == {"sampler": Noise(noise="sphere"), "num_samples": 1}, options  # of whose tilt no part
        assert all(torch.equal(other[0], found[0][0]) for other in found), (options, way)


def all_samples(rank: int, size: int) -> list[Any]:
    return [Run(rank, size, {**CARRY, **o, "sync": "samples"}, whole_batch=True).train(STEPS) for o in SAMPLES]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_share_the_samples_carry_what_one_process_carries(size: int) -> None:
    """Of SAM's one sample the other ranks have none."""
    for options, *found in zip(SAMPLES, *pool(size).run(all_samples, size), strict=True):
        alone = Run(0, 1, {**CARRY, **options}).train(STEPS)
        assert distance(found[0][0], alone[0]) < 1e-12, options
        assert all(torch.equal(other[0], found[0][0]) for other in found), options


def all_local(rank: int, size: int) -> list[Any]:
    found = []
    for options in ({"num_samples": 2}, {"sampler": "noise", "tilt": 200.0}):
        run, firsts = Run(rank, size, {**CARRY, **options, "sync": "local"}), {}
        for sample in run.opt.samples():
            with sample:
                loss = squared_error(run.model(run.x), run.y)
                loss.backward()
                sample.record(loss)
                gradient = torch.cat([p.grad.reshape(-1) for p in run.net.parameters()])
                firsts.setdefault(sample.index, gradient.clone())
        plain = torch.stack(list(firsts.values())).mean(0)
        dist.all_reduce(plain)
        tilted = torch.cat([p.grad.reshape(-1) for p in run.net.parameters()])
        run.opt.apply()
        state = run.opt.state_dict()["state"]
        v = torch.cat([state[i]["tsam_carry"].reshape(-1) for i in sorted(state)])
        found.append((v, take_direction(plain / size, tilted), run.train(STEPS)[0]))
    return found


def test_local_carries_what_the_means_over_ranks_have_beside_each_other() -> None:
    for (v, expected, first), (other, _, second) in zip(*pool(2).run(all_local, 2), strict=True):
        torch.testing.assert_close(v, expected, rtol=1e-10, atol=1e-13)
        assert v.norm() > 1e-5
        assert torch.equal(v, other)
        assert torch.equal(first, second)


def all_options(rank: int, size: int) -> list[Tensor]:
    told: list[dict[str, Any]] = [{"gradient_as_bucket_view": True}, {"static_graph": True}]
    runs = [Run(rank, size, {**CARRY, **SAM}, ddp=ddp).train(STEPS)[0] for ddp in told]
    rows = Run(rank, size, {**CARRY, **SAM, "weigh_rows": True, "reduction": "manual"})
    return [*runs, rows.train(STEPS)[0]]


def test_buckets_and_weights_by_rows() -> None:
    """A gradient that is a part of a bucket is not kept as the direction's memory: the next pass writes there."""
    alone = Run(0, 1, {**CARRY, **SAM}).train(STEPS)[0]
    for ranks in zip(*pool(2).run(all_options, 2), strict=True):
        assert all(distance(parameters, alone) < 1e-12 for parameters in ranks)


def on_shards(rank: int, size: int, case: dict[str, Any]) -> tuple[Tensor, list[tuple[int, ...]]]:
    model = sharded(size)
    opt = tsam(model, torch.optim.SGD, **case)
    parameters, _ = train(model, opt, rank, size, steps=STEPS)
    kept = [entry["tsam_carry"] for entry in opt.state_dict()["state"].values()]
    return parameters, [tuple(v.to_local().shape if size > 1 else v.shape) for v in kept]


@pytest.mark.parametrize("case", [SAM, {"num_samples": 3}, {"sampler": "noise", "tilt": 200.0}])
def test_shards_carry_shards(case: dict[str, Any]) -> None:
    case = {**CARRY, **case}
    expected, _ = on_shards(0, 1, case)
    ranks = pool(3).run(on_shards, 3, case)
    for rank, (parameters, shapes) in enumerate(ranks):
        assert distance(parameters, expected) < 1e-11
        assert shapes == [(3 - 2 * (rank == 2), 5), (3 - 2 * (rank == 2),), (1, 7), (1,)]
    plain, _ = train(model := net(), tsam(model, torch.optim.SGD, **{**case, "between": "plain"}), 0, 1, steps=STEPS)
    assert distance(plain, expected) > 1e-6
