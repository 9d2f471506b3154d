"""``python -m bench overhead``: what a gradient estimate costs beside its gradients, ours against every competitor.

Parameter lists of real models, gradients that are only copied into p.grad (that time is left out), the ways in turns on
cold caches. Floor: for each pass the larger of its words over the bandwidth and its draws over the draw rate, both
the highest of the same run; beside it the same with the bandwidth right before and after, as a shared machine's
memory is not always the same. The job fails (exit 1) where a demand of bench/README.md is not met.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tsam_ext import _C, TSAM

from . import baselines, calls, floor, overhead_report
from .baselines import Estimator, Tensors
from .meter import Meter
from .models import MODELS
from .report import environment, write_json

RHO, TILT, SAMPLES = 0.05, 2.0, 3
SMALL = 20  # estimates in one timing of the small list
ROUNDS, QUICK_ROUNDS, FLOOR_REPEATS = 12, 3, 10
Pass = tuple[int, int]  # words read or written an element, draws an element
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
        """Words an element of ours."""
        return sum(words for words, _ in self.passes)


TSAM_WAYS = ("loop", "foreach", "compiled")
NO_NOISE = [(4, 0), *[RESTORE] * (SAMPLES - 1), *[NORM] * SAMPLES, *[ASCEND] * (SAMPLES - 1), *[BLEND] * (SAMPLES - 1)]
TASKS = (
    Task("ascent", {}, ascent_passes(SAMPLES), TSAM_WAYS),
    Task("ascent without noise", {"radius": 0.0}, [*NO_NOISE, RESTORE], TSAM_WAYS),
    Task("ascent, sphere", {"noise": "sphere"}, ascent_passes(SAMPLES, 2)),
    Task("SAM", {"num_samples": 1, "radius": 0.0}, [NORM, (4, 0), RESTORE], ("wrapper", "library")),
    Task("noise", {"sampler": "noise"}, [SAVING_DRAW, *[DRAW, BLEND] * (SAMPLES - 1), RESTORE]),
    Task("hmc", {"sampler": "hmc"}, hmc_passes(SAMPLES)),
)


@dataclass
class Row:
    """What was measured of one way; ``seconds`` of an estimate without its gradients, one a round."""

    list_name: str
    task: str
    way: str
    elements: int
    words: int
    floor: float
    floor_then: float = 0.0  # by the bandwidth right before and right after
    seconds: list[float] = field(default_factory=list)
    calls: int = 0
    syncs: int = 0
    extra_memory: float = 0.0  # in units of the parameters' bytes
    passes: dict[str, list[float]] = field(default_factory=dict)  # the foreach way's, seconds of each call

    @property
    def best(self) -> float:
        """The shortest time."""
        return min(self.seconds)

    def ratio(self, ours: Row) -> tuple[float, float, float]:
        """Median and quartiles of this way's time over ours, round by round."""
        low, middle, high = np.quantile(np.array(self.seconds) / np.array(ours.seconds), (0.25, 0.5, 0.75))
        return float(middle), float(low), float(high)


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
    options: dict[str, Any] = {"rho": RHO, "tilt": TILT, "num_samples": SAMPLES, "radius": RHO, **task.options}
    if way == "ours":
        return TSAM(params, lr=0.0, seed=1, **options)
    if way == "wrapper":
        return baselines.WrapperSAM(params, rho=RHO)
    if way == "library":
        return baselines.LibrarySAM(params, rho=RHO)
    kind = baselines.LoopTSAM if way == "loop" else baselines.ForeachTSAM
    estimator = kind(params, **options)
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
    params: Tensors = [torch.nn.Parameter(torch.zeros(shape)) for shape in MODELS[name].shapes()]
    elements = sum(p.numel() for p in params)
    rows, estimators = [], []
    closure = StandIn(params, calls=2 * SAMPLES)
    for way in ways:
        row = Row(name, task.name, way, elements, task.words, 0.0)
        estimator = make(way, task, params)
        if isinstance(estimator, baselines.ForeachTSAM):
            row.words = estimator.words
        for _ in range(2):  # scratch is made, passes are compiled, the chain starts
            closure.begin()
            estimator.estimate_gradient(closure)
        closure.begin()
        gc.collect()
        if way != "compiled":  # a dispatch mode sees no compiled op
            closure.fresh = True
            with Meter() as meter:
                estimator.estimate_gradient(closure)
            closure.fresh = False
            row.calls, row.syncs = meter.calls - closure.calls * (1 + len(params)), meter.syncs
            row.extra_memory = (meter.peak + held_bytes(estimator)) / (4 * elements) - 1  # one gradient is anybody's
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


def held_bytes(estimator: Estimator) -> int:
    """Bytes that an estimator keeps between steps, beside the parameters."""
    if isinstance(estimator, TSAM):
        chain = estimator._progress.memory
        positions = [x for held in chain.positions.values() for x in held]
        kept = [*(copy for _, copy in estimator._saved.values()), *positions, *chain.momenta.values()]
    elif isinstance(estimator, baselines.ForeachTSAM):
        kept = [*estimator.saved, *estimator.noise]
    else:
        kept = []
    return sum(x.numel() * x.element_size() for x in kept)


def add_parser(commands: Any) -> None:
    """Adds the command to ``python -m bench``."""
    parser = commands.add_parser(
        "overhead",
        help="time what an estimate costs beside its gradients, against four competitors",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lists", nargs="+", choices=MODELS, default=list(MODELS), help="parameter lists (all)")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="only tasks whose name contains one of these")
    parser.add_argument("--rounds", type=int, help=f"timings of each way ({ROUNDS})")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--quick", action="store_true", help="the small lists, 3 rounds, no torch.compile, no verdict")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for JSON, Markdown and PNG")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    names = ["mlp", "wrn16-8"] if options.quick else options.lists
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    tasks = [t for t in TASKS if not options.tasks or any(name in t.name for name in options.tasks)]
    skipped = {"compiled"} if options.quick or options.no_compile else set()
    if not tasks or rounds < 1:
        print("python -m bench overhead: no task's name contains that, or --rounds is below 1", file=sys.stderr)
        return 2
    work = [(t, ["ours", *(w for w in t.competitors if w not in skipped)]) for t in tasks]
    for task, ways in work:
        for way in ways:
            if reason := wrong(task, way):
                print(f"NOT SHOWN: {task.name}: {way} computes something else: {reason}")
                return 1
    try:
        program = floor.Program()
        cache, load = floor.cache_bytes(), os.getloadavg()[0]
        size = floor.array_bytes(cache, floor.physical_memory())
    except floor.FloorError as error:
        print(f"python -m bench overhead: {error}", file=sys.stderr)
        return 2
    scratch = torch.ones(2 * cache // 4)
    bandwidths, rates = [program.bandwidths(size, FLOOR_REPEATS)], [floor.draw_rate(FLOOR_REPEATS)]
    found: list[list[Row]] = []
    with tqdm([(name, *item) for name in names for item in work], unit="task") as bar:
        for name, task, ways in bar:
            bar.set_description(f"{name}, {task.name}")
            torch._dynamo.reset()
            found.append(measure(name, task, ways, rounds, scratch))
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
    settings = {"command": command_of(options), "isa": _C.__isa__, "threads": torch.get_num_threads()}
    settings |= {"rounds": rounds, "floor": vars(limits), "load": load, "calls": calls.measure()}
    text = overhead_report.markdown(rows, environment(settings))
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / ("overhead-quick" if options.quick else "overhead")
    write_json(stem.with_suffix(".json"), rows, settings)
    stem.with_suffix(".md").write_text(text)
    overhead_report.picture(rows, stem.with_suffix(".png"))
    print(f"\n{text}\nfiles: {stem}.json, .md, .png")
    if options.quick:
        print("no verdict with --quick")
        return 0
    missing = overhead_report.verdict(rows, _C.__isa__)
    for line in missing:
        print(f"NOT SHOWN: {line}")
    return 1 if missing else 0


def command_of(options: argparse.Namespace) -> str:
    """The command line that does this again."""
    words = ["python -m bench overhead"]
    words += [f"--lists {' '.join(options.lists)}"] if options.lists != list(MODELS) else []
    words += [f"--tasks {' '.join(options.tasks)}"] if options.tasks else []
    words += [f"--rounds {options.rounds}"] if options.rounds else []
    words += [flag for flag, on in (("--no-compile", options.no_compile), ("--quick", options.quick)) if on]
    return " ".join(words)
