"""What one fused call costs on the host: lists of 1, 60 and 200 tensors so small that their work is next to nothing.

The ops in turns, the best of the rounds; ``torch._foreach_copy_`` on the same lists shows what torch's list ops cost.
Part of ``python -m bench overhead``.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tsam_ext import _ops
from tsam_ext.engine.state import DIRECTION_SLOTS, new_state

LENGTHS = (1, 60, 200)
ELEMENTS = 16  # of each tensor
CPU = torch.device("cpu")
ROUNDS, TENSORS = 60, 2000  # rounds, and how many tensors of a list one timing passes
TORCH = "torch._foreach_copy_"


def calls_on(length: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """A call of each op on lists of this length."""
    one = torch.ones((), device=device)
    position: list[Tensor] = [nn.Parameter(one.repeat(ELEMENTS)) for _ in range(length)]
    saved, grads, total = ([one.repeat(ELEMENTS) for _ in range(length)] for _ in range(3))
    state = new_state(1, device)
    _ops.tilt_begin_(state, one)
    _ops.tilt_update_(state, one, 0.0, 0, False, False)
    direction = torch.zeros(DIRECTION_SLOTS, dtype=torch.float64, device=device)
    ones, flags, base = [1.0] * length, [False] * length, [ELEMENTS * i for i in range(length)]
    noise = (1, 0, 0, 0, ELEMENTS * length, False, False)
    return {
        "restore_": lambda: _ops.restore_(position, saved),
        "perturb_": lambda: _ops.perturb_(position, saved, state, ones, flags, base, *noise),
        "grad_norm_": lambda: _ops.grad_norm_(grads, saved, state, flags, 0),
        "ascend_": lambda: _ops.ascend_(position, saved, grads, state, ones, flags, False),
        "take_direction_": lambda: _ops.take_direction_(total, grads, direction),
        "add_direction_": lambda: _ops.add_direction_(total, grads, direction),
        "norm_ascend_": lambda: _ops.norm_ascend_(position, [], grads, state, ones[:1], flags[:1], False, 0),
        "accumulate_": lambda: _ops.accumulate_(total, grads, state),
        TORCH: lambda: torch._foreach_copy_(position, saved),
    }


@torch.no_grad()
def measure(
    rounds: int = ROUNDS, device: torch.device = CPU, wait: Callable[[], object] = lambda: None, tensors: int = TENSORS
) -> dict[str, list[float]]:
    """Seconds of a call by op, a number for each of LENGTHS.

    On a GPU of the host alone: ``wait``, before each timing, lets what was launched end, and ``tensors`` are so few
    that the launches of one timing find room in the queue.
    """
    found: dict[str, list[float]] = {}
    for length in LENGTHS:
        calls = calls_on(length, device)
        repeats = -(-tensors // length)
        best = dict.fromkeys(calls, float("inf"))
        for _ in range(rounds):
            for name, call in calls.items():
                wait()
                start = time.perf_counter()
                for _ in range(repeats):
                    call()
                best[name] = min(best[name], (time.perf_counter() - start) / repeats)
        for name, seconds in best.items():
            found.setdefault(name, []).append(seconds)
    return found


def table(found: dict[str, list[float]]) -> list[str]:
    """The lines of the table."""
    lines = [
        f"One fused call, µs, on lists of tensors of {ELEMENTS} elements:",
        "",
        "| op |" + "".join(f" {length} |" for length in LENGTHS),
        "|---" * (1 + len(LENGTHS)) + "|",
    ]
    for name, seconds in found.items():
        lines.append(f"| {name} |" + "".join(f" {s * 1e6:.1f} |" for s in seconds))
    return lines
