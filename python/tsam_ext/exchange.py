"""What ranks tell each other once per pass: the loss, whether one has failed or had no batch, and which pass this is.

One sum of six float64 numbers: (L, weight, failed, skipped, k, k²) with k the number of the pass. All k are equal
exactly where ranks · Σk² = (Σk)²; k is taken modulo 2^16, for more than 1,024 ranks 2^12, so that float64 holds it all.
Invariant: a rank that raises takes part in the pass's exchange, without waiting, so that nobody waits for it; one that
left a step alone never pairs with the others' old passes unnoticed. On a GPU nothing waits: numbers are looked at once
they have arrived, in a later pass.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from .engine.ranks import CollectiveError, Ranks

LOSS, WEIGHT, FAILED, SKIPPED, NUMBER, SQUARE, LENGTH = 0, 1, 2, 3, 4, 5, 6
STRIDE = 1009  # between the numbers of two steps: a step alone never has the pass after next of another
SHORTER = 251  # between those of steps of different lengths, which batch="split" makes of fewer rows than samples


class OtherRankError(RuntimeError):
    """Another rank has raised, or is elsewhere; this one is as before the step."""


def reading_waits(home: torch.device) -> bool:
    """Whether a value on that device is not there yet when it is asked for."""
    return home.type == "cuda"


def sent(vector: Tensor) -> tuple[Any, Tensor]:
    """A copy of a vector on its way to the host, and the event after it."""
    host = torch.empty(LENGTH, dtype=torch.float64, pin_memory=True).copy_(vector, non_blocking=True)
    arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrival.record(torch.cuda.current_stream(vector.device))
    return arrival, host


class Exchange:
    """One per group of ranks; counts the steps that have begun and the passes of each."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._modulus = 1 << (16 if ranks.size <= 1024 else 12)
        self._steps = self._pass = self._fewer = 0
        self._left: tuple[Any, Tensor] | None = None  # of a pass that this rank has failed in
        self._missed = False  # whether this rank has failed where the others went on
        self._gone: CollectiveError | None = None  # what has ended the group
        self.weight = torch.ones(())  # the sum of the weights of the last pass, where it lies
        self._late: deque[tuple[Any, Tensor]] = deque()

    def begin_anew(self) -> None:
        """All ranks are at one place: they have just compared themselves."""
        self._steps = self._pass = self._fewer = 0
        self._left, self._missed = None, False
        self._late.clear()

    def begin(self) -> None:
        """A step begins, on all ranks. RuntimeError where this one has missed what others did, or the group is gone."""
        if self._gone is not None:
            raise CollectiveError(str(self._gone)) from self._gone
        if self._missed:
            raise RuntimeError(
                "TSAM: this rank failed at the end of a step that the others may have taken: the parameters are no "
                "longer the same. Load a checkpoint on all ranks. Nothing was updated."
            )
        if self._left is not None:
            work, vector = self._left
            self._left = None
            self.ranks.finish(work)  # the others have left that pass as well
            self._check_numbers(vector.tolist())
        self.look()
        self._steps, self._pass, self._fewer = self._steps + 1, 0, 0

    def meet(
        self,
        loss: Tensor | None,
        home: torch.device,
        *,
        weight: float = 1.0,
        skipped: bool = False,
        fewer: int = 0,
    ) -> Tensor:
        """The mean of the ranks' losses, float64 on ``home``; OtherRankError where a rank has failed or is elsewhere.

        ``weight``: what this rank's loss counts. ``loss``: None where losses are each rank's own. ``fewer``: by how
        many samples its step is shorter than the settings say.
        """
        self.look()
        self._fewer = fewer
        vector = self._vector(loss, home, weight, skipped=skipped)
        self._pass += 1
        self.ranks.sum_(vector)
        if reading_waits(home):
            self._late.append(sent(vector))
        else:
            self._check(vector.tolist())
        self.weight = vector[WEIGHT]
        return vector[LOSS] / self.weight

    def leave(self, home: torch.device, *, missed: bool) -> None:
        """This rank raises: its part of the pass's exchange sets out, and nothing waits for it.

        ``missed``: the others may have taken the step by now, and have no exchange in it any more.
        """
        self._missed |= missed
        if self._left is None and not self._missed:
            vector = self._vector(None, home, 1.0, failed=True)
            try:
                self._left = self.ranks.start_sum(vector), vector
            except CollectiveError:  # the group is gone, and with it whoever would wait
                self._missed = True

    def lost(self, error: CollectiveError) -> None:
        """A collective has failed: what is left of others may lie about in the group."""
        self._gone = error

    def look(self) -> None:
        """Looks at what has arrived from a GPU."""
        while self._late and self._late[0][0].query():
            self._check(self._late.popleft()[1].tolist())

    def _vector(
        self, loss: Tensor | None, home: torch.device, weight: float, *, failed: bool = False, skipped: bool = False
    ) -> Tensor:
        k = float((self._steps * STRIDE + self._fewer * SHORTER + self._pass) % self._modulus)
        numbers = (0.0, weight, float(failed), float(skipped), k, k * k)
        if home.type != "cuda":
            vector = torch.tensor(numbers, dtype=torch.float64)
        else:  # filled on the device: a copy from the host would wait
            vector = torch.zeros(LENGTH, dtype=torch.float64, device=home)
            for i, number in enumerate(numbers):
                if number:
                    vector[i].fill_(number)
        if loss is not None:
            vector[LOSS] = loss.reshape(()) if weight == 1.0 else loss.reshape(()) * weight
        return vector

    def _check_numbers(self, numbers: list[float]) -> None:
        if numbers[SQUARE] * self.ranks.size != numbers[NUMBER] ** 2:
            raise OtherRankError(
                f"TSAM: the {self.ranks.size} ranks are at different passes: one of them has left a step alone (an "
                "exception that it caught, a break, a batch more or less, batch='split' with fewer rows than samples). "
                "Nothing was updated; load a checkpoint on all ranks."
            )

    def _check(self, numbers: list[float]) -> None:
        self._check_numbers(numbers)
        size = self.ranks.size
        if numbers[FAILED] > 0.0:
            raise OtherRankError(
                f"TSAM: {numbers[FAILED]:.0f} of {size} ranks raised in this pass, for a reason of their own. Nothing "
                "was updated; the next step may work."
            )
        if 0.0 < numbers[SKIPPED] < size:
            raise OtherRankError(
                f"TSAM: {numbers[SKIPPED]:.0f} of {size} ranks had no batch (their closure returned None), the others "
                "had one. Give all ranks the same number of batches. Nothing was updated."
            )
