"""Times what a gradient estimate costs beside its gradients, ours against every competitor.

Parameter lists of real models, gradients that are only copied into p.grad (that time is left out), the ways in turns on
cold caches. Floor: for each pass the larger of its words over the bandwidth and its draws over the draw rate, both
the highest of the same run; beside it the same with the bandwidth right before and after, as a shared machine's
memory is not always the same.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tsam_ext import _C, TSAM, Ascent

from . import baselines, calls, floor, overhead_report
from .baselines import Estimator, Tensors
from .command import add_command, add_nets, add_no_compile, add_rounds, cannot_run, conclude, rounds_of
from .meter import Meter
from .nets import NETS
from .overhead_report import Row
from .record import begin, environment, keep

RHO, TILT, SAMPLES = 0.05, 2.0, 3
SMALL = 20  # estimates in one timing of the small list
ROUNDS, QUICK_ROUNDS, FLOOR_REPEATS = 12, 3, 10
Pass = tuple[int, int]  # words read or written per element, draws per element
SAVING_DRAW, DRAW, NORM, ASCEND, BLEND, RESTORE = (3, 1), (2, 1), (1, 0), (3, 0), (3, 0), (2, 0)


def ascent_passes(s: int, draws: int = 1) -> list[Pass]:
    """9 s words; the first mean is the gradient's own memory."""
    found = [(SAVING_DRAW[0], draws), *[(DRAW[0], draws)] * (s - 1)]
    return found + [NORM, ASCEND] * s + [BLEND] * (s - 1) + [RESTORE]


def hmc_passes(s: int) -> list[Pass]:
    """N = 1, gaussian, a chain that goes on: start, s times (refresh, kick and drift; last dots; carry), restore."""
    return [(4, 0)] + s * [(6, 1), (2, 0), (4, 0)] + [RESTORE]


@dataclass(frozen=True)
class Task:
    """One kind of estimate, its competitors and its floor's passes."""

    name: str
    options: dict[str, Any]
    passes: list[Pass]
    competitors: tuple[str, ...] = ()

    @property
    def words(self) -> int:
        """Words per element of ours."""
        return sum(words for words, _ in self.passes)


TSAM_WAYS = ("loop", "foreach", "compiled")
NO_NOISE = [(4, 0), *[RESTORE] * (SAMPLES - 1), *[NORM] * SAMPLES, *[ASCEND] * (SAMPLES - 1), *[BLEND] * (SAMPLES - 1)]
TASKS = (
    Task("ascent", {}, ascent_passes(SAMPLES), TSAM_WAYS),
    Task("ascent without noise", {"radius": 0.0}, [*NO_NOISE, RESTORE], TSAM_WAYS),
    Task("ascent, sphere", {"sampler": Ascent(noise="sphere")}, ascent_passes(SAMPLES, 2)),
    Task("SAM", {"num_samples": 1, "radius": 0.0, "tilt": 0.0}, [NORM, (4, 0), RESTORE], ("wrapper", "library")),
    Task("noise", {"sampler": "noise"}, [SAVING_DRAW, *[DRAW, BLEND] * (SAMPLES - 1), RESTORE]),
    Task("hmc", {"sampler": "hmc"}, hmc_passes(SAMPLES)),
)


class StandIn:
    """A closure whose gradients are copies of fixed numbers; ``seconds`` is its own time.

    They lie in memory made beforehand, as a caching allocator would have it; while ``fresh`` in memory of their own.
    """

    def __init__(self, params: Tensors, calls: int) -> None:
        generator, device = torch.Generator().manual_seed(7), params[0].device
        self.params = params
        self._from = [torch.randn(p.shape, generator=generator).to(device) for p in params]
        self._sets = [[torch.zeros_like(g) for g in self._from] for _ in range(calls)]
        self._losses = [torch.tensor(1.0 + 0.1 * k, device=device) for k in range(calls)]
        self.calls, self.seconds, self.fresh = 0, 0.0, False

    def begin(self) -> None:
        """Before each estimate."""
        for p in self.params:
            p.grad = None
        self.calls, self.seconds = 0, 0.0

    def __call__(self) -> Tensor:
        """One gradient."""
        start = time.perf_counter()
        grads = [torch.empty_like(g) for g in self._from] if self.fresh else self._sets[self.calls]
        with torch.no_grad():
            torch._foreach_copy_(grads, self._from)
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g
        loss = self._losses[self.calls]
        self.calls += 1
        self.seconds += time.perf_counter() - start
        return loss


def make(way: str, task: Task, params: Tensors) -> Estimator:
    """The estimator of one way."""
    options: dict[str, Any] = {"rho": RHO, "tilt": TILT, "num_samples": SAMPLES, **task.options}
    if way == "ours":
        return TSAM(params, lr=0.0, seed=1, **options)
    if way == "wrapper":
        return baselines.WrapperSAM(params, rho=RHO)
    if way == "library":
        return baselines.LibrarySAM(params, rho=RHO)
    kind = baselines.LoopTSAM if way == "loop" else baselines.ForeachTSAM
    estimator = kind(params, **{"radius": RHO, **options})
    return (
        baselines.compiled(estimator)
        if way == "compiled" and isinstance(estimator, baselines.ForeachTSAM)
        else estimator
    )


def wrong(task: Task, way: str) -> str:
    """What a way computes otherwise than the definition says; empty if nothing, or if there is nothing to compare."""
    if not task.competitors:
        return ""
    s, radius = task.options.get("num_samples", SAMPLES), task.options.get("radius", RHO)
    return baselines.disagreement(lambda params: make(way, task, params), rho=RHO, radius=radius, tilt=TILT, s=s)


def timed_passes(estimator: baselines.ForeachTSAM, into: dict[str, list[float]]) -> None:
    """Makes an estimator note the time of each of its passes."""

    def wrapped(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def pass_(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = run(*arguments)
            into.setdefault(name, []).append(time.perf_counter() - start)
            return result

        return pass_

    estimator.passes = {name: wrapped(name, run) for name, run in estimator.passes.items()}


def measure(name: str, task: Task, ways: list[str], rounds: int, scratch: Tensor) -> list[Row]:
    """Times the ways of one task on one list, in turns."""
    params: Tensors = [torch.nn.Parameter(torch.zeros(shape)) for shape in NETS[name].shapes()]
    elements = sum(p.numel() for p in params)
    rows, estimators = [], []
    closure = StandIn(params, calls=2 * SAMPLES)
    for way in ways:
        row = Row(name, task.name, way, elements, task.words, 0.0)
        meter = Meter() if way != "compiled" else None  # a dispatch mode sees no compiled op
        with meter or nullcontext():
            estimator = make(way, task, params)
            for _ in range(2):  # scratch is made, passes are compiled, the chain starts
                closure.begin()
                estimator.estimate_gradient(closure)
        if isinstance(estimator, baselines.ForeachTSAM):
            row.words = estimator.words
        closure.begin()
        gc.collect()
        if meter is not None:
            closure.fresh = True
            meter.restart()
            with meter:
                estimator.estimate_gradient(closure)
            closure.fresh = False
            row.calls, row.syncs = meter.calls - closure.calls * (1 + len(params)), meter.syncs
            row.extra_memory = meter.peak / (4 * elements) - 1  # one gradient is needed by every way
        if way == "foreach":
            timed_passes(estimator, row.passes)  # type: ignore[arg-type]
        rows.append(row)
        estimators.append(estimator)
    repeats = SMALL if name == "mlp" else 1
    for _ in range(rounds):
        for row, estimator in zip(rows, estimators, strict=True):
            scratch.sum()
            passed = 0.0
            for _ in range(repeats):
                closure.begin()
                start = time.perf_counter()
                estimator.estimate_gradient(closure)
                passed += time.perf_counter() - start - closure.seconds
            row.seconds.append(passed / repeats)
    return rows


def add_parser(commands: Any) -> None:
    """Adds the command to python -m bench."""
    parser = add_command(
        commands,
        "overhead",
        run,
        __doc__,
        summary="time what an estimate costs beside its gradients, against four competitors",
        targets="how near the floor ours is and how much longer the others take (bench/README.md)",
    )
    add_nets(parser, "--lists", list(NETS), "parameter lists")
    told = "only estimates whose name contains one of these, of: " + "; ".join(task.name for task in TASKS)
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help=told)
    add_rounds(parser, ROUNDS, QUICK_ROUNDS)
    add_no_compile(parser)
    parser.add_argument("--quick", action="store_true", help="two small lists, no torch.compile, no targets")


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    names = ["mlp", "wrn16-8"] if options.quick else options.lists
    tasks = [t for t in TASKS if not options.tasks or any(name in t.name for name in options.tasks)]
    skipped = {"compiled"} if options.quick or options.no_compile else set()
    if not tasks:
        return cannot_run(options, f"no estimate's name contains {' or '.join(options.tasks)}")
    if options.strict and options.quick:
        return cannot_run(options, "--quick has no targets: leave --strict out")
    settings = begin(options)
    work = [(t, ["ours", *(w for w in t.competitors if w not in skipped)]) for t in tasks]
    differs = [
        f"{task.name}: {way} computes something else: {reason}"
        for task, ways in work
        for way in ways
        if (reason := wrong(task, way))
    ]
    if differs:
        return conclude(differs)
    try:
        program = floor.Program()
        cache = floor.cache_bytes()
        size = floor.array_bytes(cache, floor.physical_memory())
    except floor.FloorError as error:
        return cannot_run(options, error)
    scratch = torch.ones(2 * cache // 4)
    bandwidths, rates = [program.bandwidths(size, FLOOR_REPEATS)], [floor.draw_rate(FLOOR_REPEATS)]
    found: list[list[Row]] = []
    with tqdm([(name, *item) for name in names for item in work], unit="task") as bar:
        for name, task, ways in bar:
            bar.set_description(f"{name}, {task.name}")
            torch._dynamo.reset()
            found.append(measure(name, task, ways, rounds_of(options), scratch))
            bandwidths.append(program.bandwidths(size, 4))
            rates.append(floor.draw_rate(4))
    limits = floor.combined(program, size, bandwidths, rates)
    passes = {task.name: task.passes for task in tasks}
    for k, timed in enumerate(found):
        then = floor.combined(program, size, bandwidths[k : k + 2], rates)
        for row in timed:
            row.floor, row.floor_then = (
                sum(at.seconds(4 * w * row.elements, n * row.elements) for w, n in passes[row.task])
                for at in (limits, then)
            )
    rows = [row for timed in found for row in timed]
    settings |= {"rounds": rounds_of(options), "floor": vars(limits), "calls": calls.measure()}
    text = overhead_report.markdown(rows, environment(settings))
    stem = options.out / ("overhead-quick" if options.quick else "overhead")
    keep(stem, rows, settings, text, lambda path: overhead_report.picture(rows, path))
    if options.quick:
        print("no targets with --quick")
        return 0
    return conclude([], overhead_report.missed(rows, _C.__isa__), strict=options.strict)
