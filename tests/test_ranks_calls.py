"""What ranks ask of each other in a step, and what they refuse together.

The laws: a step makes as many reductions of gradients and as many small collectives as the documentation says; one
process makes none; unequal rows count by their number where that is asked; what cannot work raises the same error on
all ranks, within the step that shows it, and leaves the parameters as they were.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_pool import pool
from rank_training import Run, distance, error_of, flat, rows, small_net, squared_error
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from bench.many_gpus import METHODS
from tsam_ext import HMC

AUTO = HMC(delta="auto", num_leapfrog_steps=2, burn_in=1)
DEEP = HMC(num_leapfrog_steps=3, burn_in=2)
SAM = {"num_samples": 1, "radius": 0.0}
ONE = {"sampler": "noise", "num_samples": 1}
# Per step: passes, reductions by DistributedDataParallel, and our collectives: large, small. s = 3 where not said.
COUNTS: list[tuple[dict[str, Any], tuple[int, int, int, int]]] = [
    ({"sampler": "ascent"}, (6, 4, 1, 6)),
    ({"sampler": "ascent", "reduction": "manual"}, (6, 3, 1, 6)),
    ({"sampler": "noise"}, (3, 1, 1, 3)),
    ({"sampler": "noise", "reduction": "manual"}, (3, 0, 1, 3)),
    (SAM, (2, 2, 0, 2)),
    ({**SAM, "reduction": "manual"}, (2, 1, 1, 2)),
    (ONE, (1, 1, 0, 1)),
    ({**ONE, "reduction": "manual"}, (1, 0, 1, 1)),
    ({"sampler": "hmc"}, (4, 4, 0, 4 + 3)),
    ({"sampler": DEEP}, (16, 16, 0, 16 + 5)),
    ({"sampler": AUTO}, (9, 9, 0, 9 + 4 + 1)),
    ({"sampler": "ascent", "sync": "local"}, (6, 0, 1, 1)),
    ({"sampler": "hmc", "sync": "local"}, (4, 0, 1, 1)),
    ({"sampler": "ascent", "sync": "samples"}, (-1, 0, 1, 2)),
    ({"sampler": "hmc", "sync": "samples"}, (-1, 0, 1, 2)),
]


@contextlib.contextmanager
def counted(calls: list[tuple[str, int]]) -> Iterator[None]:
    """Notes each collective of torch.distributed, with how many numbers one rank brings."""

    def noting(name: str, place: int) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append((name, arguments[place].numel()))
            return own[name](*arguments, **options)

        return call

    own = {name: getattr(dist, name) for name in ("all_reduce", "broadcast", "all_gather")}
    try:
        for name in own:
            setattr(dist, name, noting(name, 1 if name == "all_gather" else 0))
        yield
    finally:
        for name, function in own.items():
            setattr(dist, name, function)


def count(rank: int, size: int, options: dict[str, Any], how: str, alone: Any = "auto") -> tuple[int, int, int, int]:
    """What one step asks for, after a first in which ranks compare themselves."""
    passes, buckets, calls = [0], list[int](), list[tuple[str, int]]()
    told = options if alone == "auto" else {**options, "process_group": alone}
    run = Run(rank, size, told, how=how, whole_batch=options.get("sync") == "samples")

    def closure() -> Tensor:
        passes[0] += 1
        return run.closure()

    run.train(2)
    if run.model is not run.net:  # a hook's arguments may have no annotations but torch's own, as objects
        run.model.register_comm_hook(buckets, lambda own, bucket: (own.append(1), allreduce_hook(None, bucket))[1])
    with counted(calls):
        run.train(1, closure=closure)
    large = sum(numbers >= flat(run.net).numel() for _, numbers in calls)
    return passes[0], len(buckets), large - len(buckets), len(calls) - large


def all_counts(rank: int, size: int) -> list[Any]:
    found: list[Any] = [[count(rank, size, options, how) for options, _ in COUNTS] for how in ("ddp", "seen")]
    mine = [dist.new_group([r]) for r in range(size)][rank]
    return [*found, [count(rank, size, {}, "plain", group) for group in (None, mine)]]


@pytest.mark.parametrize("size", [2, 3])
def test_a_step_asks_for_no_more_than_it_is_said_to(size: int) -> None:
    for rank, (known, seen, alone) in enumerate(pool(size).run(all_counts, size)):
        for (options, wanted), *each in zip(COUNTS, known, seen, strict=True):
            own = len(range(rank, 3, size))  # samples of this rank, where they are shared
            passes = wanted[0] if wanted[0] > 0 else 2 * own if options.get("sampler") == "ascent" else 1 + own
            assert each == [(passes, *wanted[1:])] * 2, (options, rank, wanted)
        assert alone == [(6, 0, 0, 0)] * 2


MODELLED = {
    "sam": SAM,
    "ascent tail": {"sampler": "ascent"},
    "ascent manual": {"sampler": "ascent", "reduction": "manual"},
    "noise tail": {"sampler": "noise"},
    "noise manual": {"sampler": "noise", "reduction": "manual"},
    "ascent local": {"sampler": "ascent", "sync": "local"},
    "ascent samples": {"sampler": "ascent", "sync": "samples"},
    "hmc": {"sampler": "hmc"},
}


@pytest.mark.parametrize("name", MODELLED)
def test_the_model_of_many_gpus_has_the_counts_of_real_ranks(name: str) -> None:
    options = MODELLED[name]
    gradients, buckets, large, small = next(counts for known, counts in COUNTS if known == options)
    method, given = METHODS[name], {"s": options.get("num_samples", 3), "ranks": 2, "steps": 1}
    hidden, exposed, flat_ones = (count(**given) for count in (method.hidden, method.exposed, method.flat))
    assert (hidden - flat_ones, flat_ones + exposed, method.small(**given)) == (buckets, large, small)
    assert gradients in (-1, method.gradients(**given))


UNEQUAL = list(itertools.product(("ascent", "noise", "hmc"), ("ddp", "seen", "world"), (3, 1)))


def all_unequal(rank: int, size: int) -> list[Any]:
    found = []
    for sampler, how, num_samples in UNEQUAL:
        options = {"sampler": sampler, "num_samples": num_samples, "reduction": "manual", "weigh_rows": True}
        run = Run(rank, size, options, how=how)
        x, y = rows()
        run.x, run.y = (x[:5], y[:5]) if rank == 0 else (x[5:], y[5:])
        found.append(run.train())
    return found


def test_unequal_rows_count_by_their_number() -> None:
    for case, first, second in zip(UNEQUAL, *pool(2).run(all_unequal, 2), strict=True):
        parameters, losses = Run(0, 1, {"sampler": case[0], "num_samples": case[2]}).train()
        assert distance(first[0], parameters) < 1e-12, case
        assert first[1] == pytest.approx(losses, rel=1e-11), case
        assert torch.equal(first[0], second[0]), case


class Branch(nn.Module):
    """A trunk, and a branch for all rows, the first six or none."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.side = small_net(), small_net()[2]

    def forward(self, x: Tensor, side: int) -> Tensor:
        out = self.trunk(x)
        return out if side == 0 else torch.cat([out[:side] + self.side(self.trunk[:2](x[:side])), out[side:]])


def branched(rank: int, size: int, sampler: str) -> Tensor:
    """The first six rows, which are the first rank's, take the branch."""
    told = {"sampler": sampler, "reduction": "manual", "weigh_rows": True}
    run = Run(rank, size, told, net=Branch(), ddp={"find_unused_parameters": True})

    def closure() -> Tensor:
        x, y = run.opt.part(run.x, run.y)
        loss = squared_error(run.model(x, 6 if rank == 0 else 0), y)
        loss.backward()
        return loss

    return run.train(closure=closure)[0]


@pytest.mark.parametrize("sampler", ["ascent", "noise", "hmc"])
def test_rows_count_where_one_rank_alone_has_a_gradient(sampler: str) -> None:
    first, second = pool(2).run(branched, 2, sampler)
    assert distance(first, branched(0, 1, sampler)) < 1e-12
    assert torch.equal(first, second)


def groups_made(rank: int) -> int:
    mine = [dist.new_group([r]) for r in range(2)][rank]
    run = Run(rank, 2, {"process_group": mine}, how="plain")
    run.train(1)
    before = len(dist.distributed_c10d._world.pg_map)
    run.train(3)
    return len(dist.distributed_c10d._world.pg_map) - before


def test_a_group_of_one_rank_makes_no_group_per_step() -> None:
    assert pool(2).run(groups_made) == [0, 0]


def refused(rank: int, size: int) -> dict[str, tuple[str, bool]]:
    """Each case: what its first step raises, and whether the parameters are as before."""
    found = {}

    def case(name: str, run: Run, closure: Callable[[], Any] | None = None) -> None:
        before = flat(run.net)
        found[name] = error_of(lambda: run.opt.step(closure or run.closure)), torch.equal(flat(run.net), before)

    for sampler in ("ascent", "noise", "hmc"):
        case(f"unknown {sampler}", Run(rank, size, {"sampler": sampler}, how="plain"))
        options = {"sampler": sampler, "process_group": dist.group.WORLD}
        case(f"not reduced {sampler}", Run(rank, size, options, how="plain"))
    for how in ("ddp", "seen"):
        case(f"seed {how}", Run(rank, size, {"seed": rank}, how=how))
        case(f"one seed {how}", Run(rank, size, {"seed": None if rank else 3}, how=how))
        case(f"lr {how}", Run(rank, size, {"lr": 0.1 + rank}, how=how))
        case(f"tilt {how}", Run(rank, size, {"tilt": 1.0 + rank}, how=how))
        case(f"sampler {how}", Run(rank, size, {"sampler": ("ascent", "noise")[rank]}, how=how))
        case(f"reduction {how}", Run(rank, size, {"reduction": ("tail", "manual")[rank]}, how=how))
        with_rows = Run(rank, size, {"reduction": "manual", "weigh_rows": True}, how=how)
        case(f"no part {how}", with_rows, lambda run=with_rows: plain_loss(run))
        stepped = Run(rank, size, {}, how=how)
        if rank:
            stepped.opt._progress.step += 1
        case(f"steps {how}", stepped)
    world, other = {"process_group": dist.group.WORLD}, nn.Linear(5, 3, bias=rank == 0).double()
    case("shapes", Run(rank, size, world, how="plain", net=other))
    mine = [dist.new_group([r]) for r in range(size)][rank]
    case("module of others", Run(rank, size, world, how="world", ddp={"process_group": mine}))
    for sampler in ("ascent", "noise"):
        short = Run(rank, size, {"sampler": sampler, "batch": "split"})
        short.x, short.y = short.x[: 3 - rank], short.y[: 3 - rank]
        case(f"rows for fewer samples {sampler}", short)
    inside = Run(rank, size, {})
    with inside.model.no_sync():
        case("no_sync", inside)
    unseen = Run(rank, size, {}, how="seen")
    with unseen.model.no_sync():
        case("no_sync, unseen", unseen)
    joined = Run(rank, size, {})
    with joined.model.join(throw_on_early_termination=True):
        case("join", joined)
    return found


def plain_loss(run: Run) -> Tensor:
    """The loss without part()."""
    loss = squared_error(run.model(run.x), run.y)
    loss.backward()
    return loss


WORDS = {
    "unknown": ("RuntimeError", "model=ddp", "process_group="),
    "not reduced": ("DisagreementError", "nothing has reduced them"),
    "seed": ("DisagreementError", "differ in: seed.", "Rank 0 has another than rank 1"),
    "one seed": ("DisagreementError", "differ in: seed."),
    "lr": ("DisagreementError", "differ in: options of parameter groups."),
    "tilt": ("DisagreementError", "differ in: settings."),
    "sampler": ("DisagreementError", "differ in: settings."),
    "reduction": ("DisagreementError", "differ in: reduction."),
    "no part": ("RuntimeError", "needs opt.part(...)"),
    "steps": ("DisagreementError", "differ in: the step."),
    "shapes": ("DisagreementError", "differ in: the number, shapes or dtypes of parameters."),
    "module of others": ("ValueError", "process_group", "[0, 1]", "as the module's"),
    "rows for fewer samples": ("OtherRankError", "batch='split' with fewer rows than samples"),
    "no_sync": ("RuntimeError", "inside DistributedDataParallel.no_sync()"),
    "no_sync, unseen": ("RuntimeError", "inside DistributedDataParallel.no_sync()"),
    "join": ("RuntimeError", "inside DistributedDataParallel.join()"),
}


def test_what_cannot_work_raises_the_same_on_all_ranks() -> None:
    first, second = pool(2).run(refused, 2)
    first["module of others"] = first["module of others"][0].replace("[0],", "[1],"), first["module of others"][1]
    assert first == second  # but for the place of each
    for name, (error, unchanged) in first.items():
        kind = max((kind for kind in WORDS if name.startswith(kind)), key=len)
        assert all(word in error for word in WORDS[kind]), (name, error)
        assert unchanged, name
    assert {max((k for k in WORDS if name.startswith(k)), key=len) for name in first} == set(WORDS)


def by_hand(rank: int, size: int) -> list[Any]:
    """A plain net whose gradients hooks reduce."""
    found = []
    for sampler, reduction in itertools.product(("ascent", "noise", "hmc"), ("tail", "manual")):
        options = {"sampler": sampler, "reduction": reduction, "process_group": dist.group.WORLD}
        run = Run(rank, size, options, how="plain")
        for parameter in run.net.parameters():
            parameter.register_post_accumulate_grad_hook(mean_over_ranks)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append((sampler, *run.train(), [str(warning.message) for warning in caught]))
    return found


def mean_over_ranks(parameter: Tensor) -> None:
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def test_gradients_that_hooks_reduce() -> None:
    for first, second in zip(*pool(2).run(by_hand, 2), strict=True):
        sampler, parameters, losses, messages = first
        alone = Run(0, 1, {"sampler": sampler}).train()
        assert distance(parameters, alone[0]) < 1e-12, sampler
        assert losses == pytest.approx(alone[1], rel=1e-11)
        assert torch.equal(parameters, second[1])
        assert len(messages) == 1, messages
        assert "something reduces them in each backward pass" in messages[0]


def no_batch() -> None:
    """The closure of a loader that has run out."""


def step_into(losses: list[Any], run: Run, closure: Callable[[], Any]) -> None:
    losses.append(run.opt.step(closure))


def without_batches(rank: int, size: int) -> list[Any]:
    """The third of four batches is missing: on all ranks, or on the second alone.

    That is seen where the first pass reduces nothing; else the first rank's waits for the second's, as all of
    DistributedDataParallel's do.
    """
    found = []
    for everywhere, sampler, how in itertools.product((True, False), ("ascent", "noise", "hmc"), ("ddp", "seen")):
        if not everywhere and sampler != "noise":
            continue
        run = Run(rank, size, {"sampler": sampler}, how=how)
        run.train(2)
        before, losses = flat(run.net), list[Any]()
        closure = no_batch if everywhere or rank == 1 else run.closure
        error = error_of(functools.partial(step_into, losses, run, closure))
        unchanged = torch.equal(flat(run.net), before)
        after = run.train(1)
        found.append((error, losses, unchanged, everywhere, sampler, after))
    return found


def test_steps_without_a_batch() -> None:
    for first, second in zip(*pool(2).run(without_batches, 2), strict=True):
        error, losses, unchanged, everywhere, sampler, (parameters, _) = first
        assert error == second[0]
        assert unchanged and second[2]
        if everywhere:
            assert (error, losses) == ("", [None])
        else:
            assert "1 of 2 ranks had no batch" in error and error.startswith("OtherRankError")
        assert distance(parameters, Run(0, 1, {"sampler": sampler}).train(3)[0]) < 1e-12
        assert torch.equal(parameters, second[5][0])
