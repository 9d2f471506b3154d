"""Tilted losses and weights, all at once and one sample at a time.

Value (1/t) log(Σ n e^(tL) / Σ n), weights softmax(log n + t L); n is 1, or the rows of each loss.
t = 0 is the mean, t = ±inf a mode of its own: the extreme loss alone, ties in proportion to n.
Streaming, with e = t (L - L_first) + log n:
m' = max(m, e), a = S e^(m-m'), b = e^(e-m'), S' = a + b, A <- (a/S') A + (b/S') g.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _shares(losses: Tensor, sizes: Tensor | None) -> Tensor:
    n = torch.ones_like(losses) if sizes is None else sizes.to(losses)
    return n / n.sum()


def tilted_loss(losses: Tensor, tilt: float, sizes: Tensor | None = None) -> Tensor:
    """(1/t) log(Σ n e^(tL) / Σ n) of ``losses`` and ``sizes`` (default: ones), ``[s]``; 0-dim.

    Differentiable by ordinary autograd. Near t = 0 the form is
    mean + (1/t) log1p(Σ n expm1(t (L - mean)) / Σ n).
    """
    share = _shares(losses, sizes)
    if math.isinf(tilt):
        return losses.amax() if tilt > 0 else losses.amin()
    mean = (share * losses).sum()
    if tilt == 0.0:
        return mean
    exponents = tilt * (losses - mean)
    if float(exponents.detach().abs().max()) < 1.0:
        return mean + torch.log1p((share * torch.expm1(exponents)).sum()) / tilt
    return mean + torch.logsumexp(share.log() + exponents, 0) / tilt


def tilted_weights(losses: Tensor, tilt: float, sizes: Tensor | None = None) -> Tensor:
    """softmax(log n + tL), shape ``[s]``: the gradient of :func:`tilted_loss` to the losses."""
    share = _shares(losses, sizes)
    if math.isinf(tilt):
        best = losses.amax() if tilt > 0 else losses.amin()
        chosen = share * (losses == best)
        # The second term is zero: a constant that autograd accepts, and NaN where a loss is NaN.
        return chosen / chosen.sum() + 0.0 * losses.clamp(-1.0, 1.0)
    return torch.softmax(share.log() + tilt * (losses - losses.detach().mean()), 0)


def tilted_reduce(losses: Tensor, values: Tensor, tilt: float, sizes: Tensor | None = None) -> Tensor:
    """Σ_j w_j values_j over the first axis of ``values`` (``[s, ...]``)."""
    weights = tilted_weights(losses, tilt, sizes).to(values.dtype)
    return (weights.reshape(-1, *[1] * (values.dim() - 1)) * values).sum(0)


class StreamingTilt:
    """The state of the streaming mean, in Python floats (float64).

    Invariant: A is at all times the normalised weighted mean of the samples counted so far.
    """

    def __init__(self, tilt: float, skip_nonfinite_loss: bool = False) -> None:
        self.tilt = tilt
        self.skip_nonfinite_loss = skip_nonfinite_loss
        self.num_nonfinite = 0
        self.max, self.sum, self.sum_squares = -math.inf, 0.0, 0.0
        self._first: float | None = None

    def update(self, loss: float, log_size: float = 0.0) -> tuple[float, float]:
        """Counts one sample; returns (keep, add) for :meth:`blend`.

        A non-finite loss makes all that follows NaN, or is left out with ``skip_nonfinite_loss``.
        """
        if not math.isfinite(loss):
            self.num_nonfinite += 1
            if self.skip_nonfinite_loss:
                return 1.0, 0.0
            self.sum = math.nan
        if math.isnan(self.sum):
            return math.nan, math.nan
        if self._first is None:
            self._first = loss
        if math.isinf(self.tilt):
            exponent = math.copysign(1.0, self.tilt) * loss
            maximum = max(self.max, exponent)
            old = float(self.max == maximum)
            new = math.exp(log_size) * (exponent == maximum)
        else:
            exponent = self.tilt * (loss - self._first) + log_size
            maximum = max(self.max, exponent)
            old, new = math.exp(self.max - maximum), math.exp(exponent - maximum)
        total = self.sum * old + new
        keep, add = self.sum * old / total, new / total
        self.sum_squares = self.sum_squares * old * old + new * new
        self.max, self.sum = maximum, total
        return keep, add

    @property
    def ess(self) -> float:
        """(Σw)²/Σw²: the number of samples where all weigh the same, 1 where one decides."""
        if self.sum_squares == 0.0:
            return math.nan
        return self.sum * self.sum / self.sum_squares

    @staticmethod
    def blend(mean: Tensor, value: Tensor, keep: float, add: float) -> None:
        """A <- keep A + add g in place; A may hold anything before the first sample (keep = 0)."""
        if keep == 0.0:
            mean.copy_(value)
        elif add != 0.0:
            mean.mul_(keep).add_(value.to(mean.dtype), alpha=add)
