"""Varies tilt, samples, parts, radius, schedules and Hamiltonian settings of TSAM on the main job's data.

Panels of settings, one question each, over seeds of their own. Beside the accuracy on clean test labels, means over the
last epoch: the effective sample size (ESS), the spread of the sampled losses (standard deviation), the share of the
weight that lies on wrong labels (at the default noise 27% of the labels are wrong), hmc's acceptance rate and distance
moved over rho, and how far one ascent of length 0.1 lifts the loss on noisy training rows and on clean test rows.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import numpy as np

from bench import record
from bench.command import add_command, command_line, conclude, positive, share

from .panels import PANELS, setting_epochs
from .report import diverged, impossible, markdown, mean_and_error, scores_of, told
from .run import Job, Result, complete

FIRST_SEED = 51
COLUMNS = ("ess", "spread", "wrong_weight", "acceptance_rate", "distance", "train ascent", "test ascent")


def add_parser(commands: Any) -> None:
    """Adds the command to python -m bench."""
    parser = add_command(commands, "sweep", run, __doc__, summary="vary TSAM's settings and see which act")
    parser.add_argument("--panels", nargs="+", choices=PANELS, default=list(PANELS), metavar="PANEL",
                        help=f"questions, of {', '.join(PANELS)} (default: all)")  # fmt: skip
    parser.add_argument("--label-noise", type=share, default=0.3, help="share of training labels drawn at random")
    parser.add_argument("--seeds", type=positive, default=4, help="how many seeds")
    parser.add_argument("--quick", action="store_true", help="two panels, one seed, a tenth of the epochs")
    parser.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes, one thread each")
    parser.add_argument("--resume", action="store_true", help="keep the finished runs of an interrupted command")


def lines_of(results: list[Result], labels: list[str]) -> str:
    """A panel's table: a line for each setting, the columns that it has values for."""
    scores = scores_of(results)
    columns = [name for name in COLUMNS if any(name in r.seen for r in results)]
    rows = []
    for label in labels:
        mine = [r for r in results if r.method == label]
        cells = [label, told(*mean_and_error(list(scores[label].values())))]
        cells.append(told(*mean_and_error([r.measures["nll"] for r in mine])))
        for name in columns:
            values = [r.seen[name] for r in mine if name in r.seen]
            cells.append(f"{np.mean(values):.3g}" if values else "")
        rows.append([*cells, f"{np.mean([r.gradients for r in mine]):.0f}"])
    heads = {"ess": "ESS", "spread": "spread of losses", "wrong_weight": "weight on wrong labels",
             "acceptance_rate": "acceptance", "distance": "distance / rho"}  # fmt: skip
    return markdown(["setting", "accuracy %", "NLL", *(heads.get(name, name) for name in columns), "gradients"], rows)


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    options.out.mkdir(parents=True, exist_ok=True)
    command = command_line(options)
    names, seeds, shorter = options.panels, range(FIRST_SEED, FIRST_SEED + options.seeds), 1
    if options.quick:
        seeds, shorter = seeds[:1], 10
        names = names if names != list(PANELS) else ["every", "hmc"]
    stem = options.out / ("sweep-quick" if options.quick else "sweep")
    jobs = {
        name: [
            Job(
                line.method,
                "mnist",
                options.label_noise,
                seed,
                max(1, setting_epochs(name, line) // shorter),
                {},
                watch=True,
            )
            for line in PANELS[name][1]
            for seed in seeds
        ]
        for name in names
    }
    every = [job for of_panel in jobs.values() for job in of_panel]
    runs = stem.with_name(f"{stem.name}-runs.json")
    results = complete(every, runs, {"command": command}, options.workers, resume=options.resume)
    where = record.environment({"command": command})
    text = [
        f"{where['date']}, {where['processor']}, torch {where['torch']}, `{command}`, {len(seeds)} seeds, "
        "mean ± standard error.\n"
    ]
    first = 0
    for name in names:
        mine = results[first : first + len(jobs[name])]
        first += len(mine)
        question, lines = PANELS[name]
        text += [f"### {question}\n", lines_of(mine, [line.label for line in lines]), ""]
    record.keep(stem, [], {**where, "runs": str(runs)}, "\n".join(text))
    return conclude([*diverged(results), *impossible(results)])
