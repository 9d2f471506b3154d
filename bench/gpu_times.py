"""What ``python -m bench gpu`` times: whole steps, estimates, ops and the host's part of a call, on one device.

Each function takes the seconds it may take, times its ways in turns, two turns to warm up and then rounds while that
time lasts, at least one, and returns rows: dicts with ``kind``, ``list``, ``task``, ``way`` and ``seconds``, one
number per round. On a GPU by CUDA events, on the CPU, where this is a trial, by the clock.
Invariant: nothing of torch's is timed in an op's row that does not compute what ours does. What is wrong with a way is
its row's ``wrong``, and it has no times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import calls, op_cases, step
from .nets import NETS
from .op_check import disagreement
from .overhead import StandIn, Task, make

Row = dict[str, Any]
WARM = 2  # turns
CAPTURED = " captured"  # ends the name of a way whose whole step is a CUDA graph, replayed
COPIED = 1 << 28  # bytes of a copy that shows a GPU's bandwidth, several times its caches
HOST_ROUNDS, HOST_TENSORS = 20, 200
Once = Callable[[], float]


class Clock:
    """Times of work on ``device``. ``rounds`` of each way at most."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds, self.gpu = device, rounds, device.type == "cuda"
        cache = torch.cuda.get_device_properties(device).L2_cache_size if self.gpu else 0
        self._scratch = torch.zeros(max(1, cache // 2), device=device)  # float32: twice the cache

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], Any], *, cold: bool = False) -> float:
        """Time of ``run`` on the device; ``cold``: after a pass over other memory, behind which the host runs ahead."""
        self.wait()
        if cold:
            self._scratch.add_(1.0)
        if not self.gpu:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        event: Any = torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        begin.record()
        run()
        end.record()
        self.wait()
        return float(begin.elapsed_time(end)) * 1e-3

    def turns(self, ways: dict[str, Once], allowed: float) -> dict[str, list[float]]:
        """What each way says, in turns."""
        found: dict[str, list[float]] = {way: [] for way in ways}
        start = time.perf_counter()
        for turn in range(-WARM, self.rounds):
            if turn > 0 and time.perf_counter() - start > allowed:
                break
            for way, once in ways.items():
                passed = once()
                if turn >= 0:
                    found[way].append(passed)
        return found

    def bandwidth(self) -> float:
        """Bytes a second, read and written, of a copy of a large tensor: the best of ten."""
        elements = COPIED // 4 if self.gpu else 1 << 16
        a, b = torch.zeros(elements, device=self.device), torch.zeros(elements, device=self.device)
        return 8 * elements / min(self.seconds(partial(a.copy_, b)) for _ in range(10))


def repeat(run: Callable[[], Any], times: int) -> None:
    """Calls it that many times."""
    for _ in range(times):
        run()


def first_line(error: Exception) -> str:
    """What kind of exception, and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def time_estimates(name: str, task: Task, ways: Iterable[str], clock: Clock, allowed: float) -> list[Row]:
    """Estimates of one kind on one parameter list, less the time of the stand-in gradients alone."""
    params: list[Tensor] = [torch.nn.Parameter(torch.zeros(s, device=clock.device)) for s in NETS[name].shapes()]
    closure = StandIn(params, calls=6)

    def once(estimator: Any) -> float:
        closure.begin()
        whole = clock.seconds(partial(estimator.estimate_gradient, closure))
        made = closure.calls
        closure.begin()
        return whole - clock.seconds(partial(repeat, closure, made))

    found = clock.turns({way: partial(once, make(way, task, params)) for way in ways}, allowed)
    return [
        {"kind": "estimate", "list": name, "task": task.name, "way": way, "seconds": seconds}
        for way, seconds in found.items()
    ]


def captured(take: Callable[[step.Timed], Any], closure: step.Timed) -> Callable[[], None]:
    """A step as a CUDA graph, after some that make its memory: the function that replays it."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        repeat(partial(take, closure), 3)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        take(closure)
    replay: Callable[[], None] = graph.replay
    return replay


def time_steps(name: str, ways: Iterable[str], clock: Clock, allowed: float, rows: int = step.BATCH) -> list[Row]:
    """Whole training steps of one model; of a way that samples only some steps the mean of a cycle.

    ``loss``: the last one. Each way trains a model of its own.
    """
    x, y = (t.to(clock.device) for t in NETS[name].batch(rows))
    closures: dict[str, step.Timed] = {}
    runs: dict[str, Once] = {}
    head: Row = {"kind": "step", "list": name, "task": f"step, {rows} rows"}
    failed: list[Row] = []

    def once(take: Callable[[], Any], count: int) -> float:
        return clock.seconds(take) / count

    for way in ways:
        torch.manual_seed(0)
        model, graphed = NETS[name].build().to(clock.device), way.endswith(CAPTURED)
        extra: dict[str, Any] = {"capturable": True, "same_masks": False} if graphed else {}
        take, count, _ = step.stepper(way.removesuffix(CAPTURED), model, **extra)
        closures[way] = closure = step.Timed(model, x, y)
        try:
            runs[way] = partial(once, captured(take, closure) if graphed else partial(take, closure), count)
        except Exception as error:  # the eager ways can still be timed
            failed.append({**head, "way": way, "seconds": [], "wrong": f"cannot be captured: {first_line(error)}"})
    found = clock.turns(runs, allowed)
    timed = [{**head, "way": way, "seconds": seconds} for way, seconds in found.items()]
    return [*({**row, "loss": float(closures[row["way"]].loss)} for row in timed), *failed]


@torch.no_grad()
def time_ops(elements: int, clock: Clock, allowed: float) -> list[Row]:
    """Each op on cold caches, with its floor: counted bytes over the bandwidth of a copy.

    Each way has to compute what ours does.
    """
    found: list[Row] = []
    dtype = torch.float32
    cases, bandwidth = op_cases.cases(op_cases.sizes_of(elements, None), dtype, clock.device), clock.bandwidth()
    for case in cases:
        moved = case.moved_bytes(elements, dtype)
        row: Row = {"kind": "op", "list": f"{elements:,}", "task": case.name, "words": case.words, "bytes": moved}
        row["floor"] = moved / bandwidth
        wrong = {way: reason for way, run in case.ways().items() if (reason := disagreement(case, run, dtype))}
        found += [
            {**row, "way": way, "seconds": [], "wrong": f"computes something else: {reason}"}
            for way, reason in wrong.items()
        ]

        def once(run: Callable[[], Any], times: int = case.calls) -> float:
            return clock.seconds(partial(repeat, run, times), cold=times == 1) / times

        case.reset()
        ways: dict[str, Once] = {way: partial(once, run) for way, run in case.ways().items() if way not in wrong}
        seconds = clock.turns(ways, allowed / len(cases))
        found += [{**row, "way": way, "seconds": passed} for way, passed in seconds.items()]
    return found


def time_host(clock: Clock) -> list[Row]:
    """The host's own time of one call: ``seconds`` are of lists of each of calls.LENGTHS, the best of the rounds."""
    found = calls.measure(min(HOST_ROUNDS, clock.rounds), clock.device, clock.wait, HOST_TENSORS)
    return [
        {"kind": "call", "list": "host", "task": name, "way": "ours", "seconds": seconds}
        for name, seconds in found.items()
    ]
