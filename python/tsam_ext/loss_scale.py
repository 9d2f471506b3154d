"""The loss scale S of mixed precision, of a GradScaler or as a tensor: asked for, divided out of gradients, put back.

pass: S ∇L -> ∇L; at the end: mean -> S mean, NaN if any pass overflowed, so that the scaler skips the step and shrinks.
Words moved per element: 2 a pass (4 where others hold a gradient's memory) and 2 a step.
Invariant: the scale is used where it lies, on the device; gradients that others hold are not written.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.amp import GradScaler

from .engine.checks import TSAM, check_scalar_tensor, refuse, shown
from .engine.ranks import Ranks
from .mean import owned

Scaler = GradScaler | Tensor | None


def check_scaler(scaler: object) -> Scaler:
    """``scaler`` if it is one; TypeError or ValueError otherwise. No value is looked at."""
    if scaler is None or isinstance(scaler, GradScaler):
        return scaler
    if not isinstance(scaler, Tensor):
        raise refuse(TSAM, "scaler", shown(scaler), "a torch.amp.GradScaler, its scale as a tensor, or None", TypeError)
    return check_scalar_tensor(TSAM, "scaler", scaler)


@torch.no_grad()
def scale_now(scaler: Scaler, device: torch.device) -> Tensor | None:
    """The scale as a tensor of its own, 0-dim float32, on ``device``; None without a scaler or with a disabled one."""
    if isinstance(scaler, GradScaler):
        return scaler.scale(torch.ones((), device=device)) if scaler.is_enabled() else None
    if scaler is None:
        return None
    return torch.empty((), device=device).copy_(scaler.detach().reshape(()))


def has_moved_on(scaler: Scaler, scale: Tensor) -> bool:
    """Whether a GradScaler has another scale than it had: it has been updated since. Waits for the device."""
    now = scale_now(scaler, scale.device) if isinstance(scaler, GradScaler) else None
    return now is not None and bool(now != scale)


def refuse_closure(scaler: Scaler) -> None:
    """RuntimeError where a whole step would hand the base optimizer scaled gradients."""
    if scaler is not None and not (isinstance(scaler, GradScaler) and not scaler.is_enabled()):
        raise RuntimeError(
            "TSAM: step(closure) with scaler= would step with scaled gradients: call estimate_gradient(closure), "
            "scaler.step(optimizer) and scaler.update(). Nothing was updated."
        )


def is_product(loss: Tensor) -> bool:
    """Whether a loss is the product of another and of what needs no gradient, as ``GradScaler.scale`` returns it."""
    made_by = loss.grad_fn
    if made_by is None or made_by.name() != "MulBackward0":
        return False
    return any(factor is None for factor, _ in made_by.next_functions)


class LossScale:
    """One step's scale, and which of its passes have overflowed: since the last :meth:`spoiled`, and before.

    ``shards``: the ranks that hold the other rows of the gradients.
    """

    def __init__(self, scale: Tensor, shards: Ranks | None = None) -> None:
        self._scale, self._shards = scale, shards
        self._inverse: dict[torch.device, Tensor] = {}
        self._found: dict[torch.device, Tensor] = {}  # 1 where a gradient since the last spoiled() was not finite
        self._spoils = torch.zeros_like(scale)  # above 0 where any gradient of the step was not

    def divide(self, gradients: dict[int, Tensor]) -> dict[int, Tensor]:
        """The gradients of the loss itself: in their own memory, unless somebody else holds it."""
        alone = owned(gradients)
        own = {i: gradient if i in alone else gradient.clone() for i, gradient in gradients.items()}
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for gradient in own.values():
            alike.setdefault((gradient.device, gradient.dtype), []).append(gradient)
        for (device, _), tensors in alike.items():
            if device not in self._inverse:
                self._inverse[device] = self._scale.reciprocal().to(device)  # exact for a power of two
                self._found[device] = torch.zeros((), device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(tensors, self._found[device], self._inverse[device])
        return own

    def spoiled(self, loss: Tensor) -> Tensor:
        """The loss, or NaN if a gradient since the last call has overflowed."""
        for found in self._found.values():
            here = found.to(self._scale.device)
            if self._shards is not None:
                here = self._shards.sum_(here.clone())
            self._spoils += here
            loss = loss.masked_fill(here.to(loss.device) > 0, float("nan"))
            found.zero_()
        return loss

    def put_back(self, means: Iterable[Tensor]) -> None:
        """Scales the means as the scaler expects them; NaN if any pass of the step has overflowed."""
        factor = self._scale.masked_fill(self._spoils > 0, float("nan"))
        apart: dict[torch.device, list[Tensor]] = {}
        for mean in means:
            apart.setdefault(mean.device, []).append(mean)
        for device, tensors in apart.items():
            torch._foreach_mul_(tensors, factor.to(device))


def make_finite(gradients: Iterable[Tensor]) -> None:
    """0 for what is not finite, so that a step which is lost already does not run the model at NaN parameters."""
    for gradient in gradients:
        gradient.nan_to_num_(0.0, 0.0, 0.0)
