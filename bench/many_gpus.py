"""Counts what one training step communicates on many GPUs, per method: a model, counted, not measured.

METHODS has the counts of each method, ASSUMPTIONS every number that is assumed, each an option. A collective on R GPUs
takes bytes sent per GPU / bandwidth + launches x ceil(log2 R) hops of a tree x latency. Bytes are a ring's: 2 (R-1)/R
of its payload for an all-reduce, (R-1)/R for a gather or a scatter. Beyond one node there is a ring per NIC, and the
bandwidth is that of a node's NICs together, at most NVLink's. Small collectives (6 float64: losses, norms) are exposed,
others are hidden beneath a pass up to its own seconds, FLOP / (peak x utilisation), a backward twice a forward.
DDP: a gradient goes in buckets beneath its own backward; the mean as one flat vector, beneath the last backward (tail)
or after it (manual, local, samples; with samples each rank has s/R of them, rounded up). FSDP2: each pass gathers the
parameters beneath its forward, and again beneath its backward, where it scatters its gradient too.
Left out, so that communication is dearer than this: a ring's R-1 hops, a first gather and a last bucket, which nothing
covers, BatchNorm's buffers, what collectives take from the passes beside them, and the wait for the slowest rank.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .command import above_zero, add_command, cannot_run, command_line, positive, share
from .nets import resnet50_sizes, transformer_sizes
from .record import keep

Count = Callable[..., int]  # of s; also of ranks=1 and steps=1 (N, leapfrog steps per trajectory), by name
SAMPLES = 3
SMALL = 6 * 8  # bytes of a small collective
FIRST_BUCKET = 2**20  # bytes: DDP's first, the others have --bucket


@dataclass(frozen=True)
class Assumption:
    """A number that is assumed: an option of the command, and a line of what it prints."""

    key: str
    value: float
    unit: str
    words: str
    source: str
    kind: Callable[[str], float] = above_zero


ASSUMPTIONS = (
    Assumption("node", 8, "GPUs", "joined by NVLink, each with a NIC of its own", "data sheet, HGX H100", positive),
    Assumption("bandwidth_node", 450.0, "GB/s", "what a GPU sends over NVLink, one way", "data sheet, H100 SXM"),
    Assumption("bandwidth_network", 50.0, "GB/s", "what one NIC sends, 400 Gb/s", "data sheet, ConnectX-7"),
    Assumption("latency", 10.0, "µs", "one hop of a collective's tree, a share of the launch included", "a guess"),
    Assumption("peak", 989.0, "TFLOP/s", "one GPU in dense bfloat16", "data sheet, H100 SXM"),
    Assumption("utilisation", 0.4, "of the peak", "what passes reach (convolutions less)", "a guess", share),
    Assumption("batch", 64, "images", "per GPU and pass of ResNet-50, bfloat16 autocast", "our choice", positive),
    Assumption("tokens", 4096, "tokens", "per GPU and pass of the transformer", "our choice", positive),
    Assumption("bucket", 25.0, "MiB", "DDP closes a bucket once it holds as much", "PyTorch's default"),
)
DEFAULTS: Mapping[str, float] = {a.key: a.value for a in ASSUMPTIONS}


def _always(number: int) -> Count:
    return lambda s, **_: number


def _each(number: int) -> Count:
    return lambda s, **_: number * s


def _never(s: int, **_: int) -> int:
    return 0


def _mean_so_far(s: int, **_: int) -> int:
    """Only where there is a mean before the last sample."""
    return int(s > 1)


def _hmc(trajectory: int) -> Count:
    return lambda s, steps=1, **_: 1 + (steps + trajectory) * s


@dataclass(frozen=True)
class Method:
    """Counts per step and rank; a reduction is of one gradient's size. With FSDP2 each pass has its own, none is flat.

    ``hidden``: those beneath a backward, ``flat`` of them as one flat vector beneath the last, beside DDP's own.
    ``exposed``: those after the last backward, flat too. ``small``: small collectives; ``sharded``: so many more where
    parameters are sharded (norms, dot products), None: no row of its own with FSDP2.
    """

    gradients: Count
    hidden: Count
    exposed: Count
    small: Count
    flat: Count = _never
    sharded: Count | None = None


# Where the ranks act as one, each pass has a loss to reduce, and a trajectory of hmc what it is accepted by.
METHODS: dict[str, Method] = {
    "erm": Method(_always(1), _always(1), _never, _never, sharded=_never),
    "sam": Method(_always(2), _always(2), _never, _always(2), sharded=_always(1)),  # TSAM: one sample, radius 0
    "ascent tail": Method(_each(2), lambda s, **_: s + 1 + _mean_so_far(s), _never, _each(2), _mean_so_far, _each(1)),
    "ascent manual": Method(_each(2), _each(1), _always(1), _each(2)),
    "noise tail": Method(_each(1), lambda s, **_: 1 + _mean_so_far(s), _never, _each(1), _mean_so_far, _never),
    "noise manual": Method(_each(1), _never, _always(1), _each(1)),
    "ascent local": Method(_each(2), _never, _always(1), _always(1)),
    "ascent samples": Method(lambda s, ranks=1, **_: 2 * -(-s // ranks), _never, _always(1), _always(2)),
    # Gaussian; one pass at the beginning. Sharded: products of each kick and of a trajectory's last.
    "hmc": Method(_hmc(0), _hmc(0), _never, _hmc(1), sharded=lambda s, steps=1, **_: (steps + 1) * s),
}


@dataclass(frozen=True)
class Net:
    """Sizes of the parameters, bytes per gradient element, forward FLOP per unit, what FSDP2 wraps (0: DDP alone)."""

    sizes: tuple[int, ...]
    dtype: str
    word: int
    flop: float
    unit: str
    groups: int

    def passes(self, assumed: Mapping[str, float]) -> tuple[float, float]:
        """Seconds of a forward and of a backward."""
        forward = self.flop * assumed[self.unit] / (1e12 * assumed["peak"] * assumed["utilisation"])
        return forward, 2 * forward

    def buckets(self, mebibytes: float) -> int:
        """In how many launches DDP reduces a gradient (from its second step on): from the last parameter, in turn."""
        launches, held, limit = 0, 0, float(FIRST_BUCKET)
        for size in reversed(self.sizes):
            held += size * self.word
            if held >= limit:
                launches, held, limit = launches + 1, 0, mebibytes * 2**20
        return launches + (held > 0)


# Published: 4.1 G multiply-adds per image of 224 x 224; 2 FLOP per parameter and token. FSDP2: 32 blocks and the rest.
NETS = {
    "resnet50": Net(resnet50_sizes(), "float32", 4, 2 * 4.1e9, "batch", 0),
    "transformer-7b": Net(transformer_sizes(), "bfloat16", 2, 2.0 * sum(transformer_sizes()), "tokens", 33),
}


def payload(net: str) -> int:
    """Bytes of one gradient of a net of NETS, which is what one reduction reduces."""
    return sum(NETS[net].sizes) * NETS[net].word


def cost(
    net: str, by: str, name: str, ranks: int, s: int = SAMPLES, steps: int = 1, assumed: Mapping[str, float] = DEFAULTS
) -> dict[str, Any]:
    """One row: what a step of a method of METHODS communicates ``by`` DDP or FSDP2, bytes as a GPU sends them."""
    model, method = NETS[net], METHODS[name]
    forward, backward = model.passes(assumed)
    network = assumed["bandwidth_network"] * assumed["node"] if ranks > assumed["node"] else float("inf")
    bandwidth = 1e9 * min(assumed["bandwidth_node"], network)
    hops = 1e-6 * assumed["latency"] * (ranks - 1).bit_length()
    part = (ranks - 1) / ranks
    moved = part * payload(net)  # by a gather or a scatter; an all-reduce is one of each
    counts = (method.gradients, method.hidden, method.exposed, method.small, method.flat, method.sharded or _never)
    gradients, hidden, exposed, small, flat, sharded = (count(s, ranks=ranks, steps=steps) for count in counts)
    if by == "DDP":
        buckets, own, gathers = model.buckets(assumed["bucket"]), hidden - flat, 0
        one, whole = buckets * hops + 2 * moved / bandwidth, hops + 2 * moved / bandwidth
        launches, sent = own * buckets + flat + exposed, 2 * moved * (hidden + exposed)
        seconds = own * one + (flat + exposed) * whole
        bare = exposed * whole + max(own - 1, 0) * max(one - backward, 0.0)
        bare += max(one + flat * whole - backward, 0.0) if own else 0.0  # beneath the last backward
    else:
        if method.sharded is None or not model.groups:
            raise ValueError(f"cost: {by} has no row for the method {name!r} of {net!r}")
        small, hidden, exposed, gathers = small + sharded, gradients, 0, 2 * gradients
        one = model.groups * hops + moved / bandwidth
        launches, sent, seconds = 3 * gradients * model.groups, 3 * gradients * moved, 3 * gradients * one
        bare = gradients * (max(one - forward, 0.0) + max(2 * one - backward, 0.0))
    vectors = 2 * part * SMALL * small
    return {
        "net": net, "by": by, "method": name if by == "DDP" else name.split()[0], "gpus": ranks, "samples": s,
        "leapfrog_steps": steps, "gradients": gradients, "reductions_hidden": hidden, "reductions_exposed": exposed,
        "gathers": gathers, "small": small, "launches": launches + small, "bytes_sent": sent + vectors,
        "seconds_of_passes": gradients * (forward + backward), "seconds_hidden": seconds - bare,
        "seconds_exposed": bare + small * hops + vectors / bandwidth,
    }  # fmt: skip


def costs(gpus: list[int], s: int, steps: int, assumed: Mapping[str, float]) -> list[dict[str, Any]]:
    """All rows: each net and way to share the work, each method that it has, each number of GPUs."""
    ways = [(net, by) for net, model in NETS.items() for by in ("DDP", "FSDP2") if by == "DDP" or model.groups]
    pairs = [(*way, m) for way in ways for m in METHODS if way[1] == "DDP" or METHODS[m].sharded is not None]
    return [cost(*pair, ranks, s, steps, assumed) for pair in pairs for ranks in gpus]


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def _table(head: str, lines: list[list[object]]) -> str:
    columns = [f" {name.strip()} " for name in head.split("|")]
    rows = ["|".join(columns), "|".join("---" for _ in columns), *(f" {' | '.join(map(str, row))} " for row in lines)]
    return "\n".join(f"|{row}|" for row in rows)


def markdown(rows: list[dict[str, Any]], gpus: list[int], assumed: Mapping[str, float]) -> str:
    """What is assumed, the nets, the steps: a line for all numbers of GPUs, counts and bytes those of the last."""
    title = f"Counted, not measured: s = {rows[0]['samples']}, hmc gaussian with N = {rows[0]['leapfrog_steps']}."
    given: list[list[object]] = [[a.key, f"{assumed[a.key]:g} {a.unit}", a.words, a.source] for a in ASSUMPTIONS]
    nets: list[list[object]] = []
    for name, net in NETS.items():
        size, flop = f"{_short(payload(name) / 1e9)} GB, {net.dtype}", f"{net.flop / 1e9:.3g}"
        milliseconds = [_short(1e3 * seconds) for seconds in net.passes(assumed)]
        nets.append([name, f"{sum(net.sizes):,}", size, net.buckets(assumed["bucket"]), flop, *milliseconds])
    lines: list[list[object]] = []
    for first in range(0, len(rows), len(gpus)):
        group = rows[first : first + len(gpus)]
        row = group[-1]
        cells = [row["net"], row["by"], row["method"], row["gradients"], row["reductions_hidden"]]
        cells += [row["reductions_exposed"], row["small"], row["launches"], _short(row["bytes_sent"] / 1e9)]
        times = [[_short(1e3 * r[f"seconds_{kind}"]) for kind in ("exposed", "hidden")] for r in group]
        lines.append([*cells, _short(1e3 * row["seconds_of_passes"]), *map(" + ".join, times)])
    head = "net | by | method | gradients | reductions hidden | exposed | small | launches | GB sent | passes, ms"
    tables = [
        _table("assumed | value | what it is | source", given),
        _table("net | parameters | a gradient | DDP's buckets | GFLOP, one input | forward, ms | backward, ms", nets),
        _table(head + "".join(f" | {ranks:,} GPUs: exposed + hidden, ms" for ranks in gpus), lines),
    ]
    return "\n\n".join([title, (__doc__ or "").strip(), *tables]) + "\n"


def add_parser(commands: Any) -> None:
    """Adds the command to python -m bench."""
    summary = "count what a step communicates on many GPUs; no GPU is needed"
    parser = add_command(commands, "many-gpus", run, __doc__, summary=summary)
    parser.add_argument("--gpus", type=positive, nargs="+", default=[8, 64, 1024], help="numbers of GPUs, R")
    parser.add_argument("--samples", type=positive, default=SAMPLES, help="s")
    parser.add_argument("--leapfrog-steps", type=positive, default=1, help="N of hmc")
    group = parser.add_argument_group("assumptions")
    for a in ASSUMPTIONS:
        told = f"{a.unit}: {a.words}; {a.source}"
        group.add_argument("--" + a.key.replace("_", "-"), type=a.kind, default=a.value, help=told)


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    if options.utilisation == 0:
        return cannot_run(options, "--utilisation 0: passes that compute nothing take for ever")
    assumed = {a.key: getattr(options, a.key) for a in ASSUMPTIONS}
    rows = costs(options.gpus, options.samples, options.leapfrog_steps, assumed)
    settings = {"model": "counted, not measured", "command": command_line(options), "assumptions": assumed}
    keep(options.out / "many-gpus", rows, settings, markdown(rows, options.gpus, assumed))
    return 0
