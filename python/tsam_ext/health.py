"""What a user must hear of without ever reading the diagnostics: findings over the last steps, one warning a kind.

At a step's end its few scalars are copied to the host without blocking, and looked at when a later step begins, once
they have arrived; meanwhile nothing else is copied.
Invariant: nothing here waits for a device or dispatches an op on the CPU, where the scalars are read as they are; what
has been said is not looked at again. A new finding is an entry of FINDINGS; tensors that it needs are named in PARTS.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .engine.notices import warn
from .engine.state import HEADER, ROW, ChainSlot, Slot
from .estimates import Report

__all__ = ["Health"]

PARTS = (
    "state",
    "chain",
    "first_loss",
    "scale",
    "realised",
)  # the tensors of a report that are looked at, where it has them
ROWS = 64  # samples of a step that are looked at
LONGEST = HEADER + ROW * ROWS


class Seen:
    """The scalars of one step on the host: those of ``PARTS`` that there are, flat."""

    def __init__(self, report: Report, values: dict[str, list[float]]) -> None:
        self.report, self.values = report, values
        self.state, self.chain = values["state"], values.get("chain")
        self.num_rows = report.num_samples * report.states_per_sample
        end = HEADER + ROW * min(self.num_rows, ROWS)
        self.losses = self.state[HEADER:end:ROW]
        self.norms = self.state[HEADER + 2 : end : ROW]  # of the gradients that an ascent followed; NaN without one
        self.first_loss = values.get("first_loss", [])  # of the first pass: one, or none
        # Whether a chain has rejected all: its rows hold one state, and what it proposed is not among them.
        rejected = self.chain is not None and self.chain[ChainSlot.ACCEPTED] == 0.0
        self.stands = rejected and report.states_per_sample == 1


@dataclass(frozen=True)
class Finding:
    """One thing to be heard of: the mean of ``value`` over the last ``steps`` looked at is above ``high`` or below.

    ``value``: of one step, None where it says nothing of this. ``message``: from that mean and the last step.
    """

    steps: int
    value: Callable[[Seen], float | None]
    message: Callable[[float, Seen], str]
    low: float = -math.inf
    high: float = math.inf


def _equal_losses(seen: Seen) -> float | None:
    """Whether all passes that stood at different places gave one loss. Parts of a batch have losses of their own."""
    report = seen.report
    compared = [*seen.first_loss, *(seen.losses[:1] if report.split else seen.losses)]
    if seen.chain is not None:
        if seen.stands or not report.moved:
            return None
    elif not seen.norms[0] > 0.0:  # no ascent between the first pass and the first sample: they may be one
        if report.split or not report.moved:
            return None
        compared = seen.losses
    if len(compared) < 2:
        return None
    loss = compared[0]
    return float(0.0 < abs(loss) < math.inf and compared.count(loss) == len(compared))


def _say_equal_losses(mean: float, seen: Seen) -> str:
    return (
        f"all losses of a step had equal bits in 3 steps in a row (now {seen.losses[0]:.9g}), although the parameters "
        "moved. Either its passes share a copy of something made from the parameters, such as autocast's cache, "
        "parametrize.cached() or a prediction computed outside the closure: make it anew in each pass. Or the loss has "
        "too few bits to differ, 8 in bfloat16 and 11 in float16: compute it in float32, or perturb by more."
    )


def _inert_tilt(seen: Seen) -> float | None:
    """Whether a tilt that could make the weights differ does not. (With hmc the exponents' factor is tilt − delta.)"""
    squares, tilt = seen.state[Slot.SUM_SQUARES], seen.state[Slot.TILT]
    weighs = seen.report.tilt_weighs and tilt != 0.0 and not seen.stands
    if not weighs or seen.num_rows < 2 or not squares > 0.0:
        return None
    return float(seen.state[Slot.SUM] ** 2 / squares > 0.9999 * seen.num_rows)


def _say_inert_tilt(mean: float, seen: Seen) -> str:
    ess = seen.state[Slot.SUM] ** 2 / seen.state[Slot.SUM_SQUARES]
    name = "tilt" if seen.chain is None else "tilt - delta ="
    return (
        f"at {name} {seen.state[Slot.TILT]:g} all samples weigh the same: the effective sample size was above 99.99% "
        f"of {seen.num_rows} in 10 steps in a row (now {ess:.6f}). A larger |tilt| or larger perturbations make them "
        "differ."
    )


def _acceptance(seen: Seen) -> float | None:
    if seen.chain is None:
        return None
    return seen.chain[ChainSlot.ACCEPTANCE] / max(seen.chain[ChainSlot.TRAJECTORIES], 1.0)


def _rounding(seen: Seen) -> float | None:
    """delta |L| eps: the state has it for float32, the loss's own dtype is known."""
    if seen.chain is None:
        return None
    report = seen.report
    wider = 1.0 if report.first_loss is None else torch.finfo(report.loss_dtype).eps * 2.0**23
    return seen.chain[ChainSlot.ROUNDING] * wider


def _nonfinite(seen: Seen) -> float | None:
    return seen.state[Slot.NONFINITE] / max(seen.num_rows, 1)


def _scaled_loss(seen: Seen) -> float | None:
    """How far the recorded losses are in step with the scaled gradients, where they are made as scaled ones are.

    An ascent along the gradient lifts the loss by rho times its norm at first order: by 1/scale of that if the norm
    is scaled and the loss is not. Without an ascent the size alone tells, from 1/64 of the scale on.
    """
    report, scale = seen.report, seen.values.get("scale", [0.0])[0]
    if not report.product or not seen.first_loss or not 1024.0 <= scale < math.inf:
        return None
    norm = seen.norms[0]
    if norm > 0.0:
        return (seen.losses[0] - seen.first_loss[0]) / (report.rho * norm) if norm < math.inf else None
    return 32.0 * abs(seen.first_loss[0]) / scale


def _realised(index: int) -> Callable[[Seen], float | None]:
    """An entry of ``Report.realised``, where half-precision parameters are perturbed and it is a number."""

    def value(seen: Seen) -> float | None:
        realised = seen.values.get("realised")
        return None if realised is None or not math.isfinite(realised[index]) else realised[index]

    return value


FINDINGS = (
    # Two float32 losses are equal by chance about once in 1e5: in a long run one such step is no finding.
    Finding(3, _equal_losses, _say_equal_losses, high=0.99),
    Finding(10, _inert_tilt, _say_inert_tilt, high=0.99),
    Finding(
        10,
        _acceptance,
        lambda mean, seen: (
            f"the acceptance of the last 10 steps is {mean:.3f} in the mean: a smaller step_size or delta lets the "
            "chain move."
        ),
        low=0.2,
    ),
    Finding(
        10,
        _rounding,
        lambda mean, seen: (
            f"the rounding of the loss moves energy errors by delta |L| eps = {mean:.2f} in the mean of the last 10 "
            "steps: the accept test is rounding noise. A smaller delta or a loss in a wider dtype makes it a test."
        ),
        high=0.3,
    ),
    Finding(
        10,
        _nonfinite,
        lambda mean, seen: (
            f"{mean:.0%} of the samples of the last 10 steps had a non-finite loss: a smaller learning rate, rho or "
            "radius keeps losses finite."
        ),
        high=0.1,
    ),
    Finding(
        3,
        _scaled_loss,
        lambda mean, seen: (
            f"the recorded loss ({seen.first_loss[0]:g}) looks like scaler.scale(loss), at a scale of "
            f"{seen.values['scale'][0]:g}: record (return) the loss itself. Of scaled losses one takes all the weight."
        ),
        high=0.5,
    ),
    Finding(
        3,
        _realised(1),
        lambda mean, seen: (
            f"rounding has made the perturbation of half-precision parameters {mean:.1f} times as long as rho or "
            "radius: most of it is rounding noise. float32 parameters under autocast have none."
        ),
        high=2.0,
    ),
    Finding(
        3,
        _realised(2),
        lambda mean, seen: (
            f"rounding has left {mean:.0%} of the ascent along the gradient in half-precision parameters. float32 "
            "parameters under autocast keep it, and so does rounding='stochastic', in the mean."
        ),
        low=0.5,
    ),
)


class Health:
    """Looks at the steps of one TSAM, one at a time, and warns once for each finding."""

    def __init__(self, findings: tuple[Finding, ...] = FINDINGS) -> None:
        self._open = [(finding, deque[float](maxlen=finding.steps)) for finding in findings]
        self._report: Report | None = None  # of the step that is looked at next
        self._parts: dict[str, Tensor] = {}  # its scalars, on the host once they have arrived
        self._hosts: dict[str, Tensor] = {}  # pinned memory, which lasts
        self._arrival: Any = None  # the event after the copies; None on the CPU

    def note(self, report: Report) -> None:
        """A step is complete: its scalars set out for the host, unless others are on their way. Not under capture."""
        if self._report is not None or not self._open:
            return
        # Not what only stands for a tensor, as under FakeTensorMode.
        found = [(name, getattr(report, name)) for name in PARTS]
        parts = {name: part for name, part in found if type(part) is Tensor}
        if "state" in parts:
            self._parts, self._arrival = self._sent(parts)
            self._report = report

    def look(self) -> None:
        """A step begins: looks at what has arrived, and warns at the line of the user's that began it."""
        report = self._report
        if report is None or (self._arrival is not None and not self._arrival.query()):
            return
        self._report = None
        values = {name: _numbers(part) for name, part in self._parts.items()}
        seen = Seen(report, values)
        for entry in self._open.copy():
            finding, last = entry
            value = finding.value(seen)
            if value is None:
                continue
            last.append(value)
            mean = sum(last) / finding.steps
            if len(last) == finding.steps and (mean < finding.low or mean > finding.high):
                self._open.remove(entry)  # before the warning, which may be an error
                warn(finding.message(mean, seen))

    def _sent(self, parts: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        """Copies into pinned memory, under way on the current stream, and the event after them; itself on the CPU."""
        home, sent = parts["state"].device, {}
        if home.type != "cuda":
            return parts, None
        with torch.no_grad():
            for name, part in parts.items():
                # In its own dtype: a conversion on the way would wait.
                flat = part.reshape(-1)[:LONGEST].to(home, non_blocking=True)
                host = self._hosts.get(name)
                if host is None or host.dtype != flat.dtype or len(host) < len(flat):
                    host = self._hosts[name] = torch.empty(len(flat), dtype=flat.dtype, pin_memory=True)
                sent[name] = host[: len(flat)].copy_(flat, non_blocking=True)
        arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrival.record(torch.cuda.current_stream(home))
        return sent, arrival


def _numbers(part: Tensor) -> list[float]:
    """The scalars of a tensor on the host, flat, without an op where it is short."""
    numbers: Any = (part if part.numel() <= LONGEST else part[:LONGEST]).tolist()
    if not isinstance(numbers, list):
        return [numbers]
    while isinstance(numbers[0], list):  # a loss of shape [1, 1]
        numbers = numbers[0]
    return list(numbers)
