"""All that changes in one TSAM from step to step, in one object that is never replaced by another.

Lightning, Fabric and Accelerate wrap an optimizer by copying its ``__dict__``: wrapper and wrapped then share this
object, so that whichever of them is called, both have taken the step.
Invariant: a copy or a pickle holds what the next step needs, and no scratch, estimate, diagnostics or health.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .carry import Carry
from .diagnostics import Diagnostics
from .engine.checks import TSAM, check_seed
from .estimates import Estimate
from .health import Health
from .history import History
from .loss_scale import Scaler, has_moved_on
from .module_state import drawn_seed
from .origin import Scratch
from .sampler_state import KeptStates, SamplerState
from .table import Table


class Progress:
    """``step`` counts completed steps, on the device where ``capturable``; ``sampler_state`` is the sampler's own.

    ``carry``: what lasts from a full step of ``every`` to the next, where anything does.
    """

    def __init__(
        self,
        sampler_state: SamplerState,
        seed: int | None,
        device: torch.device,
        *,
        capturable: bool,
        carry: Carry | None = None,
    ) -> None:
        self.step: int | Tensor = torch.zeros((), dtype=torch.float64, device=device) if capturable else 0
        self.seed_given = seed is not None  # else it may become another rank's
        self.seed, self.sampler_state = drawn_seed() if seed is None else seed, sampler_state
        self.carry = carry
        self.forget()

    def forget(self) -> None:
        """Drops what no copy has: scratch, table, the running estimate, what describes the last steps."""
        self.scratch = Scratch()
        self.table: Table | None = None  # of the last step
        self.estimate: Estimate | None = None  # the last one, also while it runs
        self.loads = 0  # checkpoints taken
        self.pending = False  # whether p.grad holds an estimate that no step has used
        self.left = False  # whether that estimate has left any gradient
        self.inside_perturbed = False
        self.inside: Estimate | None = None  # that of the step or the perturbed() under way
        self._whole = False  # whether the base's step belongs to the step under way
        self._due = False  # whether a step is to be counted when the base has stepped
        self.history = History()
        self.diagnostics, self.health = Diagnostics(), Health()

    @property
    def running(self) -> Estimate | None:
        """The estimate whose passes are under way."""
        return self.estimate if self.estimate is not None and not self.estimate.closed else None

    @property
    def kept(self) -> KeptStates:
        """What a checkpoint holds beside the base optimizer's state."""
        return KeptStates(self.sampler_state, *(() if self.carry is None else (self.carry,)))

    @property
    def signed_seed(self) -> int:
        """The seed as the ops take it."""
        return check_seed(TSAM, self.seed)

    def begin(self, estimate: Estimate) -> None:
        """The passes of a step begin; before them comes what is to be heard of earlier steps."""
        if not estimate.capturing:
            self.health.look()
        self.estimate = estimate
        self.enter(estimate)

    def finish(self, estimate: Estimate, *, plain: bool) -> None:
        """The passes are over: p.grad holds their estimate until a step uses it. A ``plain`` one says nothing."""
        self.completed(estimate)
        self.left = estimate.has_left_gradients
        report = estimate.report
        self.diagnostics.update(report)
        if not (plain or estimate.capturing):
            self.health.note(report)

    def check_pending(self, scaler: Scaler) -> None:
        """RuntimeError unless p.grad holds an estimate that a step may use, which is asked for once."""
        estimate, cause = self.estimate, None
        if not self.pending:
            cause = (
                "needs an estimate: call step(closure), or estimate_gradient(closure) or the samples() loop before it"
            )
        elif estimate is not None:
            if self.left and not estimate.has_left_gradients:
                cause = "finds no gradient: it was cleared after the estimate"
            elif estimate.scale is not None and has_moved_on(scaler, estimate.scale):
                cause = "comes after the scaler has been updated without it: the scaler has skipped that estimate"
        if cause is not None:
            self.pending = False
            raise RuntimeError(f"TSAM: step() without a closure {cause}. Nothing was updated.")

    def refuse_inside_perturbed(self, what: str) -> None:
        """RuntimeError inside perturbed()."""
        if self.inside_perturbed:
            raise RuntimeError(f"TSAM: {what} inside perturbed(): it has moved the parameters; leave its block first.")

    def abort(self) -> None:
        """Undoes what is left of an estimate that was not finished, or not used."""
        self.pending = False
        if self.estimate is not None:
            self.estimate.abort()
        self.estimate = None
        self.leave()

    def originals(self) -> list[tuple[Tensor, Tensor]]:
        """What the step under way has written, each with its copy from before. Waits for devices."""
        return [] if self.inside is None else self.inside.originals()

    def enter(self, estimate: Estimate) -> None:
        """From here on until :meth:`leave` a checkpoint is to hold what was before."""
        self.inside = estimate

    def leave(self, estimate: Estimate | None = None) -> None:
        """What is now is what a checkpoint is to hold; with ``estimate`` if it is the one under way."""
        if estimate is None or estimate is self.inside:
            self.sampler_state.settle()
            self.inside = None

    @contextmanager
    def whole_step(self) -> Iterator[None]:
        """An estimate that is completed inside is a part of its step: that is under way until it is counted."""
        self._whole = True
        try:
            yield
        except BaseException:
            self.leave()
            raise
        finally:
            self._whole = False

    def completed(self, estimate: Estimate) -> None:
        """``p.grad`` holds an estimate, for a step that may be another call's."""
        self.pending = True
        if not self._whole:
            self.leave(estimate)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Counts the step that the block takes, once the base has stepped; not if it raises before."""
        self._due = True
        try:
            yield
            self.count()
        finally:
            self._due = False
            self.leave()

    def count(self) -> None:
        """The parameters are new: the step is over, where one is to be counted and has not been."""
        if self._due:
            self._due = False
            self.step += 1
            self.history.used()
            self.pending = False
            self.leave()

    def belong(self, rank: str) -> None:
        """A step of this rank goes on from what lasts: where that was another rank's own, it starts anew."""
        if not self.sampler_state.belong(rank):
            self.history.tell(
                f"the checkpoint has the chain of another rank or number of ranks (this is {rank or 'one of all'}): "
                "the chain starts anew. Save and load one checkpoint per rank to go on with each."
            )

    def skip(self) -> None:
        """Leaves the running estimate as if it had not begun, p.grad with it: there was no batch."""
        if self.estimate is not None:
            self.estimate.skip()
        self.estimate = None
        self.leave()

    def step_to(self, device: torch.device) -> None:
        """Takes a step that is counted on a device to where the model is now."""
        if isinstance(self.step, Tensor):
            self.step = self.step.to(device)

    def set_step(self, step: int) -> None:
        """Goes on from another step; a captured graph knows the memory that counts it."""
        self.step = self.step.fill_(step) if isinstance(self.step, Tensor) else step

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("step", "seed", "seed_given", "sampler_state", "carry")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()
        self.history.copied()
