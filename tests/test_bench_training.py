"""The main job's own rules, on made-up results and tiny runs: pairing, corrected claims, targets, resuming, exit codes.

Invariant: a diverged run fails the job; with --strict also TSAM split whose NLL is not below SAM's.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tsam_ext
from bench.__main__ import main
from bench.training import report, search, train
from bench.training.data import load
from bench.training.methods import METHODS
from bench.training.run import Job, Result, Watch, complete, flatness, read_results, train_once
from bench.training.tasks import TASKS

pytest.importorskip("mlxtend")
ROOT = Path(__file__).parents[1]
ERM, SAM, SPLIT = (next(m for m in METHODS if m.name == name) for name in ("ERM", "SAM", "TSAM split"))


def results(scores: dict[str, list[float]], finite: bool = True, task: str = "mnist") -> list[Result]:
    return [
        Result(
            f"{name}{seed}",
            name,
            task,
            0.3,
            seed,
            {"lr": 0.1},
            [1, 2],
            [50.0, value],
            {"accuracy": value, "nll": 100.0 - value, "mse": value},
            10.0,
            1.0,
            finite,
        )
        for name, values in scores.items()
        for seed, value in enumerate(values)
    ]


def test_differences_are_paired() -> None:
    scores = report.scores_of(results({"ERM": [60.0, 70.0, 80.0], "SAM": [62.0, 72.0, 81.0]}))
    difference, error = report.paired(scores, "SAM", "ERM")
    assert difference == pytest.approx(5 / 3)
    assert error == pytest.approx(1 / 3)
    assert report.chance(scores, "SAM", "ERM") == pytest.approx(0.0377, abs=1e-4)  # t = 5 on two degrees of freedom
    assert report.mean_and_error(list(scores["ERM"].values())) == pytest.approx((70.0, 10 / 3**0.5))


def test_claims_are_corrected_for_their_number() -> None:
    assert report.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert report.holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert report.holm({}) == {}


def test_a_table_marks_what_is_left_after_the_correction() -> None:
    made = results({"SAM": [60.0, 70.0, 80.0], "ERM": [59.0, 69.001, 79.0], "TSAM": [61.0, 70.0, 80.0]})
    _, _, sam, erm, tsam = report.table(made, {"SAM": 2.0, "ERM": 1.0, "TSAM": 6.0}).splitlines()
    assert "**-1.00 ± 0.00**" in erm
    assert "**+1.00 ± 0.00**" in erm  # its NLL, 100 - accuracy
    assert "| +0.33 ± 0.33 " in tsam
    assert sam.split("|")[3].strip() == ""


def test_one_seed_or_no_difference_is_no_claim() -> None:
    scores = report.scores_of(results({"ERM": [60.0], "SAM": [90.0]}))
    assert report.chance(scores, "SAM", "ERM") == 1.0
    assert report.behind(results({"SAM": [60.0], "TSAM split": [90.0]}), "TSAM split", "SAM", "accuracy")
    assert report.chance(report.scores_of(results({"ERM": [60.0, 61.0], "SAM": [60.0, 61.0]})), "SAM", "ERM") == 1.0


@pytest.mark.parametrize(
    ("split", "finite", "shown"),
    [
        ([62.0, 72.0, 81.0], True, True),
        ([62.0, 72.0, 81.0], False, False),
        ([62.0, 69.0, 81.0], True, False),  # +0.67 ± 0.88
        ([59.0, 69.0, 79.0], True, False),
        ([60.0, 70.0, 80.0], True, False),
    ],
)
def test_the_target(split: list[float], finite: bool, shown: bool) -> None:
    found = results({"SAM": [60.0, 70.0, 80.0], "TSAM split": split}, finite)
    wrong, missed = report.diverged(found), report.behind(found, "TSAM split", "SAM", "accuracy")
    assert len(missed) == len(report.behind(found, "TSAM split", "SAM", "nll"))  # 100 − accuracy here
    assert (not wrong and not missed) is shown
    assert len(wrong) == (0 if finite else 6)


def test_a_measure_that_cannot_be_is_wrong() -> None:
    assert not report.impossible(results({"SAM": [60.0]}))
    assert "accuracy is 101.0" in report.impossible(results({"SAM": [101.0]}))[0]
    assert "accuracy is -1.0" in report.impossible(results({"SAM": [-1.0]}))[0]


def test_of_an_error_less_is_better() -> None:
    found = results({"SAM": [0.5, 0.7, 0.6], "TSAM split": [0.4, 0.6, 0.5]}, task="diabetes")
    assert not report.behind(found, "TSAM split", "SAM", "mse")
    assert report.behind(found, "SAM", "TSAM split", "mse")


def test_a_run_repeats_and_watches() -> None:
    job = Job(SPLIT, "digits", 0.3, 3, 2, {"lr": 0.05, "tilt": -2.0}, watch=True)
    first, second = train_once(job), train_once(job)
    assert replace(first, seconds=0.0) == replace(second, seconds=0.0)
    assert first.finite
    assert 1.0 <= first.seen["ess"] < 15.9
    assert first.seen["spread"] > 0
    assert 0.0 < first.seen["wrong_weight"] < 0.27  # a negative tilt leans away from wrong labels
    assert first.seen["train ascent"] > 0.0
    assert first.gradients == 2 * 8 * 2  # epochs, steps, gradients
    inert = replace(job, method=replace(SPLIT, options={"num_samples": 3, "radius": 0.01}), settings={"lr": 0.05})
    assert train_once(replace(inert, epochs=3)).warned == ["at tilt "]
    assert report.warned([first, replace(first, warned=["at tilt "])]) == [
        "digits, TSAM split, 1 runs warned: at tilt ..."
    ]
    other = train_once(replace(job, seed=4))
    assert other.curve != first.curve


def test_a_weight_counts_for_the_rows_that_its_part_saw() -> None:
    """40 rows in 16 parts are cut 2, 3, 2, 3, ...; the wrong rows are those of the part that has all the weight."""
    for heavy in range(16):
        weights = torch.zeros(16, dtype=torch.float64)
        weights[heavy] = 1.0
        optimizer = tsam_ext.TSAM([torch.zeros(1, requires_grad=True)], lr=0.1, num_samples=16, batch="split")
        rows: list[torch.Tensor] = []

        def closure(seen: list[torch.Tensor] = rows, optimizer: tsam_ext.TSAM = optimizer) -> torch.Tensor:
            seen.append(optimizer.part(torch.arange(40)))
            loss = optimizer.param_groups[0]["params"][0].sum() * 1.0
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.zero_grad()
        optimizer.step(closure)
        wrong = torch.zeros(40)
        wrong[rows[2 * heavy]] = 1.0  # two passes per sample
        told = {"weights": weights, "ess": 1.0, "losses": torch.zeros(16), "acceptance_rate": 0.0, "distance": 0.0}
        stub = SimpleNamespace(diagnostics=SimpleNamespace(**told), settings=optimizer.settings)
        watch = Watch()
        watch.see(stub, wrong)  # type: ignore[arg-type]
        assert watch.means()["wrong_weight"] == 1.0


def test_flatness_is_the_rise_by_one_ascent() -> None:
    task, parts = TASKS["digits"], load("digits", 0.3, 1)
    model = task.initial(1)
    found = flatness(task, model, parts)
    for name, x, y in (("train ascent", parts.train_x, parts.train_y), ("test ascent", parts.test_x, parts.test_y)):
        before = task.loss(model(x), y)
        gradients = torch.autograd.grad(before, list(model.parameters()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        moved = {key: p + 0.1 * g / norm for (key, p), g in zip(model.named_parameters(), gradients, strict=True)}
        rise = task.loss(torch.func.functional_call(model, moved, (x,)), y) - before
        assert found[name] == pytest.approx(float(rise.detach()), rel=1e-3)


def test_finished_runs_are_kept(tmp_path: Path) -> None:
    jobs = [Job(ERM, "digits", 0.3, seed, 1, {"lr": 0.05}) for seed in (1, 2)]
    path = tmp_path / "runs.json"
    first = complete(jobs, path, {}, 1, resume=False)
    assert read_results(path) == first
    more = [*jobs, Job(ERM, "digits", 0.3, 3, 1, {"lr": 0.05}), jobs[0]]
    second = complete(more, path, {}, 1, resume=True)
    assert second[:2] == first  # seconds included: nothing ran again
    assert second[3] == first[0]
    assert len(read_results(path)) == 3


def test_the_search_takes_the_best_mean_and_sees_edges() -> None:
    method = replace(SAM, rates=(0.1,), own=tuple({"rho": rho} for rho in (0.1, 0.2, 0.4)))
    scores = {0.1: (60.0, 62.0), 0.2: (70.0, 71.0), 0.4: (90.0, float("nan"))}

    def run(jobs: list[Job]) -> list[Result]:
        assert all(job.on_validation for job in jobs)
        made = []
        for job in jobs:
            value = scores[job.settings["rho"]][job.seed - 901]
            (one,) = results({"SAM": [value]}, finite=value == value)
            made.append(replace(one, key=job.key, seed=job.seed))
        return made

    tried = search.search([method], "mnist", 0.3, (901, 902), 1, run)["SAM"]
    assert [t.settings["rho"] for t in tried] == [0.2, 0.1, 0.4]  # a diverged run is the worst that there is
    assert tried[0].mean == pytest.approx(70.5)
    assert search.at_an_edge({"lr": 0.1, "rho": 0.2}, tried) == []
    assert search.at_an_edge({"lr": 0.1, "rho": 0.4}, tried) == ["rho 0.4"]


def test_the_chosen_settings_lie_inside_their_grids() -> None:
    for method in METHODS:
        grid = [{"lr": rate, **own} for rate in method.rates for own in method.own]
        assert len(grid) == 9
        assert method.chosen in grid
        tried = [search.Tried(method.name, one, 0.0, 0.0) for one in grid]
        assert not search.at_an_edge(method.chosen, tried), method.name


def test_exit_codes_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["train", "--data", "digits", "--epochs", "1", "--seeds", "2", "--workers", "1", "--out", str(tmp_path)]
    assert main([*short, "--methods", "ERM", "SAM"]) == 0
    printed = capsys.readouterr().out
    assert "| accuracy %" in printed
    assert printed.count("minus SAM") == 3
    assert (tmp_path / "train.png").stat().st_size > 10_000
    kept = read_results(tmp_path / "train.json")
    assert len(kept) == 4
    main([*short, "--methods", "ERM", "SAM", "--resume"])
    assert read_results(tmp_path / "train.json") == kept


@pytest.mark.parametrize(
    ("split", "finite", "strict", "code"),
    [
        ([62.0, 72.0, 81.0], True, True, 0),
        ([59.0, 69.0, 79.0], True, False, 0),
        ([59.0, 69.0, 79.0], True, True, 1),
        ([62.0, 72.0, 81.0], False, False, 1),
    ],
)
def test_what_fails_the_job(
    split: list[float], finite: bool, strict: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    found = results({"SAM": [60.0, 70.0, 80.0], "TSAM split": split}, finite)
    monkeypatch.setattr(train, "complete", lambda *arguments, **options: found)
    arguments = ["train", "--methods", "SAM", "TSAM split", "--out", str(tmp_path)]
    assert main([*arguments, "--strict"] if strict else arguments) == code
    text = capsys.readouterr().out
    assert ("TARGET MISSED: TSAM split is better than SAM in nll by -1.00 ± 0.00" in text) is (split[0] < 60)
    assert text.count("WRONG: ") == (0 if finite else 6)


def test_strict_needs_both_methods(tmp_path: Path) -> None:
    assert main(["train", "--methods", "ERM", "--strict", "--out", str(tmp_path)]) == 2


def test_help_explains_every_option() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "train", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for option in ("--data", "--net", "--label-noise", "--seeds", "--epochs", "--methods", "--quick", "--resume"):
        assert option in done.stdout
