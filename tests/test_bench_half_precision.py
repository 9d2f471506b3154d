"""The trial of roundings: a run is a function of its arguments, and says what rounding did to its perturbations."""

from __future__ import annotations

import math

import pytest

from bench.__main__ import main
from bench.training.half_precision import METHODS, rows_of, train

pytest.importorskip("mlxtend")


def test_a_run_is_a_function_of_its_arguments() -> None:
    runs = {method: train("small", method, 31, 1, 0.05) for method in METHODS}
    assert runs["stochastic"] == train("small", "stochastic", 31, 1, 0.05)
    assert all(run.finite for run in runs.values())
    assert runs["nearest"].ascent < 0.99 < runs["stochastic"].ascent < 1.01
    assert runs["nearest"].norm < runs["stochastic"].norm
    assert math.isnan(runs["float32"].ascent)
    lines = rows_of("small", list(runs.values()))
    assert [line.split(" | ")[2] for line in lines] == [
        "bfloat16, nearest",
        "bfloat16, stochastic",
        "float32, autocast",
    ]
    assert all(line.startswith("| small | 0.12 M |") for line in lines)


def test_the_command(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["half-precision", "--nets", "small", "--seeds", "1", "--epochs", "1", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("| small |") == 3
