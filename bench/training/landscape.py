"""Measures how flat the nets are that ERM, SAM and TSAM find: curvature, sharpness and surfaces of their losses.

Trains the main job's net by each method, on the same data, order and initial weights per seed, and measures each twice:
on the clean test loss, and on the noisy training loss that it was trained on. Five largest eigenvalues and trace of the
Hessian, the rise of the loss by gaussian noise and by one ascent on groups of 64 rows, and filter-normalised surfaces.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench.command import above_zero, add_command, conclude, positive, share
from bench.record import begin, chart, environment, heading, keep, read_json, write_json
from tsam_ext import metrics

from .data import DATASETS, load
from .methods import METHODS
from .report import markdown, mean_and_error
from .run import Job, train
from .tasks import TASKS

SEEDS = (11, 12, 13, 14, 15)
USUAL = ("ERM", "SAM", "TSAM whole", "TSAM split")
CLEAN, NOISY = "clean test", "noisy training"
GROUP, REACH = 64, 1.0  # rows of a group; how far lines and planes go, in lengths of the filters
LEVELS = [0.05 * 2**i for i in range(10)]  # contours, the same for all methods
PAPER = "On CIFAR-100 the paper reports, for its top-5 eigenvalues, ERM 342, SAM 233 and TSAM 141 (arXiv 2410.22656)."


@dataclass(frozen=True)
class Work:
    """How much is measured: probes of the trace and of the noise, points of a line and along a side of a plane."""

    samples: int
    line: int
    plane: int
    radius: float
    rho: float


@dataclass(frozen=True)
class Measured:
    """One net on one loss. ``line``: along one random direction; ``plane``: of the first seed's test loss, else empty.

    ``left``: the largest residual of the eigenvalues, over the largest eigenvalue.
    """

    key: str
    method: str
    seed: int
    on: str
    accuracy: float
    loss: float
    eigenvalues: list[float]
    left: float
    products: int
    trace: float
    average: float
    ascent: float
    line: list[float]
    plane: list[list[float]]
    seconds: float

    @property
    def numbers(self) -> list[float]:
        """All that have to be finite."""
        return [self.loss, *self.eigenvalues, self.trace, self.average, self.ascent]


def add_parser(commands: Any) -> None:
    """Adds the command to python -m bench."""
    names = [m.name for m in METHODS]
    parser = add_command(
        commands, "landscape", run, __doc__, summary="how flat are the nets that ERM, SAM and TSAM find?",
        targets="on the clean test loss the largest eigenvalue is smaller for SAM than for ERM, and for each TSAM "
        "than for SAM",
    )  # fmt: skip
    parser.add_argument("--data", choices=DATASETS, help="mnist or digits (default: mnist; with --quick digits)")
    parser.add_argument("--label-noise", type=share, default=0.3, help="share of training labels drawn at random")
    parser.add_argument("--seeds", type=positive, help=f"how many seeds (default: {len(SEEDS)}; with --quick 1)")
    parser.add_argument("--epochs", type=positive, help=f"epochs per run (default: {TASKS['mnist'].epochs}; with "
                        "--quick 5)")  # fmt: skip
    parser.add_argument("--lr", type=above_zero, help="learning rate of all methods (default: each its own, as train "
                        "has them)")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=names, default=list(USUAL), metavar="NAME",
                        help=f"methods, of {', '.join(names)}")  # fmt: skip
    parser.add_argument("--radius", type=above_zero, default=1.0, help="length of the noise of the average sharpness")
    parser.add_argument("--rho", type=above_zero, default=0.1, help="length of the ascent of the ascent sharpness")
    parser.add_argument("--quick", action="store_true", help="digits, 1 seed, coarse surfaces: half a minute")
    parser.add_argument("--resume", action="store_true", help="keep what an interrupted job has measured")


def measured(job: Job, work: Work, first: bool) -> list[Measured]:
    """Trains one net and measures it on both losses, in this thread."""
    model, result = train(job)
    model.eval()
    parts = load(TASKS[job.task].data, job.noise, job.seed)
    rows = {CLEAN: (parts.test_x, parts.test_y), NOISY: (parts.train_x, parts.train_y)}
    return [_measure(job, work, model, result.final, on, *part, first and on == CLEAN) for on, part in rows.items()]


def _measure(
    job: Job, work: Work, model: nn.Module, accuracy: float, on: str, x: Tensor, y: Tensor, with_plane: bool
) -> Measured:
    start = time.process_time()
    loss_of = TASKS[job.task].loss
    batches = list(zip(torch.split(x, 16 * GROUP), torch.split(y, 16 * GROUP), strict=True))
    objective = metrics.Objective(model, batches, lambda net, batch: loss_of(net(batch[0]), batch[1]))
    spectrum = metrics.hessian_eigenvalues(objective, min(5, objective.num_elements))
    axis = torch.linspace(-REACH, REACH, work.line)
    side = torch.linspace(-REACH, REACH, work.plane)
    line = metrics.surface(objective, axis, seed=job.seed).losses
    plane = metrics.surface(objective, side, side, seed=job.seed).losses if with_plane else torch.empty(0, 0)
    return Measured(
        f"{job.key} {work} {on} {with_plane}",
        job.method.name,
        job.seed,
        on,
        accuracy,
        float(metrics.surface(objective, [0.0]).losses),
        spectrum.eigenvalues.tolist(),
        float(spectrum.residuals.max() / spectrum.eigenvalues.abs().max()),
        spectrum.products,
        metrics.hessian_trace(objective, work.samples).mean,
        metrics.average_sharpness(objective, work.radius, num_samples=work.samples).mean,
        metrics.ascent_sharpness(objective, work.rho, group_size=GROUP).mean,
        line.tolist(),
        plane.tolist(),
        time.process_time() - start,
    )


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    where = begin(options)
    quick = options.quick
    task = options.data or ("digits" if quick else "mnist")
    epochs = options.epochs or (5 if quick else TASKS[task].epochs)
    seeds = [SEEDS[0] + i for i in range(options.seeds or (1 if quick else len(SEEDS)))]
    work = Work(*((10, 11, 5) if quick else (100, 41, 21)), options.radius, options.rho)
    methods = [m for m in METHODS if m.name in options.methods]
    rate = {"lr": options.lr} if options.lr else {}
    jobs = [Job(m, task, options.label_noise, seed, epochs, {**m.chosen, **rate}) for seed in seeds for m in methods]
    name = options.out / ("landscape_quick" if quick else "landscape")
    options.out.mkdir(parents=True, exist_ok=True)
    known = {row.key: row for row in read(name.with_suffix(".json"))} if options.resume else {}
    found: list[Measured] = []
    for job in tqdm(jobs, desc="training and measuring", unit="net", disable=None):
        keys = [f"{job.key} {work} {on} {job.seed == seeds[0] and on == CLEAN}" for on in (CLEAN, NOISY)]
        have = [known[key] for key in keys if key in known]
        found += have if len(have) == 2 else measured(job, work, job.seed == seeds[0])
        write_json(name.with_suffix(".json"), found, where)
    names = [m.name for m in methods]
    where |= environment({})
    details = (
        f", {task}, {options.label_noise:.0%} random labels, {len(seeds)} seed{'s' * (len(seeds) > 1)}, {epochs} epochs"
    )
    text = f"{heading(where, details)}\n\n{tables(found, names, work)}\n\n{PAPER}\n"
    keep(name, found, where, text, lambda path: picture(found, names, path))
    return conclude(wrong(found), missed(found, names), strict=options.strict)


def read(path: Path) -> list[Measured]:
    """What a file of results holds."""
    return [Measured(**row) for row in read_json(path)]


def of(found: Sequence[Measured], method: str, on: str) -> list[Measured]:
    """The rows of one method on one loss, seed by seed."""
    return [row for row in found if (row.method, row.on) == (method, on)]


def tables(found: Sequence[Measured], methods: Sequence[str], work: Work) -> str:
    """One table for each loss: means over seeds, with their standard errors."""
    heads = ["method", "accuracy %", "loss", "largest eigenvalue", "eigenvalues 2 to 5", "trace"]
    heads += [f"rise by noise, {work.radius:g}", f"rise by ascent, {work.rho:g}"]
    parts = []
    for on in (CLEAN, NOISY):
        rows = []
        for name in methods:
            mine = of(found, name, on)
            first, *rest = zip(*(row.eigenvalues for row in mine), strict=True)
            rows.append(
                [
                    name,
                    _told([row.accuracy for row in mine], 1),
                    _told([row.loss for row in mine], 3),
                    _told(first, 2),
                    ", ".join(f"{mean_and_error(values)[0]:.2f}" for values in rest),
                    _told([row.trace for row in mine], 1),
                    _told([row.average for row in mine], 4),
                    _told([row.ascent for row in mine], 4),
                ]
            )
        parts.append(f"On the {on} loss (accuracy: of the clean test rows):\n\n{markdown(heads, rows)}")
    return "\n\n".join(parts)


def _told(values: Sequence[float], digits: int) -> str:
    """Mean ± standard error over seeds; of a single seed the value."""
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def wrong(found: Sequence[Measured]) -> list[str]:
    """Rows with a number that is not finite, or with eigenvalues that were given up."""
    lines = []
    for row in found:
        where = f"{row.method}, seed {row.seed}, {row.on} loss"
        if not all(map(math.isfinite, row.numbers)):
            lines.append(f"{where}: a loss or a measure that is not finite")
        elif row.left > 1e-3:
            lines.append(f"{where}: eigenvalues known to {row.left:.1e} of the largest alone, expected 1e-3")
    return lines


def missed(found: Sequence[Measured], methods: Sequence[str]) -> list[str]:
    """Where the paper's order of the largest eigenvalue on the clean test loss is not seen, in the mean over seeds."""
    tops = {name: mean_and_error([row.eigenvalues[0] for row in of(found, name, CLEAN)])[0] for name in methods}
    pairs = [("ERM", "SAM"), *(("SAM", name) for name in methods if name.startswith("TSAM"))]
    return [
        f"the largest eigenvalue on the {CLEAN} loss is {tops[flat]:.2f} for {flat} and {tops[sharp]:.2f} for {sharp}"
        for sharp, flat in pairs
        if sharp in tops and flat in tops and not tops[flat] < tops[sharp]
    ]


def picture(found: Sequence[Measured], methods: Sequence[str], path: Path) -> None:
    """Eigenvalues, the rise on a line for both losses (bands: standard errors over seeds), and a plane per method."""
    with chart(path, 3 + len(methods), (2.9 * (3 + len(methods)), 3.2)) as panels:
        for name in methods:
            mean, error = _over_seeds([row.eigenvalues for row in of(found, name, CLEAN)])
            panels[0].errorbar(range(1, len(mean) + 1), mean, error, marker="o", markersize=4, label=name)
        panels[0].set_title(f"largest eigenvalues, {CLEAN} loss", fontsize=8)
        panels[0].set(xlabel="number", yscale="log")
        panels[0].legend(frameon=False, fontsize=7)
        for axes, on in zip(panels[1:3], (CLEAN, NOISY), strict=True):
            for name in methods:
                mean, error = _over_seeds([row.line for row in of(found, name, on)])
                places = torch.linspace(-REACH, REACH, len(mean))
                axes.plot(places, mean)
                axes.fill_between(places, mean - error, mean + error, alpha=0.2)
            axes.set_title(f"{on} loss on a random line", fontsize=8)
            axes.set(xlabel="filter-normalised distance")
        for axes, name in zip(panels[3:], methods, strict=True):
            plane = torch.tensor(of(found, name, CLEAN)[0].plane)
            places = torch.linspace(-REACH, REACH, len(plane))
            lines = axes.contour(places, places, (plane - plane.min()).T, levels=LEVELS, linewidths=0.8, cmap="viridis")
            axes.clabel(lines, fontsize=6)
            axes.set_title(f"{name}: rise of the {CLEAN} loss", fontsize=8)
            axes.set(aspect="equal")


def _over_seeds(rows: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """Mean and standard error of each entry; no error of a single seed."""
    values = torch.tensor(rows, dtype=torch.float64)
    error = values.std(0) / len(values) ** 0.5 if len(values) > 1 else torch.zeros(values.shape[1])
    return values.mean(0), error
