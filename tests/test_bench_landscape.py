"""The landscape of trained nets: what fails the command, and a quick run whose numbers are those of the metrics.

Invariant: what is finished is kept by --resume, seconds included; a measure that is not finite, or eigenvalues that
were given up, fail the command; another order than the paper's fails it with --strict alone.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.training.landscape import CLEAN, NOISY, Measured, Work, measured, missed, read, wrong
from bench.training.methods import METHODS
from bench.training.run import Job

pytest.importorskip("matplotlib")


def row(method: str, top: float, on: str = CLEAN, **changes: float) -> Measured:
    """A made-up net on a made-up loss."""
    made = Measured("", method, 11, on, 90.0, 0.5, [top, 1.0], 1e-4, 10, 9.0, 0.1, 0.2, [1.0], [], 1.0)
    return dataclasses.replace(made, **changes)


def test_what_is_wrong_and_what_is_missed() -> None:
    falling = [row("ERM", 5.0), row("SAM", 3.0), row("TSAM split", 2.0)]
    names = ["ERM", "SAM", "TSAM split"]
    assert not wrong(falling)
    assert not missed(falling, names)
    assert not missed([*falling, row("SAM", 9.0, NOISY)], names)  # the clean loss decides
    assert len(missed([row("ERM", 2.0), row("SAM", 3.0), row("TSAM split", 3.0)], names)) == 2
    assert missed([row("SAM", 3.0), row("TSAM whole", 4.0)], ["SAM", "TSAM whole"]) == [
        "the largest eigenvalue on the clean test loss is 4.00 for TSAM whole and 3.00 for SAM"
    ]
    for broken in ({"trace": float("nan")}, {"loss": float("inf")}, {"left": 0.1}):
        assert len(wrong([row("ERM", 5.0, **broken)])) == 1


def test_a_quick_run_its_files_and_resuming(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["landscape", "--quick", "--epochs", "1", "--methods", "ERM", "SAM", "--out", str(tmp_path)]
    assert main(short) == 0
    printed = capsys.readouterr().out
    assert printed.count("| ERM ") == printed.count("| SAM ") == 2
    assert "ERM 342, SAM 233 and TSAM 141" in printed
    assert (tmp_path / "landscape_quick.png").stat().st_size > 10_000
    kept = read(tmp_path / "landscape_quick.json")
    assert [(r.method, r.on) for r in kept] == [("ERM", CLEAN), ("ERM", NOISY), ("SAM", CLEAN), ("SAM", NOISY)]
    assert [len(r.plane) for r in kept] == [5, 0, 5, 0]
    assert all(r.eigenvalues == sorted(r.eigenvalues, reverse=True) and len(r.line) == 11 for r in kept)
    assert main([*short, "--resume"]) == 0
    assert read(tmp_path / "landscape_quick.json") == kept  # seconds included: nothing ran again
    erm = METHODS[0]
    again = measured(Job(erm, "digits", 0.3, 11, 1, erm.chosen), Work(10, 11, 5, 1.0, 0.1), first=True)
    same = [dataclasses.replace(r, seconds=0.0) for r in again]
    assert same == [dataclasses.replace(r, seconds=0.0) for r in kept[:2]]
    middle = torch.tensor([r.line[5] for r in kept])
    torch.testing.assert_close(middle, torch.tensor([r.loss for r in kept]), rtol=0, atol=0)
