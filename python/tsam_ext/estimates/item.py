"""One gradient of a step: the item of ``samples()``, a context manager around the passes that compute it.

Invariant: leaving it hands loss and gradients to the estimate that runs, or, by an exception, restores everything.
"""

from __future__ import annotations

import inspect
import numbers
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from tsam_ext._compile import graphs_break_at
from tsam_ext.engine.checks import TSAM, refuse, shown
from tsam_ext.engine.spread import Spread
from tsam_ext.loss_scale import is_product
from tsam_ext.shards import is_sharded, whole_of
from tsam_ext.table import Table


class Running(Protocol):
    """What an item asks of the estimate that it is part of."""

    table: Table
    spread: Spread
    closed: bool
    skipped: bool
    first_loss: Tensor | None
    scale: Tensor | None
    product: bool

    def end_pass(self, sample: Sample, loss: Tensor) -> None:
        """The passes are over: their loss, and their gradients in p.grad."""

    def fail(self, error: BaseException | None) -> None:
        """Puts everything back to before the step, after an exception."""


@graphs_break_at("record", "__enter__", "__exit__")
class Sample:
    """One gradient of a step: a context manager around the forward and backward passes that compute it.

    The item of :meth:`TSAM.samples`. Leaving it hands the gradients over, or, by an exception, restores everything.

    Attributes:
        index: which sample of the step, from 0.
        probe: whether this gradient is only on the way: an ascent follows, or a chain moves on.
        loss: what :meth:`record` was given, detached, as a tensor; None before.
        done: whether the pass is over.
    """

    def __init__(self, estimate: Running, index: int, probe: bool, *, steers: bool, last: bool) -> None:
        self._estimate = estimate
        self.steers, self.last = (
            steers,
            last,
        )  # whether its gradient moves the parameters; whether it is the step's last
        self.index = index
        self.probe = probe
        self.loss: Tensor | None = None
        self.done = False
        self.differentiable = False  # whether what was recorded is still part of a graph

    def record(self, loss: Tensor | float) -> None:
        """Records the loss (one element, any floating-point dtype) of this pass, once, inside ``with``.

        Nothing is read from a device.

        Raises:
            TypeError, ValueError: if it is no loss, or lies on a device that holds no parameter.
        """
        spread = self._estimate.spread
        if isinstance(loss, Tensor) and is_sharded(loss):
            loss = whole_of(loss)
        if not isinstance(loss, Tensor):
            if isinstance(loss, bool) or not isinstance(loss, numbers.Real):
                if inspect.iscoroutine(loss):
                    loss.close()  # or Python complains that nobody has awaited it
                expected = "a floating-point tensor of one element or a number (a closure has to return the loss)"
                raise refuse(TSAM, "loss", shown(loss), expected, TypeError)
            loss = torch.tensor(float(loss), dtype=torch.float64, device=spread.home)
        if loss.numel() != 1 or not loss.dtype.is_floating_point:
            got = f"a {loss.dtype} tensor of shape {tuple(loss.shape)}"
            raise refuse(TSAM, "loss", got, "a floating-point tensor of one element")
        if loss.device not in spread.devices:
            raise refuse(TSAM, "loss", f"a tensor on {loss.device}", f"one on {spread}, as the parameters are")
        if self._estimate.scale is not None:
            self._estimate.product |= is_product(loss)
        self.loss, self.differentiable = loss.detach(), loss.requires_grad

    @property
    def is_first(self) -> bool:
        """Whether this is the step's first pass."""
        return self._estimate.first_loss is None

    @property
    def has_gradients(self) -> bool:
        """Whether the pass has left a gradient anywhere so far."""
        return any(parameter.grad is not None for parameter in self._estimate.table.parameters)

    def __enter__(self) -> Sample:
        if self.done or self._estimate.closed:
            raise RuntimeError("TSAM: this item of samples() is over; enter each item once, as the loop yields it.")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._estimate.fail(error)
            return
        if self._estimate.skipped:
            return
        try:
            if self.loss is None:
                raise RuntimeError("TSAM: sample.record(loss) was not called inside 'with sample:'.")
            self._estimate.end_pass(self, self.loss)
        except BaseException as failure:
            self._estimate.fail(failure)
            raise
        self.done = True

    def __repr__(self) -> str:
        what = "probe" if self.probe else "counted"
        return f"Sample(index={self.index}, {what}, {'done' if self.done else 'open'})"
