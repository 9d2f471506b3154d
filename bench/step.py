"""Times whole training steps of real models, and which share of them is not forward and backward.

ERM (SGD with momentum), SAM and TSAM by tsam_ext, and TSAM in plain torch (loops, torch._foreach, torch.compile), on
random batches, in turns. Share = 1 - time inside the closure / time of the step, the base optimizer's step included.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from tsam_ext import TSAM

from . import baselines
from .command import above_zero, add_command, add_nets, add_rounds, cannot_run, conclude, positive, rounds_of
from .nets import NETS
from .record import begin, chart, environment, heading, keep

BATCH, BUDGET, ROUNDS, QUICK_ROUNDS = 64, 120.0, 10, 2
RHO, TILT, SAMPLES, LEARNING_RATE = 0.05, 2.0, 3, 0.01
ALLOWED = 0.02
WAYS = {
    "erm": "ERM",
    "sam": "SAM, tsam_ext",
    "sam2": "SAM every 2 steps, carried, tsam_ext",
    "sam3": "SAM every 3 steps, carried, tsam_ext",
    "sam5": "SAM every 5 steps, carried, tsam_ext",
    "split": "TSAM split in 4, tsam_ext",
    "split3": "TSAM split in 4 every 3 steps, carried, tsam_ext",
    "tsam": "TSAM s=3, tsam_ext",
    "loop": "TSAM s=3, loops over tensors",
    "foreach": "TSAM s=3, torch._foreach",
    "compiled": "TSAM s=3, torch.compile",
    "wrapper": "SAM, the common wrapper",
}
OURS: dict[str, dict[str, Any]] = {  # TSAM's settings
    "sam": {"num_samples": 1, "radius": 0.0, "tilt": 0.0},
    "sam2": {"num_samples": 1, "radius": 0.0, "tilt": 0.0, "every": 2},
    "sam3": {"num_samples": 1, "radius": 0.0, "tilt": 0.0, "every": 3},
    "sam5": {"num_samples": 1, "radius": 0.0, "tilt": 0.0, "every": 5},
    "split": {"num_samples": 4, "batch": "split"},
    "split3": {"num_samples": 4, "batch": "split", "every": 3},
    "tsam": {"num_samples": SAMPLES},
}
Closure = Callable[[], Tensor]


@dataclass
class Row:
    """One way on one model: seconds of each step, and those of them spent in forward and backward.

    Of a way that samples only some steps a step is the mean over one full step and those up to the next. ``gradients``
    of whole batches per step.
    """

    model: str
    way: str
    gradients: float
    batch: int
    loss: float = 0.0  # the last one
    seconds: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The median over the steps of what is not forward and backward."""
        return median(1 - inside / seconds for inside, seconds in zip(self.inside, self.seconds, strict=True))


class Timed:
    """A closure around a model and a batch; ``seconds`` is the time inside it, ``loss`` its last."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = model, x, y
        self.seconds, self.loss = 0.0, torch.zeros(())
        self.part: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda x, y: (x, y)

    def __call__(self) -> Tensor:
        """Forward and backward."""
        start = time.perf_counter()
        x, y = self.part(self.x, self.y)
        loss = cross_entropy(self.model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        self.seconds += time.perf_counter() - start
        self.loss = loss.detach()
        return self.loss


def stepper(way: str, model: nn.Module, **extra: Any) -> tuple[Callable[[Timed], Any], int, float]:
    """A few training steps as a function of the closure, how many they are, and the gradients that each takes.

    ``extra``: further settings of TSAM, where the way is ours.
    """
    params = list(model.parameters())
    base: dict[str, Any] = {"lr": LEARNING_RATE, "momentum": 0.9}
    if way in OURS:
        options = OURS[way]
        given, every = (
            {"rho": RHO, "tilt": TILT, "seed": 1, "model": model, **options, **extra, **base},
            options.get("every", 1),
        )
        ours = TSAM(params, **given)

        def ours_steps(closure: Timed) -> None:
            closure.part = ours.part
            for _ in range(every):
                ours.zero_grad()
                ours.step(closure)

        full = 2 * (1 if options.get("batch") == "split" else options["num_samples"])
        return ours_steps, every, (full + every - 1) / every
    sgd = torch.optim.SGD(params, **base)
    if way == "erm":

        def erm(closure: Closure) -> None:
            sgd.zero_grad()
            closure()
            sgd.step()

        return erm, 1, 1.0
    settings: dict[str, Any] = {"rho": RHO, "radius": RHO, "tilt": TILT, "num_samples": SAMPLES}
    tensors: list[Tensor] = list(params)
    estimator: baselines.Estimator
    if way == "wrapper":
        estimator = baselines.WrapperSAM(tensors, rho=RHO)
    elif way == "loop":
        estimator = baselines.LoopTSAM(tensors, **settings)
    else:
        foreach = baselines.ForeachTSAM(tensors, **settings)
        estimator = baselines.compiled(foreach) if way == "compiled" else foreach

    def step(closure: Closure) -> None:
        estimator.estimate_gradient(closure)
        sgd.step()

    return step, 1, 2.0 if way == "wrapper" else 2.0 * SAMPLES


def measure(name: str, ways: list[str], batch: int, rounds: int, budget: float, bar: Any) -> list[Row]:
    """Steps of all ways in turns: one to warm up, then rounds while the budget lasts, at least one."""
    x, y = NETS[name].batch(batch)
    rows, steps = [], []
    for way in ways:
        torch.manual_seed(0)
        model = NETS[name].build()
        run, count, gradients = stepper(way, model)
        rows.append(Row(name, way, gradients, batch))
        steps.append((run, count, Timed(model, x, y)))
    began = time.perf_counter()
    for turn in range(-1, rounds):
        if turn > 0 and (time.perf_counter() - began) * (1 + 1 / (turn + 1)) > budget:
            break
        for row, (run, count, closure) in zip(rows, steps, strict=True):
            bar.set_description(f"{name}, {WAYS[row.way]}")
            closure.seconds = 0.0
            start = time.perf_counter()
            run(closure)
            if turn >= 0:
                row.seconds.append((time.perf_counter() - start) / count)
                row.inside.append(closure.seconds / count)
    for row, (*_, closure) in zip(rows, steps, strict=True):
        row.loss = float(closure.loss)
    return rows


def add_parser(commands: Any) -> None:
    """Adds the command to python -m bench."""
    parser = add_command(
        commands,
        "step",
        run,
        __doc__,
        summary="time whole training steps of real models, and what share of them is not forward and backward",
        targets=f"that share is at most {ALLOWED:.0%} for TSAM, s=3, of tsam_ext on every model but the MLP, from "
        f"{BATCH} rows on",
    )
    add_nets(parser, "--models", ["mlp", "wrn16-8", "distilbert"], "models (vit-b16 and resnet18: minutes per step)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY",
                        help=f"ways to train, of {', '.join(WAYS)}")  # fmt: skip
    parser.add_argument("--batch", type=positive, default=BATCH, help="rows per batch")
    add_rounds(parser, ROUNDS, QUICK_ROUNDS)
    parser.add_argument("--budget", type=above_zero, default=BUDGET, help="seconds per model, about")
    parser.add_argument("--quick", action="store_true", help="the MLP alone, no torch.compile, no targets")


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    if options.strict and options.quick:
        return cannot_run(options, "--quick has no targets: leave --strict out")
    names = ["mlp"] if options.quick else options.models
    ways = [way for way in options.ways if not (options.quick and way == "compiled")]
    settings, rows = begin(options), []
    with tqdm(names, unit="model") as bar:
        for name in bar:
            torch._dynamo.reset()
            rows += measure(name, ways, options.batch, rounds_of(options), options.budget, bar)
    settings |= {"batch": options.batch}
    stem = options.out / ("step-quick" if options.quick else "step")
    keep(stem, rows, settings, markdown(rows, environment(settings)), lambda path: picture(rows, path))
    if options.quick:
        print("no targets with --quick")
    return conclude(diverged(rows), [] if options.quick else missed(rows), strict=options.strict)


def diverged(rows: list[Row]) -> list[str]:
    """Ways whose last loss is not finite."""
    return [f"{row.model}: {WAYS[row.way]}: the loss is not finite" for row in rows if not math.isfinite(row.loss)]


def missed(rows: list[Row]) -> list[str]:
    """Models on which tsam_ext's TSAM spends more than it may outside forward and backward."""
    judged = [row for row in rows if row.way == "tsam" and row.model != "mlp" and row.batch >= BATCH]
    return [
        f"{row.model}: {row.share:.1%} of a step is not forward and backward, allowed {ALLOWED:.0%}"
        for row in judged
        if not row.share <= ALLOWED
    ]


def markdown(rows: list[Row], where: dict[str, Any]) -> str:
    """The table and what it has to be quoted with."""
    lines = [
        f"{heading(where)} Medians.",
        "",
        "| model | way | gradients per step | steps | s per step | steps/s | not forward and backward, ms | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = median(row.seconds)
        outside = median(t - i for t, i in zip(row.seconds, row.inside, strict=True))
        lines.append(
            f"| {row.model} | {WAYS[row.way]} | {row.gradients:.3g} | {len(row.seconds)} | {seconds:.3g} | "
            f"{1 / seconds:.3g} | {outside * 1e3:.2f} | {row.share:.2%} |"
        )
    return "\n".join(lines) + "\n"


def picture(rows: list[Row], path: Path) -> None:
    """Bars of a step's time, the share outside forward and backward on top, one panel per model."""
    names = list(dict.fromkeys(row.model for row in rows))
    with chart(path, len(names), (4.2 * len(names), 3.4)) as panels:
        for axes, name in zip(panels, names, strict=True):
            shown = [row for row in rows if row.model == name]
            inside = [median(row.inside) for row in shown]
            outside = [median(t - i for t, i in zip(row.seconds, row.inside, strict=True)) for row in shown]
            places = range(len(shown))
            axes.barh(places, inside, label="forward and backward")
            bars = axes.barh(places, outside, left=inside, label="everything else")
            axes.bar_label(bars, [f"{row.share:.1%}" for row in shown], fontsize=7, padding=2)
            axes.set(title=name, xlabel="seconds per step", yticks=places)
            axes.set_yticklabels([WAYS[row.way] for row in shown], fontsize=7)
            axes.invert_yaxis()
        panels[0].legend(frameon=False, fontsize=7)
