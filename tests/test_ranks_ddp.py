"""TSAM over ranks of DistributedDataParallel with sync="global": one step is that of one process on all their rows.

The laws: parameters and losses after some steps are those of one process, in whichever way the ranks come to know each
other and whatever options DistributedDataParallel has; ranks have the same bits; a step makes as many collectives as it
is said to; what cannot work raises the same on all ranks, and changes nothing.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from rank_pool import pool
from rank_training import Run, distance, flat, rows, share, small_net, squared_error, twin
from torch import Tensor, nn

from tsam_ext import HMC

SAMPLERS: dict[str, Any] = {"ascent": "ascent", "noise": "noise", "hmc": "hmc", "ball": HMC(prior="ball")}
WAYS = list(itertools.product(SAMPLERS, ("tail", "manual"), ("ddp", "inner", "seen", "world")))
BOTH = [{"sampler": sampler} for sampler in ("ascent", "noise")]


def all_ways(rank: int, size: int, dtype: torch.dtype, ways: list[tuple[str, str, str]]) -> list[Any]:
    return [
        Run(rank, size, {"sampler": SAMPLERS[name], "reduction": reduction}, how=how, dtype=dtype).train()
        for name, reduction, how in ways
    ]


@pytest.mark.parametrize(("size", "dtype"), [(2, torch.float64), (3, torch.float64), (2, torch.float32)])
def test_global_is_one_process_on_all_rows(size: int, dtype: torch.dtype) -> None:
    ways = WAYS if (size, dtype) == (2, torch.float64) else WAYS[::3]  # every sampler, reduction and how is there still
    ranks = pool(size).run(all_ways, size, dtype, ways)
    alone = {name: Run(0, 1, {"sampler": sampler}, dtype=dtype).train() for name, sampler in SAMPLERS.items()}
    for (name, reduction, how), *found in zip(ways, *ranks, strict=True):
        case, near = (name, reduction, how), 1e-6 if dtype == torch.float32 else 1e-9 if name == "ball" else 1e-12
        assert distance(found[0][0], alone[name][0]) < near, case
        assert found[0][1] == pytest.approx(alone[name][1], rel=10 * near), case
        assert all(torch.equal(other[0], found[0][0]) and other[1] == found[0][1] for other in found), case


def without_seeds(rank: int, size: int) -> list[Any]:
    found = []
    for name, how in itertools.product(SAMPLERS, ("ddp", "seen", "world")):
        torch.manual_seed(rank)
        run = Run(rank, size, {"sampler": SAMPLERS[name], "seed": None}, how=how)
        drawn = run.opt.seed
        found.append((name, how, drawn, run.train()[0], run.opt.seed))
    return found


def test_ranks_that_draw_their_seeds_take_that_of_the_first() -> None:
    for first, second in zip(*pool(2).run(without_seeds, 2), strict=True):
        name, how, drawn, parameters, seed = first
        assert drawn == seed == second[4] != second[2], (name, how)
        assert torch.equal(parameters, second[3]), (name, how)
        alone = Run(0, 1, {"sampler": SAMPLERS[name], "seed": seed}).train()[0]
        assert distance(parameters, alone) < (1e-9 if name == "ball" else 1e-12), (name, how)


def many_steps(rank: int, size: int) -> list[Tensor]:
    options: dict[str, Any] = {"num_samples": 2, "lr": 0.1}
    return [Run(rank, size, {"sampler": name, **options}).train(200)[0] for name in ("ascent", "noise", "hmc")]


def test_ranks_have_the_same_bits_after_many_steps() -> None:
    for first, second in zip(*pool(2).run(many_steps, 2), strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, second)


DDP_OPTIONS: dict[str, Any] = {
    "bucket views": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "static graph, bucket views": {"static_graph": True, "gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "small buckets": {"bucket_cap_mb": 1e-4},
}
LOOPS = ("plain", "zeros inside", "zeros kept", "microbatches")
OPTIONS = [
    case
    for case in itertools.product(DDP_OPTIONS, LOOPS, ("ascent", "noise"), ("ddp", "seen"))
    # A static graph must reduce its first backward pass; no_sync() in the first pass needs the module to be known.
    if case[1] != "microbatches" or (not case[0].startswith("static") and case[3] == "ddp")
]


def loops(run: Run, loop: str) -> tuple[Tensor, list[float]]:
    """Five steps of a loop as people write it."""

    def with_zeros() -> Tensor:
        run.opt.zero_grad()
        return run.closure()

    def microbatches() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for i, (x, y) in enumerate(zip(run.x.chunk(2), run.y.chunk(2), strict=True)):
            with run.model.no_sync() if i == 0 and run.model is not run.net else contextlib.nullcontext():
                loss = squared_error(run.model(x), y) / 2
                loss.backward()
            total += loss.detach()
        return total

    if loop == "zeros kept":
        losses = []
        for _ in range(5):
            losses.append(float(run.opt.step(run.closure)))
            run.opt.zero_grad(set_to_none=False)
        return flat(run.net), losses
    return run.train(closure={"plain": run.closure, "zeros inside": with_zeros, "microbatches": microbatches}[loop])


def all_options(rank: int, size: int) -> list[Any]:
    return [
        loops(Run(rank, size, {"sampler": sampler}, how=how, ddp=DDP_OPTIONS[name]), loop)
        for name, loop, sampler, how in OPTIONS
    ]


def test_options_of_distributed_data_parallel_and_loops() -> None:
    first, second = pool(2).run(all_options, 2)
    alone = {sampler: loops(Run(0, 1, {"sampler": sampler}), "plain") for sampler in ("ascent", "noise")}
    for case, one, other in zip(OPTIONS, first, second, strict=True):
        parameters, losses = alone[case[2]]
        assert distance(one[0], parameters) < 1e-12, case
        assert one[1] == pytest.approx(losses, rel=1e-11), case
        assert torch.equal(one[0], other[0]), case
        assert one[1] == other[1], case
