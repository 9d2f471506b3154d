"""Compares TSAM with SAM's family over several tasks, each method with its own settings, at three budgets.

For each task: a search of six settings per method on noisy validation rows, then fresh seeds at the best, with the
same epochs for all, with SAM's gradients for all (a method of fewer gradients per step trains longer), and with SAM's
seconds for all (by the seconds of the first). Differences to SAM are paired by seed; their p values are corrected for
all differences that the command shows, the two of carried SAM against LookSAM and MomentumSAM included.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench import record
from bench.command import add_command, command_line, conclude, positive, share

from .contenders import CONTENDERS
from .methods import NORMS, Method
from .report import LEVEL, chance, diverged, holm, impossible, markdown, mean_and_error, paired, scores_of, told, warned
from .run import Job, Result, complete, set_aside
from .search import Settings, at_an_edge, search
from .tasks import TASKS


class Trial(NamedTuple):
    """A task and the share of its training targets that are replaced."""

    task: str
    noise: float

    def __str__(self) -> str:
        return f"{self.task}:{self.noise:g}"


USUAL = tuple(Trial(*one) for one in (("mnist", 0.0), ("mnist", 0.4), ("mnist1d", 0.2), ("diabetes", 0.15)))
FULL = (
    *(
        Trial(name, noise)
        for noise in (0.0, 0.2, 0.4)
        for name in ("mnist", "mnist-cnn", "mnist1d", "digits-cnn", "text")
    ),
    *(Trial(name, noise) for noise in (0.0, 0.15) for name in ("diabetes", "segments", "transfer", "long-tail")),
)
SEEDS, SEARCH_SEEDS = tuple(range(31, 39)), (911, 912)
QUICK_EPOCHS = 6
FULL_SEARCH_SEEDS = tuple(range(911, 915))
BUDGETS = ("epochs", "gradients", "seconds")
BASELINE = "SAM"
CLAIMS = (("SAM every 3", "LookSAM", "seconds"), ("SAM every 3", "MomentumSAM", "seconds"))


def trial(text: str) -> Trial:
    """task or task:noise."""
    name, _, noise = text.partition(":")
    if name not in TASKS:
        raise argparse.ArgumentTypeError(f"got task {name!r}, expected one of {', '.join(TASKS)}")
    return Trial(name, share(noise or "0"))


def add_parser(commands: Any) -> None:
    """Adds the command to python -m bench."""
    names = [m.name for m in CONTENDERS]
    parser = add_command(commands, "compare", run, __doc__, summary="compare SAM's family over tasks and budgets")
    shown = " ".join(map(str, USUAL))
    parser.add_argument("--tasks", nargs="+", type=trial, metavar="TASK:NOISE",
                        help=f"of {', '.join(TASKS)}, with the share of wrong training targets (default: {shown}; "
                        "with --full all, clean and noisy)")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=names, default=names, metavar="NAME",
                        help=f"of {', '.join(names)}; {BASELINE} is always among them")  # fmt: skip
    parser.add_argument("--seeds", type=positive, help=f"how many seeds (default: {len(SEEDS)}; with --quick 2)")
    parser.add_argument(
        "--epochs", type=positive, help="epochs of the first budget (default: each task's own; with --quick 6)"
    )
    parser.add_argument("--full", action="store_true",
                        help="every task, four seeds in the search: many hours, so with --resume")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="two small tasks, four methods, two seeds: a minute")
    parser.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes, one thread each")
    parser.add_argument("--resume", action="store_true", help="keep the finished runs of an interrupted command")


def applies(method: Method, task: str) -> bool:
    """Whether the method can be run there: one of normalisation layers needs some."""
    has_norms = any(isinstance(m, NORMS) for m in TASKS[task].network().modules())
    return has_norms or not method.options.get("norm_only")


def epochs_of(method: Method, budget: str, epochs: int, seconds: dict[str, float], baseline: Method) -> int:
    """Epochs that spend the baseline's gradients, or its seconds."""
    ratio = 1.0
    if budget == "gradients":
        ratio = baseline.gradients / method.gradients
    elif budget == "seconds":
        ratio = seconds[baseline.name] / seconds[method.name]
    return max(1, round(epochs * ratio))


class Comparison:
    """One task: the settings that the search chose, and the results of each budget."""

    def __init__(self, options: argparse.Namespace, one: Trial, methods: Sequence[Method], path: Path) -> None:
        self.task, self.noise = one
        self.methods = [m for m in methods if applies(m, self.task)]
        self.options, self.path = options, path
        self.epochs = options.epochs or (QUICK_EPOCHS if options.quick else TASKS[self.task].epochs)
        self.chosen: dict[str, Settings] = {}
        self.edges: dict[str, list[str]] = {}
        self.results: dict[str, list[Result]] = {}
        self.lengths: dict[str, dict[str, int]] = {}

    def _complete(self, jobs: list[Job]) -> list[Result]:
        settings = {"command": command_line(self.options)}
        return complete(jobs, self.path, settings, self.options.workers, resume=True)

    def run(self, search_seeds: Sequence[int], seeds: Sequence[int]) -> None:
        """The search, then the budgets; the seconds of the third are the medians of the first."""
        found = search(self.methods, self.task, self.noise, search_seeds, self.epochs, self._complete)
        self.chosen = {name: tried[0].settings for name, tried in found.items()}
        self.edges = {name: at_an_edge(tried[0].settings, tried) for name, tried in found.items()}
        baseline = next(m for m in self.methods if m.name == BASELINE)
        seconds: dict[str, float] = {}
        for budget in BUDGETS:
            length = {m.name: epochs_of(m, budget, self.epochs, seconds, baseline) for m in self.methods}
            jobs = [
                Job(m, self.task, self.noise, seed, length[m.name], self.chosen[m.name])
                for m in self.methods
                for seed in seeds
            ]
            results = self._complete(jobs)
            self.results[budget], self.lengths[budget] = results, length
            seconds = seconds or {
                m.name: float(np.median([r.seconds for r in results if r.method == m.name])) for m in self.methods
            }

    def _claim(self, name: str, other: str, budget: str) -> tuple[str, ...]:
        """Which comparison it is: at two budgets of the same epochs it is one."""
        length = self.lengths[budget]
        return self.task, f"{self.noise:g}", name, str(length[name]), other, str(length[other])

    def chances(self) -> dict[tuple[str, ...], float]:
        """p of every difference to SAM, and of the named claims, before any correction."""
        found: dict[tuple[str, ...], float] = {}
        for budget, results in self.results.items():
            scores = scores_of(results)
            pairs = [(name, BASELINE) for name in scores if name != BASELINE]
            pairs += [(name, other) for name, other, at in CLAIMS if at == budget and {name, other} <= set(scores)]
            for name, other in pairs:
                found[self._claim(name, other, budget)] = chance(scores, name, other)
        return found

    def text(self, corrected: dict[tuple[str, ...], float]) -> str:
        """The task's table: a line for each method, a column for each budget; bold: p below 5% after correction."""
        task, digits = TASKS[self.task], 2 if TASKS[self.task].higher else 4
        rows = []
        for m in self.methods:
            cells = [m.name, ", ".join(f"{k} {v:g}" for k, v in self.chosen[m.name].items())]
            for budget in BUDGETS:
                scores = scores_of(self.results[budget])
                mean, error = mean_and_error(list(scores[m.name].values()))
                cells.append(told(mean, error, digits))
                if m.name != BASELINE:
                    gain = told(*paired(scores, m.name, BASELINE), digits, "+")
                    p = corrected[self._claim(m.name, BASELINE, budget)]
                    cells[-1] += f" (**{gain}**)" if p < LEVEL else f" ({gain})"
                if budget != "epochs":
                    cells[-1] += f", {self.lengths[budget][m.name]}"
            seconds = np.mean([r.seconds for r in self.results["epochs"] if r.method == m.name])
            rows.append([*cells, f"{m.gradients:.3g}", f"{seconds:.2f}"])
        heads = ["method", "settings", "equal epochs", "equal gradients, epochs", "equal seconds, epochs"]
        better = "more is better" if task.higher else "less is better"
        lines = [f"### {self.task}, noise {self.noise:g}: {task.metric} ({better}), {self.epochs} epochs\n"]
        lines += [markdown([*heads, "gradients/step", "seconds"], rows), ""]
        edges = [f"{name}: {', '.join(found)}" for name, found in self.edges.items() if found]
        lines += [f"Best at an edge of its grid: {'; '.join(edges)}.", ""] if edges else []
        for name, other, budget in CLAIMS:
            if {name, other} <= set(self.chosen):
                key = self._claim(name, other, budget)
                gain = told(*paired(scores_of(self.results[budget]), name, other), digits, "+")
                lines += [f"{name} minus {other} at equal {budget}: {gain}, p {corrected[key]:.2g}.", ""]
        return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    names = [m.name for m in CONTENDERS]
    wanted = set(options.methods) | {BASELINE}
    trials = options.tasks or (FULL if options.full else USUAL)
    seeds, search_seeds = SEEDS[0], FULL_SEARCH_SEEDS if options.full else SEARCH_SEEDS
    count = options.seeds or len(SEEDS)
    if options.quick:
        trials = options.tasks or (Trial("digits", 0.3), Trial("diabetes", 0.15))
        wanted = wanted if options.methods != names else {"ERM", "SAM", "SAM every 3", "LookSAM"}
        count, search_seeds = options.seeds or 2, SEARCH_SEEDS[:1]
    stem = options.out / ("compare-quick" if options.quick else "compare")
    stem.parent.mkdir(parents=True, exist_ok=True)
    runs = stem.with_name(f"{stem.name}-runs.json")
    if not options.resume:
        set_aside(runs)
    done = []
    for one in trials:
        done.append(Comparison(options, one, [m for m in CONTENDERS if m.name in wanted], runs))
        done[-1].run(search_seeds, range(seeds, seeds + count))
    corrected = holm({key: p for one in done for key, p in one.chances().items()})
    where = record.environment({"command": command_line(options)})
    head = (
        f"{where['date']}, {where['processor']}, one thread per run, torch {where['torch']}, `{where['command']}`, "
        f"{count} seeds. Mean ± standard error over the seeds (paired difference to SAM; bold: p < {LEVEL} after "
        f"Holm's correction for {len(corrected)} comparisons); behind it the epochs that the budget gave. Seconds of "
        "processor time per run."
    )
    text = "\n".join([head, "", *(one.text(corrected) for one in done)])
    results = list({r.key: r for one in done for found in one.results.values() for r in found}.values())
    text += "\n".join(warned(results)) + "\n"
    record.keep(stem, [{"key": list(key), "p": p} for key, p in corrected.items()], {**where, "runs": str(runs)}, text)
    return conclude([*diverged(results), *impossible(results)])
