"""TSAM over ranks that sample by themselves: sync="local" on each rank's own rows, sync="samples" on the same rows.

The laws: under "local" the gradient is the mean over ranks of each one's own estimate, by noise or a chain of its own;
under "samples" a step is one process's with all samples, diagnostics included, whatever the tilt and whichever rank has
which; ranks keep the same bits; what either cannot do is refused on all ranks.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_pool import pool
from rank_training import Run, distance, error_of, flat, rows, share, small_net, squared_error
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tsam_ext import HMC, TSAM, Ascent, Noise
from tsam_ext.together import GOLDEN

STEPS = 4
DRAWING: list[dict[str, Any]] = [
    {"sampler": "ascent"},
    {"sampler": "noise"},
    {"sampler": Noise(antithetic=True), "num_samples": 4},
    {"sampler": Ascent(noise="sphere"), "adaptive": True},
    {"sampler": "noise", "num_samples": 1},
    {"num_samples": 1, "radius": 0.0},
    {"sampler": "ascent", "tilt": math.inf},
    {"sampler": "noise", "batch": "split"},
    {"sampler": "ascent", "every": 3, "between": "plain"},  # the last step, which diagnostics describe, is sampled
]
CHAINS: list[dict[str, Any]] = [
    {"sampler": "hmc"},
    {"sampler": HMC(prior="ball")},
    {"sampler": HMC(recycle=True, num_leapfrog_steps=2), "num_samples": 2},
    {"sampler": HMC(delta="auto", burn_in=1)},
]
LOCAL = list(itertools.product([*DRAWING, *CHAINS], ("ddp", "seen")))


def all_local(rank: int, size: int) -> list[Any]:
    found = []
    for options, how in LOCAL:
        run = Run(rank, size, {**options, "sync": "local"}, how=how)
        parameters, losses = run.train(STEPS)
        found.append((parameters, losses, run.opt.diagnostics.losses))
    return found


def gradients(net: nn.Module, x: Tensor, y: Tensor) -> tuple[float, list[Tensor]]:
    loss = squared_error(net(x), y)
    return loss.item(), list(torch.autograd.grad(loss, list(net.parameters())))


def fill(net: nn.Module, found: list[Tensor] | None) -> None:
    for i, parameter in enumerate(net.parameters()):
        parameter.grad = None if found is None else found[i]


def drawn_by_hand(size: int, options: dict[str, Any]) -> tuple[Tensor, list[list[Tensor]]]:
    """The parameters in the end, and the losses of each step's samples on each rank, all worked in one process.

    Rank r's sample j is number r s + j of a TSAM that moves nothing and only counts the steps.
    """
    s, tilt, every = options.get("num_samples", 3), options.get("tilt", 20.0), options.get("every", 1)
    net, losses = small_net(), []
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    told = {key: value for key, value in options.items() if key in ("sampler", "radius", "adaptive")}
    draws = TSAM(net.parameters(), lr=0.0, rho=0.1, seed=3, num_samples=s * size, **told)
    for step in range(STEPS):
        mean, seen = [torch.zeros_like(p) for p in net.parameters()], []
        for r in range(size):
            x, y = share(r, size, *rows())
            own, found, counts = [], [], []
            for j in range(s) if step % every == 0 else [None]:
                number, each = r * s + (j or 0), (x, y)
                if options.get("batch") == "split" and j is not None:
                    each = tuple(t[j * len(x) // s : (j + 1) * len(x) // s] for t in (x, y))  # type: ignore[assignment]
                fill(net, None)
                if j is None:
                    loss, gradient = gradients(net, *each)
                else:
                    with draws.perturbed(number):
                        loss, gradient = gradients(net, *each)
                    if isinstance(draws.settings.sampler, Ascent):
                        fill(net, gradient)
                        with draws.perturbed(number):
                            loss, gradient = gradients(net, *each)
                own.append(loss)
                counts.append(len(each[0]))
                found.append(gradient)
            values = torch.tensor(own, dtype=torch.float64)
            tops = (values == values.max()).double()
            lifts = torch.tensor(counts, dtype=torch.float64).log()
            weights = tops / tops.sum() if tilt == math.inf else (tilt * values + lifts).softmax(0)
            for weight, gradient in zip(weights, found, strict=True):
                torch._foreach_add_(mean, gradient, alpha=float(weight) / size)
            seen.append(values)
        losses.append(seen)

        def closure() -> Tensor:
            loss = squared_error(net(x), y)  # noqa: B023
            loss.backward()
            return loss

        fill(net, None)
        draws.step(closure)
        fill(net, mean)
        sgd.step()
    return flat(net), losses


def chains_by_hand(size: int, options: dict[str, Any], *, whole_batch: bool = False) -> Tensor:
    """The same for chains, whose seeds lie a golden section of 2^64 apart: one process, a TSAM for each rank."""
    runs = []
    for r in range(size):
        runs.append(Run(0, 1, {**options, "seed": (3 + r * GOLDEN) % (1 << 64)}))
        if not whole_batch:
            runs[-1].x, runs[-1].y = share(r, size, *rows())
    for _ in range(STEPS):
        for run in runs:
            run.opt.estimate_gradient(run.closure)
        every = [[p.grad for p in run.net.parameters()] for run in runs]
        mean = [sum(each) / size for each in zip(*every, strict=True)]  # type: ignore[arg-type]
        for run in runs:
            fill(run.net, [each.clone() for each in mean])
            run.opt.apply()
            run.opt.zero_grad()
    return flat(runs[0].net)


@pytest.mark.parametrize("size", [2, 3])
def test_local_is_the_mean_of_what_each_rank_does_alone(size: int) -> None:
    found = pool(size).run(all_local, size)
    drawn = [drawn_by_hand(size, options) for options in DRAWING]
    chained = [(chains_by_hand(size, options), None) for options in CHAINS]
    wanted = [each for each in drawn + chained for _ in range(2)]  # type: ignore[operator]
    for (options, how), (parameters, losses), *ranks in zip(LOCAL, wanted, *found, strict=True):
        near = 1e-9 if "ball" in repr(options) else 1e-12
        assert distance(ranks[0][0], parameters) < near, (options, how)
        for rank, each in enumerate(ranks):
            assert torch.equal(each[0], ranks[0][0]), (options, how)
            if losses is not None:
                assert torch.allclose(each[2], losses[-1][rank], rtol=1e-11), (options, how, rank)
        assert ranks[0][1] != ranks[1][1], "the losses are each rank's own"


SAMPLES: list[dict[str, Any]] = [
    {},
    {"num_samples": 5},
    {"num_samples": 2},
    {"num_samples": 1, "radius": 0.1},
    {"tilt": 0.0},
    {"tilt": -3.0},
    {"tilt": math.inf},
    {"tilt": -math.inf, "sampler": "noise"},
    {"tilt": 3e4, "sampler": "noise", "num_samples": 4},
    {"sampler": Noise(antithetic=True), "num_samples": 4, "batch": "split"},
    {"sampler": "noise", "every": 2},
    {"maximize": True, "lr": 1e-3},
]
# The sample whose loss is infinite, and whether it is left out; s = 3, so that of two ranks the second has one alone.
SPOILED: list[tuple[int, dict[str, Any]]] = [
    (bad, {"sampler": sampler, "skip_nonfinite_loss": skips, "tilt": tilt})
    for bad, skips, sampler, tilt in itertools.product(
        (0, 1, 2), (True, False), ("ascent", "noise"), (20.0, math.inf, -math.inf, 0.0)
    )
]


def of_samples(rank: int, size: int, options: dict[str, Any], how: str, bad: int | None = None) -> list[Any]:
    """Parameters, losses and diagnostics of a training whose ranks share the samples."""
    run = Run(rank, size, {**options, "sync": "samples"}, how=how, whole_batch=True)
    losses: list[float] = []
    if bad is None:
        losses = run.train(STEPS)[1]
    else:
        for sample in run.opt.samples():
            with sample:
                loss = run.closure().detach()
                sample.record(loss * math.inf if sample.index == bad and not sample.probe else loss)
        run.opt.apply()
    seen = run.opt.diagnostics
    return [flat(run.net), losses, seen.losses, seen.weights, seen.ess, seen.tilted_loss, seen.num_nonfinite]


def knows(options: dict[str, Any], size: int) -> tuple[str, ...]:
    """Ranks without samples, and parts taken before the model runs, need model=ddp."""
    return ("ddp", "seen") if options.get("num_samples", 3) >= size and "batch" not in options else ("ddp",)


def all_samples(rank: int, size: int) -> list[Any]:
    found = [of_samples(rank, size, options, how) for options in SAMPLES for how in knows(options, size)]
    return found + [of_samples(rank, size, options, "ddp", bad) for bad, options in SPOILED]


@pytest.mark.parametrize("size", [2, 3])
def test_shared_samples_are_those_of_one_process(size: int) -> None:
    ranks = pool(size).run(all_samples, size)
    cases: list[Any] = [(options, how, None) for options in SAMPLES for how in knows(options, size)]
    cases += [(options, "ddp", bad) for bad, options in SPOILED]
    for case, *found in zip(cases, *ranks, strict=True):
        alone = of_samples(0, 1, *case)
        close = {"rtol": 1e-12 * max(1.0, abs(case[0].get("tilt", 1.0))), "atol": 1e-13, "equal_nan": True}
        close["rtol"] = min(close["rtol"], 1e-9)  # of weights with a large tilt, relative to which losses round
        for i, (mine, wanted) in enumerate(zip(found[0], alone, strict=True)):
            mine, wanted = (torch.as_tensor(each, dtype=torch.float64) for each in (mine, wanted))
            assert torch.allclose(mine, wanted, **close), (case, i, mine, wanted)
        for other in found[1:]:
            for mine, wanted in zip(other, found[0], strict=True):
                mine, wanted = torch.as_tensor(mine), torch.as_tensor(wanted)
                assert torch.equal(mine.nan_to_num(7.0), wanted.nan_to_num(7.0)), case


def shared_chains(rank: int, size: int) -> list[Any]:
    found = []
    for options, how in itertools.product(CHAINS, ("ddp", "seen")):
        told = {**options, "num_samples": 2 * size, "sync": "samples"}
        run = Run(rank, size, told, how=how, whole_batch=True)
        found.append((run.train(STEPS)[0], run.opt.diagnostics.losses))
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_shared_samples_of_chains(size: int) -> None:
    ranks = pool(size).run(shared_chains, size)
    for (options, how), *found in zip(itertools.product(CHAINS, ("ddp", "seen")), *ranks, strict=True):
        assert all(torch.equal(a, b) for other in found for a, b in zip(other, found[0], strict=True)), (options, how)
        if "auto" not in repr(options):  # delta is the tilt: all samples weigh the same
            parameters = chains_by_hand(size, {**options, "num_samples": 2}, whole_batch=True)
            assert distance(found[0][0], parameters) < (1e-9 if "ball" in repr(options) else 1e-12), (options, how)


def normed(rank: int, size: int) -> list[Any]:
    found = []
    for sync, sampler in itertools.product(("local", "samples"), ("ascent", "noise", "hmc")):
        net = nn.Sequential(small_net()[0], nn.BatchNorm1d(7, dtype=torch.float64), nn.Tanh(), small_net()[2])
        run = Run(rank, size, {"sampler": sampler, "sync": sync}, net=net, whole_batch=sync == "samples")
        if size == 1:
            run.opt.model = net
        run.train(STEPS)
        found.append([sync, sampler, flat(net), *(buffer.clone() for buffer in net.buffers())])
    return found


def test_buffers_are_the_first_rank_s() -> None:
    for first, second, alone in zip(*pool(2).run(normed, 2), normed(0, 1), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first[2:], second[2:], strict=True)), first[:2]
        if first[0] == "samples" and first[1] != "hmc":
            pairs = zip(first[2:], alone[2:], strict=True)
            assert all(torch.allclose(a, b, rtol=1e-11) for a, b in pairs), first[:2]
        assert int(first[-1]) == STEPS, "batches that the statistics have seen"


def visited(rank: int, size: int) -> bool:
    """Whether perturbed() shows this rank's own noise of the coming step."""
    run = Run(rank, size, {"sync": "local", "sampler": "noise"})
    run.train(1)
    with run.opt.perturbed(2):
        shown = flat(run.net)
    seen = []

    def closure() -> Tensor:
        seen.append(flat(run.net))
        return run.closure()

    run.train(1, closure=closure)
    return torch.equal(shown, seen[2])


def test_perturbed_shows_a_rank_its_own_noise() -> None:
    assert pool(2).run(visited, 2) == [True, True]


def ignored(rank: int, size: int, sync: str) -> list[float]:
    """Two buffers of a net of which DistributedDataParallel is to leave one alone."""
    net = small_net()
    for name in ("own", "shared"):
        net.register_buffer(name, torch.full((1,), float(rank)))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["own"])
    Run(rank, size, {"sync": sync}, net=net, whole_batch=True).train(1)
    return [float(buffer) for buffer in net.buffers()]


@pytest.mark.parametrize("sync", ["global", "local", "samples"])
def test_buffers_that_a_module_ignores_stay_each_rank_s(sync: str) -> None:
    assert pool(2).run(ignored, 2, sync) == [[0.0, 0.0], [1.0, 0.0]]


def refused(rank: int, size: int) -> dict[str, tuple[str, bool]]:
    """Each case: what its first step raises, and whether the parameters are as before."""
    found = {}

    def case(name: str, run: Run) -> None:
        before = flat(run.net)
        found[name] = error_of(lambda: run.opt.step(run.closure)), torch.equal(flat(run.net), before)

    for how, sampler in itertools.product(("ddp", "seen"), ("ascent", "hmc")):
        case(f"other rows {how} {sampler}", Run(rank, size, {"sync": "samples", "sampler": sampler}, how=how))
    for how, sync in itertools.product(("ddp", "seen"), ("local", "samples")):
        options = {"sync": sync}
        static = {"static_graph": True}
        case(f"static {how} {sync}", Run(rank, size, options, how=how, ddp=static, whole_batch=True))
    for sync in ("local", "samples"):
        options = {"sync": sync, "process_group": dist.group.WORLD}
        case(f"plain module {sync}", Run(rank, size, options, how="plain", whole_batch=True))
    few: dict[str, Any] = {"sync": "samples", "num_samples": size - 1, "sampler": "noise"}
    case("few samples", Run(rank, size, few, how="seen", whole_batch=True))
    split = {"sync": "samples", "batch": "split", "sampler": "noise"}
    case("split", Run(rank, size, split, how="seen", whole_batch=True))
    sam = Run(rank, size, {"sync": "local", "num_samples": 1, "radius": 0.0})
    sam.closure()
    found["two steps"] = error_of(sam.opt.first_step), True
    return found


WORDS = {
    "other rows": ("DisagreementError", "needs the same batch on all ranks"),
    "static": ("ValueError", "static_graph of the DistributedDataParallel: got True with sync="),
    "plain module": ("RuntimeError", "pass model=ddp"),
    "few samples": ("num_samples", "model=ddp"),
    "split": ("batch", "model=ddp"),
    "two steps": ("ValueError", "'global' with first_step()"),
}


@pytest.mark.parametrize("size", [2, 3])
def test_what_they_cannot_do_is_refused(size: int) -> None:
    ranks = pool(size).run(refused, size)
    for name, words in WORDS.items():
        for case in filter(lambda each: each.startswith(name), ranks[0]):
            found = [rank[case] for rank in ranks]
            assert all(unchanged for _, unchanged in found), case
            if name == "few samples":  # the ranks that have none say so, and the others hear of it
                assert all("OtherRankError" in error for error, _ in found[:-1])
                found = found[-1:]
            for error, _ in found:
                assert all(word in error for word in words), (case, error)
