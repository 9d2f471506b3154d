"""Trains ERM, SAM and TSAM on data with wrong labels and compares them.

ERM (SGD), SAM, SAM carried, TSAM on whole batches, TSAM on a split batch with a negative tilt, and its two halves alone
(the tilt without the ascent, the ascent without the tilt), over fixed seeds; each seed gives all methods the same data,
order and initial weights. With --tune: a search for the settings instead; with --sampler hmc: what the chain does while
a net trains.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from bench import record
from bench.command import above_zero, add_command, cannot_run, command_line, conclude, positive, share

from . import sampler, search
from .data import DATASETS
from .methods import METHODS, Method
from .report import behind, diverged, impossible, picture, table, told, warned
from .run import Job, Result, complete, set_aside
from .tasks import TASKS

SEEDS: tuple[int, ...] = (11, 12, 13, 14, 15, 16, 17, 18)
QUICK_SEEDS = SEEDS[:4]
BEST, BASELINE, MEASURE = "TSAM split", "SAM", "nll"


def add_parser(commands: Any) -> None:
    """Adds the command to python -m bench."""
    names = [m.name for m in METHODS]
    parser = add_command(
        commands,
        "train",
        run,
        __doc__,
        summary="train ERM, SAM and TSAM on data with wrong labels and compare them",
        targets="TSAM split has a lower NLL than SAM by two standard errors; with --sampler hmc acceptance is 0.6 "
        "to 0.97, distance over rho above 0.3, and delta lifts the sampled loss by three standard errors",
    )
    parser.add_argument("--data", choices=DATASETS, help="mnist: 5,000 digits; digits: scikit-learn's (default: mnist; "
                        "with --quick digits)")  # fmt: skip
    parser.add_argument("--net", choices=["mlp", "cnn"], default="mlp", help="a perceptron, or a convolutional net, "
                        "which --sampler always takes")  # fmt: skip
    parser.add_argument("--label-noise", type=share, default=0.3, help="share of training labels drawn at random")
    parser.add_argument("--seeds", type=positive, help=f"how many seeds (default: {len(SEEDS)}; with --quick "
                        f"{len(QUICK_SEEDS)})")  # fmt: skip
    parser.add_argument("--epochs", type=positive, help=f"epochs per run (default: {TASKS['mnist'].epochs}; with "
                        f"--sampler hmc {sampler.EPOCHS}, with --quick too {sampler.QUICK_EPOCHS})")  # fmt: skip
    parser.add_argument("--lr", type=above_zero, help="learning rate of all methods (default: each its own, chosen by "
                        "--tune on validation rows of mnist, noise 0.3, with the perceptron)")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=names, default=names, metavar="NAME",
                        help=f"of {', '.join(names)}")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="digits, 4 seeds: half a minute")
    parser.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes, one thread each")
    parser.add_argument("--resume", action="store_true", help="keep the finished runs of an interrupted job")
    parser.add_argument("--tune", action="store_true", help="search the settings on validation rows instead (long)")
    parser.add_argument("--sampler", choices=["hmc"], help="train TSAM with this sampler and print what its chain does")
    parser.add_argument("--delta", type=float,
                        help="for --sampler: how far the samples lean towards high losses "
                        f"(default: {sampler.DELTA:g})")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    if options.delta is not None and not options.sampler:
        return cannot_run(options, "--delta belongs to --sampler hmc")
    options.out.mkdir(parents=True, exist_ok=True)
    command = command_line(options)
    options.data = options.data or ("digits" if options.quick else "mnist")
    if options.sampler:
        return sampler.run(options, command)
    return _tune(options, command) if options.tune else _compare(options, command)


def _task(options: argparse.Namespace) -> str:
    return str(options.data) + ("" if options.net == "mlp" else "-cnn")


def _compare(options: argparse.Namespace, command: str) -> int:
    comparable = {BEST, BASELINE} <= set(options.methods)
    if options.strict and not comparable:
        return cannot_run(options, f"--strict compares {BEST} with {BASELINE}: --methods needs both")
    seeds = QUICK_SEEDS if options.quick else SEEDS
    if options.seeds:
        seeds = tuple(range(SEEDS[0], SEEDS[0] + options.seeds))
    task = _task(options)
    epochs = options.epochs or TASKS[task].epochs
    methods = [m for m in METHODS if m.name in options.methods]
    rate = {"lr": options.lr} if options.lr else {}
    jobs = [Job(m, task, options.label_noise, seed, epochs, {**m.chosen, **rate}) for m in methods for seed in seeds]
    settings = {"command": command, "task": task, "label_noise": options.label_noise, "epochs": epochs}
    settings |= {"seeds": list(seeds), "methods": {m.name: {**m.options, **m.chosen, **rate} for m in methods}}
    name = "quick" if options.quick else "train"
    path = options.out / f"{name}.json"
    results = complete(jobs, path, settings, options.workers, resume=options.resume)
    title = f"{task}, {options.label_noise:.0%} random labels (one in ten right), {len(seeds)} seeds"
    picture(results, options.out / f"{name}.png", title)
    print(f"\n{title}, {epochs} epochs, {record.environment({})['date']}, {record.environment({})['processor']}")
    print("last epoch, clean test labels, mean ± standard error; bold: p < 5%, corrected for all differences (Holm)")
    print(f"\n{table(results, {m.name: m.gradients for m in methods})}")
    print("\n".join(["", *warned(results)]))
    print(f"\npicture: {options.out / f'{name}.png'}   figures: {path}")
    if not comparable:
        print(f"no target: it compares {BEST} with {BASELINE}, and needs both")
    return conclude(
        [*diverged(results), *impossible(results)], behind(results, BEST, BASELINE, MEASURE), strict=options.strict
    )


def _tune(options: argparse.Namespace, command: str) -> int:
    if options.strict:
        return cannot_run(options, "--tune has no targets: leave --strict out")
    task = _task(options)
    methods = [m for m in METHODS if m.name in options.methods]
    path = options.out / "tune.json"
    if not options.resume:
        set_aside(path)

    def runs(jobs: list[Job]) -> list[Result]:
        return complete(jobs, path, {"command": command}, options.workers, resume=True)

    epochs = options.epochs or TASKS[task].epochs
    found = search.search(methods, task, options.label_noise, search.SEEDS, epochs, runs)
    print(
        f"\n{TASKS[task].metric} on noisy validation rows, seeds {search.SEEDS}, the best three of each method's grid"
    )
    for method in methods:
        _show(method, found[method.name])
    return 0


def _show(method: Method, tried: list[search.Tried]) -> None:
    print(f"\n{method.name}, {len(tried)} settings")
    for one in tried[:3]:
        print(f"  {told(one.mean, one.error)}  " + ", ".join(f"{k} {v}" for k, v in one.settings.items()))
    for edge in search.at_an_edge(tried[0].settings, tried):
        print(f"  the best is at an edge of the grid: {edge}")
