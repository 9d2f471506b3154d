"""``python -m bench train --sampler hmc``: its targets, what is wrong, and one short run from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.training import sampler
from bench.training.sampler import COLUMNS, diverged, missed

LAST = {"acceptance": 0.8, "distance / rho": 1.0}


@pytest.mark.parametrize(
    ("last", "lifted", "flat", "wrong"),
    [
        ({}, (1.1, 0.01), (1.0, 0.01), ""),
        ({"acceptance": 0.59}, (1.1, 0.01), (1.0, 0.01), "acceptance 0.590"),
        ({"acceptance": 0.98}, (1.1, 0.01), (1.0, 0.01), "acceptance 0.980"),
        ({"acceptance": float("nan")}, (1.1, 0.01), (1.0, 0.01), "acceptance nan"),
        ({"distance / rho": 0.3}, (1.1, 0.01), (1.0, 0.01), "distance over rho 0.300"),
        ({"distance / rho": float("nan")}, (1.1, 0.01), (1.0, 0.01), "distance over rho nan"),
        ({}, (1.04, 0.01), (1.0, 0.01), "sampled loss"),  # 2.8 errors
        ({}, (0.9, 0.01), (1.0, 0.01), "sampled loss"),
        ({}, (float("nan"), 0.01), (1.0, 0.01), "sampled loss"),
    ],
)
def test_the_targets(
    last: dict[str, float], lifted: tuple[float, float], flat: tuple[float, float], wrong: str
) -> None:
    found = missed({**LAST, **last}, lifted, flat)
    assert len(found) == bool(wrong)
    assert all(wrong in line for line in found)


ROW = {"sampled loss": 1.0, "start loss": 1.0}
NAN = float("nan")


@pytest.mark.parametrize(
    ("row", "lifted", "flat", "wrong"),
    [
        ({}, 1.1, 1.0, []),
        ({"sampled loss": NAN}, 1.1, 1.0, ["epoch 2: the sampled loss is not finite"]),
        ({"start loss": float("inf")}, 1.1, 1.0, ["epoch 2: the start loss is not finite"]),
        ({}, NAN, 1.0, ["the sampled loss at delta is not finite"]),
        ({}, 1.1, NAN, ["the sampled loss at delta 0 is not finite"]),
    ],
)
def test_a_loss_that_is_not_finite_is_wrong(
    row: dict[str, float], lifted: float, flat: float, wrong: list[str]
) -> None:
    assert diverged([ROW, {**ROW, **row}], (lifted, 0.1), (flat, 0.1)) == wrong


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "LIFT_STEPS", 60)
    threads = torch.get_num_threads()
    code = main(["train", "--sampler", "hmc", "--data", "digits", "--epochs", "2", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    text = capsys.readouterr().out
    assert code == 0
    saved = json.loads((tmp_path / "hmc.json").read_text())
    assert len(saved["results"]) == 2
    assert tuple(saved["results"][0]) == COLUMNS
    for row in saved["results"]:
        assert 0.0 < row["acceptance"] <= 1.0
        assert 0.0 < row["distance / rho"] < 2.0
        assert 1.0 <= row["ESS"] <= 3.0
        assert row["1 - ESS/s"] == pytest.approx(1 - row["ESS"] / 3)
    assert all(name in text for name in COLUMNS)
    assert "at delta 300" in text
