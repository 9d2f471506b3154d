"""Metrics over ranks that each have rows of their own: the numbers are those of one process with all rows.

Laws: all ranks get the same bits; a rank without rows counts nothing; where one raises, or measures something else, all
raise, are as before, and may go on; where nothing says which ranks share the rows, a metric is refused.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from rank_pool import pool
from rank_training import error_of, flat, rows, small_net, squared_error
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tsam_ext import metrics

SHARES = ([2, 5], [3, 2])  # the rows of each rank's batches


def batches(shares: Any) -> list[tuple[Tensor, Tensor]]:
    """Of consecutive rows; ``shares``: the sizes of the batches that come before, and of those wanted."""
    before, wanted = shares
    x, y = (tensor[sum(before) :][: sum(wanted)].split(wanted) if wanted else () for tensor in rows())
    return list(zip(x, y, strict=True))


def value(net: nn.Module, batch: Any) -> Tensor:
    return squared_error(net(batch[0]), batch[1])


def measured(objective: metrics.Objective) -> list[Tensor]:
    found = metrics.hessian_eigenvalues(objective, 3, eigenvectors=True, tolerance=1e-6)
    assert found.eigenvectors is not None
    rise = metrics.ascent_sharpness(objective, 0.2)
    return [
        found.eigenvalues,
        torch.cat([part.flatten() for part in found.eigenvectors[0]]),
        metrics.hessian_trace(objective, 3).samples,
        metrics.average_sharpness(objective, 0.5, noise="sphere", num_samples=3).samples,
        metrics.tilted_objective(objective, 3.0, 0.5, num_samples=3).losses,
        metrics.surface(objective, [0.0, 1.0], directions=[found.eigenvectors[0]], filter_normalised=False).losses,
        torch.tensor([rise.mean, rise.standard_error], dtype=torch.float64),
    ]


def on_a_rank(rank: int) -> dict[str, Any]:
    net = small_net()
    ddp = DistributedDataParallel(net)
    mine = batches((SHARES[0] if rank else [], SHARES[rank]))
    objective = metrics.Objective(ddp, mine, value)
    found: dict[str, Any] = {"values": measured(objective)}
    calls = 0

    def failing(net: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 3:
            raise OSError("no more rows")
        return value(net, batch)

    broken = metrics.Objective(ddp, mine, failing)
    before = flat(net)
    found["raised"] = error_of(lambda: metrics.average_sharpness(broken, 0.5, num_samples=3))
    calls = 0 if rank == 1 else 9
    found["raised in a group"] = error_of(lambda: metrics.ascent_sharpness(broken, 0.5, group_size=1))
    found["radius"] = error_of(lambda: metrics.average_sharpness(objective, 0.5 + rank))
    direction = [torch.full_like(p, 1.0 + rank) for p in net.parameters()]
    found["direction"] = error_of(lambda: metrics.surface(objective, [0.0], directions=[direction]))
    found["unsaid"] = error_of(lambda: metrics.Objective(net, mine, value))
    found["around"] = error_of(lambda: metrics.Objective(nn.Sequential(ddp), mine, value, process_group=None))
    alone = metrics.Objective(net, batches(([], [12])), value, process_group=None)
    found["alone"] = metrics.hessian_trace(alone, 2).samples
    given = metrics.Objective(net, mine, value, process_group=dist.group.WORLD)
    found["given"] = metrics.hessian_trace(given, 2).samples
    idle = metrics.Objective(ddp, batches(([], [4, 8] if rank else [])), value)  # the first has no rows
    found["idle"] = metrics.hessian_trace(idle, 2).samples
    found["kept"] = torch.equal(flat(net), before)
    if rank == 1:
        net[0].bias.data[3] += 1.0
    found["parameters"] = error_of(lambda: metrics.hessian_trace(objective, 1))
    return found


def test_several_ranks_measure_what_one_process_does() -> None:
    ranks = pool(2).run(on_a_rank)
    whole = metrics.Objective(small_net(), batches(([], [2, 5, 3, 2])), value)
    for found in ranks:
        for mine, others, expected in zip(found["values"], ranks[0]["values"], measured(whole), strict=True):
            assert torch.equal(mine, others)
            torch.testing.assert_close(mine.abs(), expected.abs(), rtol=1e-7, atol=1e-7)
        trace = metrics.hessian_trace(whole, 2).samples
        for name in ("alone", "given", "idle"):
            torch.testing.assert_close(found[name], trace)
        assert found["kept"]
    for name in ("raised", "raised in a group"):
        assert ranks[1][name] == "OSError: no more rows"
        assert ranks[0][name].startswith("OtherRankError: tsam.metrics.")
    for found in ranks:
        assert "differ in: radius" in found["radius"]
        assert "directions[0]: ranks do not have the same values" in found["direction"]
        assert "0.bias: ranks do not have the same values" in found["parameters"]
        assert "got 'auto' in one of 2 processes, without a DistributedDataParallel" in found["unsaid"]
        assert "got a module around a DistributedDataParallel" in found["around"]
