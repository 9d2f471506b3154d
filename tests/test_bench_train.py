"""The main job's own rules, on made-up results and tiny runs: targets, pairing, data, resuming, exit codes.

Invariant: a diverged run fails the job; a method that does not beat ERM by two standard errors does so with --strict.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import data, train, train_report
from bench.__main__ import main
from bench.run import Job, Result, train_once
from bench.training_methods import METHODS, initial

ROOT = Path(__file__).parents[1]


def results(scores: dict[str, list[float]], finite: bool = True) -> list[Result]:
    return [
        Result(f"{name}{seed}", name, seed, [1, 2], [50.0, value], 1.0, finite, None)
        for name, values in scores.items()
        for seed, value in enumerate(values)
    ]


def test_differences_are_paired() -> None:
    scores = train_report.finals(results({"ERM": [60.0, 70.0, 80.0], "SAM": [62.0, 72.0, 81.0]}))
    difference, error = train_report.paired(scores, "SAM", "ERM")
    assert difference == pytest.approx(5 / 3)
    assert error == pytest.approx(1 / 3)
    assert train_report.mean_and_error(list(scores["ERM"].values())) == pytest.approx((70.0, 10 / 3**0.5))


@pytest.mark.parametrize(
    ("sam", "finite", "shown"),
    [
        ([62.0, 72.0, 81.0], True, True),
        ([62.0, 72.0, 81.0], False, False),
        ([62.0, 69.0, 81.0], True, False),  # +0.67 ± 0.88
        ([59.0, 69.0, 79.0], True, False),
        ([60.0, 70.0, 80.0], True, False),
    ],
)
def test_the_target(sam: list[float], finite: bool, shown: bool) -> None:
    found = results({"ERM": [60.0, 70.0, 80.0], "SAM": sam}, finite)
    wrong, missed = train_report.diverged(found), train_report.behind(found)
    assert (not wrong and not missed) is shown
    assert len(wrong) == (0 if finite else 6)


def test_a_single_seed_shows_nothing() -> None:
    assert train_report.behind(results({"ERM": [60.0], "SAM": [90.0]}))


@pytest.mark.parametrize("name", data.DATASETS)
def test_the_parts_do_not_overlap_and_only_training_and_validation_are_noisy(name: str) -> None:
    clean, noisy, other = (data.load(name, noise, seed) for noise, seed in ((0.0, 1), (0.3, 1), (0.3, 2)))
    images, _ = data._all_images(name)
    parts = [{tuple(x.flatten().tolist()) for x in p} for p in (clean.train_x, clean.validation_x, clean.test_x)]
    duplicates = len(images) - len({tuple(x.flatten().tolist()) for x in images})
    assert len(parts[0] & parts[2]) + len(parts[0] & parts[1]) + len(parts[1] & parts[2]) <= duplicates
    assert torch.equal(clean.test_y, noisy.test_y)
    assert torch.equal(clean.train_x, noisy.train_x)
    assert not torch.equal(noisy.train_x, other.train_x)
    # Of 30% random labels nine in ten are wrong; 500 labels, 5.5 standard errors.
    for a, b in ((clean.train_y, noisy.train_y), (clean.validation_y, noisy.validation_y)):
        wrong = (a != b).float().mean().item()
        assert abs(wrong - 0.27) < 5.5 * (0.27 * 0.73 / len(a)) ** 0.5


def test_methods_start_from_the_same_weights_and_a_run_repeats() -> None:
    assert all(torch.equal(a, b) for a, b in zip(initial(8, 3).parameters(), initial(8, 3).parameters(), strict=True))
    job = Job(METHODS[-1], 3, "digits", 0.3, 1, 0.02)
    first, second = train_once(job), train_once(job)
    assert first.accuracy == second.accuracy
    assert first.finite
    assert first.ess is not None


def test_exit_codes_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["train", "--data", "digits", "--epochs", "1", "--seeds", "2", "--workers", "1", "--out", str(tmp_path)]
    assert main([*short, "--methods", "ERM", "SAM"]) == 0
    printed = capsys.readouterr().out
    assert "minus ERM" in printed
    assert "SAM" in printed
    assert (tmp_path / "train.png").stat().st_size > 10_000
    kept = train_report.read_json(tmp_path / "train.json")
    assert len(kept) == 4
    main([*short, "--methods", "ERM", "SAM", "--resume"])
    assert train_report.read_json(tmp_path / "train.json") == kept  # seconds included: nothing ran again


@pytest.mark.parametrize(
    ("sam", "finite", "strict", "code"),
    [
        ([62.0, 72.0, 81.0], True, True, 0),
        ([59.0, 69.0, 79.0], True, False, 0),
        ([59.0, 69.0, 79.0], True, True, 1),
        ([62.0, 72.0, 81.0], False, False, 1),
    ],
)
def test_what_fails_the_job(
    sam: list[float], finite: bool, strict: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    found = results({"ERM": [60.0, 70.0, 80.0], "SAM": sam}, finite)
    monkeypatch.setattr(train, "_run", lambda *arguments: found)
    arguments = ["train", "--methods", "ERM", "SAM", "--out", str(tmp_path)]
    assert main([*arguments, "--strict"] if strict else arguments) == code
    text = capsys.readouterr().out
    assert ("TARGET MISSED: SAM minus ERM is -1.00 ± 0.00" in text) is (sam[0] < 60)
    assert text.count("WRONG: ") == (0 if finite else 6)


def test_help_explains_every_option() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "train", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for option in ("--data", "--label-noise", "--seeds", "--epochs", "--methods", "--quick", "--workers", "--resume"):
        assert option in done.stdout
