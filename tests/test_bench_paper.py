"""The paper's runs: schedule, grids, rows of ranks, checkpoints, the command's exit codes and what it keeps.

Laws: a run that was interrupted and goes on ends with the bits of one that was not; ranks see one permutation, end with
the same bits and take the steps of one process; rank 0 alone writes; what is finished or begun is not lost unasked.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import pool
from torch import Tensor, nn

from bench.__main__ import main
from bench.paper.images import Augmentation
from bench.paper.ranks import Ranks
from bench.paper.settings import GRIDS, METHODS, USUAL, Job, Settings, optimizer_of, rate, tries
from bench.paper.task import Rows, Task
from bench.paper.trainer import accuracy, batches, train

CPU = torch.device("cpu")
SMALL = Settings("made up", "tiny", epochs=3, batch=16, lr=0.05)


def labelled(n: int, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    return Rows(torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8), torch.arange(n) % 4)


def conv_task() -> Task:
    """BatchNorm, dropout and augmentation: all that a run draws or keeps beside its parameters."""

    def build() -> nn.Module:
        layers = [nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Dropout(0.3), nn.Linear(36, 4))

    ready = Augmentation(torch.full((3,), 0.5), torch.full((3,), 0.3), padding=1, size=4)
    return Task("made up", labelled(44), labelled(20, 1), 4, build, ready)


def linear_task() -> Task:
    """Nothing random, nothing beside parameters: what ranks do is what one process does."""

    def prepare(images: Tensor, generator: torch.Generator | None) -> Tensor:
        return images.flatten(1) / 255

    return Task("made up", labelled(48), labelled(20, 1), 4, lambda: nn.Linear(192, 4), prepare)


def job(**changes: Any) -> Job:
    return Job(replace(SMALL, **changes), seed=3, rows=(48, 20))


def test_the_learning_rate_goes_down_after_3_6_and_8_tenths() -> None:
    image = Settings("cifar100", "resnet18", lr=0.1)
    found = [rate(image, epoch) for epoch in (0, 59, 60, 119, 120, 159, 160, 199)]
    assert found == pytest.approx([0.1, 0.1, 0.02, 0.02, 0.004, 0.004, 0.0008, 0.0008])
    assert [rate(replace(image, epochs=5), epoch) for epoch in range(5)] == pytest.approx(
        [0.1, 0.1, 0.02, 0.004, 0.0008]
    )
    text = replace(image, **USUAL["text"])
    assert {rate(text, epoch) for epoch in range(text.epochs)} == {1e-3}


def test_a_grid_varies_what_a_method_looks_at() -> None:
    sizes = {m: len(tries(SMALL, m, GRIDS["cifar100"])) for m in METHODS}
    assert sizes == {"erm": 2, "sam": 2 * 3, "tsam": 2 * 3 * 6 * 3}
    found = tries(SMALL, "tsam", {"tilt": (0.0, 400.0), "samples": (3, 5)})
    assert [(s.tilt, s.samples) for s in found] == [(0.0, 3), (0.0, 5), (400.0, 3), (400.0, 5)]
    assert all(s.method == "tsam" and (s.lr, s.rho, s.radius) == (0.05, 0.05, 1.0) for s in found)
    assert len(tries(replace(SMALL, parts=4), "tsam", {"tilt": (0.0, 400.0), "samples": (3, 5)})) == 2


@pytest.mark.parametrize(
    ("changes", "gradients"),
    [
        ({"method": "erm", "every": 3}, 1),
        ({"method": "sam"}, 2),
        ({"method": "sam", "parts": 4}, 2),
        ({"method": "tsam"}, 6),
        ({"method": "tsam", "samples": 5}, 10),
        ({"method": "tsam", "parts": 4}, 2),
        ({"method": "tsam", "every": 4}, 9 / 4),
    ],
)
def test_gradients_per_step_are_those_that_are_taken(changes: dict[str, Any], gradients: float) -> None:
    """Counted over four steps, by the rows that the net sees."""
    settings, seen = replace(SMALL, **changes), 0
    net = nn.Linear(2, 4)

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal seen
        seen += len(inputs[0])

    net.register_forward_pre_hook(count)
    optimizer: Any = optimizer_of(settings, net, net, 0)
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    for _ in range(4):

        def closure() -> Tensor:
            loss: Tensor = net(optimizer.part(x) if settings.method != "erm" else x).square().mean()
            loss.backward()
            return loss

        optimizer.zero_grad()
        optimizer.step(closure)
    assert seen / 32 == gradients == settings.gradients


def test_the_base_optimizer_is_the_authors() -> None:
    net = nn.Linear(2, 4)
    for method in METHODS:
        group = optimizer_of(replace(SMALL, method=method), net, net, 0).param_groups[0]
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.05, 0.9, 5e-4)
    assert (Settings("", "").batch, Settings("", "").epochs, Settings("", "").label_smoothing) == (64, 200, 0.1)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_see_one_permutation_an_epoch(size: int) -> None:
    settings = replace(SMALL, parts=2)
    epochs = []
    for epoch in (0, 1):
        of_ranks = [list(batches(45, settings, 3, epoch, Ranks(rank, size))) for rank in range(size)]
        together = [torch.cat(parts) for parts in zip(*of_ranks, strict=True)]
        assert [len(part) for part in together] == [16, 16, 13 // (2 * size) * (2 * size)]
        assert all(len(set(map(len, parts))) == 1 for parts in zip(*of_ranks, strict=True))
        order = torch.cat(together).tolist()
        assert len(set(order)) == len(order) and set(order) <= set(range(45))
        epochs.append(order)
    assert epochs[0] != epochs[1]
    assert torch.equal(
        torch.cat(list(batches(45, replace(settings, parts=0), 3, 0, Ranks()))).sort()[0], torch.arange(45)
    )


class Stop:
    """Raises at the n-th step, as Ctrl-C would."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def states(path: Path) -> dict[str, Any]:
    kept: dict[str, Any] = torch.load(path, weights_only=True)
    kept["progress"].pop("seconds")
    return kept


def same_bits(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return bool(a == b)


METHODS_AND_FORMS = [{"method": "erm"}, {"method": "sam", "every": 2, "clip": 1.0}, {"method": "tsam", "parts": 2}]


@pytest.mark.parametrize("changes", METHODS_AND_FORMS)
def test_an_interrupted_run_goes_on_with_the_same_bits(changes: dict[str, Any], tmp_path: Path) -> None:
    """Interrupted in its second epoch and again in its third, at another step."""
    one, task = job(**changes), conv_task()
    whole = train(one, task, CPU, checkpoint=tmp_path / "whole.pt")
    path = tmp_path / "parts.pt"
    for steps, kept in ((5, 1), (4, 2)):
        with pytest.raises(KeyboardInterrupt):
            train(one, task, CPU, checkpoint=path, tick=Stop(steps))
        assert len(states(path)["progress"]["losses"]) == kept
        torch.rand(7)  # what others draw meanwhile
    resumed = train(one, task, CPU, checkpoint=path)
    assert replace(resumed, seconds=0.0) == replace(whole, seconds=0.0)
    assert same_bits(states(path), states(tmp_path / "whole.pt"))
    assert len(whole.losses) == 3 and whole.finite and whole.seconds > 0
    again = train(one, task, CPU, checkpoint=path, tick=Stop(1))  # nothing is left to do
    assert again == resumed
    assert not list(tmp_path.glob("*.part"))


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, save = tmp_path / "run.pt", torch.save

    def torn(states: Any, file: Path) -> None:
        if len(states["progress"]["losses"]) == 2:
            file.write_bytes(b"torn")
            raise KeyboardInterrupt
        save(states, file)

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        train(job(), linear_task(), CPU, checkpoint=path)
    assert len(states(path)["progress"]["losses"]) == 1


def test_the_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    train(job(epochs=1), linear_task(), CPU, checkpoint=path)
    with pytest.raises(ValueError, match=r"run\.pt: got the checkpoint of run \w+, expected that of \w+"):
        train(job(epochs=1, lr=0.06), linear_task(), CPU, checkpoint=path)


def test_methods_begin_with_the_same_weights_and_order_and_seeds_differ() -> None:
    """Weights that do not move: each step's first loss, where there is no noise before it, is the plain one."""
    still = [train(job(method=m, lr=1e-30, radius=0.0, epochs=1), linear_task(), CPU) for m in METHODS]
    assert still[0].losses == still[1].losses == still[2].losses
    other = train(replace(job(lr=1e-30, epochs=1), seed=4), linear_task(), CPU)
    assert other.losses != still[0].losses


def test_accuracy_draws_no_masks_and_moves_no_statistics() -> None:
    task = conv_task()
    net = task.build().train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = [accuracy(net, task, SMALL, CPU) for _ in range(3)]
    assert found[0] == found[1] == found[2] and same_bits(dict(net.state_dict()), before)
    with torch.no_grad():
        right = net(task.prepare(task.test.inputs, None)).argmax(1) == task.test.labels
    assert found[0] == 100 * int(right.sum()) / 20


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    found = train(job(lr=1e30), linear_task(), CPU)
    assert not found.finite and len(found.losses) < 3


def test_autocast_trains_otherwise_and_in_float32_parameters() -> None:
    found, plain = (train(job(method="tsam", bf16=half, epochs=1), linear_task(), CPU) for half in (True, False))
    assert found.finite and found.losses != plain.losses and found.losses == pytest.approx(plain.losses, rel=0.02)


def on_ranks(rank: int, folder: str) -> Any:
    """What one of two ranks has: results, its weights, and the same after an interruption."""
    nets: list[nn.Module] = []
    ranks, found = Ranks(rank, 2), []
    for kind, changes in (("linear", {"method": "erm"}), ("linear", {"method": "tsam"}), ("conv", {"method": "tsam"})):
        task = linear_task() if kind == "linear" else conv_task()
        build = task.build
        task = replace(task, build=lambda build=build: nets.append(build()) or nets[-1])
        one = job(**changes)
        whole = train(one, task, CPU, ranks)
        path = Path(folder, f"{kind}-{one.key}.pt")
        with contextlib.suppress(KeyboardInterrupt):
            train(one, task, CPU, ranks, path, Stop(5))
        resumed = train(one, task, CPU, ranks, path)
        weights = [torch.cat([p.detach().flatten() for p in net.parameters()]).tolist() for net in (nets[-3], nets[-1])]
        found.append((replace(whole, seconds=0.0), replace(resumed, seconds=0.0), weights))
    return found


def quick_on_ranks(rank: int, folder: str) -> Any:
    """The command on one of two ranks: its exit code and what it prints, into a folder of its own."""
    out = Path(folder, str(rank))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main(["paper", "--quick", "--methods", "sam", "--seeds", "1", "--epochs", "1", "--out", str(out)])
        refused = main(["paper", "--quick", "--batch", "63", "--out", str(out)])
    return code, refused, printed.getvalue(), out.exists()


def test_two_ranks_hold_the_same_bits_and_take_the_steps_of_one_process(tmp_path: Path) -> None:
    first, second = pool(2).run(on_ranks, str(tmp_path))
    assert first == second
    for whole, resumed, weights in first:
        assert whole == resumed and weights[0] == weights[1]
    for (whole, _, _), method in zip(first, ("erm", "tsam"), strict=False):
        alone = train(job(method=method), linear_task(), CPU)
        assert whole.losses == pytest.approx(alone.losses, rel=1e-5)
        assert whole.accuracy == pytest.approx(alone.accuracy, abs=5.1)  # one row of twenty


def test_rank_0_alone_prints_and_writes(tmp_path: Path) -> None:
    (code, refused, printed, wrote), other = pool(2).run(quick_on_ranks, str(tmp_path))
    assert (code, refused, wrote) == (0, 2, True) and "2 processes" in printed
    assert "--batch: got 63, expected a multiple of the 2 ranks" in printed
    assert other == (0, 2, "", False)
