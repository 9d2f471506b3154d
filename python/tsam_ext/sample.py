"""One gradient of a step, as the user meets it: the item of ``samples()``.

Entered once, around forward and backward; ``record`` hands over the loss. Invariant: leaving it hands the pass to its
estimate, or, by an exception, has the estimate put everything back.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .settings import reject

if TYPE_CHECKING:
    from .estimate import Estimate


class Sample:
    """One gradient of a step: a context manager around the forward and backward passes that compute it."""

    def __init__(self, estimate: Estimate, index: int, probe: bool) -> None:
        self._estimate = estimate
        self.index = index
        self.probe = probe
        self.loss: Tensor | None = None
        self.done = False

    def record(self, loss: Tensor | float) -> None:
        """Records the loss (one element, any float dtype) of this pass; once, inside ``with``. Nothing is read."""
        spread = self._estimate.spread
        if not isinstance(loss, Tensor):
            loss = torch.tensor(float(loss), dtype=torch.float64, device=spread.home)
        if loss.numel() != 1 or not loss.dtype.is_floating_point:
            raise reject("loss", f"a {loss.dtype} tensor of shape {tuple(loss.shape)}", "a float scalar")
        if loss.device not in spread.devices:
            raise reject("loss", f"a tensor on {loss.device}", f"one on {spread}, as the parameters are")
        self.loss = loss.detach()

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
            self._estimate.abort()
            return
        try:
            if self.loss is None:
                raise RuntimeError("TSAM: sample.record(loss) was not called inside 'with sample:'.")
            self._estimate.end_pass(self)
        except BaseException:
            self._estimate.abort()
            raise
        self.done = True
