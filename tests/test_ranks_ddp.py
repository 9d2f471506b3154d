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
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from tsam_ext import HMC, TSAM

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


def many_steps(rank: int, size: int) -> list[tuple[Tensor, int]]:
    found = []
    for name in ("ascent", "noise", "hmc"):
        run = Run(rank, size, {"sampler": name, "num_samples": 2, "lr": 0.1})
        parameters, places = run.train(200)[0], set()
        for _ in range(4):
            run.opt.step(run.closure)
            places.add(next(run.net.parameters()).grad.data_ptr())  # type: ignore[union-attr]
            run.opt.zero_grad()
        found.append((parameters, len(places)))
    return found


def test_ranks_have_the_same_bits_after_many_steps_in_the_same_memory() -> None:
    names = ("ascent", "noise", "hmc")
    for name, (first, places), (second, _) in zip(names, *pool(2).run(many_steps, 2), strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, second), name
        assert places == 1 or name == "hmc", "the mean that travels has its memory from step to step"


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


class Branches(nn.Module):
    """A trunk, a branch for the rows from ``begin`` on, and one that nothing runs."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.side, self.idle = small_net(), small_net()[0], small_net()[2]

    def forward(self, x: Tensor, begin: int) -> Tensor:
        out = self.trunk(x)
        if begin >= len(x):
            return out
        return torch.cat([out[:begin], out[begin:] + self.side(x[begin:])[:, :3]])


UNUSED = list(itertools.product(("ascent", "noise"), ("tail", "manual"), (True, False), ("ddp", "seen")))


def branches(rank: int, size: int, sampler: str, reduction: str, keep: bool, how: str) -> list[Any]:
    """Rows from the 7th on, which are the second rank's, take the branch in every other step."""
    ddp, net = {"find_unused_parameters": True}, Branches()
    run = Run(rank, size, {"sampler": sampler, "reduction": reduction}, how=how, net=net, ddp=ddp)
    found: list[Any] = []
    for step in range(5):
        begin = len(run.x) if step % 2 == 0 or (size == 2 and rank == 0) else 0 if size == 2 else 6

        def closure(begin: int = begin) -> Tensor:
            loss = squared_error(run.model(run.x, begin), run.y)
            loss.backward()
            return loss

        run.opt.zero_grad(set_to_none=not keep)
        run.opt.step(closure)
        found.append([p.grad is None for p in net.parameters()])
    return [flat(net), *found]


def all_branches(rank: int, size: int) -> list[Any]:
    return [branches(rank, size, *case) for case in UNUSED]


def test_branches_that_no_rank_or_one_rank_runs() -> None:
    for case, first, second in zip(UNUSED, *pool(2).run(all_branches, 2), strict=True):
        alone = branches(0, 1, *case)
        assert distance(first[0], alone[0]) < 1e-12, case
        assert torch.equal(first[0], second[0]), case
        assert first[1:] == second[1:] == alone[1:], case
        assert first[1][-2:] == [True, True], "what nothing runs has no gradient"


def normed(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    net = small_net(dtype)
    return nn.Sequential(net[0], nn.BatchNorm1d(7, dtype=dtype), net[1], net[2])


NORMED = list(itertools.product(("ascent", "noise", "hmc"), (True, False)))


def all_normed(rank: int, size: int) -> list[Any]:
    found = []
    for sampler, broadcasts in NORMED:
        net, buffers = normed(), []
        run = Run(rank, size, {"sampler": sampler}, net=net, ddp={"broadcast_buffers": broadcasts})
        for _ in range(4):
            run.train(1)
            buffers.append([buffer.clone() for buffer in net.buffers()])
        found.append((flat(net), buffers))
    return found


def test_batch_norm_is_each_rank_s_and_its_statistics_are_kept_as_told() -> None:
    for (sampler, broadcasts), *ranks in zip(NORMED, *pool(2).run(all_normed, 2), strict=True):
        case, net = (sampler, broadcasts), normed()
        nets = nn.ModuleList([net, twin(net)])  # one process, with the statistics of two ranks
        run = Run(0, 1, {"sampler": sampler, "model": nets}, net=net)

        def closure(run: Run = run, nets: nn.ModuleList = nets) -> Tensor:
            parts = zip(nets, run.x.chunk(2), run.y.chunk(2), strict=True)
            loss = sum(squared_error(each(x), y) for each, x, y in parts) / 2
            loss.backward()
            return loss

        for step in range(4):
            run.train(1, closure=closure)
            for rank, (_, buffers) in enumerate(ranks):
                kept = nets[0 if broadcasts else rank].buffers()
                for found, wanted in zip(buffers[step], kept, strict=True):
                    assert torch.allclose(found, wanted, rtol=1e-11), (case, step, rank)
            same = [torch.equal(a, b) for a, b in zip(ranks[0][1][step], ranks[1][1][step], strict=True)]
            assert all(same) if broadcasts else not same[0], case
        assert distance(ranks[0][0], flat(net)) < 1e-12, case
        assert torch.equal(ranks[0][0], ranks[1][0]), case


LOWER = list(itertools.product(("ascent", "noise", "hmc"), ("tail", "manual"), ("hook", "autocast", "scaler")))


def lower(rank: int, size: int, sampler: str, reduction: str, what: str) -> tuple[Tensor, list[float]]:
    """Training in lower precision: of what travels, of the passes, and with a scaled loss and clipping."""
    options: dict[str, Any] = {"sampler": sampler, "reduction": reduction}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run = Run(rank, size, options | ({"scaler": scaler} if what == "scaler" else {}), dtype=torch.float32)
    if what == "hook" and size > 1:
        run.model.register_comm_hook(None, fp16_compress_hook)

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
            loss = squared_error(run.model(run.x), run.y)
        (scaler.scale(loss) if what == "scaler" else loss).backward()
        return loss

    if what != "scaler":
        return run.train(closure=closure)
    losses = []
    for _ in range(5):
        losses.append(float(run.opt.estimate_gradient(closure)))
        scaler.unscale_(run.opt)
        nn.utils.clip_grad_norm_(run.net.parameters(), 0.1)
        scaler.step(run.opt)
        scaler.update()
        run.opt.zero_grad()
    return flat(run.net), losses


def all_lower(rank: int, size: int) -> list[Any]:
    return [lower(rank, size, *case) for case in LOWER]


def test_lower_precision() -> None:
    for case, first, second in zip(LOWER, *pool(2).run(all_lower, 2), strict=True):
        parameters, losses = lower(0, 1, *case)
        near = {"hook": 1e-3, "autocast": 2e-3, "scaler": 1e-6}[case[2]]
        assert distance(first[0], parameters) < near, case
        assert first[1] == pytest.approx(losses, rel=10 * near), case
        assert torch.equal(first[0], second[0]), case
        assert first[1] == second[1], case


MORE = list(
    itertools.product(("every", "split", "few rows", "clip", "other", "maximize"), ("ascent", "noise"), ("ddp", "seen"))
)
MORE += [("two steps", "ascent", how) for how in ("ddp", "world")]


def more(rank: int, size: int, what: str, sampler: str, how: str) -> tuple[Tensor, list[float]]:
    """Settings and loops that say which gradient is taken of what."""
    settings: dict[str, dict[str, Any]] = {"every": {"every": 2}, "split": {"batch": "split"}}
    settings["maximize"] = {"maximize": True, "lr": 1e-3}
    settings["two steps"] = {"num_samples": 1, "radius": 0.0}
    one = {"num_samples": 1} | ({"radius": 0.1} if sampler == "ascent" else {})  # as long as of several
    settings["few rows"] = {"batch": "split"} if size > 1 else one
    run = Run(rank, size, {"sampler": sampler, **settings.get(what, {})}, how=how)
    if what == "split" and size == 2:  # sample j of one process sees what the ranks' samples j see
        x, y = rows()
        order = torch.arange(12).view(3, 2, 2)[:, rank].reshape(-1)
        run.x, run.y = x[order], y[order]
    if what == "few rows":  # one of each rank's, which makes one sample
        run.x, run.y = (t[:1] if size > 1 else t[[0, 6]] for t in (run.x, run.y))
    if what not in ("clip", "other", "two steps"):
        return run.train()
    losses = []
    if what == "two steps":
        for _ in range(5):
            run.closure()
            run.opt.first_step(zero_grad=True)
            run.closure()
            run.opt.second_step(zero_grad=True)
        return flat(run.net), []
    if what == "clip":
        for _ in range(5):
            losses.append(float(run.opt.estimate_gradient(run.closure)))
            nn.utils.clip_grad_norm_(run.net.parameters(), 0.1)
            run.opt.apply()
            run.opt.zero_grad()
        return flat(run.net), losses
    run.opt = TSAM(
        run.net[0].parameters(), lr=0.05, rho=0.1, tilt=20.0, seed=3, sampler=sampler, model=run.model, num_samples=3
    )
    other = torch.optim.SGD(run.net[2].parameters(), lr=0.05)
    for _ in range(5):
        losses.append(float(run.opt.step(run.closure)))
        other.step()
        run.opt.zero_grad()
        other.zero_grad()
    return flat(run.net), losses


def all_more(rank: int, size: int) -> list[Any]:
    return [more(rank, size, *case) for case in MORE]


def test_settings_and_loops() -> None:
    for case, first, second in zip(MORE, *pool(2).run(all_more, 2), strict=True):
        parameters, losses = more(0, 1, *case)
        assert distance(first[0], parameters) < 1e-12, case
        assert first[1] == pytest.approx(losses, rel=1e-11), case
        assert torch.equal(first[0], second[0]), case


class Complex(nn.Module):
    """A layer with a complex, a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, generator = small_net()[2], torch.Generator().manual_seed(3)
        self.mix = nn.Parameter(torch.randn(3, 3, dtype=torch.complex128, generator=generator))
        self.frozen = nn.Parameter(torch.ones(3).double(), requires_grad=False)
        self.idle = nn.Parameter(torch.ones(3).double())

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x).to(torch.complex128) @ self.mix
        return z.real + z.imag * self.frozen


TOWERS = list(itertools.product(("ascent", "noise", "hmc"), ("tail", "manual"), ("ddp", "seen"), (0, 2)))


def towers(rank: int, size: int, sampler: str, reduction: str, how: str, joins: int) -> tuple[Tensor, bool]:
    """Two modules, of which the first joins at a step; and whether gradients that are kept keep their values."""
    first, second = small_net()[0], Complex()
    a, b = (DistributedDataParallel(m, find_unused_parameters=True) if size > 1 else m for m in (first, second))
    net, (x, y) = nn.Sequential(a, nn.Tanh(), b), share(rank, size, *rows())
    told: dict[str, Any] = {"reduction": reduction, **({"model": net} if how == "ddp" else {})} if size > 1 else {}
    own = list(second.parameters())
    opt = TSAM(own, lr=0.05, rho=0.05, tilt=2.0, seed=3, num_samples=3, sampler=sampler, **told)

    def closure() -> Tensor:
        loss = squared_error(net(x), y)
        loss.backward()
        return loss

    kept: list[tuple[Tensor, Tensor]] = []
    for step in range(4):
        if step == joins:
            opt.add_param_group({"params": list(first.parameters()), "rho": 0.02})
        opt.step(closure)
        grad = second.layer.weight.grad
        kept.append((grad if how == "ddp" else grad.detach(), grad.clone()))
        del grad  # or the loop would hold it too
        net.zero_grad()
    parameters = [torch.view_as_real(p) if p.is_complex() else p for p in net.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in parameters]), all(torch.equal(a, b) for a, b in kept)


def all_towers(rank: int, size: int) -> list[Any]:
    return [towers(rank, size, *case) for case in TOWERS]


@pytest.mark.filterwarnings("ignore:TSAM. parameters that this optimizer does not hold")
def test_several_modules_odd_parameters_and_gradients_that_are_kept() -> None:
    for case, first, second in zip(TOWERS, *pool(2).run(all_towers, 2), strict=True):
        assert distance(first[0], towers(0, 1, *case)[0]) < 1e-12, case
        assert torch.equal(first[0], second[0]), case
        assert first[1] and second[1], case
