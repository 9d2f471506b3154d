"""``bench overhead`` and ``step``: competitors that compute the same, honest words, targets that can be missed.

What is timed is not tested here, but that every way is checked before it is timed, and that the check sees mistakes.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("pytorch_optimizer")
pytest.importorskip("matplotlib")

from bench import baselines, overhead, overhead_report, step
from bench.__main__ import main
from bench.meter import Meter
from bench.nets import NETS
from bench.overhead_report import Row

ASCENT, SAM = overhead.TASKS[0], overhead.TASKS[3]
SETTINGS: dict[str, Any] = {"rho": 0.3, "radius": 0.4, "tilt": 3.0, "num_samples": 3}
CHECK: dict[str, Any] = {"rho": 0.3, "radius": 0.4, "tilt": 3.0, "s": 3}


@pytest.mark.parametrize("way", ["ours", "loop", "foreach"])
@pytest.mark.parametrize("task", overhead.TASKS[:2], ids=lambda task: task.name)
def test_the_competitors_compute_what_tsam_computes(task: overhead.Task, way: str) -> None:
    assert overhead.wrong(task, way) == ""


@pytest.mark.parametrize("way", ["ours", "wrapper", "library"])
def test_the_competitors_compute_what_sam_computes(way: str) -> None:
    assert overhead.wrong(SAM, way) == ""


@pytest.mark.slow
def test_the_compiled_one_too() -> None:
    assert overhead.wrong(ASCENT, "compiled") == ""


class Forgetful(baselines.ForeachTSAM):
    def estimate_gradient(self, closure: Any) -> Any:
        result = super().estimate_gradient(closure)
        with torch.no_grad():
            self.params[0].mul_(1 + 2**-20)
        return result


class Uniform(baselines.LoopTSAM):
    def estimate_gradient(self, closure: Any) -> Any:
        self.tilt = 0.0
        return super().estimate_gradient(closure)


class Repeating(baselines.ForeachTSAM):
    def estimate_gradient(self, closure: Any) -> Any:
        self._flat.normal_()
        self.passes["draw"] = lambda: None
        return super().estimate_gradient(closure)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (baselines.LoopTSAM, {"num_samples": 2}, "4 gradients, expected 6"),
        (baselines.LoopTSAM, {"radius": 0.8}, "noise of length "),
        (baselines.ForeachTSAM, {"rho": 0.2}, "the ascent of sample 0 is not rho g / |g|"),
        (Forgetful, {}, "the parameters have not come back"),
        (Uniform, {}, "the estimate is not the tilted mean"),
        (Repeating, {}, "two samples have the same noise"),
    ],
)
def test_the_check_sees_what_is_wrong(kind: Any, change: dict[str, Any], message: str) -> None:
    assert message in baselines.disagreement(lambda params: kind(params, **{**SETTINGS, **change}), **CHECK)


def test_the_check_sees_a_wrong_tilt_at_the_settings_that_are_timed() -> None:
    def uniform(params: Any) -> Any:
        return Uniform(params, rho=overhead.RHO, radius=overhead.RHO, tilt=overhead.TILT, num_samples=overhead.SAMPLES)

    settings = {"rho": overhead.RHO, "radius": overhead.RHO, "tilt": overhead.TILT, "s": overhead.SAMPLES}
    assert baselines.disagreement(uniform, **settings) == "the estimate is not the tilted mean"


def test_words_are_those_of_the_mathematics() -> None:
    words = {task.name: task.words for task in overhead.TASKS}
    assert words == {"ascent": 27, "ascent without noise": 25, "ascent, sphere": 27, "SAM": 7, "noise": 15, "hmc": 42}
    assert sum(w for w, _ in overhead.ascent_passes(5)) == 45
    # The words of the foreach way, counted from its own passes as they run.
    for radius in (0.0, 0.4):
        params = [torch.nn.Parameter(torch.zeros(5))]
        estimator = baselines.ForeachTSAM(params, **{**SETTINGS, "radius": radius})
        ran: dict[str, list[float]] = {}
        overhead.timed_passes(estimator, ran)
        estimator.estimate_gradient(overhead.StandIn(params, 6))
        assert estimator.words == sum(estimator.WORDS[name] * len(times) for name, times in ran.items())


def test_what_an_estimate_does_is_counted() -> None:
    """The loops read a norm per tensor and a loss per sample on the host and keep s gradients; ours reads nothing."""
    scratch, n = torch.ones(1), len(NETS["mlp"].shapes())
    ours, loop, foreach = overhead.measure("mlp", ASCENT, ["ours", "loop", "foreach"], 1, scratch)
    assert (ours.syncs, loop.syncs, foreach.syncs) == (0, 3 * (n + 1), 0)
    assert ours.calls < foreach.calls < loop.calls
    assert ours.extra_memory == pytest.approx(2.0, abs=0.05)
    assert foreach.extra_memory == pytest.approx(3.0, abs=0.05)
    assert loop.extra_memory >= 4.0


def test_the_meter_sees_syncs_and_memory_that_is_gone() -> None:
    with Meter() as meter:
        x = torch.zeros(1000)
        y = x + 1
        del y
        z = x + 2
        z.sum().item()
    assert meter.syncs == 1
    assert 8000 <= meter.peak < 9000


@pytest.mark.parametrize(
    ("name", "tensors", "millions"),
    [("mlp", 120, 0.217), ("resnet18", 62, 11.69), ("wrn16-8", 44, 10.96), ("vit-b16", 152, 86.57),
     ("distilbert", 78, 66.07)],
)  # fmt: skip
def test_the_lists_are_those_of_the_models(name: str, tensors: int, millions: float) -> None:
    shapes = NETS[name].shapes()
    assert len(shapes) == tensors
    assert sum(shape.numel() for shape in shapes) / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize("name", ["mlp", "wrn16-8"])
def test_the_models_run(name: str) -> None:
    x, y = NETS[name].batch(2)
    assert NETS[name].build()(x).shape == (2, NETS[name].classes)
    assert int(y.max()) < NETS[name].classes


def row(task: str, way: str, seconds: float, name: str = "resnet18") -> Row:
    return Row(name, task, way, 10, 27, 1.0, 1.0, [seconds, seconds])


@pytest.mark.parametrize(
    ("rows", "missing"),
    [
        ([row("ascent", "ours", 1.3), row("ascent", "loop", 16.0), row("ascent", "foreach", 6.6)], []),
        ([row("ascent", "ours", 1.4)], ["resnet18, ascent: 1.40 times the floor, allowed 1.35"]),
        ([row("ascent", "ours", 1.0), row("ascent", "loop", 11.0)],
         ["resnet18, ascent: TSAM, loops over tensors takes 11.00 times as long as ours, wanted 12"]),
        ([row("ascent", "ours", 1.0, "mlp"), row("ascent", "loop", 19.0, "mlp")],
         ["mlp, ascent: TSAM, loops over tensors takes 19.00 times as long as ours, wanted 20"]),
        ([row("ascent", "ours", 9.0, "mlp")], []),
        ([row("SAM", "ours", 1.3), row("SAM", "wrapper", 1.0)], ["resnet18, SAM: 1.30 times the floor, allowed 1.2"]),
    ],
)  # fmt: skip
def test_the_targets(rows: list[Row], missing: list[str]) -> None:
    assert overhead_report.missed(rows, "avx512") == missing


def test_overhead_runs_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["overhead", "--lists", "mlp", "--tasks", "SAM", "hmc", "--rounds", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "overhead.json").read_text())
    assert {(r["task"], r["way"]) for r in found["results"]} == {
        ("SAM", "ours"), ("SAM", "wrapper"), ("SAM", "library"), ("hmc", "ours"),
    }  # fmt: skip
    text = (tmp_path / "overhead.md").read_text()
    assert "| mlp | SAM | SAM, the wrapper's flow |" in text
    assert "\n| restore_ |" in text
    assert (tmp_path / "overhead.png").stat().st_size > 0
    capsys.readouterr()
    assert main(["overhead", "--tasks", "nothing", "--out", str(tmp_path)]) == 2
    assert "no estimate's name contains nothing" in capsys.readouterr().err


def test_a_way_that_computes_something_else_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "LoopTSAM", Uniform)
    arguments = ["overhead", "--lists", "mlp", "--tasks", "ascent", "--no-compile", "--out", str(tmp_path)]
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert "WRONG: ascent: loop computes something else: the estimate is not the tilted mean" in out
    assert not list(tmp_path.iterdir())


class FakeProgram:
    stores = ""

    def bandwidths(self, size: int, repeats: int) -> dict[str, float]:
        return dict.fromkeys(overhead.floor.WORDS, 1e9)


@pytest.mark.parametrize("floor_seconds", [1e-9, 1e9])
def test_strict_fails_on_a_missed_target(
    floor_seconds: float, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overhead.floor, "Program", FakeProgram)
    monkeypatch.setattr(overhead.floor, "draw_rate", lambda repeats: 1e9)
    monkeypatch.setattr(overhead.floor.Floor, "seconds", lambda self, moved, draws: floor_seconds)
    monkeypatch.setattr(overhead_report, "OVER_FLOOR", {"SAM": (1.2, 1.2)})
    monkeypatch.setattr(overhead, "_C", SimpleNamespace(__isa__="avx512"))
    monkeypatch.setattr(overhead, "measure", lambda name, task, ways, rounds, scratch: [row("SAM", "ours", 1.0)])
    monkeypatch.setattr(overhead.calls, "measure", dict)
    arguments = ["overhead", "--lists", "wrn16-8", "--tasks", "SAM", "--rounds", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert main([*arguments, "--strict"]) == (1 if floor_seconds < 1 else 0)
    assert capsys.readouterr().out.count("TARGET MISSED: resnet18, SAM: ") == (2 if floor_seconds < 1 else 0)


def test_step_runs_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["step", "--models", "mlp", "--ways", "erm", "tsam", "loop", "foreach", "--batch", "4"]
    assert main([*arguments, "--rounds", "2", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "step.json").read_text())["results"]
    assert [(r["way"], r["gradients"], len(r["seconds"])) for r in found] == [
        ("erm", 1, 2), ("tsam", 6, 2), ("loop", 6, 2), ("foreach", 6, 2),
    ]  # fmt: skip
    assert all(0 < inside < seconds for r in found for inside, seconds in zip(r["inside"], r["seconds"], strict=True))
    assert "files:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("inside", "loss", "strict", "code"),
    [(0.99, 1.0, True, 0), (0.9, 1.0, False, 0), (0.9, 1.0, True, 1), (0.99, float("nan"), False, 1)],
)
def test_what_fails_step(
    inside: float, loss: float, strict: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = [step.Row("wrn16-8", "tsam", 6, 64, loss, [1.0], [inside])]
    monkeypatch.setattr(step, "measure", lambda *given: measured)
    arguments = ["step", "--models", "wrn16-8", "--out", str(tmp_path)]
    assert main([*arguments, "--strict"] if strict else arguments) == code


def test_the_target_of_step() -> None:
    good, bad = (step.Row("wrn16-8", "tsam", 6, 64, 1.0, [1.0], [inside]) for inside in (0.99, 0.9))
    small = step.Row("mlp", "tsam", 6, 64, 1.0, [1.0], [0.5])
    assert step.missed([good, small]) == []
    assert step.missed([bad]) == ["wrn16-8: 10.0% of a step is not forward and backward, allowed 2%"]
