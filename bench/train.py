"""``python -m bench train``: does the installed package train better than plain SGD on noisy labels?

ERM, SAM, TSAM and TSAM with a split batch on real images, over seeds fixed here, everything paired over the methods.
The job fails (exit 1) if a run diverges or if SAM or TSAM does not beat ERM by more than two standard errors.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import sampler
from .data import DATASETS
from .record import write_json
from .run import Job, Result, run_all
from .train_report import finals as finals_of
from .train_report import mean_and_error, paired, picture, read_json, table, verdict
from .training_methods import EPOCHS, LEARNING_RATE, LEARNING_RATES, METHODS, Method, grid

SEEDS: tuple[int, ...] = (11, 12, 13, 14, 15, 16, 17, 18)
QUICK_SEEDS: tuple[int, ...] = (11, 12, 13, 14)
QUICK_EPOCHS = 40
QUICK_LEARNING_RATE = 0.05  # where the base optimizer alone overfits the noise within few epochs
TUNING_SEEDS = (901, 902, 903)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected a number above 0")
    return value


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {value}, expected a number above 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"got {value}, expected a number from 0 to 1")
    return value


def add_parser(commands: Any) -> None:
    """Adds the command to ``python -m bench``."""
    names = [m.name for m in METHODS]
    parser = commands.add_parser(
        "train",
        help="train ERM, SAM and TSAM on images with label noise and compare them",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", choices=DATASETS, help="mnist: 5,000 digits (default); digits: scikit-learn's")
    parser.add_argument("--label-noise", type=_share, default=0.3, help="share of random training labels (0.3)")
    parser.add_argument("--seeds", type=_positive, help=f"how many seeds ({len(SEEDS)})")
    parser.add_argument("--epochs", type=_positive, help=f"epochs a run ({EPOCHS})")
    parser.add_argument(
        "--lr", type=_above_zero, help=f"learning rate of all methods ({LEARNING_RATE}, chosen on validation)"
    )
    parser.add_argument("--methods", nargs="+", choices=names, default=names, help="which methods (all)")
    parser.add_argument("--quick", action="store_true", help="digits, 4 seeds, 40 epochs, lr 0.05: half a minute")
    parser.add_argument("--workers", type=_positive, default=os.cpu_count() or 1, help="processes, one thread each")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for PNG and JSON")
    parser.add_argument("--resume", action="store_true", help="keep the finished runs of an interrupted job")
    parser.add_argument("--tune", action="store_true", help="search the settings on validation images instead (long)")
    parser.add_argument("--sampler", choices=["hmc"], help="train TSAM with this sampler and print what its chain does")
    parser.add_argument("--delta", type=float, help="for --sampler: how far the samples lean towards high losses")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    options.out.mkdir(parents=True, exist_ok=True)
    options.data = options.data or ("digits" if options.quick else "mnist")
    if options.sampler:
        return sampler.run(options)
    return _tune(options) if options.tune else _compare(options)


def _compare(options: argparse.Namespace) -> int:
    seeds = QUICK_SEEDS if options.quick else SEEDS
    if options.seeds:
        seeds = tuple(range(SEEDS[0], SEEDS[0] + options.seeds))
    epochs = options.epochs or (QUICK_EPOCHS if options.quick else EPOCHS)
    methods = [m for m in METHODS if m.name in options.methods]
    rate = options.lr or (QUICK_LEARNING_RATE if options.quick else LEARNING_RATE)
    jobs = [Job(m, seed, options.data, options.label_noise, epochs, rate) for seed in seeds for m in methods]
    settings = {"command": "python -m bench train", "data": options.data, "label_noise": options.label_noise}
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
    scores = finals_of(results)
    for method in ("TSAM", "TSAM split"):
        if method in scores and "SAM" in scores:
            print("\n{} minus SAM: {:+.2f} ± {:.2f}".format(method, *paired(scores, method, "SAM")), end="")
    print(f"\n\npicture: {options.out / f'{name}.png'}   figures: {options.out / f'{name}.json'}")
    wrong = verdict(results)
    if "ERM" not in scores or len(scores) == 1:
        print("nothing to compare: the check against ERM needs ERM and one method more")
    for line in wrong:
        print(f"NOT SHOWN: {line}")
    return 1 if wrong else 0


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


def _tune(options: argparse.Namespace) -> int:
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
        results = _run(jobs, options, path, {"command": "python -m bench train --tune"})
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
    for method in METHODS[1:]:
        tries = grid()[method.name]
        found = scores([(Method(method.name, o, method.gradients), best) for o in tries])
        top = max(range(len(tries)), key=lambda i: found[i][0])
        for i, (o, (mean, error)) in enumerate(zip(tries, found, strict=True)):
            shown = ", ".join(f"{k} {v}" for k, v in o.items() if k not in ("batch", "num_samples"))
            print(f"{method.name:<11} {shown:<32} {mean:.2f} ± {error:.2f}{'   <' if i == top else ''}")
    return 0
