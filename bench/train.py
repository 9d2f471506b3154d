"""Trains ERM, SAM and TSAM on images with noisy labels and compares them.

ERM (SGD), SAM, TSAM and TSAM with a split batch on real images, over fixed seeds; each seed gives all methods the
same data, order and initial weights. With --tune: a search for the settings instead; with --sampler hmc: what the
chain does while a net trains.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import sampler
from .command import above_zero, add_command, cannot_run, command_line, conclude, positive, share
from .data import DATASETS
from .record import write_json
from .run import Job, Result, run_all
from .train_report import behind, diverged, mean_and_error, picture, read_json, table
from .training_methods import EPOCHS, LEARNING_RATE, LEARNING_RATES, METHODS, Method, grid

SEEDS: tuple[int, ...] = (11, 12, 13, 14, 15, 16, 17, 18)
QUICK_SEEDS: tuple[int, ...] = (11, 12, 13, 14)
QUICK_EPOCHS = 40
QUICK_LEARNING_RATE = 0.05  # where the base optimizer alone overfits the noise within few epochs
TUNING_SEEDS = (901, 902, 903)


def add_parser(commands: Any) -> None:
    """Adds the command to python -m bench."""
    names, usual = [m.name for m in METHODS], [m.name for m in METHODS if m.usual]
    parser = add_command(
        commands,
        "train",
        run,
        __doc__,
        summary="train ERM, SAM and TSAM on images with label noise and compare them",
        targets="each method beats ERM by two standard errors; with --sampler hmc acceptance is 0.6 to 0.97, distance "
        "over rho above 0.3, and delta lifts the sampled loss by three standard errors",
    )
    parser.add_argument("--data", choices=DATASETS, help="mnist: 5,000 digits; digits: scikit-learn's (default: mnist; "
                        "with --quick digits)")  # fmt: skip
    parser.add_argument("--label-noise", type=share, default=0.3, help="share of training labels drawn at random")
    parser.add_argument("--seeds", type=positive, help=f"how many seeds (default: {len(SEEDS)}; with --quick "
                        f"{len(QUICK_SEEDS)})")  # fmt: skip
    parser.add_argument("--epochs", type=positive, help=f"epochs per run (default: {EPOCHS}; with --sampler hmc "
                        f"{sampler.EPOCHS}, with --quick too {sampler.QUICK_EPOCHS})")  # fmt: skip
    parser.add_argument("--lr", type=above_zero, help=f"learning rate of all methods (default: {LEARNING_RATE}, "
                        f"chosen on validation images; with --quick {QUICK_LEARNING_RATE})")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=names, default=usual, metavar="NAME",
                        help=f"methods, of {', '.join(names)} (default: all but those that end in plain)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="digits, 4 seeds, 40 epochs, lr 0.05: half a minute")
    parser.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes, one thread each")
    parser.add_argument("--resume", action="store_true", help="keep the finished runs of an interrupted job")
    parser.add_argument("--tune", action="store_true", help="search the settings on validation images instead (long)")
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


def _compare(options: argparse.Namespace, command: str) -> int:
    comparable = "ERM" in options.methods and len(options.methods) > 1
    if options.strict and not comparable:
        return cannot_run(options, "--strict compares with ERM: --methods needs ERM and one method more")
    seeds = QUICK_SEEDS if options.quick else SEEDS
    if options.seeds:
        seeds = tuple(range(SEEDS[0], SEEDS[0] + options.seeds))
    epochs = options.epochs or (QUICK_EPOCHS if options.quick else EPOCHS)
    methods = [m for m in METHODS if m.name in options.methods]
    rate = options.lr or (QUICK_LEARNING_RATE if options.quick else LEARNING_RATE)
    jobs = [Job(m, seed, options.data, options.label_noise, epochs, rate) for seed in seeds for m in methods]
    settings = {"command": command, "data": options.data, "label_noise": options.label_noise}
    settings |= {
        "learning_rate": rate,
        "epochs": epochs,
        "seeds": list(seeds),
        "methods": {m.name: m.options for m in methods},
    }
    name = "quick" if options.quick else "train"
    results = _run(jobs, options, options.out / f"{name}.json", settings)
    title = f"{options.data}, {options.label_noise:.0%} random labels (one in ten right), {len(seeds)} seeds"
    picture(results, methods, options.out / f"{name}.png", title)
    print(f"\n{title}, learning rate {rate}, {epochs} epochs")
    print("accuracy of the last epoch on clean test labels, mean ± standard error\n")
    print(table(results, methods))
    print(f"\npicture: {options.out / f'{name}.png'}   figures: {options.out / f'{name}.json'}")
    if not comparable:
        print("no targets: they compare with ERM, and need ERM and one method more")
    return conclude(diverged(results), behind(results), strict=options.strict)


def _run(jobs: list[Job], options: argparse.Namespace, path: Path, settings: dict[str, Any]) -> list[Result]:
    wanted = {job.key: job for job in jobs}
    before = read_json(path) if options.resume else []
    done = {r.key: r for r in before if r.key in wanted}
    others = [r for r in before if r.key not in wanted] if options.tune else []
    left = [job for job in jobs if job.key not in done]
    with tqdm(total=sum(job.cost for job in jobs), unit="epoch·gradient", desc="training") as bar:
        bar.update(sum(wanted[key].cost for key in done))
        for job, result in run_all(left, min(options.workers, max(1, len(left)))):
            done[result.key] = result
            write_json(path, [*others, *done.values()], settings)
            bar.update(job.cost)
            bar.set_postfix_str(f"{job.method.name}: {result.accuracy[-1]:.1f}%")
    return [done[job.key] for job in jobs]


def _tune(options: argparse.Namespace, command: str) -> int:
    if options.strict:
        return cannot_run(options, "--tune has no targets: leave --strict out")
    epochs = options.epochs or EPOCHS
    path = options.out / "tune.json"
    if not options.resume:
        path.unlink(missing_ok=True)
    options.resume = True  # each part of the search keeps the results of the parts before it

    def scores(tries: list[tuple[Method, float]]) -> list[tuple[float, float]]:
        jobs = [
            Job(m, seed, options.data, options.label_noise, epochs, rate, True)
            for m, rate in tries
            for seed in TUNING_SEEDS
        ]
        results = _run(jobs, options, path, {"command": command})
        n = len(TUNING_SEEDS)
        chunks = [results[i * n : (i + 1) * n] for i in range(len(tries))]
        return [mean_and_error([r.accuracy[-1] if r.finite else 0.0 for r in chunk]) for chunk in chunks]

    erm = METHODS[0]
    rates = list(LEARNING_RATES)
    found = scores([(erm, rate) for rate in rates])
    best = rates[max(range(len(rates)), key=lambda i: found[i][0])]
    print("accuracy on noisy validation labels, %")
    for rate, (mean, error) in zip(rates, found, strict=True):
        print(f"ERM         lr {rate:<6} {mean:.2f} ± {error:.2f}{'   <' if rate == best else ''}")
    tried = grid()
    for method in (m for m in METHODS if m.name in tried):  # those that carry have the settings of those that do not
        tries = tried[method.name]
        found = scores([(Method(method.name, o, method.gradients), best) for o in tries])
        top = max(range(len(tries)), key=lambda i: found[i][0])
        for i, (o, (mean, error)) in enumerate(zip(tries, found, strict=True)):
            shown = ", ".join(f"{k} {v}" for k, v in o.items() if k not in ("batch", "num_samples"))
            print(f"{method.name:<11} {shown:<32} {mean:.2f} ± {error:.2f}{'   <' if i == top else ''}")
    return 0
