"""What a timed case is, and the check that all its ways do the same work: a wrong one has no time worth knowing.

Every way starts from the same inputs and must leave the same numbers, to a stated tolerance. Noise cannot be equal:
there the saved copy must be the start bit for bit, and the displacement must have the scale and moments of ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Way = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One op, and the same work in torch.

    ``words`` are read or written per element, ``wide`` of them in float32 always; ``draws``: normals per element.
    ``reset`` makes the inputs what they were; ``result`` finds what a way has computed, given what it returned.
    ``scale`` is set where the work is noise: the standard deviation of the displacement, or minus its norm; ``signs``
    says that the displacement has one size, and either sign.
    """

    name: str
    words: float
    draws: int
    ours: Way
    plain: Way
    foreach: Way | None
    compiled: Way | None
    reset: Callable[[], object]
    result: Callable[[object], list[Tensor]]
    wide: int = 0
    calls: int = 1
    scale: float | None = None
    signs: bool = False
    tolerance: float = 1e-5  # relative and absolute, float32
    reads: bool = False  # writes nothing but a few numbers
    judged: str = ""  # what the verdict asks of it: "noise" or "memory"

    def ways(self) -> dict[str, Way]:
        """The eager ways by name, ours first."""
        found = {"ours": self.ours, "plain": self.plain, "foreach": self.foreach}
        return {name: way for name, way in found.items() if way is not None}

    def moved_bytes(self, elements: int, dtype: torch.dtype) -> float:
        """Bytes that one call reads and writes."""
        return ((self.words - self.wide) * dtype.itemsize + self.wide * 4) * elements


def returned(value: object) -> list[Tensor]:
    """The result of an op out of place, as a case's ``result``."""
    assert isinstance(value, Tensor)
    return [value]


def _wrong_noise(case: Case, before: list[Tensor], after: list[Tensor]) -> str:
    """What is wrong with the displacement; false alarms below one in a million (six standard errors)."""
    half, saves = len(after) // 2, "saves" in case.name
    start = torch.cat([x.double() for x in (before[:half] if saves else before[half:])])
    moved, kept = (torch.cat([x.double() for x in part]) for part in (after[:half], after[half:]))
    if not torch.equal(kept, start):
        return "the saved copy is not the start"
    assert case.scale is not None
    n, size = len(start), moved - start
    rounding = 2e-2 if after[0].dtype != torch.float32 else 1e-4
    if case.scale < 0:
        if abs(float(size.norm()) / -case.scale - 1) > rounding:
            return f"the norm is {float(size.norm())}, expected {-case.scale}"
        size = size / size.square().mean().sqrt()
    else:
        size = size / case.scale
    square = size.square()
    of_square, of_fourth = ((1, 0), (1, 0)) if case.signs else ((1, 2), (3, 96))
    moments = ((1, size, (0, 1)), (2, square, of_square), (4, square.square(), of_fourth))
    for power, values, (want, variance) in moments:
        got = float(values.mean())
        if abs(got - want) > 6 * math.sqrt(variance / n) + rounding * want:
            return f"moment {power} of the noise is {got}, expected {want}"
    return ""


def disagreement(case: Case, way: Way, dtype: torch.dtype) -> str:
    """What differs between ours and another way of the same work from the same start; empty if nothing does.

    Tolerance: the case's in float32; 2e-2 in bfloat16, where plain torch rounds between its passes.
    """
    found = []
    for run in (case.ours, way):
        case.reset()
        before = [x.clone() for x in case.result(None)] if case.scale is not None else []
        returned = run()
        after = [x.clone() for x in case.result(returned)]
        if case.scale is not None and (wrong := _wrong_noise(case, before, after)):
            return wrong
        found.append(after)
    tolerance = case.tolerance if dtype == torch.float32 else 2e-2
    for k, (a, b) in enumerate(zip(*found, strict=True)):
        a, b = a.double(), b.double()
        if case.scale is None and not torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True):
            return f"result {k} differs by up to {float((a - b).abs().max())}"
    return ""
