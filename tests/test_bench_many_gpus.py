"""``python -m bench many-gpus``: the counts of each method, and what the model makes of them.

Gradients are those that TSAM asks for, buckets those of DDP's own rule, bytes those of a ring that is walked here.
Whatever is assumed, hidden and exposed seconds add up to all seconds; all that is assumed is printed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bench import many_gpus
from bench.__main__ import main
from bench.many_gpus import ASSUMPTIONS, DEFAULTS, METHODS, NETS, SMALL, Net, cost, payload
from tsam_ext import HMC, TSAM

SHARDED = [name for name, method in METHODS.items() if method.sharded is not None]


def counts(name: str, s: int, **others: int) -> tuple[int, ...]:
    """Gradients, reductions hidden, exposed, small collectives, more of them where parameters are sharded."""
    method = METHODS[name]
    of = (method.gradients, method.hidden, method.exposed, method.small, *([method.sharded] if method.sharded else []))
    return tuple(count(s, **others) for count in of)


def assume(**others: float) -> Mapping[str, float]:
    return {**DEFAULTS, **others}


def gigabytes_per_second(value: float) -> Mapping[str, float]:
    """One bandwidth everywhere, and no latency: a reduction over two GPUs takes payload / bandwidth."""
    return assume(bandwidth_node=value, bandwidth_network=value, latency=0.0)


@pytest.mark.parametrize("s", [1, 2, 3, 7])
def test_the_counts_are_those_of_the_methods(s: int) -> None:
    last = 1 if s == 1 else 2  # the mean so far and the last gradient; of one sample there is the gradient alone
    assert counts("ascent tail", s) == (2 * s, s + last, 0, 2 * s, s)
    assert counts("ascent manual", s) == (2 * s, s, 1, 2 * s)
    assert counts("noise tail", s) == (s, last, 0, s, 0)
    assert counts("noise manual", s) == (s, 0, 1, s)
    assert counts("ascent local", s) == (2 * s, 0, 1, 1)
    for n in (1, 2, 4):
        passes = 1 + n * s
        assert counts("hmc", s, steps=n) == (passes, passes, 0, passes + s, n * s + s)
    for ranks, each in ((1, s), (2, (s + 1) // 2), (8, 1), (1024, 1)):
        assert counts("ascent samples", s, ranks=ranks) == (2 * each, 0, 1, 2)
    # SAM is the ascent of one sample, whatever the number of samples of the others is.
    assert counts("sam", s) == counts("ascent tail", 1) == (2, 2, 0, 2, 1)
    assert counts("erm", s) == (1, 1, 0, 0, 0)


def test_a_tail_takes_one_reduction_more_and_exposes_none() -> None:
    assert len(METHODS) == 9
    for name, method in METHODS.items():
        for s in (1, 2, 5):
            assert method.exposed(s) == int(name.split()[-1] in ("manual", "local", "samples"))
            assert method.flat(s) == int(name.endswith("tail") and s > 1)
            # No more gradients go by DDP than there are backwards.
            assert 0 <= method.hidden(s) - method.flat(s) <= method.gradients(s)
            assert method.hidden(s) + method.exposed(s) >= 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sam", {"radius": 0.0, "num_samples": 1}),
        ("ascent tail", {"num_samples": 3}),
        ("ascent manual", {"num_samples": 3}),
        ("noise tail", {"sampler": "noise", "num_samples": 3}),
        ("noise manual", {"sampler": "noise", "num_samples": 2}),
        ("hmc", {"sampler": "hmc", "num_samples": 3}),
        ("hmc", {"sampler": HMC(num_leapfrog_steps=4), "num_samples": 2}),
    ],
)
def test_the_gradients_are_those_that_the_optimizer_asks_for(name: str, options: dict[str, Any]) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, asked = TSAM([weight], lr=0.01, **options), 0

    def closure() -> torch.Tensor:
        nonlocal asked
        asked += 1
        loss = (weight**2).sum()
        loss.backward()
        return loss

    for step in range(1, 3):
        optimizer.step(closure)
        sampler = options.get("sampler")
        steps = sampler.num_leapfrog_steps if isinstance(sampler, HMC) else 1
        assert asked == step * METHODS[name].gradients(options["num_samples"], steps=steps)


def test_the_sizes_are_those_of_the_published_nets() -> None:
    assert {name: sum(net.sizes) for name, net in NETS.items()} == {
        "resnet50": 25_557_032,
        "transformer-7b": 6_738_415_616,
    }
    assert len(NETS["resnet50"].sizes) == 161 and len(NETS["transformer-7b"].sizes) == 291
    assert payload("resnet50") == 4 * 25_557_032 and payload("transformer-7b") == 2 * 6_738_415_616
    # 64 images of 3 x 8.2 GFLOP and 4096 tokens of 6 per parameter, at 40% of 989 TFLOP/s.
    times = {name: sum(net.passes(DEFAULTS)) for name, net in NETS.items()}
    assert times["resnet50"] == pytest.approx(64 * 3 * 8.2e9 / 395.6e12)
    assert times["transformer-7b"] == pytest.approx(6 * 6_738_415_616 * 4096 / 395.6e12)


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("cap", [25.0, 1.0, 3.5])
def test_buckets_are_those_of_ddp(cap: float) -> None:
    # The last tensor fills the first bucket exactly.
    small = Net((70_000, 300_000, 5, 2_000_000, 262_144, 10, 1_000_000, 262_144), "float32", 4, 1.0, "batch", 0)
    for net in (small, NETS["resnet50"]):
        params = [torch.empty(size) for size in reversed(net.sizes)]
        caps = [dist._DEFAULT_FIRST_BUCKET_BYTES, int(cap * 2**20)]
        buckets, _ = dist._compute_bucket_assignment_by_size(params, caps)
        assert net.buckets(cap) == len(buckets) > 1


def sent_by_a_ring(ranks: int, elements: int) -> tuple[list[int], list[int]]:
    """Elements that each rank sends in a reduce-scatter and in an all-gather around a ring; the sums are checked."""
    chunk = elements // ranks
    held = torch.arange(ranks).repeat_interleave(elements).view(ranks, ranks, chunk) + 1
    total, sent = held.sum(0), ([0] * ranks, [0] * ranks)
    for phase, start in enumerate((0, 1)):
        for turn in range(ranks - 1):
            before = held.clone()
            for rank in range(ranks):
                piece, to = (rank + start - turn) % ranks, (rank + 1) % ranks
                held[to, piece] = before[rank, piece] + (before[to, piece] if phase == 0 else 0)
                sent[phase][rank] += chunk
    assert (held == total).all()
    return sent


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_the_bytes_are_those_of_a_ring(ranks: int) -> None:
    net, elements = NETS["transformer-7b"], 24
    scatter, gather = sent_by_a_ring(ranks, elements)
    assert len({*scatter, *gather}) == 1
    per_element = payload("transformer-7b") / elements
    assert net.word == 2
    for name in METHODS:
        row = cost("transformer-7b", "DDP", name, ranks)
        vectors = row["small"] * SMALL / elements * (scatter[0] + gather[0])
        reductions = row["reductions_hidden"] + row["reductions_exposed"]
        assert row["bytes_sent"] == pytest.approx(
            reductions * (scatter[0] + gather[0]) * per_element + vectors, rel=1e-12
        )
    for name in SHARDED:
        row = cost("transformer-7b", "FSDP2", name, ranks)
        vectors = row["small"] * SMALL / elements * (scatter[0] + gather[0])
        each = scatter[0] + 2 * gather[0]
        assert row["gathers"] == 2 * row["gradients"] == 2 * row["reductions_hidden"]
        assert row["bytes_sent"] == pytest.approx(row["gradients"] * each * per_element + vectors, rel=1e-12)


def test_launches() -> None:
    buckets = NETS["resnet50"].buckets(25.0)
    found = {name: cost("resnet50", "DDP", name, 8)["launches"] for name in METHODS}
    assert found["erm"] == buckets > 1 and found["sam"] == 2 * buckets + 2
    assert found["ascent tail"] == 4 * buckets + 1 + 6 and found["ascent manual"] == 3 * buckets + 1 + 6
    assert found["noise tail"] == buckets + 1 + 3 and found["noise manual"] == 1 + 3
    assert found["ascent local"] == 2 and found["ascent samples"] == 3 and found["hmc"] == 4 * buckets + 7
    sharded = {name: cost("transformer-7b", "FSDP2", name, 8)["launches"] for name in SHARDED}
    assert sharded == {"erm": 99, "sam": 198 + 3, "ascent tail": 594 + 9, "noise tail": 297 + 3, "hmc": 396 + 13}


@pytest.mark.parametrize("by", ["DDP", "FSDP2"])
def test_seconds_are_hidden_or_exposed_and_fast_passes_hide_nothing(by: str) -> None:
    for name in METHODS if by == "DDP" else SHARDED:
        for ranks in (8, 64, 1024):
            rows = [cost("transformer-7b", by, name, ranks, assumed=assume(peak=p)) for p in (1e-3, 989.0, 1e5, 1e12)]
            totals = [row["seconds_hidden"] + row["seconds_exposed"] for row in rows]
            assert totals == pytest.approx([totals[0]] * 4)
            exposed = [row["seconds_exposed"] for row in rows]
            assert exposed == sorted(exposed) and rows[-1]["seconds_hidden"] == pytest.approx(0.0, abs=1e-4)
            always = cost("transformer-7b", by, name, ranks, assumed=assume(peak=1e-9))
            alone = METHODS[name].exposed(3) if by == "DDP" else 0
            hops = {8: 3, 64: 6, 1024: 10}[ranks] * 10e-6
            bandwidth = 450e9 if ranks == 8 else 400e9
            whole = 2 * (ranks - 1) / ranks * payload("transformer-7b") / bandwidth + hops
            assert always["seconds_exposed"] == pytest.approx(alone * whole + always["small"] * hops, abs=1e-8)


def test_the_last_backward_covers_two_reductions_of_a_tail() -> None:
    net = NETS["resnet50"]
    forward, backward = net.passes(DEFAULTS)
    # Over two GPUs a reduction takes 0.8 of a backward: beneath the last one, 0.6 of it are left.
    slow = gigabytes_per_second(payload("resnet50") / (0.8 * backward) / 1e9)
    for name, left in (("ascent tail", 0.6), ("noise tail", 0.6), ("ascent manual", 0.8), ("noise manual", 0.8),
                       ("ascent local", 0.8), ("erm", 0.0), ("sam", 0.0), ("hmc", 0.0)):  # fmt: skip
        row = cost("resnet50", "DDP", name, 2, assumed=slow)
        assert row["seconds_exposed"] == pytest.approx(left * backward, rel=1e-5, abs=1e-8)
        assert row["seconds_of_passes"] == pytest.approx(row["gradients"] * (forward + backward))
    # Where it takes 1.5 of a backward, half of one is left at each pass that has one, and 2 at the last of a tail.
    slow = gigabytes_per_second(payload("resnet50") / (1.5 * backward) / 1e9)
    for name, left in (("erm", 0.5), ("sam", 1.0), ("ascent tail", 3 * 0.5 + 2.0), ("ascent manual", 3 * 0.5 + 1.5)):
        assert cost("resnet50", "DDP", name, 2, assumed=slow)["seconds_exposed"] == pytest.approx(
            left * backward, rel=1e-5
        )
    # FSDP2: a gather of 1.2 forwards is 0.2 too long there, and two of them 0.4 beneath a backward of two forwards.
    forward, _ = NETS["transformer-7b"].passes(DEFAULTS)
    slow = gigabytes_per_second(payload("transformer-7b") / 2 / (1.2 * forward) / 1e9)
    row = cost("transformer-7b", "FSDP2", "ascent tail", 2, assumed=slow)
    assert row["seconds_exposed"] == pytest.approx(6 * (0.2 + 0.4) * forward, rel=1e-5)


def test_the_narrower_of_nvlink_and_a_nodes_nics_counts_beyond_a_node() -> None:
    def rate(ranks: int, **others: float) -> float:
        row = cost("resnet50", "DDP", "noise manual", ranks, 1, assumed=assume(latency=0.0, **others))
        return float(row["bytes_sent"] / row["seconds_exposed"] / 1e9)

    assert rate(8) == pytest.approx(450.0) and rate(9) == pytest.approx(400.0)
    assert rate(8, bandwidth_network=1.0) == pytest.approx(450.0)
    assert rate(64, bandwidth_network=100.0) == pytest.approx(450.0)
    assert rate(64, node=4) == pytest.approx(200.0) and rate(8, node=4) == pytest.approx(200.0)


def test_one_gpu_sends_nothing_and_hops_grow_by_doubling() -> None:
    alone = cost("resnet50", "DDP", "ascent manual", 1)
    assert alone["bytes_sent"] == alone["seconds_exposed"] == alone["seconds_hidden"] == 0.0
    wide = assume(bandwidth_node=1e15, bandwidth_network=1e15)
    hops = [
        cost("resnet50", "DDP", "ascent local", r, assumed=wide)["seconds_exposed"] / 20e-6 for r in (2, 3, 8, 9, 1024)
    ]
    assert hops == pytest.approx([1, 2, 3, 4, 10])


@pytest.mark.parametrize(("net", "name"), [("resnet50", "erm"), ("transformer-7b", "ascent local")])
def test_there_is_no_row_where_fsdp2_does_not_apply(net: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"FSDP2 has no row for the method '{name}' of '{net}'"):
        cost(net, "FSDP2", name, 8)


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["many-gpus", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "many-gpus.md").read_text()
    assert text in capsys.readouterr().out and text.startswith("Counted, not measured") and "Left out" in text
    for a in ASSUMPTIONS:
        assert f"| {a.key} | {a.value:g} {a.unit} | {a.words} | {a.source} |" in text
    found = json.loads((tmp_path / "many-gpus.json").read_text())
    assert found["environment"]["model"] == "counted, not measured"
    assert found["environment"]["assumptions"] == dict(DEFAULTS)
    rows = found["results"]
    assert len(rows) == 3 * (2 * len(METHODS) + len(SHARDED)) and {row["gpus"] for row in rows} == {8, 64, 1024}
    assert {row["method"] for row in rows if row["by"] == "FSDP2"} == {"erm", "sam", "ascent", "noise", "hmc"}
    assert rows == many_gpus.costs([8, 64, 1024], 3, 1, DEFAULTS)
    # 5 buckets of 3, 6 and 10 hops of 10 µs each, and 2 (R-1)/R of 0.1022 GB at 450, 400 and 400 GB/s.
    times = "0 + 0.548 | 0 + 0.803 | 0 + 1.01"
    assert f"| resnet50 | DDP | erm | 1 | 1 | 0 | 0 | 5 | 0.204 | 3.98 | {times} |\n" in text
    assert text.count("| DDP |") == 2 * len(METHODS) and text.count("| FSDP2 |") == len(SHARDED)


def test_the_options_are_what_is_assumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {a.key: 0.5 * a.value if a.key == "utilisation" else 2 * a.value for a in ASSUMPTIONS}
    words = [w for a in ASSUMPTIONS for w in ("--" + a.key.replace("_", "-"), str(given[a.key]))]
    words += ["--gpus", "2", "16", "--samples", "5", "--leapfrog-steps", "2", "--out", str(tmp_path)]
    assert main(["many-gpus", *words]) == 0
    found = json.loads((tmp_path / "many-gpus.json").read_text())
    assert found["environment"]["assumptions"] == given
    assert found["results"] == many_gpus.costs([2, 16], 5, 2, given) != many_gpus.costs([2, 16], 5, 2, DEFAULTS)
    assert found["environment"]["command"].startswith("python -m bench many-gpus --gpus 2 16 --samples 5")
    assert main(["many-gpus", "--utilisation", "0", "--out", str(tmp_path / "none")]) == 2
    assert "--utilisation 0" in capsys.readouterr().err and not (tmp_path / "none").exists()
