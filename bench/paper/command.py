"""Trains the paper's nets on the paper's data with ERM, SAM and TSAM, and reports test accuracy.

CIFAR-10 and CIFAR-100 from their official archives, folders of images (Tiny-ImageNet), or GLUE's sentence files.
With --tune settings are chosen first, on a part of the training rows that is held out. The runs that are reported
train on all training rows, and see the test rows once, after the last epoch. Under torchrun the ranks share each
batch. A run writes a checkpoint after each epoch: --resume goes on, and does not repeat what is finished.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from bench import nets
from bench.command import above_zero, add_command, cannot_run, conclude, positive, share
from bench.record import begin, environment, heading, keep, write_json

from .archives import CIFAR, read_cifar, read_folder, write_cifar
from .images import Augmentation, mean_and_std
from .ranks import Ranks, launched
from .settings import GRIDS, METHODS, OWN, USUAL, Job, Settings, tries
from .task import Rows, Task, held_out, with_label_noise
from .text import LENGTH, text_task
from .trainer import Result, train

TUNING_SEED = 901
SEEDS, QUICK_SEEDS, QUICK_EPOCHS, QUICK_ROWS = 3, 2, 2, 200
IMAGE_NETS = ("resnet18", "resnet18-narrow", "wrn16-8")


def add_parser(commands: Any) -> None:
    """Adds the command to python -m bench."""
    summary = "the paper's rows on CIFAR, image folders or GLUE, where data and a GPU are (not yet run on them)"
    parser = add_command(commands, "paper", run, __doc__, summary=summary)
    data = parser.add_argument_group("data")
    data.add_argument("--data", choices=USUAL, help="the data set (default: none; with --quick cifar10)")
    data.add_argument("--root", type=Path, help="CIFAR's archive or its folder, the folder of images, or "
                      "the folder with train.tsv and dev.tsv (default: none)")  # fmt: skip
    data.add_argument("--side", type=positive, help="for --data folder: fit images to it (default: as they are)")
    data.add_argument("--columns", nargs="+", metavar="NAME", help="for --data text: text columns and "
                      "label column, names or numbers (default: by the header)")  # fmt: skip
    data.add_argument("--label-noise", type=share, default=0.0, help="share of training labels drawn at "
                      "random (default: 0)")  # fmt: skip
    model = parser.add_argument_group("net")
    model.add_argument("--net", choices=IMAGE_NETS, help="for images; narrow: for trials (default: resnet18; "
                       "with --quick resnet18-narrow)")  # fmt: skip
    model.add_argument("--model", type=Path, help="for --data text: a local folder of transformers (default: none)")
    model.add_argument("--model-config", choices=["tiny"], help="for --data text: random weights (default: none)")
    runs = parser.add_argument_group("runs")
    runs.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
                      help=f"of {', '.join(METHODS)}")  # fmt: skip
    told = "several are a grid, with --tune (default: the authors'; with --tune a grid)"
    runs.add_argument("--lr", type=above_zero, nargs="+", help=f"learning rates; {told}")
    for name, what in (("rho", "length of the ascent"), ("radius", "length of TSAM's noise")):
        runs.add_argument(f"--{name}", type=not_negative, nargs="+", help=f"{what}; {told}")
    runs.add_argument("--tilt", type=float, nargs="+", help=f"TSAM's t; {told}")
    runs.add_argument("--samples", type=positive, nargs="+", help=f"TSAM's s; several are a grid (default: "
                      f"{Settings.samples})")  # fmt: skip
    runs.add_argument("--every", type=positive, default=1, help="sample each so many steps, carry in between")
    runs.add_argument("--parts", type=positive, help="TSAM's batch split in so many (default: whole batches)")
    runs.add_argument("--epochs", type=positive, help=f"epochs of a run (default: {Settings.epochs}; text "
                      f"{USUAL['text']['epochs']}; with --quick {QUICK_EPOCHS})")  # fmt: skip
    runs.add_argument("--batch", type=positive, default=Settings.batch, help="rows of a step, over all ranks")
    runs.add_argument("--seeds", type=positive, help=f"runs of each method (default: {SEEDS}; with --quick "
                      f"{QUICK_SEEDS})")  # fmt: skip
    runs.add_argument("--tune", action="store_true", help="choose settings first, on held-out training rows")
    runs.add_argument("--tune-epochs", type=positive, help="epochs of a run that chooses (default: as --epochs)")
    runs.add_argument("--holdout", type=share, default=0.1, help="share of the training rows that --tune judges by")
    runs.add_argument("--quick", action="store_true", help="a tiny archive of its own and a narrow net: seconds")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    machine.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    machine.add_argument("--compile", action="store_true", help="torch.compile the net")
    machine.add_argument("--resume", action="store_true", help="keep finished runs, go on from checkpoints")
    machine.add_argument("--plan", action="store_true", help="say which runs there would be, and stop")


def not_negative(text: str) -> float:
    """A finite number, 0 or above."""
    value = float(text)
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {value}, expected 0 or a number above")
    return value


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    if reason := _unusable(options):
        return cannot_run(options, reason)
    with launched(torch.cuda.is_available() and options.device != "cpu") as ranks:
        try:
            task = with_label_noise(load(options), options.label_noise)
            chosen_on = held_out(task, options.holdout) if options.tune else None
            if options.batch % ranks.size:
                raise ValueError(f"--batch: got {options.batch}, expected a multiple of the {ranks.size} ranks")
        except (ImportError, OSError, ValueError) as error:
            return cannot_run(options, error) if ranks.first else 2
        runs = Runs(options, task, chosen_on, ranks)
        if options.plan:
            return runs.plan()
        if reason := ranks.shared(runs.in_the_way()):
            return cannot_run(options, reason) if ranks.first else 2
        tuned = runs.tune() if options.tune else {}
        return runs.report(tuned, runs.final(tuned))


def _unusable(options: argparse.Namespace) -> str:
    """What is wrong with the command line, if anything is."""
    if options.quick and (options.data or options.root):
        return "--quick writes its own data: leave --data and --root out"
    if not options.quick and not (options.data and options.root):
        return "--data and --root are needed, or --quick"
    text = options.data == "text"
    uses = {"side": options.data == "folder", "net": not text, "columns": text, "tune_epochs": options.tune}
    if idle := [name for name, used in uses.items() if getattr(options, name) is not None and not used]:
        return f"--{idle[0].replace('_', '-')} says nothing here: it belongs to another --data, or to --tune"
    if text != bool(options.model or options.model_config):
        return "--data text needs --model DIR or --model-config tiny, and the others neither"
    if options.model and options.model_config:
        return "--model and --model-config: give one of the two"
    several = [name for name in OWN["tsam"] if len(getattr(options, name) or ()) > 1]
    return f"--{several[0]}: several values are a grid, which needs --tune" if several and not options.tune else ""


def load(options: argparse.Namespace) -> Task:
    """The data set of the command line, with its net."""
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            write_cifar(Path(folder), "cifar10", *made_up(QUICK_ROWS))
            found = read_cifar(Path(folder), "cifar10")
        task = image_task("quick", *found, 10, options.net or "resnet18-narrow")
        return replace(task, note="made-up images and a few steps: this says that everything runs, and nothing more")
    net, root = options.net or "resnet18", options.root
    if options.data == "text":
        return text_task(root, options.model, options.columns or (), LENGTH)
    if options.data == "folder":
        train_rows, test_rows, names = read_folder(root, options.side)
        fitted = f" at {options.side}" if options.side else ""
        return image_task(f"folder {root.resolve().name}{fitted}", train_rows, test_rows, len(names), net)
    archive = CIFAR[options.data]
    task = image_task(options.data, *read_cifar(root, options.data), archive.classes, net)
    whole = (len(task.train), len(task.test)) == archive.rows
    return task if whole else replace(task, note=f"NOT THE OFFICIAL ARCHIVE, which has {archive.rows} rows")


def image_task(name: str, train_rows: Rows, test_rows: Rows, classes: int, net: str) -> Task:
    """Images with crop, flip and cutout, normalised by the training images' mean and standard deviation."""

    def build() -> nn.Module:
        if net == "wrn16-8":
            return nets.wrn16_8(classes)
        return nets.resnet18(classes, small=True, width=64 if net == "resnet18" else 4)

    return Task(name, train_rows, test_rows, classes, build, Augmentation(*mean_and_std(train_rows.inputs)))


def made_up(rows: int) -> tuple[Rows, Rows]:
    """Images uint8 [n, 3, 32, 32] that say their class by a colour under noise: n to train, half as many to test."""
    generator = torch.Generator().manual_seed(5)
    colours = torch.randint(40, 216, (10, 3, 1, 1), generator=generator)
    labels = torch.arange(rows + rows // 2) % 10
    noise = torch.randint(-40, 41, (len(labels), 3, 32, 32), generator=generator)
    images = Rows((colours[labels] + noise).to(torch.uint8), labels)
    return images.take(torch.arange(rows)), images.take(torch.arange(rows, len(labels)))


class Runs:
    """All runs of one command: which there are, those that are done, and the report on them."""

    def __init__(self, options: argparse.Namespace, task: Task, chosen_on: Task | None, ranks: Ranks) -> None:
        self.options, self.task, self.chosen_on, self.ranks = options, task, chosen_on, ranks
        self.stem: Path = options.out / ("paper_quick" if options.quick else "paper")
        self.where = begin(options)
        data = options.data or "cifar10"
        grid = GRIDS[data] if options.tune else {}
        given = {name: getattr(options, name) for name in OWN["tsam"] if getattr(options, name)}
        net = options.net or ("resnet18-narrow" if options.quick else "resnet18")
        if data == "text":
            net = options.model.resolve().name if options.model else options.model_config
        base = Settings(
            **{"data": task.name, "net": net, **USUAL[data]},
            batch=options.batch, label_noise=options.label_noise, every=options.every, parts=options.parts or 0,
            bf16=options.bf16, compile=options.compile,
        )  # fmt: skip
        base = replace(base, epochs=options.epochs or (QUICK_EPOCHS if options.quick else base.epochs))
        self.tries = {method: tries(base, method, {**grid, **given}) for method in options.methods}
        self.seeds = range(1, 1 + (options.seeds or (QUICK_SEEDS if options.quick else SEEDS)))
        self.device = _device(options.device)
        self.kept: dict[str, Result] = {}

    def tuning(self, method: str) -> list[Job]:
        """The runs that choose a method's settings."""
        assert self.chosen_on is not None
        rows = (len(self.chosen_on.train), len(self.chosen_on.test))
        epochs = self.options.tune_epochs
        shorter = [replace(s, epochs=epochs or s.epochs) for s in self.tries[method]]
        return [Job(s, TUNING_SEED, rows, "validation") for s in shorter]

    def reported(self, settings: Settings) -> list[Job]:
        """The runs that are reported."""
        return [Job(settings, seed, (len(self.task.train), len(self.task.test))) for seed in self.seeds]

    def in_the_way(self) -> str:
        """Reads the finished runs; says what keeps the command from starting: work that it would repeat unasked."""
        if self.options.quick or not self.ranks.first:
            return ""
        path = self.stem.with_suffix(".json")
        if path.exists():
            rows = [Result(**row) for row in json.loads(path.read_text())["results"]]
            self.kept = {row.key: row for row in rows}
        jobs = [job for settings in self.tries.values() for s in settings for job in self.reported(s)]
        jobs += [job for method in self.tries for job in self.tuning(method)] if self.options.tune else []
        begun = [job for job in jobs if job.key in self.kept or self.checkpoint(job).exists()]
        if not begun or self.options.resume:
            return ""
        return f"{path.parent} holds {len(begun)} of these runs, finished or begun: --resume goes on, or another --out"

    def checkpoint(self, job: Job) -> Path:
        """Where a run keeps what it has done so far."""
        return self.stem.parent / "paper_checkpoints" / f"{job.key}.pt"

    def tune(self) -> dict[str, list[tuple[Settings, Result]]]:
        """Each method's tries, in order, with how they did on the held-out rows."""
        assert self.chosen_on is not None
        jobs = {method: self.tuning(method) for method in self.tries}
        results = iter(self.finished([job for some in jobs.values() for job in some], self.chosen_on, "choosing"))
        return {method: [(s, next(results)) for s in settings] for method, settings in self.tries.items()}

    def final(self, tuned: dict[str, list[tuple[Settings, Result]]]) -> dict[str, list[Result]]:
        """The reported runs of each method at its settings."""
        settings = {m: best(tuned[m]) if m in tuned else self.tries[m][0] for m in self.tries}
        jobs = {method: self.reported(s) for method, s in settings.items()}
        results = iter(self.finished([job for some in jobs.values() for job in some], self.task, "training"))
        return {method: [next(results) for _ in some] for method, some in jobs.items()}

    def finished(self, jobs: Sequence[Job], task: Task, what: str) -> list[Result]:
        """The jobs' results; those that are not there yet are run, and kept as each ends."""
        done = self.ranks.shared(self.kept)
        if self.ranks.first and not self.options.quick:
            (self.stem.parent / "paper_checkpoints").mkdir(parents=True, exist_ok=True)
        costs = [cost(job) for job in jobs]
        with tqdm(total=math.ceil(sum(costs)), unit="gradient", desc=what, disable=not self.ranks.first) as bar:
            for i, job in enumerate(jobs):
                if job.key not in done:
                    bar.set_postfix_str(f"{job.settings.method}, seed {job.seed}")
                    file = None if self.options.quick else self.checkpoint(job)
                    tick = partial(bar.update, job.settings.gradients)
                    done[job.key] = train(job, task, self.device, self.ranks, file, tick)
                    self.keep(done, file)
                bar.update(sum(costs[: i + 1]) - bar.n)  # what was done before, and steps of the last batch
        return [done[job.key] for job in jobs]

    def keep(self, done: dict[str, Result], checkpoint: Path | None) -> None:
        """Writes all results, then drops the last one's checkpoint, which they make needless."""
        self.kept = done
        if self.ranks.first and checkpoint is not None:
            write_json(self.stem.with_suffix(".json"), list(done.values()), self.where)
            checkpoint.unlink(missing_ok=True)

    def plan(self) -> int:
        """Prints how many runs and gradients there would be."""
        for method, settings in self.tries.items() if self.ranks.first else ():
            chosen = self.tuning(method) if self.options.tune else []
            final = self.reported(settings[0])
            gradients = sum(map(cost, [*chosen, *final]))
            print(f"{method}: {len(chosen)} runs choose, {len(final)} are reported, {gradients:.3g} gradients in all")
        return 0

    def report(self, tuned: dict[str, list[tuple[Settings, Result]]], final: dict[str, list[Result]]) -> int:
        """Writes and prints the table; the exit code is 1 where a reported loss is not finite."""
        if not self.ranks.first:
            return 0
        text = markdown(self.task, tuned, final, heading(environment(self.where), self.place()))
        keep(self.stem, list(self.kept.values()), self.where, text)
        rows = [result for results in final.values() for result in results]
        wrong = [f"{r.settings['method']}, seed {r.seed}: the loss is not finite" for r in rows if not r.finite]
        return conclude(wrong)

    def place(self) -> str:
        """On what it ran, for the heading."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return f", {name}, {self.ranks.size} process{'es' if self.ranks.size > 1 else ''}"


def _device(name: str | None) -> torch.device:
    """The device of --device; without: this process's GPU, or the CPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else device


def cost(job: Job) -> float:
    """Whole-batch gradients of a run, about."""
    return job.settings.epochs * math.ceil(job.rows[0] / job.settings.batch) * job.settings.gradients


def best(tried: list[tuple[Settings, Result]]) -> Settings:
    """The settings of the highest accuracy whose loss stayed finite; of equals the first."""
    return max(tried, key=lambda one: one[1].accuracy if one[1].finite else -1.0)[0]


def markdown(
    task: Task, tuned: dict[str, list[tuple[Settings, Result]]], final: dict[str, list[Result]], head: str
) -> str:
    """The reported rows, then what they were chosen from."""
    first = next(iter(final.values()))[0]
    s = Settings(**first.settings)
    lines = [
        head,
        "",
        f"{task.name}: {len(task.train)} training rows, {len(task.test)} test rows, {s.label_noise:.0%} of the "
        f"training labels drawn at random. {s.net}, {s.epochs} epochs, batch {s.batch}. Test accuracy after the last "
        f"epoch, mean ± standard deviation over {len(next(iter(final.values())))} seeds.",
        *(["", f"Note: {task.note}."] if task.note else []),
        "",
        "| method | settings | test accuracy % | each seed | gradients per step | seconds per run |",
        "|---|---|---|---|---|---|",
    ]
    for method, results in final.items():
        settings, values = Settings(**results[0].settings), torch.tensor([r.accuracy for r in results]).double()
        spread = f" ± {values.std():.2f}" if len(values) > 1 else ""
        each = ", ".join(f"{value:.2f}" for value in values.tolist())
        seconds = sum(r.seconds for r in results) / len(results)
        lines.append(
            f"| {method.upper()} | {settings.shown} | {values.mean():.2f}{spread} | {each} | "
            f"{settings.gradients:.3g} | {seconds:.1f} |"
        )
    if tuned:
        kept = next(iter(tuned.values()))[0][1]
        lines += ["", f"Chosen by accuracy on held-out training rows (labels as noisy), one seed, "
                  f"{len(kept.losses)} epochs:", "", "| method | settings | accuracy % |", "|---|---|---|"]  # fmt: skip
        for method, tried in tuned.items():
            top = best(tried)
            for settings, result in tried:
                shown = f"{result.accuracy:.2f}" if result.finite else "the loss is not finite"
                mark = "**" if settings == top else ""
                lines.append(f"| {method.upper()} | {settings.shown} | {mark}{shown}{mark} |")
    return "\n".join(lines) + "\n"
