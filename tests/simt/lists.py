"""Runs every op on random lists, trains with samplers, and saves what came out: one process a library.

``python lists.py FILE ops:SEED ... train:SAMPLER ...`` on the tsam_ext that PYTHONPATH gives and the device that
TSAM_LISTS_DEVICE names (cpu). Layout of FILE: the module's path, and for each job a dict name -> CPU tensors. Names
that end in ``bits`` are to be the same bit for bit.
"""

from __future__ import annotations

import math
import os
import random
import sys

import torch
from torch import Tensor, nn

from tsam_ext import _C, HMC, TSAM
from tsam_ext.engine.state import CHAIN_SLOTS, DIRECTION_SLOTS, ChainSlot, Slot, new_state

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEVICE = torch.device(os.environ.get("TSAM_LISTS_DEVICE", "cpu"))
Lists = dict[str, list[Tensor]]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Make:
    """Lists of a common random make: sizes, storage types, and how far each tensor lies off an aligned address."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        count = (600, 0, 1, 60, 7)[seed % 5]
        small = [0, 1, 2, 3, 4, 5, 31, 33, 255, 257, 1023, 4095, 4096, 4097]
        self.sizes = [self.random.choice(small) for _ in range(count)]
        for large in (70_001, 65_536, 3_000_000)[: 3 if count in (1, 7) else 1]:
            if count:
                self.sizes[self.random.randrange(count)] = large
        self.dtypes = [self.random.choice(DTYPES) for _ in self.sizes]
        self.adaptive = [self.random.random() < 0.5 for _ in self.sizes]
        self.radius = [self.random.choice([0.0, 0.05, 1.5]) for _ in self.sizes]
        self.base, at = [], 0
        for n in self.sizes:
            self.base.append(at)
            at += (n + 3) // 4 * 4
        if seed % 2:  # any base is allowed
            self.base = [b + self.random.randrange(4) for b in self.base]
        self.dimension = sum(self.sizes)
        self.generator = torch.Generator().manual_seed(seed)

    def fresh(self, *, in_wide: bool = False, filled: bool = True) -> list[Tensor]:
        """A list; a third of its tensors do not start at a multiple of 16 bytes."""
        tensors = []
        for n, dtype in zip(self.sizes, self.dtypes, strict=True):
            kind = wide(dtype) if in_wide else dtype
            off = self.random.choice([0, 0, self.random.randrange(1, 8)])
            whole = torch.full((n + off,), 7.0, dtype=kind)
            if filled:
                whole.copy_(torch.randn(n + off, generator=self.generator))
            tensors.append(whole.to(DEVICE)[off:])
        return tensors


def copies(*lists: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensors in lists for tensor in tensors]


def scalar(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def run_ops(seed: int) -> Lists:
    lists, out = Make(seed), {}
    x, saved, grads = lists.fresh(), lists.fresh(filled=False), lists.fresh()
    total, state = lists.fresh(in_wide=True), new_state(4, DEVICE)
    flags, base, d, step = lists.adaptive, lists.base, lists.dimension, 11 + seed
    _C.tilt_begin_(state, scalar(3.0))
    _C.perturb_(x, saved, state, lists.radius, flags, base, 5, step, 0, 0, d, False, True)
    out["gaussian bits"] = copies(x, saved)
    _C.perturb_(x, saved, state, lists.radius, flags, base, 5, step, 1, 0, d, True, False)
    out["negated bits"] = copies(x)
    for noise, (name, needs_norm) in enumerate(_C.__noises__):
        _C.perturb_(x, saved, state, lists.radius, flags, base, 5, step, 2, noise, d, False, False)
        out[f"{name} later{'' if needs_norm else ' bits'}"] = copies(x, [state])
    _C.grad_norm_(grads, saved, state, flags, 0)
    _C.ascend_(x, saved, grads, state, lists.radius, flags, False)
    out["ascended"] = copies(x, [state])
    _C.norm_ascend_(x, saved, grads, state, lists.radius, flags, False, 1)
    out["ascended at once"] = copies(x, [state])
    _C.norm_ascend_(x, [], grads, state, [0.1], [False], False, 2)
    out["ascended at once without copies"] = copies(x, [state])
    if x:  # torch cannot dispatch without a tensor, nor accumulate_ tell no tensors from an adopted gradient
        _C.restore_(x, saved)
    out["restored bits"] = copies(x)
    _C.ascend_(x, saved, grads, state, lists.radius, flags, True)
    out["ascended from the start"] = copies(x, saved)
    sums = torch.ones(3, dtype=torch.float64, device=DEVICE)
    if x:
        _C.displacement_(x, saved, grads, sums, lists.radius, flags)
        _C.displacement_(x, saved, [], sums, lists.radius, flags)
    out["displacement"] = copies([sums / (1.0 + sums.abs().max())])
    out |= run_rounded(lists)
    for row, loss in enumerate((0.3, 0.9, float("nan"), -0.2)):
        _C.tilt_update_(state, scalar(loss), 0.5 * row, row, True, row == 3)
        if x:
            _C.accumulate_(total, grads if row % 2 else lists.fresh(), state)
    out["mean"] = copies(total, [state, _C.tilt_summary(state, 4)])
    direction = torch.zeros(DIRECTION_SLOTS, dtype=torch.float64, device=DEVICE)
    for stages in ((-1,), (0, 1)):
        plain, carried = lists.fresh(in_wide=True), lists.fresh()
        for stage in stages:
            _C.take_direction_(plain, grads, direction, stage)
        out[f"direction {len(stages)}"] = copies(plain, [direction])
        for stage in stages:
            _C.add_direction_(plain, carried, direction, stage)
        out[f"carried {len(stages)}"] = copies(plain, [direction])
    merged = lists.fresh(in_wide=True)
    _C.tilt_begin_(state, scalar(3.0))
    for row, loss in enumerate((0.3, 0.9, -0.2)):
        _C.tilt_update_(state, scalar(loss), 0.0, row, False, row == 2)
        draw = (lists.radius, flags, base, 5, step, row, row, d, False)
        _C.accumulate_perturb_(merged, grads, x, saved, state, *draw)
        out[f"merged {row}{'' if row else ' bits'}"] = copies(x, merged)
    out |= run_single(lists)
    for prior, name in enumerate(("gaussian", "ball")):
        out |= run_hmc(lists, prior, name)
    return out


def run_rounded(lists: Make) -> Lists:
    """Every op that writes positions, rounding what is half precision stochastically: by the same words, so that where
    nothing depends on a sum the bits are the same. An ascent of a given norm."""
    out, where = {}, (lists.base, 5, 11)
    x, saved, grads, state = lists.fresh(), lists.fresh(filled=False), lists.fresh(), new_state(1, DEVICE)
    state[Slot.GRAD_NORM] = 30.0
    draw = (lists.radius, lists.adaptive, *where, 1, 0, lists.dimension, False)
    _C.perturb_(x, saved, state, *draw, True, 2)
    out["rounded bits"] = copies(x, saved)
    _C.ascend_(x, saved, grads, state, lists.radius, lists.adaptive, False, *where, 3)
    out["ascended and rounded bits"] = copies(x)
    _C.ascend_(x, saved, grads, state, lists.radius, lists.adaptive, True, *where, 4)
    out["ascended and rounded again bits"] = copies(x, saved)
    means = lists.fresh(in_wide=True)
    _C.tilt_begin_(state, scalar(1.0))
    for row in range(2):  # the second blends
        _C.tilt_update_(state, scalar(0.5), 0.0, 0, False, row == 1)
        if x:
            _C.accumulate_perturb_(means, grads, x, saved, state, *draw, 6 + row)
    out["merged and rounded bits"] = copies(x)
    buffers = [lists.fresh(in_wide=True) for _ in range(3)]
    momentum, chain = lists.fresh(in_wide=True), torch.zeros(CHAIN_SLOTS, dtype=torch.float64, device=DEVICE)
    scale = (lists.radius, lists.adaptive, *where)
    _C.hmc_place_(x, saved, *buffers, chain, state, *scale, lists.dimension, 0, True, 0)
    out["placed and rounded bits"] = copies(x)
    for first in (True, False):
        for prior in (0, 1):
            _C.hmc_leapfrog_(x, saved, momentum, *buffers, grads, chain, *scale, 0, lists.dimension, prior, 0.5, 1.0,
                             first, True, 0)  # fmt: skip
            if prior == 0 and not first:
                out["moved and rounded"] = copies(x)
    return out


def run_hmc(lists: Make, prior: int, name: str) -> Lists:
    """Two trajectories: of two steps and recycled, then of one. All but draws depends on sums or on exp(log step)."""
    out, exact = {}, "" if prior else " bits"
    x, saved, grads, others = lists.fresh(), lists.fresh(filled=False), lists.fresh(), lists.fresh()
    carried, total, momentum = lists.fresh(), lists.fresh(in_wide=True), lists.fresh(in_wide=True, filled=False)
    buffers = [lists.fresh(in_wide=True, filled=False) for _ in range(3)]
    chain, state = torch.zeros(CHAIN_SLOTS, dtype=torch.float64, device=DEVICE), new_state(4, DEVICE)
    chain[ChainSlot.LOG_STEP] = math.log(0.9)
    scale, seeds, d = (lists.radius, lists.adaptive), (lists.base, 5, 11), lists.dimension

    def place(draw: bool) -> list[Tensor]:
        _C.hmc_place_(x, saved, *buffers, chain, state, *scale, *seeds, d, prior, draw)
        return copies(x, saved, buffers[0])

    def leapfrog(g: list[Tensor], trajectory: int, kick: float, drift: float, first: bool, measure: bool) -> None:
        _C.hmc_leapfrog_(
            x, saved, momentum, *buffers, g, chain, *scale, *seeds, trajectory, d, prior, kick, drift, first, measure
        )  # fmt: skip

    def end(loss: float, trajectory: int, row: int) -> None:
        arguments = (*scale, 5, 11, trajectory, d, prior, 0.5, row, True, False, row == 3)
        _C.hmc_end_(saved, momentum, others, chain, state, scalar(loss), *arguments)
        _C.hmc_carry_(total, carried, others, chain, state, row >= 0)

    out[f"{name} placed{exact}"] = place(draw=True)
    for buffer in buffers[0]:
        buffer *= 0.5  # the ball's draws lie at the wall, and rounding would say when the first drift hits it
    out[f"{name} placed again{exact}"] = place(draw=False)
    tilt, delta = scalar(3.0), scalar(1.0 if prior else 20.0)
    _C.tilt_begin_(state, tilt)
    _C.hmc_begin_(saved, grads, chain, state, scalar(0.3), tilt, delta, bool(prior), *scale, d, prior)
    leapfrog(grads, 0, 0.0, 0.0, True, False)
    out[f"{name} momentum{exact}"] = copies(momentum)
    leapfrog(grads, 0, 0.5, 1.0, True, False)
    out[f"{name} first step"] = copies(x, momentum, *buffers, [chain])
    leapfrog(others, 0, 1.0, 1.0, False, True)
    _C.hmc_recycle_(chain, state, scalar(0.4), 0.5, 0, 0, True, False, False)
    end(0.5, 0, -1)
    for part in (1, 2):
        _C.hmc_recycle_(chain, state, scalar(0.5), 1.0, 3 - part, part, True, False, False)
    leapfrog(carried, 1, 0.5, 1.0, True, True)
    end(0.2, 1, 3)
    _C.hmc_adapt_(chain, math.log(2.0))
    wides = [i for i, dtype in enumerate(lists.dtypes) if dtype == wide(dtype)]
    adopting, kept = ([tensors[i].clone() for i in wides] for tensors in (others, carried))
    _C.tilt_begin_(state, tilt)
    _C.tilt_update_(state, scalar(0.1), 0.0, 0, False, False)
    _C.hmc_carry_(adopting, kept, [], chain, state, True)
    out[f"{name} adopted"] = [*adopting, *kept]
    out[f"{name} chain"] = copies(x, momentum, *buffers, carried, total, [chain, state])
    return out


def run_single(lists: Make) -> Lists:
    """The differentiable ops, on the first tensors of a list."""
    out: Lists = {"perturb bits": [], "perturb": [], "leapfrog bits": [], "tilted": []}
    position, momentum, grad = lists.fresh(), lists.fresh(), lists.fresh()
    for i, (x, p, g) in enumerate(zip(position[:7], momentum, grad, strict=False)):
        radius = scalar(0.3, x.dtype)
        for kind, (_, needs_norm) in enumerate(_C.__noises__):
            name = "perturb" if needs_norm else "perturb bits"
            out[name].append(_C.perturb(x, radius, 3, 4 << 28, lists.base[i], kind))
        out["leapfrog bits"] += [*_C.leapfrog(x, p, g, radius, g if i % 2 else radius), _C.kick(p, g, radius)]
        moved = [x.clone(), p.clone()]
        _C.leapfrog_(*moved, g, radius, g if i % 2 else radius)
        _C.kick_(moved[1], g, radius)
        out["leapfrog bits"] += moved
        losses = torch.randn(5, generator=lists.generator).to(DEVICE)
        values = torch.randn(5, min(x.numel(), 5000), generator=lists.generator).to(x)
        for t in (0.0, 2.0, -3.0, float("inf"), float("-inf")):
            out["tilted"] += [_C.tilted_loss(losses, t), _C.tilted_weights(losses, t)]
            out["tilted"].append(_C.tilted_reduce(losses, values, t))
        out["tilted"].append(_C.tilted_reduce(losses, values.t().contiguous().t(), 1.0))
    for rows, columns in ((5000, 3), (600, 132)):  # rows over threads and blocks
        losses, values = (torch.randn(rows, n, generator=lists.generator).to(DEVICE) for n in (1, columns))
        for dtype in DTYPES:
            out["tilted"].append(_C.tilted_reduce(losses[:, 0].contiguous(), values.to(dtype), 1.0))
    return out


def train(sampler: str) -> Lists:
    out: Lists = {}
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)).to(dtype)
        net.to(DEVICE)
        x, y = torch.randn(48, 20, dtype=dtype).to(DEVICE), torch.randint(0, 3, (48,)).to(DEVICE)
        opt = TSAM(
            net.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.1, tilt=2.0, num_samples=4,
            sampler=HMC(num_leapfrog_steps=3) if sampler == "hmc" else sampler, seed=7,
        )  # fmt: skip

        def closure(net: nn.Module = net, x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            return loss

        losses = torch.stack([opt.step(closure) for _ in range(12)])
        assert losses[-1] < losses[0]
        out[str(dtype)] = [losses, *(p.detach() for p in net.parameters())]
    return out


def run(job: str) -> Lists:
    kind, what = job.split(":")
    found = run_ops(int(what)) if kind == "ops" else train(what)
    return {name: [tensor.cpu() for tensor in tensors] for name, tensors in found.items()}


if __name__ == "__main__":
    torch.save((_C.__file__, {job: run(job) for job in sys.argv[2:]}), sys.argv[1])
