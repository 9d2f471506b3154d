"""A rank that fails, of several that train one model: what the others see, and where every one's parameters are then.

Ranks are processes under gloo (rank_pool.py). Equal means equal bits; "before" is before the step that failed.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from rank_pool import Pool, pool
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tsam_ext import TSAM
from tsam_ext.mean import Mean

DEAD_AFTER = 3.0  # seconds that a collective may take in pools of tests that lose a rank


class Run:
    """A small regression on this rank's half of the rows; ``fault`` is called in each pass with its number."""

    def __init__(self, rank: int, *, shards: bool = False, **options: Any) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.ddp: nn.Module = net
        if shards:
            for layer in (net[0], net[2], net):
                fully_shard(layer)
        else:
            self.ddp = DistributedDataParallel(net)
        x, y = torch.randn(8, 5).double(), torch.randn(8, 3).double()
        self.x, self.y = x[4 * rank : 4 * rank + 4], y[4 * rank : 4 * rank + 4]
        told: dict[str, Any] = {"rho": 0.1, "tilt": 5.0, "num_samples": 3, "seed": 1, "model": self.ddp, **options}
        self.opt = TSAM(self.ddp.parameters(), torch.optim.SGD, lr=0.05, **told)
        self.passes = 0
        for _ in range(2):  # DDP arranges its buckets anew in the forward after its first reduction: a collective
            self.step()

    def step(self, fault: Callable[[int], float] = lambda number: 1.0) -> Any:
        """One step; the loss of each pass times what ``fault`` returns."""
        self.passes = 0

        def closure() -> Tensor:
            self.passes += 1
            factor = fault(self.passes)
            loss = (self.ddp(self.x) - self.y).square().mean() * factor
            loss.backward()
            return loss

        return self.opt.step(closure)

    @property
    def parameters(self) -> Tensor:
        """All that this rank holds of the parameters, in one vector."""
        parameters = (p.detach() for p in self.ddp.parameters())
        return torch.cat([(p.to_local() if isinstance(p, DTensor) else p).reshape(-1) for p in parameters])

    def failed(self, fault: Callable[[int], float]) -> tuple[str, bool]:
        """What a step that fails says, and whether the parameters are as before."""
        before = self.parameters
        try:
            self.step(fault)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        else:
            said = "nothing"
        return said, torch.equal(before, self.parameters)


def raises_in(number: int, on: bool) -> Callable[[int], float]:
    def fault(passed: int) -> float:
        if on and passed == number:
            raise KeyError("a fault")
        return 1.0

    return fault


def same(results: list[tuple[Any, ...]]) -> bool:
    """Whether the last entry, a tensor, is the same on all ranks."""
    return all(torch.equal(results[0][-1], result[-1]) for result in results)


def a_rank_raises(rank: int, options: dict[str, Any], number: int) -> tuple[Any, ...]:
    run, clean = Run(rank, **options), Run(rank, **options)
    said, restored = run.failed(raises_in(number, rank == 1))
    run.step()
    clean.step()
    return said, restored, torch.equal(run.parameters, clean.parameters), run.parameters


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({"sampler": "noise"}, 1),
        ({"sampler": "noise"}, 2),
        ({"sampler": "noise", "reduction": "manual"}, 3),
        ({"reduction": "manual"}, 2),
        ({}, 4),
        ({"sync": "local"}, 3),
        ({"sync": "samples", "num_samples": 4}, 1),
    ],
)
def test_where_no_collective_is_under_way_all_ranks_raise_and_the_next_step_works(
    options: dict[str, Any], number: int
) -> None:
    results = pool(2).run(a_rank_raises, options, number)
    assert "KeyError: 'a fault'" in results[1][0]
    assert "1 of 2 ranks raised in this pass" in results[0][0] and "Nothing was updated" in results[0][0]
    assert all(restored and as_if_never for _, restored, as_if_never, _ in results)
    assert same(results)


def all_ranks_raise(rank: int, options: dict[str, Any]) -> tuple[Any, ...]:
    run = Run(rank, **options)
    said, restored = run.failed(raises_in(1, True))
    run.step()
    return said, restored, run.opt.state_dict()["param_groups"][0]["tsam_step"], run.parameters


@pytest.mark.parametrize("options", [{}, {"sampler": "hmc"}, {"sampler": "noise"}])
def test_a_pass_that_all_ranks_fail_in_is_no_hindrance(options: dict[str, Any]) -> None:
    results = pool(2).run(all_ranks_raise, options)
    assert all("a fault" in said and restored and step == 3 for said, restored, step, _ in results)
    assert same(results)


def a_loss_is_not_finite(rank: int, bad: float, options: dict[str, Any]) -> tuple[Any, ...]:
    run = Run(rank, **options)
    before = run.parameters
    run.step(lambda number: bad if rank == 1 and number == 2 else 1.0)
    counted = run.opt.diagnostics.num_nonfinite
    return int(counted), torch.equal(before, run.parameters), run.parameters


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{"sampler": "noise"}, {}, {"sync": "local"}, {"sampler": "hmc"}])
@pytest.mark.parametrize("skips", [False, True])
def test_a_loss_that_is_not_finite_is_so_for_all(bad: float, options: dict[str, Any], skips: bool) -> None:
    results = pool(2).run(a_loss_is_not_finite, bad, {**options, "skip_nonfinite_loss": skips})
    first, second = (torch.nan_to_num(result[-1], nan=123.0) for result in results)
    assert torch.equal(first, second)
    finite = bool(results[0][-1].isfinite().all())
    if options.get("sampler") == "hmc":  # a proposal with such a loss is rejected
        assert finite
    elif options.get("sync") == "local":
        assert [count for count, *_ in results] == [0, 1] and finite == skips
    else:
        assert [count for count, *_ in results] == [1, 1] and finite == skips


def a_rank_leaves_alone(rank: int, how: str) -> tuple[Any, ...]:
    run = Run(rank, sampler="noise")
    if rank == 1:
        if how == "break":
            for sample in run.opt.samples():
                with sample:
                    loss = (run.ddp(run.x) - run.y).square().mean()
                    loss.backward()
                    sample.record(loss)
                break
        else:
            run.opt.step(lambda: None)
    return run.failed(lambda number: 1.0)


def test_a_rank_that_leaves_a_step_alone_never_pairs_with_old_passes() -> None:
    crowd = Pool(2, seconds=DEAD_AFTER)
    try:
        results = crowd.run(a_rank_leaves_alone, "break")
        assert all("ranks are at different passes" in said and restored for said, restored in results)
    finally:
        crowd.close()


def a_rank_has_no_batch(rank: int, both: bool) -> tuple[Any, ...]:
    run = Run(rank, sampler="noise")
    before, said = run.parameters, "nothing"
    try:
        if rank == 1 or both:
            run.opt.step(lambda: None)
        else:
            run.step()
    except RuntimeError as error:
        said = str(error)
    return said, torch.equal(before, run.parameters)


def test_a_batch_that_some_ranks_have_alone_is_refused() -> None:
    assert pool(2).run(a_rank_has_no_batch, True) == [("nothing", True)] * 2
    results = pool(2).run(a_rank_has_no_batch, False)
    assert all(restored and "1 of 2 ranks had no batch" in said for said, restored in results)


def a_rank_fails_after_all_have_met(rank: int) -> tuple[Any, ...]:
    run = Run(rank, sampler="noise", reduction="manual")
    true = Mean.start_sum

    def broken(*arguments: Any) -> Any:
        raise MemoryError("no room")

    if rank == 1:
        Mean.start_sum = broken  # type: ignore[method-assign]
    try:
        first = run.failed(lambda number: 1.0)
    finally:
        Mean.start_sum = true  # type: ignore[method-assign]
    return first, run.failed(lambda number: 1.0)


def test_a_rank_that_misses_what_others_have_done_does_not_go_on() -> None:
    crowd = Pool(2, seconds=DEAD_AFTER)
    try:
        (alone, _), (broken, after) = crowd.run(a_rank_fails_after_all_have_met)
    finally:
        crowd.close()
    assert "no room" in broken[0] and broken[1]
    assert "failed at the end of a step that the others may have taken" in after[0] and after[1]
    assert "over 2 ranks failed" in alone[0] and alone[1]


def a_rank_dies(rank: int, number: int, options: dict[str, Any]) -> tuple[Any, ...]:
    run = Run(rank, **options)

    def fault(passed: int) -> float:
        if rank == 1 and passed == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return 1.0

    began = time.monotonic()
    said, restored = run.failed(fault)
    return said, restored, time.monotonic() - began


@pytest.fixture
def crowd() -> Iterator[Pool]:
    made = Pool(2, seconds=20.0)
    yield made
    made.close()


KILLED = [({}, 1), ({"sampler": "noise"}, 2), ({"sync": "local"}, 1), ({"shards": True}, 2)]


@pytest.mark.parametrize(("options", "number"), KILLED)
def test_a_rank_that_is_killed_inside_a_step(crowd: Pool, options: dict[str, Any], number: int) -> None:
    (said, restored, seconds), gone = crowd.run(a_rank_dies, number, options)
    assert gone is None and restored and seconds < 60.0
    assert "RuntimeError" in said or "CollectiveError" in said or "DistBackendError" in said


def a_rank_never_comes(rank: int) -> tuple[Any, ...]:
    run = Run(rank)
    run.opt.load_state_dict(run.opt.state_dict())  # whereupon ranks compare themselves
    if rank == 1:
        time.sleep(3 * DEAD_AFTER)
        return "stayed away", True
    return run.failed(lambda number: 1.0)


def test_a_rank_that_never_comes_ends_in_the_timeout() -> None:
    crowd = Pool(2, seconds=DEAD_AFTER)
    try:
        (said, restored), _ = crowd.run(a_rank_never_comes)
    finally:
        crowd.close()
    assert restored and "has not come within the group's timeout" in said
