"""What a step will be, from the optimizer's groups and settings as they are now: its table, its ranks, its estimate.

Invariant: nothing is moved here; ranks may compare themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from . import checkpoint
from .estimates import Estimate, PlainEstimate, Step
from .loss_scale import Scaler
from .processes import Processes
from .progress import Progress
from .settings import Settings
from .shards import drop_gathered, sharded_modules
from .table import Table, others_of
from .together import ALONE

Kind = Literal["sampled", "plain", "visit", "two steps"]


def planned(
    kind: Kind,
    groups: list[dict[str, Any]],
    names: Mapping[str, str],
    *,
    settings: Settings,
    progress: Progress,
    processes: Processes,
    model: nn.Module | None,
    scaler: Scaler,
) -> Estimate:
    """The estimate of the coming step, or of what moves the parameters outside one: a visit, SAM's two steps."""
    modules = [] if model is None else list(model.modules())
    sharded = sharded_modules(modules) if modules else []
    if sharded:
        drop_gathered(sharded)  # or its modules would show gathered copies in place of their parameters
    others, default_radius = others_of(modules, groups), settings.default_radius
    table = Table.of(groups, names, progress.step, others, known=progress.table, default_radius=default_radius)
    progress.table = table
    if table.own:
        progress.step_to(table.tensors[0].device)  # the model may have moved since
    plain = kind == "plain"
    num_samples = 1 if plain else settings.num_samples

    def facts() -> list[tuple[str, str]]:  # what ranks compare
        shapes = " ".join(f"{tuple(p.shape)} {p.dtype}" for p in table.parameters[: table.own])
        options = [{k: v for k, v in group.items() if _is_plain(v)} for group in groups]
        return [
            ("the number, shapes or dtypes of parameters", shapes),
            ("settings", settings.compared),
            ("options of parameter groups", repr([sorted(group.items()) for group in options])),
            ("the step", str(int(progress.step))),
            ("the noise scheme", checkpoint.NOISE_SCHEME),
        ]

    together = ALONE
    if processes.alone:
        processes.check_alone(table)
        progress.belong("")
    else:
        processes.look(table, (progress.loads, *(len(group["params"]) for group in groups)))
        ranked: dict[str, Any] = {"table": table, "modules": modules, "num_samples": num_samples}
        ranked |= {"seeded": progress, "facts": facts}
        if kind in ("sampled", "plain"):
            together = processes.step(plain=plain, **ranked)
        else:
            together = processes.visit(steps=kind == "two steps", **ranked)
    step = Step(
        table=table,
        scratch=progress.scratch,
        seed=progress.signed_seed,
        count=progress.step,
        num_samples=num_samples,
        tilt=settings.tilt_at(progress.step) if kind == "sampled" else 0.0,
        split=settings.split and not plain,
        skip_nonfinite_loss=settings.skip_nonfinite_loss,
        same_masks=settings.same_masks,
        modules=modules,
        generators=settings.generators,
        scaler=scaler,
        rounding=settings.rounding,
        history=progress.history,
        sharded=sharded,
        together=together,
        carry=progress.carry if kind in ("sampled", "plain") else None,
    )
    return PlainEstimate(step) if plain else settings.sampler.estimate(step, progress.sampler_state)


def _is_plain(value: Any) -> bool:
    """Whether a value reads the same on all ranks where it is the same: no object, no tensor."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str))
