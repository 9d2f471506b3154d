"""Loops in which ranks would train apart without an error: each is refused, on all ranks, before anything is updated.

Ranks are processes under gloo (rank_pool.py). A refusal leaves the parameters, and a later step may be refused again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from rank_pool import pool
from rank_training import Run, error_of, flat, rows, share, small_net, squared_error
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tsam_ext import TSAM

TOLD: dict[str, Any] = {"lr": 0.05, "tilt": 20.0, "seed": 3, "rho": 0.1, "num_samples": 3}


class Outside:
    """A net in DistributedDataParallel, and one scale that nothing reduces; the same optimizer has both."""

    def __init__(self, rank: int, size: int, options: dict[str, Any]) -> None:
        self.net, self.scale = small_net(), nn.Parameter(torch.ones(3).double())
        self.model, (self.x, self.y) = DistributedDataParallel(self.net), share(rank, size, *rows())
        self.opt = TSAM([*self.net.parameters(), self.scale], model=self.model, **TOLD, **options)

    def closure(self) -> Tensor:
        loss = squared_error(self.model(self.x) * self.scale, self.y)
        loss.backward()
        return loss


def frozen_at_first(rank: int, size: int, options: dict[str, Any]) -> Run:
    net = small_net()
    net[0].requires_grad_(False)
    run = Run(rank, size, options, net=net)
    run.train(2)
    net[0].requires_grad_(True)
    return run


def twice(step: Callable[[], Any], net: nn.Module) -> tuple[str, str, bool]:
    """What two steps raise, and whether the net is as it was."""
    before = flat(net)
    return error_of(step), error_of(step), torch.equal(before, flat(net))


def unreduced(rank: int, size: int) -> list[tuple[str, str, bool]]:
    found = []
    for sampler, reduction in (("ascent", "tail"), ("ascent", "manual"), ("noise", "tail"), ("hmc", "tail")):
        options = {"sampler": sampler, "reduction": reduction}
        outside, late = Outside(rank, size, options), frozen_at_first(rank, size, options)
        inner, quiet = Run(rank, size, options), Run(rank, size, options)
        inner.model = inner.net

        def in_no_sync(quiet: Run = quiet) -> Tensor:
            with quiet.opt.model.no_sync():  # type: ignore[union-attr, operator]
                return quiet.closure()

        for run, closure in (
            (outside, outside.closure),
            (late, late.closure),
            (inner, inner.closure),
            (quiet, in_no_sync),
        ):
            found.append(twice(lambda run=run, closure=closure: run.opt.step(closure), run.net))  # type: ignore[misc]
    return found


def test_gradients_that_a_module_was_to_reduce_and_has_not() -> None:
    ranks = pool(2).run(unreduced, 2)
    assert ranks[0] == ranks[1]
    assert len(ranks[0]) == 16
    for (first, second, unchanged), place in zip(ranks[0], itertools.cycle((4, 0, 0, None))):
        if place is None:
            assert "a step inside DistributedDataParallel.no_sync()" in first
        else:
            assert f"params'][{place}].grad: gradients differ between ranks" in first
            assert "nothing has reduced them" in first
        assert second == first, "the refusal is everyone's, so that none waits for a checkpoint"
        assert unchanged


def of_one_length(rank: int) -> tuple[str, str, bool]:
    """Gradients of the same length and sum of values on both ranks, which differ all the same."""
    torch.manual_seed(0)
    net = nn.Linear(4, 1, bias=False)
    opt = TSAM(net.parameters(), process_group=dist.group.WORLD, **TOLD)
    signs = torch.tensor([[1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, 1.0, -1.0]])[rank]

    def closure() -> Tensor:
        loss = (net.weight * signs).sum()
        loss.backward()
        return loss

    return twice(lambda: opt.step(closure), net)


def test_gradients_of_the_same_length_are_not_taken_for_the_same() -> None:
    for first, second, unchanged in pool(2).run(of_one_length):
        assert "nothing has reduced them" in first
        assert first == second
        assert unchanged


def apart(rank: int, size: int) -> dict[str, tuple[str, str, bool]]:
    """Each case: what two steps raise, and whether the net is as it was."""
    found = {}
    for sampler, how in itertools.product(("ascent", "noise"), ("manual", "local")):
        told = {"reduction": "manual"} if how == "manual" else {"sync": "local"}
        part = Run(rank, size, {}, how="seen")
        part.opt = TSAM(part.net[0].parameters(), sampler=sampler, **TOLD, **told)
        found[f"part {sampler} {how}"] = twice(lambda part=part: part.opt.step(part.closure), part.net)  # type: ignore[misc]
    for sampler in ("ascent", "noise", "hmc"):
        alone = Run(rank, size, {"sampler": sampler, "process_group": None}, how="seen")
        found[f"alone {sampler}"] = twice(lambda run=alone: run.opt.step(run.closure), alone.net)  # type: ignore[misc]
    options = {"reduction": "manual", "weigh_rows": True, "process_group": dist.group.WORLD}
    hooked = Run(rank, size, options, how="plain")
    for parameter in hooked.net.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))
    found["weighed"] = twice(lambda: hooked.opt.step(hooked.closure), hooked.net)
    sam = Run(rank, size, {"num_samples": 1, "radius": 0.0, "process_group": dist.group.WORLD}, how="plain")
    sam.closure()
    found["two steps"] = twice(sam.opt.first_step, sam.net)
    for how in ("ddp", "seen"):
        loaded = Run(rank, size, {}, how=how)
        loaded.train(2)
        state = loaded.opt.state_dict()
        state["param_groups"][0]["lr"] += rank
        loaded.opt.load_state_dict(state)
        found[f"loaded {how}"] = twice(lambda run=loaded: run.opt.step(run.closure), loaded.net)  # type: ignore[misc]
    for sync in ("global", "local"):
        other = Run(rank, size, {"sync": sync})
        with torch.no_grad():
            other.net[2].bias[1] += 1e-6 * rank
        error, again, _ = twice(lambda run=other: run.opt.step(run.closure), other.net)  # type: ignore[misc]
        found[f"values {sync}"] = error, again, True
    return found


SAID = {
    "values": "params'][3]: its values differ between ranks",
    "part": "expected the module, as it holds parameters of another optimizer",
    "alone": "process_group: got None, expected 'auto' or a group, as a DistributedDataParallel",
    "weighed": "weigh_rows=True needs to keep backward passes from reducing gradients",
    "two": "params'][0].grad: gradients differ between ranks",
    "loaded": "differ in: options of parameter groups.",
}


def test_settings_by_which_ranks_would_train_apart() -> None:
    first, second = pool(2).run(apart, 2)
    assert first == second
    for name, (error, again, unchanged) in first.items():
        assert SAID[name.split()[0]] in error, (name, error)
        assert again == error, name
        assert unchanged, name


def shards_alone(rank: int) -> str:
    net = small_net()
    fully_shard(net)
    opt = TSAM(net.parameters(), model=net, process_group=None, **TOLD)
    return error_of(lambda: opt.step(lambda: squared_error(net(rows()[0]), rows()[1])))


def test_a_process_with_a_part_of_the_parameters_does_not_train_alone() -> None:
    for error in pool(2).run(shards_alone):
        assert "process_group: got None, expected 'auto' or a group, as the parameters are DTensors" in error


def quiet_later(rank: int, size: int) -> list[tuple[str, bool, bool]]:
    """A good step; one whose passes are inside no_sync(), which is refused; then a good one again."""
    found = []
    for options in ({}, {"sampler": "noise"}, {"sampler": "hmc"}):
        run, clean = Run(rank, size, options), Run(rank, size, options)
        run.train(2)
        clean.train(2)
        before = flat(run.net)

        def in_no_sync(run: Run = run) -> Tensor:
            with run.model.no_sync():  # type: ignore[operator]
                return run.closure()

        said = error_of(lambda run=run, closure=in_no_sync: run.opt.step(closure))  # type: ignore[misc]
        restored = torch.equal(before, flat(run.net))
        run.train(1)
        clean.train(1)
        found.append((said, restored, torch.equal(flat(run.net), flat(clean.net))))
    return found


def test_a_later_pass_inside_no_sync_is_refused_and_the_next_step_works() -> None:
    for said, restored, goes_on in itertools.chain(*pool(2).run(quiet_later, 2)):
        assert "a step inside DistributedDataParallel.no_sync()" in said and restored and goes_on


def other_betas(rank: int) -> str:
    model = DistributedDataParallel(small_net())
    opt = TSAM(
        model.parameters(), torch.optim.AdamW, betas=(0.9 - 0.1 * rank, 0.99), model=model, seed=1, num_samples=3
    )
    x, y = rows()
    return error_of(lambda: opt.step(lambda: squared_error(model(x), y)))


def test_options_that_are_tuples_are_compared_too() -> None:
    for said in pool(2).run(other_betas):
        assert "DisagreementError" in said and "differ in: options of parameter groups." in said
