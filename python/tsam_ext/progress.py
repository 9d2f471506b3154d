"""All that changes in one TSAM from step to step, in one object that is never replaced by another.

Lightning, Fabric and Accelerate wrap an optimizer by copying its ``__dict__``: wrapper and wrapped then share this
object, so that whichever of them is called, both have taken the step.
Invariant: a copy or a pickle holds what the next step needs, and no scratch, estimate, diagnostics or health.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .diagnostics import Diagnostics
from .engine.checks import TSAM, check_seed
from .estimates import Estimate
from .health import Health
from .origin import Scratch
from .sampler_state import SamplerState


class Progress:
    """``step`` counts completed steps, on the device where ``capturable``; ``sampler_state`` is the sampler's own."""

    def __init__(self, sampler_state: SamplerState, seed: int, device: torch.device, *, capturable: bool) -> None:
        self.step: int | Tensor = torch.zeros((), dtype=torch.float64, device=device) if capturable else 0
        self.seed, self.sampler_state = seed, sampler_state
        self.forget()

    def forget(self) -> None:
        """Drops what no copy has: scratch, the running estimate, what describes the last steps."""
        self.scratch: Scratch = {}
        self.estimate: Estimate | None = None  # the last one, also while it runs
        self.pending = False  # whether p.grad holds an estimate that no step has used
        self.inside_perturbed = False
        self.watched = False  # whether a step has looked for training normalisation layers
        self.diagnostics, self.health = Diagnostics(), Health()

    @property
    def running(self) -> Estimate | None:
        """The estimate whose passes are under way."""
        return self.estimate if self.estimate is not None and not self.estimate.closed else None

    @property
    def signed_seed(self) -> int:
        """The seed as the ops take it."""
        return check_seed(TSAM, self.seed)

    def abort(self) -> None:
        """Undoes what is left of an estimate that was not finished, or not used."""
        self.pending = False
        if self.estimate is not None:
            self.estimate.abort()
        self.estimate = None

    def step_to(self, device: torch.device) -> None:
        """Takes a step that is counted on a device to where the model is now."""
        if isinstance(self.step, Tensor):
            self.step = self.step.to(device)

    def set_step(self, step: int) -> None:
        """Goes on from another step; a captured graph knows the memory that counts it."""
        self.step = self.step.fill_(step) if isinstance(self.step, Tensor) else step

    def __getstate__(self) -> dict[str, Any]:
        return {"step": self.step, "seed": self.seed, "sampler_state": self.sampler_state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()
