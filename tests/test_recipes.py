"""The recipes in bench/recipes run as they stand, and each does what its first line says."""

from __future__ import annotations

import io
import os
import runpy
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from tsam_ext import TSAM

pytest.importorskip("sklearn")

FOLDER = Path(__file__).parents[1] / "bench" / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
SEVERAL_PROCESSES = ("accelerate_ddp", "ddp", "fsdp2", "lightning_ddp")  # test_recipes_ranks.py runs them

NEEDS = {
    "lightning_automatic": "lightning",
    "lightning_manual": "lightning",
    "lightning_ddp": "lightning",
    "accelerate_loop": "accelerate",
    "accelerate_ddp": "accelerate",
    "transformers_trainer": "transformers",
}


def forget_accelerators() -> None:
    """accelerate keeps one state a process, and refuses another precision later."""
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@cache
def run(name: str, *edits: tuple[str, str]) -> dict[str, Any]:
    """The recipe's names, and beside them what it has ``printed``; ``edits`` are made to its text first."""
    pytest.importorskip(NEEDS.get(name, "torch"), reason="pip install '.[recipes]'")
    text = (FOLDER / f"{name}.py").read_text()
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    printed, threads, here = io.StringIO(), torch.get_num_threads(), os.getcwd()
    forget_accelerators()
    torch.set_num_threads(1)  # the nets are small: a second thread would mostly wait
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.py")
        path.write_text(text)
        os.chdir(folder)
        try:
            with redirect_stdout(printed), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scope = runpy.run_path(str(path), run_name="__main__")
            left = sorted(entry.name for entry in Path(folder).iterdir() if entry != path)
        finally:
            os.chdir(here)
            torch.set_num_threads(threads)
            forget_accelerators()
    return {**scope, "printed": printed.getvalue(), "left": left}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SEVERAL_PROCESSES])
def test_a_recipe_runs_and_learns(name: str) -> None:
    scope = run(name)
    assert "loss " in scope["printed"]
    assert scope["left"] == [] and scope["printed"].count("\n") == (3 if name == "training_loop" else 1)
    if "losses" in scope:
        assert scope["losses"][-1] < 0.6 * scope["losses"][0]


def test_the_list_in_the_readme_is_complete() -> None:
    text = (FOLDER.parent / "README.md").read_text()
    assert [name for name in NAMES if f"recipes/{name}.py" not in text] == []
    assert len(NAMES) >= 20


def test_the_plain_loop_learns_and_follows_its_schedule() -> None:
    scope = run("training_loop")
    assert scope["accuracy"] > 0.85
    assert scope["optimizer"].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-6)


def test_microbatches_do_the_step_of_the_whole_batch() -> None:
    parts, whole = run("accumulation")["model"], run("without_closure")["model"]
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_clipped_to_its_length() -> None:
    gradients = [p.grad for p in run("gradient_clipping")["model"].parameters()]
    assert float(torch.nn.utils.get_total_norm(gradients)) == pytest.approx(0.2, rel=1e-3)


def test_running_statistics_move_once_per_step() -> None:
    assert int(run("conv_net")["norm"].num_batches_tracked) == 20


def test_under_autocast_the_passes_see_the_perturbed_weights() -> None:
    scope = run("bfloat16_autocast")
    losses = scope["optimizer"].diagnostics.losses  # after the ascents of the recipe's last step
    assert (losses > scope["losses"][-1]).all()


def whole_batches(steps: list[Any], clip: float, **base: float) -> torch.nn.Linear:
    """A twin of the recipes' net after TSAM's steps on ``steps``: each the rows of its microbatches, in one forward."""
    torch.manual_seed(0)
    net = torch.nn.Linear(64, 10).to(steps[0][0][0].dtype)
    optimizer = TSAM(net.parameters(), torch.optim.SGD, lr=1.0, num_samples=3, radius=1.0, tilt=20.0, seed=0, **base)
    for parts in steps:
        x, y = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
        weights = torch.cat([torch.full((len(x),), 1 / len(x), dtype=x.dtype) for x, _ in parts]) / len(parts)

        def closure(x: Any = x, y: Any = y, weights: Any = weights) -> torch.Tensor:
            loss = weights @ cross_entropy(net(x), y, reduction="none")
            loss.backward()
            return loss

        optimizer.estimate_gradient(closure)
        torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.apply()
    return net


def length(net: torch.nn.Module) -> float:
    return float(torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None]))


def same(net: torch.nn.Linear, twin: torch.nn.Linear, tolerance: float) -> None:
    torch.testing.assert_close(net.weight, twin.weight, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(net.bias, twin.bias, rtol=tolerance, atol=tolerance)


def epochs(digits: Any, dtype: torch.dtype) -> list[Any]:
    """Six epochs of four steps of four microbatches, as the recipes' loaders give them."""
    x, y = digits.tensors
    parts = list(zip(x.to(dtype).split(112), y.split(112), strict=True))
    return [parts[i : i + 4] for i in range(0, 16, 4)] * 6


@pytest.mark.parametrize("name", ["lightning_automatic", "lightning_manual"])
def test_lightning_steps_on_all_microbatches_and_clips_the_aggregate(name: str) -> None:
    scope = run(name, ('"bf16-mixed"', '"64-true"'))
    net = scope["model"].net
    same(net, whole_batches(epochs(scope["digits"], torch.float64), 0.2), 1e-10)
    assert length(net) == pytest.approx(0.2, rel=1e-4) == length(run(name)["model"].net)
    assert scope["trainer"].global_step == 24 == len(scope["losses"])


def test_accelerate_steps_on_all_microbatches_and_clips_the_aggregate() -> None:
    scope = run("accelerate_loop", (', mixed_precision="bf16"', ""))
    same(scope["model"], whole_batches(epochs(scope["digits"], torch.float32), 0.2), 1e-4)
    assert length(scope["model"]) == pytest.approx(0.2, rel=1e-4) == length(run("accelerate_loop")["model"])


def test_the_trainer_steps_on_all_microbatches_and_clips_the_aggregate() -> None:
    """The last step of an epoch has one microbatch of five rows."""
    scope = run(
        "transformers_trainer",
        ("Dropout(0.1)", "Dropout(0.0)"),
        ("self.parts, self.losses = [], []", "self.parts, self.losses, self.steps = [], [], []"),
        ("        self.parts = []", "        self.steps.append(self.parts)\n        self.parts = []"),
    )
    steps = [[(part["x"], part["labels"]) for part in parts] for parts in scope["trainer"].steps]
    assert [len(parts) for parts in steps] == [4, 4, 4, 4, 1] * 4
    same(scope["trainer"].model.net[1], whole_batches(steps, 0.2, momentum=0.5), 1e-4)


def test_the_resumed_trainer_ends_at_the_same_bits() -> None:
    scope = run("transformers_trainer")
    trainer, resumed = scope["trainer"], scope["resumed"]
    assert len(resumed.losses) == 10 and resumed.losses == trainer.losses[10:]
    for value, other in zip(resumed.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(value, other)
    assert resumed.optimizer.optimizer.seed == trainer.optimizer.optimizer.seed == 0


def test_scaled_microbatches_do_the_step_of_the_whole_batch() -> None:
    scope = run("float16_grad_scaler", ("dtype=torch.float16", "enabled=False"))
    same(scope["model"], whole_batches([[(scope["x"], scope["y"])]] * 20, 0.2), 1e-4)
    scope = run("float16_grad_scaler")
    assert scope["scaler"].get_scale() == 2.0**10  # no step was skipped
    assert length(scope["model"]) == pytest.approx(0.2, rel=1e-3)


def test_the_tilt_of_the_regression_acts() -> None:
    assert 1.05 < float(run("regression")["optimizer"].diagnostics.ess) < 2.95


def counted(scope: dict[str, Any], count: Callable[[], int]) -> list[int]:
    """One more estimate of a recipe, with what ``count`` says at each of its gradients."""
    seen: list[int] = []

    def closure() -> torch.Tensor:
        seen.append(count())
        loss: torch.Tensor = scope["closure"]()
        return loss

    scope["optimizer"].estimate_gradient(closure)
    return seen


def test_a_split_batch_sees_every_row_twice() -> None:
    scope = run("split_batch")
    rows = counted(scope, lambda: len(scope["optimizer"].part(scope["x"])))
    assert len(rows) == 8 and sum(rows) == 2 * len(scope["x"])


def test_sam_takes_two_gradients_per_step() -> None:
    scope = run("sam")
    assert len(counted(scope, lambda: 1)) == 2
    assert scope["optimizer"].diagnostics.losses.shape == (1,)


def test_the_resumed_run_ends_at_the_same_bits() -> None:
    scope = run("checkpoint")
    assert torch.equal(scope["model"].weight, scope["resumed"].weight)
    assert torch.equal(scope["model"].bias, scope["resumed"].bias)
