"""One training run, from its job to its result, on one process or on the ranks of a DistributedDataParallel.

Each epoch is a function of net, optimizer and (seed, epoch, rank) alone: order, augmentation and masks are drawn from
generators that start anew with it. So a checkpoint at an epoch's end holds all there is, and a run that goes on from
one ends with the bits of one that was never interrupted (on a CPU; on a GPU as far as its kernels are deterministic).
Of a batch of B rows rank r of k takes the r-th B/k; BatchNorm sees a rank's own rows, as in any DDP.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from tsam_ext import TSAM

from .ranks import Ranks
from .settings import Job, Settings, optimizer_of, rate
from .task import Rows, Task

EVALUATED = 500  # rows of a forward pass without gradients


@dataclass(frozen=True)
class Result:
    """Mean training loss of each epoch, accuracy in % after the last one, and the seconds of training."""

    key: str
    settings: dict[str, Any]
    seed: int
    part: str
    losses: list[float]
    accuracy: float
    seconds: float
    finite: bool


@dataclass
class Progress:
    """What a run has behind it: epochs, their losses, and the seconds they took."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def finite(self) -> bool:
        """Whether every epoch's loss is finite."""
        return all(map(math.isfinite, self.losses))


def stream(*words: object) -> int:
    """A seed below 2⁶³ for one purpose of one run: a hash of the words."""
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=8).digest(), "big") >> 1


def batches(rows: int, settings: Settings, seed: int, epoch: int, ranks: Ranks) -> Iterator[Tensor]:
    """This rank's row numbers of each batch of an epoch, int64: together the ranks see one permutation.

    The last batch is what is left, without the rows that ranks and parts do not divide.
    """
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(stream(seed, "order", epoch)))
    whole = ranks.size * max(1, settings.parts)
    for batch in torch.split(order, settings.batch):
        taken = len(batch) // whole * whole
        if taken:
            yield batch[:taken].chunk(ranks.size)[ranks.rank]


def train(
    job: Job,
    task: Task,
    device: torch.device,
    ranks: Ranks = Ranks(),  # noqa: B008  # frozen
    checkpoint: Path | None = None,
    tick: Callable[[], object] = lambda: None,
) -> Result:
    """Runs a job, from its checkpoint where there is one.

    Args:
        job, task, device: what is run, and where. ``task``'s test rows are those that the job is judged on.
        ranks: the processes that share each batch; its rows have to be a multiple of them.
        checkpoint: a file, written by rank 0 after each epoch, as a whole or not at all; ``None``: none.
        tick: called after each step; what it raises ends the run, and the last checkpoint stays.

    Raises:
        ValueError: if the checkpoint is another job's.
    """
    s = job.settings
    torch.manual_seed(stream(job.seed, "weights"))
    net = task.build().to(device)
    running: nn.Module = torch.compile(net) if s.compile else net  # type: ignore[assignment]
    if ranks.size > 1:
        running = DistributedDataParallel(running, device_ids=None if device.type == "cpu" else [device.index])
    optimizer = optimizer_of(s, net, running, job.seed)
    progress = _load(checkpoint, job, net, optimizer, ranks)
    rows = task.train.to(device)
    while len(progress.losses) < s.epochs and progress.finite:
        begin, epoch = time.perf_counter(), len(progress.losses)
        loss = _epoch(epoch, job, task, rows, running, optimizer, ranks, tick)
        progress.losses.append(loss)
        progress.seconds += time.perf_counter() - begin
        if checkpoint is not None and ranks.first:
            _save(checkpoint, job, net, optimizer, progress)
    right = ranks.shared(accuracy(net, task, s, device) if ranks.first else None)
    return Result(job.key, asdict(s), job.seed, job.part, progress.losses, right, progress.seconds, progress.finite)


def _epoch(
    epoch: int, job: Job, task: Task, rows: Rows, running: nn.Module, optimizer: Optimizer, ranks: Ranks,
    tick: Callable[[], object],
) -> float:  # fmt: skip
    """One pass over the training rows; returns the mean loss of its steps, over all ranks."""
    s, device = job.settings, rows.labels.device
    for group in optimizer.param_groups:
        group["lr"] = rate(s, epoch)
    torch.manual_seed(stream(job.seed, "masks", epoch, ranks.rank))
    generator = torch.Generator(device).manual_seed(stream(job.seed, "augmentation", epoch, ranks.rank))
    running.train()
    total, steps = torch.zeros((), device=device), 0
    for index in batches(len(rows), s, job.seed, epoch, ranks):
        batch = rows.take(index.to(device))
        total += _step(running, optimizer, task.prepare(batch.inputs, generator), batch.labels, s)
        steps += 1
        tick()
    if ranks.size > 1:
        dist.all_reduce(total)
    return float(total) / (max(1, steps) * ranks.size)


def _step(running: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, s: Settings) -> Tensor:
    """One step; returns its first loss."""

    def closure() -> Tensor:
        inputs, labels = optimizer.part(x, y) if isinstance(optimizer, TSAM) else (x, y)
        with _precision(s, x.device):
            loss = cross_entropy(running(inputs), labels, label_smoothing=s.label_smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    optimizer.zero_grad()
    loss = optimizer.estimate_gradient(closure) if isinstance(optimizer, TSAM) else closure()
    if s.clip:
        clip_grad_norm_((p for group in optimizer.param_groups for p in group["params"]), s.clip)
    optimizer.step()
    assert loss is not None
    return loss


def _precision(s: Settings, device: torch.device) -> Any:
    """bfloat16 autocast, inside the closure: it keeps converted weights until it ends."""
    return torch.autocast(device.type, torch.bfloat16) if s.bf16 else nullcontext()


@torch.no_grad()
def accuracy(net: nn.Module, task: Task, s: Settings, device: torch.device) -> float:
    """Share of the test rows whose largest logit is at the label, in %."""
    net.eval()
    right = torch.zeros((), dtype=torch.int64, device=device)
    for x, y in zip(*(torch.split(part, EVALUATED) for part in (task.test.inputs, task.test.labels)), strict=True):
        with _precision(s, device):
            logits = net(task.prepare(x.to(device), None))
        right += (logits.argmax(1) == y.to(device)).sum()
    return 100 * int(right) / len(task.test)


def _save(path: Path, job: Job, net: nn.Module, optimizer: Optimizer, progress: Progress) -> None:
    """A kill in mid-write leaves the file of the epoch before."""
    draft = path.with_suffix(".part")
    states = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({"key": job.key, "progress": vars(progress), **states}, draft)
    os.replace(draft, path)


def _load(path: Path | None, job: Job, net: nn.Module, optimizer: Optimizer, ranks: Ranks) -> Progress:
    """Brings net and optimizer to where the checkpoint was, on all ranks by what rank 0 reads; returns its progress."""
    found: dict[str, Any] | None = None
    if path is not None and ranks.first and path.exists():
        found = torch.load(path, map_location="cpu", weights_only=True)
    found = ranks.shared(found)
    if found is None:
        return Progress()
    if found["key"] != job.key:
        raise ValueError(f"{path}: got the checkpoint of run {found['key']}, expected that of {job.key}")
    net.load_state_dict(found["net"])
    optimizer.load_state_dict(found["optimizer"])
    return Progress(**found["progress"])
