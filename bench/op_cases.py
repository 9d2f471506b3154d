"""What ``python -m bench ops`` times: one entry per op, with the words it moves and the same work in torch.

plain: torch ops, a Python loop over the tensors; foreach: torch._foreach_* ops; compiled: what torch.compile gets, the
plain function unless one without host reads and separate passes fuses better. All in place and without temporaries
where torch allows it. Invariant: all of a case's ways leave the same numbers in ``result``; noise has the same moments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

import tsam_ext
from tsam_ext import _ops
from tsam_ext.engine.checks import NOISES
from tsam_ext.engine.state import Slot, new_state

from . import direction_cases, dynamics_cases, scalar_cases
from .op_check import Case, Way, returned

CPU = torch.device("cpu")
SAMPLES = 3
TILT = 2.0
RHO = 1e-3
GAUSSIAN, SPHERE, RADEMACHER = (NOISES.index(name) for name in ("gaussian", "sphere", "rademacher"))

# ResNet-18's parameters by size, 62 tensors; shares of the wanted number of elements.
_STAGES = ((64, 64), (64, 128), (128, 256), (256, 512))
NETWORK: list[int] = [9408, 64, 64]
for _entry, _width in _STAGES:
    _norm = [_width, _width]
    _shortcut = [] if _entry == _width else [_entry * _width, *_norm]
    NETWORK += [9 * _entry * _width, *_norm, 9 * _width * _width, *_norm, *_shortcut]
    NETWORK += 2 * [9 * _width * _width, *_norm]
NETWORK += [512 * 1000, 1000]


def sizes_of(elements: int, tensors: int | None) -> list[int]:
    """Sizes that add up to ``elements``: in ResNet-18's proportions, or of ``tensors`` about equal tensors."""
    weights = NETWORK if tensors is None else [1] * tensors
    total, passed, borders = sum(weights), 0, [0]
    for weight in weights:
        passed += weight
        borders.append(passed * elements // total)
    return [b - a for a, b in pairwise(borders) if b > a]


@dataclass
class Lists:
    """The tensors that the list ops work on; of the same values on every device."""

    sizes: list[int]
    dtype: torch.dtype
    device: torch.device = CPU
    position: list[Tensor] = field(init=False)
    saved: list[Tensor] = field(init=False)
    grads: list[Tensor] = field(init=False)
    accumulator: list[Tensor] = field(init=False)
    base: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(1)
        self.position, self.saved, self.grads = (self._normal(self.dtype) for _ in range(3))
        self.accumulator = self._normal(torch.float32)
        self.state = new_state(SAMPLES, self.device)
        self.norm = torch.zeros((), device=self.device)
        self.base = [sum((n + 3) // 4 * 4 for n in self.sizes[:k]) for k in range(len(self.sizes))]
        self.elements = sum(self.sizes)

    def _normal(self, dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(n, generator=self._generator).to(self.device, dtype) for n in self.sizes]

    def every(self, value: float) -> list[float]:
        """One number per tensor."""
        return [value] * len(self.sizes)

    def flags(self, value: bool) -> list[bool]:
        """One flag per tensor."""
        return [value] * len(self.sizes)

    def refill(self) -> None:
        """Gives everything that an op writes the values of a fixed seed."""
        generator = torch.Generator().manual_seed(2)
        for p, s, a in zip(self.position, self.saved, self.accumulator, strict=True):
            p.copy_(torch.randn(p.shape, generator=generator))
            s.copy_(torch.randn(p.shape, generator=generator))
            a.copy_(torch.randn(p.shape, generator=generator))
        self.norm.zero_()

    def act(self, loss: float) -> None:
        """Brings the state to where accumulate_ assigns (first sample) or blends (second sample of another loss)."""
        tilt, first, second = torch.tensor([TILT, 1.0, loss], device=self.device).unbind()
        _ops.tilt_begin_(self.state, tilt)
        _ops.tilt_update_(self.state, first, 0.0, 0, False, False)
        if loss != 1.0:
            _ops.tilt_update_(self.state, second, 0.0, 1, False, False)


def _root(norms: Sequence[Tensor]) -> Tensor:
    root: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)), dtype=torch.float32)
    return root


def _perturb(at: Lists, noise: int, save: bool) -> Case:
    # A radius that makes one deviation 1 keeps bfloat16 from rounding the noise away.
    radius = math.sqrt(at.elements)
    turns = iter(range(1 << 31))
    p, s = at.position, at.saved

    def ours() -> None:
        call = (at.every(radius), at.flags(False), at.base, 7, next(turns), 0, noise, at.elements, False, save)
        _ops.perturb_(p, s, at.state, *call)

    def plain() -> None:
        if save:
            for x, y in zip(p, s, strict=True):
                y.copy_(x)
        if noise != SPHERE:
            for x, y in zip(p, s, strict=True):
                (x.normal_() if noise == GAUSSIAN else x.bernoulli_().mul_(2).sub_(1)).add_(y)
            return
        norm = float(_root([torch.linalg.vector_norm(x.normal_()) for x in p]))
        for x, y in zip(p, s, strict=True):
            torch.add(y, x, alpha=radius / norm, out=x)

    def foreach() -> None:
        if save:
            torch._foreach_copy_(s, p)
        for x in p:
            x.bernoulli_() if noise == RADEMACHER else x.normal_()
        if noise == RADEMACHER:
            torch._foreach_mul_(p, 2)
            torch._foreach_sub_(p, 1)
        if noise == SPHERE:
            torch._foreach_mul_(p, radius / float(_root(torch._foreach_norm(p))))
        torch._foreach_add_(p, s)

    def compiled() -> None:
        # torch 2.13's inductor saves the moved position if a draw stands before the copy (the check below sees it);
        # so the gaussian draw comes after it, and sphere copies -(-x).
        if noise != SPHERE:
            for x, y in zip(p, s, strict=True):
                if save:
                    y.copy_(x)
                z = torch.randn_like(x) if noise == GAUSSIAN else (torch.rand_like(x) < 0.5).to(x.dtype) * 2 - 1
                x.copy_((x if save else y) + z)
            return
        draws = [torch.randn_like(x) for x in p]
        scale = radius / torch.stack([(d * d).sum() for d in draws]).sum().sqrt()
        for x, y, d in zip(p, s, draws, strict=True):
            if save:
                y.copy_(-x).neg_()
            x.copy_((x if save else y) + scale * d)

    name = f"perturb_ {NOISES[noise]}, {'first draw (saves)' if save else 'later draw'}"
    words, draws = 3 if save else 2, {GAUSSIAN: 1, SPHERE: 2, RADEMACHER: 0}[noise]
    scale, signs = -radius if noise == SPHERE else 1.0, noise == RADEMACHER
    judged = "noise" if save and noise == GAUSSIAN else ""
    return Case(
        name, words, draws, ours, plain, foreach, compiled, at.refill, lambda _: p + s,
        scale=scale, signs=signs, judged=judged,
    )  # fmt: skip


def _grad_norm(at: Lists, adaptive: bool) -> Case:
    g, origin = at.grads, at.saved

    def scaled() -> list[Tensor]:
        return [x * y for x, y in zip(g, origin, strict=True)] if adaptive else g

    def ours() -> Tensor:
        _ops.grad_norm_(g, origin, at.state, at.flags(adaptive), 0)
        return at.state[Slot.GRAD_NORM]

    def plain() -> Tensor:
        # A product lives only until its norm is known.
        if adaptive:
            return _root([torch.linalg.vector_norm(x * y) for x, y in zip(g, origin, strict=True)])
        return _root([torch.linalg.vector_norm(x) for x in g])

    def foreach() -> Tensor:
        return _root(torch._foreach_norm(torch._foreach_mul(g, origin) if adaptive else g))

    def compiled() -> Tensor:
        return torch.stack([(x.float() ** 2).sum() for x in scaled()]).sum().sqrt()

    # Tolerance: torch adds in float32 and was seen 2e-5 off at 10M elements.
    name, judged = ("grad_norm_ adaptive", "") if adaptive else ("grad_norm_", "memory")
    words = 2 if adaptive else 1
    return Case(
        name, words, 0, ours, plain, foreach, compiled, at.refill, returned, tolerance=1e-4, reads=True, judged=judged
    )


def _ascend(at: Lists, save: bool) -> Case:
    p, s, g = at.position, at.saved, at.grads

    def ours() -> None:
        _ops.ascend_(p, s, g, at.state, at.every(RHO), at.flags(False), save)

    def plain() -> None:
        scale = RHO / float(at.norm)
        for x, y, d in zip(p, s, g, strict=True):
            if save:
                y.copy_(x)
            x.add_(d, alpha=scale)

    def foreach() -> None:
        if save:
            torch._foreach_copy_(s, p)
        torch._foreach_add_(p, g, alpha=RHO / float(at.norm))

    def compiled() -> None:
        scale = RHO / at.norm
        for x, y, d in zip(p, s, g, strict=True):
            if save:
                y.copy_(x)
            x.add_(d * scale)

    def reset() -> None:
        # One deviation of the ascent is 1 here, so that the check sees it; the timings move by as much.
        at.refill()
        at.state[Slot.GRAD_NORM] = RHO
        at.norm.fill_(RHO)

    name, judged = ("ascend_ first (saves)", "") if save else ("ascend_", "memory")
    return Case(name, 4 if save else 3, 0, ours, plain, foreach, compiled, reset, lambda _: p + s, judged=judged)


def _norm_ascend(at: Lists) -> Case:
    """The norm and the ascent along it in one call: what a step does, where nothing is saved or scaled."""
    norm, ascent = _grad_norm(at, False), _ascend(at, False)
    # ascend_'s deviation of 1, of a gradient whose elements have one too.
    rho = math.sqrt(at.elements)

    def ours() -> None:
        _ops.norm_ascend_(at.position, [], at.grads, at.state, [rho], [False], False, 0)

    def after(measured: Way | None, move: Way | None) -> Way:
        assert measured is not None and move is not None

        def both() -> None:
            found = measured()
            assert isinstance(found, Tensor)
            at.norm.copy_(found).mul_(RHO / rho)  # the ascent's own rho is RHO
            move()

        return both

    plain, foreach = after(norm.plain, ascent.plain), after(norm.foreach, ascent.foreach)
    compiled = after(norm.compiled, ascent.compiled)
    return Case("norm_ascend_", 4, 0, ours, plain, foreach, compiled, at.refill, lambda _: at.position, tolerance=1e-4)


def _accumulate(at: Lists, blend: bool) -> Case:
    a, g = at.accumulator, at.grads
    keep, add = torch.zeros(2, device=at.device).unbind()

    def ours() -> None:
        _ops.accumulate_(a, g, at.state)

    def plain() -> None:
        if not blend:
            for x, y in zip(a, g, strict=True):
                x.copy_(y)
        elif at.dtype == torch.float32:
            weight = float(add)
            for x, y in zip(a, g, strict=True):
                x.lerp_(y, weight)
        else:
            k, b = float(keep), float(add)
            for x, y in zip(a, g, strict=True):
                x.mul_(k).add_(y, alpha=b)

    def foreach() -> None:
        if not blend:
            torch._foreach_copy_(a, g)
        elif at.dtype == torch.float32:
            torch._foreach_lerp_(a, g, float(add))
        else:
            torch._foreach_mul_(a, float(keep))
            torch._foreach_add_(a, g, alpha=float(add))

    def compiled() -> None:
        for x, y in zip(a, g, strict=True):
            x.copy_(keep * x + add * y if blend else y)

    def reset() -> None:
        at.refill()
        at.act(0.5 if blend else 1.0)
        keep.copy_(at.state[Slot.KEEP])
        add.copy_(at.state[Slot.ADD])

    name, judged = ("accumulate_ blend", "memory") if blend else ("accumulate_ assign", "")
    words, wide = (3, 2) if blend else (2, 1)
    return Case(name, words, 0, ours, plain, foreach, compiled, reset, lambda _: a, wide=wide, judged=judged)


def _merged(at: Lists) -> Case:
    """A sample's mean and the next one's draw: one pass of ours, the two ops in a row for the others.

    Its noise is perturb_'s, whose own case looks at it.
    """
    mean, draw = _accumulate(at, True), _perturb(at, GAUSSIAN, False)
    call = (at.every(math.sqrt(at.elements)), at.flags(False), at.base, 7)
    turns = iter(range(1 << 31))

    def ours() -> None:
        lists = (at.accumulator, at.grads, at.position, at.saved)
        _ops.accumulate_perturb_(*lists, at.state, *call, next(turns), 0, GAUSSIAN, at.elements, False)

    def both(first: Way | None, second: Way | None) -> Way:
        assert first is not None and second is not None
        return lambda: (first(), second())

    plain, foreach = both(mean.plain, draw.plain), both(mean.foreach, draw.foreach)
    compiled = both(mean.compiled, draw.compiled)
    name, result = "accumulate_perturb_", lambda _: at.accumulator
    return Case(name, 5, 1, ours, plain, foreach, compiled, mean.reset, result, wide=2)


def _restore(at: Lists) -> Case:
    p, s = at.position, at.saved

    def ours() -> None:
        _ops.restore_(p, s)

    def plain() -> None:
        for x, y in zip(p, s, strict=True):
            x.copy_(y)

    def foreach() -> None:
        torch._foreach_copy_(p, s)

    return Case("restore_", 2, 0, ours, plain, foreach, plain, at.refill, lambda _: p)


def _tilted_reduce(at: Lists) -> Case:
    losses = torch.tensor([0.5, 1.0, 0.75], dtype=at.dtype, device=at.device)
    values = torch.randn(SAMPLES, at.elements, generator=torch.Generator().manual_seed(3)).to(losses)

    def ours() -> Tensor:
        return tsam_ext.tilted_reduce(losses, values, TILT)

    def plain() -> Tensor:
        return torch.softmax(TILT * losses, 0) @ values

    def compiled() -> Tensor:
        return (torch.softmax(TILT * losses, 0)[:, None] * values).sum(0)

    words = SAMPLES + 1
    return Case("tilted_reduce, s=3", words, 0, ours, plain, None, compiled, lambda: None, returned)


def cases(sizes: list[int], dtype: torch.dtype, device: torch.device = CPU) -> list[Case]:
    """Every op that is timed."""
    at = Lists(sizes, dtype, device)
    return [
        *(_perturb(at, noise, save) for noise in (GAUSSIAN, SPHERE, RADEMACHER) for save in (True, False)),
        _grad_norm(at, False),
        _grad_norm(at, True),
        _ascend(at, False),
        _ascend(at, True),
        _norm_ascend(at),
        _accumulate(at, False),
        _accumulate(at, True),
        _merged(at),
        *direction_cases.cases(at.grads),
        _restore(at),
        _tilted_reduce(at),
        *scalar_cases.cases(at.state, TILT, lambda: at.act(1.0)),
        *dynamics_cases.cases(at.elements, dtype, device),
    ]
