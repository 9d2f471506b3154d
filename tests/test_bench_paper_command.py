"""python -m bench paper on tiny archives: the quick run, tuning, what is kept and resumed, exit codes, the table.

Laws: the reported rows are trained on all training rows and judged on test rows, the others on held-out ones; settings
are those of the highest held-out accuracy; finished runs are not repeated; an interruption loses an epoch at most.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tqdm")

from bench.__main__ import main
from bench.paper import command
from bench.paper.archives import write_cifar
from bench.paper.settings import Settings
from bench.paper.trainer import Result


def archive(folder: Path, rows: int = 60) -> Path:
    train, test = command.made_up(rows)
    write_cifar(folder, "cifar100", train, test)
    return folder


def usual(root: Path, out: Path, *more: str) -> list[str]:
    small = ["--net", "resnet18-narrow", "--epochs", "2", "--batch", "30", "--device", "cpu"]
    return ["paper", "--data", "cifar100", "--root", str(root), "--out", str(out), *small, *more]


def kept(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / "paper.json").read_text())["results"]
    return rows


def test_the_quick_run_trains_every_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", "--quick", "--seeds", "1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "quick: 200 training rows, 100 test rows" in printed and "says that everything runs" in printed
    for row in ("| ERM | lr 0.1 |", "| SAM | lr 0.1, rho 0.05 |", "| TSAM | lr 0.1, rho 0.05, t 1, radius 1, s 3 |"):
        assert row in printed
    rows = json.loads((tmp_path / "paper_quick.json").read_text())["results"]
    assert [row["settings"]["method"] for row in rows] == ["erm", "sam", "tsam"]
    assert all(len(row["losses"]) == 2 and row["finite"] and row["part"] == "test" for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["paper_quick.json", "paper_quick.md"]


def test_settings_are_chosen_on_held_out_rows_and_reported_on_test_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out, seen = archive(tmp_path), tmp_path / "out", []
    train = command.train

    def spy(job: Any, task: Any, *arguments: Any) -> Result:
        seen.append((job.part, job.settings.method, job.seed, len(task.train), len(task.test), job.settings.epochs))
        return train(job, task, *arguments)

    monkeypatch.setattr(command, "train", spy)
    grid = ["--methods", "erm", "sam", "--lr", "0.01", "0.1", "--rho", "0.05", "--tune", "--tune-epochs", "1",
            "--holdout", "0.25", "--seeds", "2", "--label-noise", "0.2"]  # fmt: skip
    assert main(usual(root, out, *grid)) == 0
    chosen = [("validation", m, command.TUNING_SEED, 45, 15, 1) for m in ("erm", "erm", "sam", "sam")]
    final = [("test", m, seed, 60, 30, 2) for m in ("erm", "sam") for seed in (1, 2)]
    assert seen == chosen + final
    rows = kept(out)
    for method in ("erm", "sam"):
        tried = [r for r in rows if r["part"] == "validation" and r["settings"]["method"] == method]
        top = max(tried, key=lambda r: r["accuracy"])["settings"]["lr"]
        assert {r["settings"]["lr"] for r in rows if r["part"] == "test" and r["settings"]["method"] == method} == {top}
    text = (out / "paper.md").read_text()
    assert "20% of the training labels drawn at random" in text and "NOT THE OFFICIAL ARCHIVE" in text
    assert "over 2 seeds" in text and text.count("**") == 4 and "one seed, 1 epochs" in text
    capsys.readouterr()
    assert main(usual(root, out, *grid)) == 2
    assert "holds 8 of these runs, finished or begun: --resume goes on, or another --out" in capsys.readouterr().err
    seen.clear()
    assert main(usual(root, out, *grid, "--resume")) == 0
    assert seen == [] and kept(out) == rows
    assert main(usual(root, out, "--methods", "erm", "--seeds", "1", "--lr", "0.02")) == 0  # others stay
    assert kept(out)[:-1] == rows and len(rows) == 8


def test_an_interrupted_command_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out, other = archive(tmp_path), tmp_path / "out", tmp_path / "other"
    bar = command.tqdm

    class Impatient(bar):  # type: ignore[misc, valid-type]
        steps = 0

        def update(self, n: float = 1) -> Any:
            Impatient.steps += n > 0
            if Impatient.steps == 8:  # two runs of 2 epochs of 2 steps: in the second run's second epoch
                raise KeyboardInterrupt
            return super().update(n)

    short = ("--methods", "erm", "--seeds", "2")
    monkeypatch.setattr(command, "tqdm", Impatient)
    assert main(usual(root, out, *short)) == 130
    assert "--resume goes on" in capsys.readouterr().err
    assert len(kept(out)) == 1 and len(list((out / "paper_checkpoints").iterdir())) == 1
    monkeypatch.setattr(command, "tqdm", bar)
    assert main(usual(root, out, *short)) == 2
    assert main(usual(root, out, *short, "--resume")) == 0
    assert main(usual(root, other, *short)) == 0
    assert [{**row, "seconds": 0} for row in kept(out)] == [{**row, "seconds": 0} for row in kept(other)]
    assert list((out / "paper_checkpoints").iterdir()) == []


def test_a_diverged_run_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = archive(tmp_path)
    assert main(usual(root, tmp_path / "out", "--methods", "erm", "--seeds", "1", "--lr", "1e38")) == 1
    assert "WRONG: erm, seed 1: the loss is not finite" in capsys.readouterr().out


def test_the_plan_counts_runs_and_gradients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = usual(archive(tmp_path), tmp_path / "out", "--tune", "--samples", "3", "5", "--plan")
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "erm: 2 runs choose, 3 are reported, 20 gradients in all" in printed  # 5 runs of 2 epochs of 2 steps
    assert "tsam: 216 runs choose, 3 are reported" in printed and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "--data and --root are needed, or --quick"),
        (["--data", "cifar10"], "--data and --root are needed"),
        (["--quick", "--data", "cifar10"], "--quick writes its own data"),
        (["--data", "cifar10", "--root", "."], "--root: got ., expected cifar-10-python.tar.gz"),
        (["--data", "cifar10", "--root", ".", "--lr", "1", "2"], "--lr: several values are a grid, which needs --tune"),
        (["--data", "cifar10", "--root", ".", "--model-config", "tiny"], "and the others neither"),
        (["--data", "text", "--root", "."], "--data text needs --model DIR or --model-config tiny"),
        (["--data", "text", "--root", ".", "--model", ".", "--model-config", "tiny"], "give one of the two"),
        (["--data", "folder", "--root", "."], "expected the folders train and val"),
        (["--data", "cifar10", "--root", ".", "--side", "8"], "--side says nothing here"),
        (["--data", "text", "--root", ".", "--model", ".", "--net", "resnet18"], "--net says nothing here"),
        (["--quick", "--columns", "label"], "--columns says nothing here"),
        (["--quick", "--tune-epochs", "1"], "--tune-epochs says nothing here"),
    ],
)
def test_what_cannot_run_exits_with_2(
    arguments: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["paper", *arguments]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--rho", "-1"], ["--radius", "inf"], ["--net", "vgg"], ["--holdout", "2"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["paper", *arguments])
    assert error.value.code == 2


def result(method: str, seed: int, accuracy: float, lr: float = 0.1, finite: bool = True) -> Result:
    settings = vars(Settings("made up", "tiny", method=method, lr=lr))
    return Result(f"{method}{seed}", dict(settings), seed, "test", [1.0], accuracy, 2.0, finite)


def test_the_table_has_mean_and_deviation_and_what_was_chosen() -> None:
    task = command.image_task("made up", *command.made_up(20), 10, "resnet18-narrow")
    final = {"erm": [result("erm", 1, 70.0), result("erm", 2, 71.0), result("erm", 3, 73.0)]}
    tried = [
        (Settings("", "", lr=lr), result("erm", 1, value, lr, finite))
        for lr, value, finite in ((1.0, 99.0, False), (0.1, 60.0, True), (0.01, 60.0, True))
    ]
    assert command.best(tried).lr == 0.1  # of equals the first, and never one that diverged
    text = command.markdown(task, {"erm": tried}, final, "Head.")
    assert text.startswith("Head.\n")
    assert "| ERM | lr 0.1 | 71.33 ± 1.53 | 70.00, 71.00, 73.00 | 1 | 2.0 |" in text
    assert "| ERM | lr 1 | the loss is not finite |" in text and "| ERM | lr 0.1 | **60.00** |" in text
    alone = command.markdown(task, {}, {"erm": final["erm"][:1]}, "Head.")
    assert "| 70.00 | 70.00 | 1 |" in alone and "Chosen" not in alone


@pytest.mark.parametrize(("net", "parameters"), [("resnet18", 11_220_132), ("wrn16-8", 11_007_540)])
def test_the_nets_have_the_sizes_that_are_known(net: str, parameters: int) -> None:
    """Of CIFAR's forms with 100 classes: one 3×3 convolution as stem, no pooling before the last."""
    task = command.image_task("", *command.made_up(10), 100, net)
    with torch.device("meta"):
        model = task.build()
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 100)
    assert sum(p.numel() for p in model.parameters()) == parameters
