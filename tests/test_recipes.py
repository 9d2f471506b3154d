"""The recipes in bench/recipes run as they stand, and each does what its first line says."""

from __future__ import annotations

import io
import runpy
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")

FOLDER = Path(__file__).parents[1] / "bench" / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


@cache
def run(name: str) -> dict[str, Any]:
    """The recipe's names, and beside them what it has ``printed``."""
    text, threads = io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(1)  # the nets are small: a second thread would mostly wait
    with redirect_stdout(text):
        scope = runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    torch.set_num_threads(threads)
    return {**scope, "printed": text.getvalue()}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_and_learns(name: str) -> None:
    scope = run(name)
    assert "loss " in scope["printed"]
    if "losses" in scope:
        assert scope["losses"][-1] < 0.6 * scope["losses"][0]


def test_the_list_in_the_readme_is_complete() -> None:
    text = (FOLDER.parent / "README.md").read_text()
    assert [name for name in NAMES if f"recipes/{name}.py" not in text] == []
    assert len(NAMES) >= 10


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
    assert int(run("batch_norm")["model"][1].num_batches_tracked) == 20


def test_under_autocast_the_passes_see_the_perturbed_weights() -> None:
    scope = run("bfloat16_autocast")
    losses = scope["optimizer"].diagnostics.losses  # after the ascents of the recipe's last step
    assert (losses > scope["losses"][-1]).all()


def test_scaled_gradients_do_the_step_of_unscaled_ones() -> None:
    scope = run("float16_grad_scaler")
    assert scope["scaler"].get_scale() == 2.0**10  # no step was skipped
    assert scope["optimizer"].diagnostics.losses.isfinite().all()


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
