"""The ops benchmark's own rules: bytes are counted, every way does the same work, targets are judged as they should.

Invariant: nothing is timed that fails its check; a wrong way or a missing compiler is an exit code.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import floor, ops
from bench.__main__ import main
from bench.op_cases import NETWORK, cases, sizes_of
from bench.op_check import Case, disagreement

ROOT = Path(__file__).parents[1]
MIB = 1 << 20
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def row(name: str, judged: str, ours: list[float], plain: list[float], bound: float = 1.0) -> ops.Row:
    return ops.Row(name, 3, 0, 1e9, bound, {"ours": ours, "plain": plain}, judged)


class FakeProgram:
    stores = ""

    def bandwidths(self, size: int, repeats: int) -> dict[str, float]:
        return dict.fromkeys(floor.WORDS, 1e9)


def find(name: str, dtype: torch.dtype = torch.float32) -> Case:
    return next(c for c in cases([500, 3, 20_000], dtype) if c.name == name)


def test_floor_counts_real_bytes() -> None:
    assert {k: floor.bytes_moved(k, 1000) for k in floor.WORDS} == {
        "copy": 8000,
        "triad": 12_000,
        "add": 12_000,
        "read": 4000,
    }
    limits = floor.Floor(bandwidth=8e9, read_bandwidth=4e9, draw_rate=1e9, stores="", array_bytes=0, runs=())
    assert limits.seconds(8e9, 0.5e9) == 1.0  # the memory is slower
    assert limits.seconds(8e9, 2e9) == 2.0  # drawing is
    assert limits.read_seconds(8e9) == 2.0


def test_reading_is_a_roofline_of_its_own_and_no_part_of_the_floor() -> None:
    class Program:
        stores = ""

    runs = [{"copy": 3e9, "triad": 5e9, "add": 4e9, "read": 7e9}, {"copy": 2e9, "triad": 1e9, "add": 6e9, "read": 8e9}]
    limits = floor.combined(Program(), 0, runs, [1e9, 2e9])  # type: ignore[arg-type]
    assert (limits.bandwidth, limits.read_bandwidth, limits.draw_rate) == (6e9, 8e9, 2e9)
    with torch.no_grad():
        found = {case.name: case.reads for case in cases([8], torch.float32) if case.words}
        assert [name for name, reads in found.items() if reads] == ["grad_norm_", "grad_norm_ adaptive"]
        norm, moving = (
            ops.row_of(find(name), {"ours": [1.0]}, limits, 1, torch.float32) for name in ("grad_norm_", "kick")
        )
    assert norm.over_read() == pytest.approx(1.0 / (4 / 8e9))
    assert norm.over_floor() == pytest.approx(1.0 / (4 / 6e9))
    assert moving.over_read() != moving.over_read()  # NaN: it writes


def test_cases_count_words_in_the_dtype_and_the_accumulator_in_float32() -> None:
    expected = {
        "perturb_ gaussian, first draw (saves)": (12, 6),
        "perturb_ gaussian, later draw": (8, 4),
        "perturb_ sphere, first draw (saves)": (12, 6),
        "perturb_ sphere, later draw": (8, 4),
        "perturb_ rademacher, first draw (saves)": (12, 6),
        "perturb_ rademacher, later draw": (8, 4),
        "grad_norm_": (4, 2),
        "grad_norm_ adaptive": (8, 4),
        "ascend_": (12, 6),
        "ascend_ first (saves)": (16, 8),
        "norm_ascend_": (16, 8),
        "accumulate_ assign": (8, 6),
        "accumulate_ blend": (12, 10),
        "accumulate_perturb_": (20, 14),
        "take_direction_": (20, 16),
        "add_direction_": (16, 16),
        "restore_": (8, 4),
        "tilted_reduce, s=3": (16, 8),
        "leapfrog": (20, 10),
        "kick": (12, 6),
        "leapfrog_": (20, 10),
        "kick_": (12, 6),
        "perturb": (8, 4),
    }
    for k, dtype in enumerate((torch.float32, torch.bfloat16)):
        found = {c.name: c.moved_bytes(1, dtype) for c in cases([8], dtype)}
        assert {name: counts[k] for name, counts in expected.items()} == {n: b for n, b in found.items() if b}


def test_arrays_are_eight_caches_and_fit(tmp_path: Path) -> None:
    assert floor.array_bytes(32 * MIB, 4096 * MIB) == 256 * MIB
    assert floor.array_bytes(MIB + 1, 4096 * MIB) == 9 * MIB  # whole mebibytes, rounded up
    with pytest.raises(floor.FloorError, match="do not fit"):
        floor.array_bytes(32 * MIB, 1024 * MIB)
    for index, size in enumerate(("32K", "1024K", "33M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert floor.cache_bytes(tmp_path) == 33 * MIB


@needs_compiler
def test_the_program_does_its_work_with_any_number_of_threads() -> None:
    # It checks its arrays itself: 16 elements leave two of three threads without any.
    program = floor.Program()
    for elements, threads in ((16, 3), (48, 1), (4096, 2)):
        times = program.seconds(elements, threads, 3)
        assert list(times) == list(floor.WORDS)
        assert all(len(found) == 3 and min(found) > 0 for found in times.values())
    with pytest.raises(floor.FloorError, match="argument"):
        program.seconds(17, 1, 3)


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("stream(a + i, load(b + i))", "stream(a + i, load(c + i))"),
        ("mul(s, load(c + i))", "load(c + i)"),
        ("add(load(a + i), load(b + i))", "load(b + i)"),
        ("run(kernel, a.data, b.data, c.data, begin, end)", "run(kernel, a.data, b.data, c.data, begin, end - 16)"),
        ("read(shape, c.data, begin, end)", "read(shape, c.data, begin, end - 16)"),
        ("read(shape, c.data, begin, end)", "read(shape, b.data, begin, end)"),
        ("p + (s * part + k) * kLanes", "p + k * kLanes"),
        ("k = Streams * part; k", "k = Streams * part + 1; k"),
    ],
)
def test_the_program_notices_wrong_results(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = floor.SOURCE.read_text()
    assert text.count(right) == 1
    source = tmp_path / "floor.cpp"
    source.write_text(text.replace(right, wrong))
    monkeypatch.setattr(floor, "SOURCE", source)
    with pytest.raises(floor.FloorError, match="wrong"):
        floor.Program().seconds(4096, 3, 2)  # parts that no number of streams divides


@pytest.mark.parametrize("sizes", [[1], [5, 4096, 3, 70_001]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ways_compute_the_same(sizes: list[int], dtype: torch.dtype) -> None:
    with torch.no_grad():
        for case in cases(sizes, dtype):
            if case.scale is not None and sum(sizes) < 1000:
                continue  # one normal has no moments
            assert case.compiled is not None
            for name, way in {**case.ways(), "compiled, eagerly": case.compiled}.items():
                assert not disagreement(case, way, dtype), (case.name, name)


def test_a_way_that_does_something_else_is_refused() -> None:
    with torch.no_grad():
        for case in cases([500, 3, 20_000], torch.float32):
            if case.name.startswith(("tilted", "grad_norm", "kick")):
                assert disagreement(case, lambda: torch.zeros(()), torch.float32), case.name
            elif case.name == "leapfrog":
                assert disagreement(case, lambda: (torch.zeros(()), torch.zeros(())), torch.float32)
            else:
                assert disagreement(case, lambda: None, torch.float32), case.name


@pytest.mark.parametrize("scale", [1.03, 0.97])
@pytest.mark.parametrize("noise", ["gaussian", "sphere", "rademacher"])
def test_noise_of_another_scale_or_shape_is_refused(noise: str, scale: float) -> None:
    case = next(c for c in cases([150_000], torch.float32) if c.name == f"perturb_ {noise}, later draw")
    with torch.no_grad():
        position, saved = case.result(None)  # the tensors themselves
        assert not disagreement(case, case.plain, torch.float32)
        assert disagreement(case, lambda: position.normal_().mul_(scale).add_(saved), torch.float32)
        assert disagreement(case, lambda: position.uniform_(-(3**0.5), 3**0.5).add_(saved), torch.float32)


@pytest.mark.parametrize(
    ("ours", "plain", "bound", "judged", "shown"),
    [
        ([1.0, 1.0, 1.0], [6.0, 6.1, 6.2], 9.0, "noise", True),
        ([1.0, 1.0, 1.0], [5.9, 5.9, 9.0], 9.0, "noise", False),  # the median counts
        ([1.0, 2.0, 3.0], [6.0, 12.0, 18.0], 9.0, "noise", True),  # paired by round
        ([1.36, 1.34], [1.0, 1.0], 1.0, "memory", True),  # the best counts
        ([1.36, 1.36], [9.0, 9.0], 1.0, "memory", False),
        ([9.0, 9.0], [1.0, 1.0], 1.0, "", True),
        ([float("nan")], [float("nan")], 1.0, "noise", False),
        ([float("nan")], [float("nan")], 1.0, "memory", False),
    ],
)
def test_the_targets(ours: list[float], plain: list[float], bound: float, judged: str, shown: bool) -> None:
    wrong = ops.missed([row("op", judged, ours, plain, bound)])
    assert (not wrong) is shown, wrong


def test_the_targets_are_those_of_these_ops() -> None:
    judged = {c.name: c.judged for c in cases([8], torch.float32) if c.judged}
    assert judged == {
        "perturb_ gaussian, first draw (saves)": "noise",
        "grad_norm_": "memory",
        "ascend_": "memory",
        "accumulate_ blend": "memory",
    }


def test_ways_take_turns() -> None:
    order: list[str] = []
    case = replace(find("restore_"), calls=1)
    ways = {name: (lambda name=name: order.append(name)) for name in "ABC"}
    found = ops.measure(case, ways, 4, torch.ones(16))
    assert order == list("ABC") * 5  # one turn of warm-up
    assert all(len(times) == 4 for times in found.values())


@pytest.mark.parametrize(("load", "warned"), [(0.1, False), (3.0, True)])
def test_the_table_says_when_the_machine_was_busy(load: float, warned: bool) -> None:
    limits = {
        "bandwidth": 1e9,
        "read_bandwidth": 1e9,
        "stores": "",
        "array_bytes": 0,
        "draw_rate": 1e9,
        "runs": [{"copy": 1.0}] * 3,
    }
    where = dict.fromkeys(("date", "processor", "threads", "isa", "torch", "command", "dtype", "tensors", "rounds"), "")
    reading = replace(row("norm", "", [1.0], [2.0]), roof=0.8)
    text = ops.markdown(
        [row("op", "", [1.0], [2.0]), reading], {**where, "elements": 1, "load": load, "floor": limits, "notes": []}
    )
    assert ("do not quote" in text) is warned
    assert "| norm | 3 | 1000.00 | 1000.00 | 1.00 | 1.25 | 1.0 | 2000.00" in text
    assert "| op | 3 | 1000.00 | 1000.00 | 1.00 |  | 1.0 | 2000.00, ×2.00 [2.00, 2.00] |" in text


def test_sizes_add_up() -> None:
    assert len(NETWORK) == 62
    assert sum(NETWORK) == 11_689_512
    assert sizes_of(11_689_512, None) == NETWORK
    for elements, tensors in ((10_000_000, None), (1_000_000, None), (10, None), (10, 3), (2, 5)):
        sizes = sizes_of(elements, tensors)
        assert sum(sizes) == elements
        assert min(sizes) > 0
    assert sizes_of(10, 3) == [3, 3, 4]


@needs_compiler
def test_quick_run_from_end_to_end(tmp_path: Path) -> None:
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "bench", "ops", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (
        end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime < 300
    )  # 7 s on the clock of one idle machine, 40 on that of another
    assert "no targets" in done.stdout
    assert (tmp_path / "ops-quick.md").read_text() in done.stdout
    assert (tmp_path / "ops-quick.png").stat().st_size > 10_000
    kept = json.loads((tmp_path / "ops-quick.json").read_text())
    where = kept["environment"]
    assert {"date", "processor", "torch", "isa", "threads", "command", "floor"} <= where.keys()
    assert where["command"] == "python -m bench ops --quick"
    assert where["elements"] == 1_000_000
    runs = where["floor"]["runs"]
    assert [list(run) for run in runs] == [list(floor.WORDS)] * 2  # before and after
    assert where["floor"]["bandwidth"] / 1e9 == pytest.approx(
        max(v for run in runs for kernel, v in run.items() if kernel != floor.READ)
    )
    assert where["floor"]["read_bandwidth"] / 1e9 == pytest.approx(max(run[floor.READ] for run in runs))
    assert [r["name"] for r in kept["results"]] == [c.name for c in cases([8], torch.float32)]
    for result in kept["results"]:
        assert {"ours", "plain"} <= result["seconds"].keys()
        assert all(len(times) == 3 and min(times) > 0 for times in result["seconds"].values())
        assert result["name"] in done.stdout
        want = max(
            result["moved_bytes"] / where["floor"]["bandwidth"], result["draws"] * 1e6 / where["floor"]["draw_rate"]
        )
        assert result["floor"] == pytest.approx(want)
        reads = result["name"].startswith("grad_norm_")
        assert result["roof"] == pytest.approx(reads * result["moved_bytes"] / where["floor"]["read_bandwidth"])


def test_without_a_compiler_it_says_so_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["ops", "--quick", "--out", str(tmp_path)]) == 2
    assert "no g++" in capsys.readouterr().err


def test_a_way_that_computes_something_else_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        broken = replace(find("restore_"), plain=lambda: None)
    monkeypatch.setattr(ops, "cases", lambda sizes, dtype: [broken])
    monkeypatch.setattr(ops.floor.Program, "__init__", lambda self: None)
    monkeypatch.setattr(ops.floor.Program, "bandwidths", lambda self, size, repeats: {})
    assert main(["ops", "--quick", "--out", str(tmp_path)]) == 1
    assert "WRONG: restore_: torch, loop computes something else: result 0 differs" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("seconds", "code"), [(1.3, 0), (1.4, 1)])
def test_strict_fails_on_a_missed_target(
    seconds: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = row("ascend_", "memory", [seconds], [9.0])
    monkeypatch.setattr(ops, "_C", SimpleNamespace(__isa__="avx512"))
    monkeypatch.setattr(ops, "cases", lambda sizes, dtype: [find("ascend_")])
    monkeypatch.setattr(ops, "measure", lambda *given: measured.seconds)
    monkeypatch.setattr(ops, "row_of", lambda *given: measured)
    monkeypatch.setattr(ops.floor, "Program", FakeProgram)
    monkeypatch.setattr(ops.floor, "draw_rate", lambda repeats: 1e9)
    arguments = ["ops", "--no-compile", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert main([*arguments, "--strict"]) == code
    assert ("TARGET MISSED: ascend_ takes 1.40 times the floor, allowed 1.35" in capsys.readouterr().out) is bool(code)


def test_an_unknown_op_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ops", "--quick", "--ops", "dance", "--out", str(tmp_path)]) == 2
    assert "dance" in capsys.readouterr().err
