"""What earlier passes have shown of a user's loop, so that a later step need not look again and says each thing once.

Which gradients the last step left in p.grad (others were accumulated by somebody), whether a pass has ever made one,
which buffers a forward pass moves, what has been warned of.
Invariant: a look that waits for a device happens once; nothing of the size of the parameters is kept alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from operator import attrgetter

import torch
from torch import Tensor, nn

from .engine.notices import warn

VERSION = attrgetter("_version")
ACCUMULATED = (
    "p.grad held a gradient that was accumulated before the step, and it does not count: each pass of a step has to "
    "see all rows at the parameters where it is taken. Run all microbatches inside the closure, or inside the body of "
    "samples(), with one backward() each; or clear p.grad before the step."
)
NO_BATCH = (
    "a closure returned None and made no gradient, which counts as no batch: nothing was updated. A closure that has a "
    "batch calls backward() and returns the loss."
)
NO_GRADIENT = (
    "a pass left no gradient, which counts as zeros: none of the optimizer's parameters took part in its loss."
)
TWO_GRADIENTS = (
    "first_step(): parameters that another optimizer holds have a gradient of the first pass, and the second pass adds "
    "to it. Clear it in between, or use step(closure) or samples(), which give them one."
)


class History:
    """One per optimizer, from its first step on; a copy begins anew."""

    def __init__(self) -> None:
        self.gradient_seen = False
        self.watched = False  # whether a step without model= has looked at the modules that run
        # How each buffer of a module moves in a forward pass, by its name (module_state.Buffers).
        self.buffers: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()
        self._told: set[str] = set()
        self._left: list[weakref.ref[Tensor]] = []  # the gradients that the last estimate has left in p.grad
        self._versions: list[int] = []  # theirs, once the base optimizer has used them
        self._has_looked = self._knows_none = False

    def tell(self, message: str) -> None:
        """Warns of this once."""
        if message not in self._told:
            self._told.add(message)
            warn(message)

    def leave(self, gradients: Iterable[Tensor]) -> None:
        """Notes the gradients that an estimate has left in p.grad."""
        self._left, self._versions = list(map(weakref.ref, gradients)), []

    def find(self, gradients: Iterable[Tensor | None]) -> None:
        """Notes the gradients that are there before the first step: another optimizer's, which nobody accumulates."""
        self.leave(gradient for gradient in gradients if gradient is not None)
        self.used()

    def copied(self) -> None:
        """This is a copy's: the gradients that it finds in its first step are copies too."""
        self._knows_none = True

    def used(self) -> None:
        """The base optimizer has stepped: whoever writes to these gradients from now on accumulates."""
        left = [gradient for ref in self._left if (gradient := ref()) is not None]
        if len(left) == len(self._left):
            self._versions = list(map(VERSION, left))

    def check_found(self, found: Sequence[Tensor | None]) -> None:
        """Warns of gradients that are neither ours nor cleared; their values are looked at once, if ever."""
        knows_none, self._knows_none = self._knows_none, False
        if knows_none or self._has_looked or not any(gradient is not None for gradient in found):
            return
        ours: dict[int, int | None] = {id(ref()): None for ref in self._left}
        ours |= zip((id(ref()) for ref in self._left), self._versions, strict=False)
        foreign = [g for g in found if g is not None and ours.get(id(g), -1) not in (None, g._version)]
        if foreign:
            self._has_looked = True
            if any(bool(torch.count_nonzero(gradient.detach())) for gradient in foreign if not gradient.is_sparse):
                self.tell(ACCUMULATED)
