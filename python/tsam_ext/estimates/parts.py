"""A batch split over the samples of a step: which rows each of them sees.

Of n rows sample j of s has those from ⌊jn/s⌋ to ⌊(j+1)n/s⌋; parts of unequal size enter the weights by their rows.
Invariant: all passes of a step ask for rows of batches of one length.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

from tsam_ext.engine.checks import TSAM, refuse


class Splits(Protocol):
    """What runs a step, and knows the rows of its current pass."""

    def take_part(self, rows: int) -> tuple[int, int]:
        """First and last row (exclusive) of the current pass, of so many."""

    def saw(self, batch: tuple[Any, ...]) -> None:
        """Takes note of the batch that was asked for."""


def part_of(batch: tuple[Any, ...], running: Splits | None) -> Any:
    """The current pass's rows of each entry: one object for one entry, a tuple for several; all where nothing runs."""
    if not batch:
        raise TypeError("TSAM: part: got no argument, expected the tensors of one batch")
    rows = len(batch[0])
    for i, rest in enumerate(batch):
        if len(rest) != rows:
            raise refuse(TSAM, f"part: argument {i}", f"{len(rest)} rows", f"{rows}, as in argument 0")
    begin, end = (0, rows) if running is None else running.take_part(rows)
    if running is not None:
        running.saw(batch)
    parts = batch if (begin, end) == (0, rows) else tuple(item[begin:end] for item in batch)
    return parts[0] if len(parts) == 1 else parts


class Parts:
    """How the rows of one batch are shared by its samples: of n rows sample j of s has those from ⌊jn/s⌋ on."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.rows: int | None = None
        self.asked = False  # whether the current pass has asked for its rows

    def take(self, rows: int, index: int) -> tuple[int, int]:
        """First and last row (exclusive) of sample ``index``; the first call says how many rows the batch has."""
        if rows < 1:
            raise refuse(TSAM, "part", "an empty batch", "at least one row")
        if self.rows is None:
            self.rows, self.num_samples = rows, min(self.num_samples, rows)
        elif rows != self.rows:
            raise refuse(TSAM, "part", f"{rows} rows", f"{self.rows}, as in the earlier passes of this step")
        self.asked = True
        return index * rows // self.num_samples, (index + 1) * rows // self.num_samples

    def log_size(self, index: int) -> float:
        """log of the rows of sample ``index``, relative to the first: parts of equal size leave exponents untouched."""
        if self.rows is None:
            return 0.0
        begin, end = ((index + k) * self.rows // self.num_samples for k in (0, 1))
        return math.log((end - begin) / (self.rows // self.num_samples))
