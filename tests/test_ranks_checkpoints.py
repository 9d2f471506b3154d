"""Checkpoints of sharded parameters, which reshard, and bases that shard their own state.

Ranks are processes under gloo (rank_pool.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rank_pool import pool
from shard_training import CASES, net, sharded, train, tsam
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from tsam_ext import TSAM


def saved(rank: int, size: int, folder: str, case: dict[str, Any], flat: bool, steps: int, saves: bool) -> Tensor:
    """Trains; then saves, or first loads."""
    model = sharded(size)
    if size == 1 and dist.is_initialized():
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    opt = tsam(model, **case)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    if not saves:
        model_state, optimizer_state = get_state_dict(model, opt, options=options)
        state = {"model": model_state, "opt": optimizer_state}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["opt"], options=options)
    parameters, _ = train(model, opt, rank, size, steps=steps)
    if saves:
        model_state, optimizer_state = get_state_dict(model, opt, options=options)
        dcp.save({"model": model_state, "opt": optimizer_state}, checkpoint_id=folder)
    return parameters


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", ["ascent", "every", "hmc"])
def test_a_checkpoint_of_two_ranks_goes_on_with_the_same_noise_on_one_and_three(
    tmp_path: Path, name: str, flat: bool
) -> None:
    model = net()
    expected, _ = train(model, tsam(model, **CASES[name]), 0, 1, steps=6)
    folder = str(tmp_path / "checkpoint")
    pool(2).run(saved, 2, folder, CASES[name], flat, 3, True)
    for size in (1, 2, 3):
        for ours in pool(size).run(saved, size, folder, CASES[name], flat, 3, False):
            torch.testing.assert_close(ours, expected, rtol=1e-11, atol=0.0)


def loaded_whole(rank: int) -> bool:
    """A checkpoint of one process, whose positions hold all rows, in a sharded optimizer."""
    single = net()
    alone = TSAM(
        single.parameters(), torch.optim.SGD, lr=0.02, sampler="hmc", seed=3, rho=0.1, process_group=None, num_samples=3
    )
    train(single, alone, 0, 1, steps=2)
    model = sharded(2)
    opt = tsam(model, torch.optim.SGD, sampler="hmc")
    opt.load_state_dict(alone.state_dict())
    ours = [position.full_tensor() for position in opt.chain_position()]  # type: ignore[attr-defined]
    # ε scales with no parameter: adaptive is False.
    return all(torch.equal(a, b) for a, b in zip(ours, alone.chain_position(), strict=True))


def test_a_position_of_all_rows_loads_into_shards() -> None:
    assert pool(2).run(loaded_whole) == [True, True]


def zero(rank: int, size: int) -> Tensor:
    model = net()
    ddp: nn.Module = DistributedDataParallel(model) if size > 1 else model
    if size > 1:
        base: Any = ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.AdamW, lr=0.02)
    else:
        base = torch.optim.AdamW(ddp.parameters(), lr=0.02)
    opt = TSAM(None, base, rho=0.1, tilt=20.0, seed=3, model=ddp, num_samples=3)
    return train(ddp, opt, rank, size, steps=5)[0]  # type: ignore[arg-type]


def test_a_base_that_shards_its_state_works() -> None:
    expected = zero(0, 1)
    for ours in pool(2).run(zero, 2):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0.0)
