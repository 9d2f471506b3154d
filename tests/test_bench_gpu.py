"""``bench gpu`` without a GPU: a trial of the whole command on the CPU, and what it says of what is wrong or left out.

Only what takes CUDA is not run here: events, the capture of a step, the driver's version. Invariants: nothing is timed
where an op differs; what the budget leaves out is named; the text that is posted has all of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import back_ends
import pytest
import torch

pytest.importorskip("pytorch_optimizer")
pytest.importorskip("matplotlib")

from bench import gpu, gpu_check, gpu_times, step
from bench.__main__ import main
from bench.op_cases import cases
from bench.overhead import TASKS
from tsam_ext import _C

CPU = torch.device("cpu")
SMALL = ["gpu", "--device", "cpu", "--models", "mlp", "--lists", "mlp", "--elements", "20000", "--batch", "4"]
SMALL += ["--rounds", "1"]


@pytest.fixture
def right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op agrees, and torch.compile takes no time."""
    monkeypatch.setattr(gpu_check, "differences", lambda device: [])
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def kept(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    found = json.loads((folder / "gpu.json").read_text())
    return found["environment"], found["results"], (folder / "gpu.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu"]) == 2
    assert "no GPU to run on: torch finds none; --device cpu is a trial" in capsys.readouterr().err
    assert main([*SMALL, "--tests"]) == 2
    assert "--tests needs a GPU" in capsys.readouterr().err


def test_a_trial_on_the_cpu_is_the_whole_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, right: None
) -> None:
    """Every op, way and kind of estimate has its row, and the text a line that says what it was taken on."""
    assert main([*SMALL, "--out", str(tmp_path)]) == 0
    where, rows, text = kept(tmp_path)
    assert text in capsys.readouterr().out
    of = {kind: [row for row in rows if row["kind"] == kind] for kind in ("step", "op", "estimate", "call")}
    assert {row["way"] for row in of["step"]} == step.WAYS.keys()
    assert {row["task"] for row in of["op"]} == {case.name for case in cases([8], torch.float32)}
    competitors = {(task.name, way) for task in TASKS for way in ("ours", *task.competitors)}
    assert {(row["task"], row["way"]) for row in of["estimate"]} == competitors
    assert all(row["seconds"] for row in rows) and of["call"]
    assert {"gpu", "driver", "cuda", "torch", "date", "processor", "command", "seconds"} <= where.keys()
    assert "a trial on the CPU" in text and "every op agrees with the CPU's" in text
    assert "left out: the captured steps, as CUDA graphs need a GPU" in text
    for way in step.WAYS:
        assert re.search(rf"\n\| mlp \| step, 4 rows \| {way} \| [\d.]+ \| ", text), way
    for row in of["op"]:
        assert row["floor"] >= 0.0 and (row["floor"] > 0.0) is (row["words"] > 0) and f"\n| {row['task']} |" in text


def test_what_the_budget_leaves_out_is_named(tmp_path: Path, right: None) -> None:
    assert main([*SMALL, "--budget", "4", "--out", str(tmp_path)]) == 0
    where, rows, text = kept(tmp_path)
    assert rows == [] and " --budget 4.0 " in where["command"]
    for name in ("steps of mlp", "ops", "estimates on mlp", "the host's time of a call", "estimates on mlp, compiled"):
        assert f"- left out, as the budget of 4 s was spent: {name}\n" in text


def test_the_least_important_is_left_out_first() -> None:
    options = SimpleNamespace(models=["resnet18", "mlp"], lists=["mlp"], batch=4, elements=8)
    jobs = list(gpu.jobs_of(options, gpu_times.Clock(CPU, 1)))  # type: ignore[arg-type]
    names = [job.name for job in jobs]
    assert names[:3] == ["steps of resnet18", "ops", "estimates on mlp"] and len(set(names)) == len(names)
    compiled = [gpu.COMPILED in name for name in names]
    assert compiled == sorted(compiled) and sum(compiled) == 3
    assert [job.least == gpu.LEAST_COMPILED for job in jobs] == compiled


def test_where_an_op_differs_nothing_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "differences", lambda device: ["ops:3: restored bits[0]: not equal"])
    monkeypatch.setattr(gpu, "jobs_of", lambda *given: pytest.fail("timed"))
    assert main([*SMALL, "--out", str(tmp_path)]) == 1
    assert "WRONG: ops:3: restored bits[0]: not equal" in capsys.readouterr().out
    _, rows, text = kept(tmp_path)
    assert rows == [] and "- WRONG: ops:3: restored bits[0]: not equal" in text and "1 WRONG" in text


def fails(allowed: float) -> list[gpu.Row]:
    raise RuntimeError("no room\nat all")


def row(**changed: Any) -> Callable[[float], list[gpu.Row]]:
    made = {"kind": "step", "list": "mlp", "task": "step", "way": "tsam", "seconds": [1.0], "loss": 1.0}
    return lambda allowed: [{**made, **changed}]


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (gpu.Job("steps", row()), ""),
        (gpu.Job("steps", row(loss=float("nan"))), "WRONG: mlp: step: tsam: the loss is not finite"),
        (gpu.Job("ops", row(wrong="a sum", seconds=[])), "WRONG: mlp: step: tsam: a sum"),
        (gpu.Job("steps", fails), "WRONG: steps: RuntimeError: no room\n"),
        (gpu.Job("steps, compiled", fails), ""),
    ],
)
def test_what_is_wrong_fails_the_command(
    job: gpu.Job, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    right: None,
) -> None:  # fmt: skip
    monkeypatch.setattr(gpu, "jobs_of", lambda options, clock: [job, gpu.Job("another", row(way="erm"))])
    assert main([*SMALL, "--out", str(tmp_path)]) == bool(said)
    out = capsys.readouterr().out
    assert said in out and ("WRONG" in out) is bool(said)
    _, rows, text = kept(tmp_path)
    assert rows[-1]["job"] == "another"  # goes on
    assert ("left out: steps, compiled: RuntimeError: no room\n" in text) is (job.name == "steps, compiled")


def test_a_step_that_cannot_be_captured_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where it can, it is ours with settings for it, in a model of its own."""
    made = []

    def stepper(way: str, model: Any, **extra: Any) -> Any:
        made.append((way, id(model), extra))
        return real(way, model, **extra)

    def fails(take: Any, closure: Any) -> None:
        raise RuntimeError("a stream waits")

    real = step.stepper
    monkeypatch.setattr(step, "stepper", stepper)
    ways, clock = ("erm", *gpu.CAPTURED), gpu_times.Clock(CPU, 1)
    monkeypatch.setattr(gpu_times, "captured", lambda take, closure: lambda: take(closure))
    assert [r["way"] for r in gpu_times.time_steps("mlp", ways, clock, 0.0, 2) if r["seconds"]] == list(ways)
    graphed = {"capturable": True, "same_masks": False}
    assert [(way, extra) for way, _, extra in made] == [("erm", {}), ("sam", graphed), ("tsam", graphed)]
    monkeypatch.setattr(gpu_times, "captured", fails)
    erm, *others = gpu_times.time_steps("mlp", ways, clock, 0.0, 2)
    assert erm["way"] == "erm" and erm["seconds"] and [r["seconds"] for r in others] == [[], []]
    assert gpu.fault(others[0]) == "cannot be captured: RuntimeError: a stream waits"


def test_a_way_that_computes_something_else_has_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu_times.disagreement
    plain: list[Any] = []

    def differs(case: Any, way: Any, dtype: torch.dtype) -> str:
        if case.name == "restore_" and way is case.plain:
            plain.append(case)
            return "a sum"
        return real(case, way, dtype)

    monkeypatch.setattr(gpu_times, "disagreement", differs)
    monkeypatch.setattr(gpu_times.op_cases, "cases", lambda *given: [c for c in cases(*given) if "restore" in c.name])
    rows = {row["way"]: row for row in gpu_times.time_ops(200, gpu_times.Clock(CPU, 2), 0.0)}
    assert plain and gpu.fault(rows["plain"]) == "computes something else: a sum" and rows["plain"]["seconds"] == []
    assert len(rows["ours"]["seconds"]) == len(rows["foreach"]["seconds"]) == 1
    assert rows["ours"]["bytes"] == 200 * 2 * 4


@pytest.mark.parametrize("failed", [[], ["racecheck"]])
def test_longer_checks_are_part_of_it_where_asked_for(
    failed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, right: None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "_cuda", SimpleNamespace(cause=None))
    monkeypatch.setattr(gpu, "machine", lambda device: dict.fromkeys(("gpu", "driver", "cuda"), "none"))
    monkeypatch.setattr(gpu, "Clock", lambda device, rounds: None)
    monkeypatch.setattr(gpu, "jobs_of", lambda options, clock: [])
    monkeypatch.setattr(gpu_check, "longer", lambda: failed)
    assert main(["gpu", "--tests", "--out", str(tmp_path)]) == bool(failed)
    assert ("WRONG: racecheck: the check fails" in capsys.readouterr().out) is bool(failed)
    assert "captured steps" not in kept(tmp_path)[2]


def test_turns_take_turns_and_end_in_time() -> None:
    clock, order = gpu_times.Clock(CPU, 3), []
    ways = {name: lambda name=name: order.append(name) or float(len(order)) for name in "ab"}
    assert clock.turns(ways, 1e9) == {"a": [5.0, 7.0, 9.0], "b": [6.0, 8.0, 10.0]}  # two turns to warm up
    assert order == list("ab") * 5
    assert {name: len(times) for name, times in clock.turns(ways, 0.0).items()} == {"a": 1, "b": 1}


def test_the_comparison_names_each_result_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own nothing differs from the CPU on the CPU; then results are made up."""
    assert gpu_check.differences(CPU) == []
    job, x = gpu_check.TRIAL[0], torch.arange(3.0)
    made_up = {"noise bits": [x, x + 2**-20], "sum": [x * (1 + 2**-23)], "other": [x + 0.1]}
    expected = {"noise bits": [x, x], "sum": [x], "other": [x]}
    answers = [("path", {job: made_up}), ("path", {job: expected})]
    monkeypatch.setattr(back_ends, "results", lambda *given, **environment: answers.pop(0))
    first, second = gpu_check.differences(CPU)
    assert first.startswith(f"{job}: noise bits[1]: ") and second.startswith(f"{job}: other[0]: ")

    def dies(*given: Any, **environment: str) -> None:
        raise AssertionError("Traceback\nRuntimeError: no kernel image")

    monkeypatch.setattr(back_ends, "results", dies)
    assert gpu_check.differences(CPU) == ["the ops on cpu cannot be run: RuntimeError: no kernel image"]


def test_the_comparison_calls_every_op() -> None:
    text = gpu_check.LISTS.read_text()
    ops = {str(s.name).removeprefix("tsam::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("tsam::")}
    assert len(ops) > 20 and {name for name in ops if f"_C.{name}(" not in text} == set()
    assert all(hasattr(_C, name) for name in ops)
