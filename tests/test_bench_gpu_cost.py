"""``python -m bench gpu-cost``: the words of MATHEMATICS 6, the launches of csrc/cuda, floors that no kernel can beat.

A pass never moves more than the disassembled kernel can (bench/sass.py, WORDS). Launches are held against the emulated
CUDA ops, call by call, also for lists of more tensors than a table takes. Loops are found in a listing written by hand.
"""

from __future__ import annotations

import ctypes
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_cost, sass
from bench.__main__ import main
from bench.gpu_cost import PASSES, SAMPLERS, Pass, Recorder, record
from bench.gpus import GPUS
from tsam_ext import _C, HMC, Ascent, Noise

ROOT = Path(__file__).parents[1]
# Every way through an op that the model knows.
CASES: dict[str, dict[str, Any]] = {
    **SAMPLERS,
    "sphere": {"sampler": Ascent(noise="sphere")},
    "ball": {"sampler": Noise(noise="ball")},
    "rademacher": {"sampler": Ascent(noise="rademacher")},
    "antithetic": {"sampler": Ascent(antithetic=True)},
    "adaptive": {"adaptive": True},
    "adaptive SAM": {"adaptive": True, "radius": 0.0},
    "hmc, N=3": {"sampler": HMC(num_leapfrog_steps=3)},
    "hmc ball, N=2": {"sampler": HMC(num_leapfrog_steps=2, prior="ball")},
    "hmc ball, adaptive, fresh": {
        "sampler": HMC(num_leapfrog_steps=2, prior="ball", chain="fresh"),
        "adaptive": True,
    },
    "hmc, delta from the gradient": {"sampler": HMC(delta="auto")},
    "carried": {"every": 2},
}
CASES = {name: {"num_samples": 3, **options} for name, options in CASES.items()}


def passes(options: dict[str, Any], *, keep: bool = False) -> list[Pass]:
    return [p for _, made in record(options, 2, keep=keep).calls for p in made]


def words(options: dict[str, Any], *, keep: bool = False) -> int:
    return sum(p.words for p in passes(options, keep=keep))


@pytest.mark.parametrize("s", [1, 2, 5])
def test_the_words_are_those_of_the_formulas(s: int) -> None:
    assert words({"sampler": "noise", "num_samples": s}) == 5 * s
    assert words({"num_samples": s, "radius": 0.05}) == 9 * s
    # Where p.grad has memory, the first sample is copied into it.
    assert words({"num_samples": s, "radius": 0.05}, keep=True) == 9 * s + 2
    for n in (1, 2, 4):
        # Start 4, way back 2; N > 1 reads the start for the distance; the first mean is a gradient's memory, 2 less.
        rest = 4 + 2 + (s if n > 1 else 0) - 2
        for prior, passes_each in (("gaussian", 7), ("ball", 10)):
            sampler = HMC(num_leapfrog_steps=n, prior=prior)
            assert words({"sampler": sampler, "num_samples": s}) == s * (passes_each * n + 5) + rest


def test_the_words_of_sam() -> None:
    assert words({"num_samples": 1, "radius": 0.0}) == 7


def test_the_words_of_a_carried_direction() -> None:
    """Of a full step, beside it: the mean of the probes, of which the first is there; sums; the direction. Then later
    steps: the norm, and what is added to the plain gradient, which is where it is."""
    for s in (1, 2, 5):
        assert words({"num_samples": s, "radius": 0.05, "every": 3}) == 9 * s + 5 + 3 * (s - 1)
    assert words({"num_samples": 1, "radius": 0.0, "every": 3}) == 7 + 5
    later = record({"num_samples": 3, "every": 3}, 2, later=True)
    assert sum(p.words for _, made in later.calls for p in made) == 4
    assert later.syncs == 0


def test_no_pass_moves_more_than_its_kernel_can_and_each_maximum_is_reached() -> None:
    most: dict[str, tuple[int, int]] = {}
    for options in CASES.values():
        for p in passes(options):
            if p.words:
                reads, writes = most.get(p.kernel, (0, 0))
                most[p.kernel] = max(reads, p.reads), max(writes, p.writes)
    assert most == {kernel: limit for kernel, limit in sass.WORDS.items() if kernel in most}
    # The others are kernels of the differentiable ops, and one for half-precision parameters.
    others = {
        "weighted_sum<float, float, 4>",
        "leapfrog_chunks<float>",
        "kick_chunks<float>",
        "displacement_chunks<float>",
    }
    assert sass.WORDS.keys() - most.keys() == others


def test_a_table_takes_what_the_source_says() -> None:
    text = (ROOT / "csrc" / "cuda" / "apply.cuh").read_text()
    found = re.findall(r"kParameterBytes = (\d+), kFewBytes = (\d+), kOtherParameters = (\d+);", text)[0]
    parameters, few, others = map(int, found)
    fields = re.findall(
        r"^  (char\*|u?int64_t|double|int32_t|bool) \w+(?:\[L\])?;",
        text.split("struct TensorEntry")[1].split("};")[0],
        re.M,
    )
    assert fields == ["char*", "int64_t", "uint64_t", "double", "int32_t", "bool"]
    for lists in (1, 2, 3, 5, 7):
        entry = 8 * lists + 3 * 8 + 8
        assert gpu_cost.tensors_per_launch(lists) == (parameters - others - 8) // entry
        assert gpu_cost.tensors_per_launch(lists, few=True) == (few - others - 8) // entry
    full = gpu_cost.tensors_per_launch(2)
    assert [Pass("k", 2).launches(n) for n in (1, full, full + 1)] == [1, 1, 2]
    assert Pass("k").launches(10_000) == 1


class Watched(Recorder):
    """Notes beside each call what the emulation launched."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[int] = []
        self._count = ctypes.CDLL(_C.__file__).simt_launches
        self._count.restype = ctypes.c_uint64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, calls = self._count(), len(self.calls)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.calls) > calls:
            self.launched.append(self._count() - before)
        return result


SHORT = [(case, 2) for case in CASES]
# Tables of 7, 5, 3 and 2 lists overflow one after another.
LONG = [(case, tensors) for case in ("ascent, s=1", "sphere, s=1", "hmc, s=1") for tensors in (400, 500, 600, 700)]
CASES |= {
    "ascent, s=1": {"num_samples": 1, "radius": 0.05},
    "sphere, s=1": {"num_samples": 1, "sampler": Noise(noise="sphere")},
    "hmc, s=1": {"num_samples": 1, "sampler": HMC(prior="ball", chain="fresh", delta="auto")},
}


def test_the_long_lists_tell_the_numbers_of_lists_apart() -> None:
    fits = [[gpu_cost.tensors_per_launch(lists) >= n for lists in (2, 3, 5, 7)] for n in (400, 500, 600, 700)]
    assert [sum(row) for row in fits] == [3, 2, 1, 0]


@pytest.mark.emulated
@pytest.mark.parametrize(("case", "tensors"), [*SHORT, *LONG])
def test_each_op_launches_what_the_model_says(case: str, tensors: int) -> None:
    seen = Watched()
    record(CASES[case], tensors, seen)
    expected = [(op, sum(p.launches(tensors) for p in made)) for op, made in seen.calls]
    assert [(op, n) for (op, _), n in zip(seen.calls, seen.launched, strict=True)] == expected
    assert sum(seen.launched) > len(seen.launched) > 0


def test_floors_are_never_below_the_memory_and_grow_with_instructions() -> None:
    kernels = {p.kernel for options in SAMPLERS.values() for p in passes(options)}
    few, many = (dict.fromkeys(kernels, sass.Cost(cost)) for cost in (0.0, 1000.0))
    for cheap, dear in zip(gpu_cost.estimates("mlp", few), gpu_cost.estimates("mlp", many), strict=True):
        memory = cheap["words"] * 4 * cheap["elements"] / GPUS[gpu_cost.DEFAULT].bandwidth
        assert cheap["floor"] == pytest.approx(memory) == pytest.approx(dear["memory"])
        loops = cheap["estimate"].startswith("loops")
        assert (dear["floor"] == memory) if loops else (dear["floor"] > 5 * memory)
        assert loops == (cheap["syncs"] > 0)
    costs, gpu = {"k": sass.Cost(8.0, 4.0, 3.0, 2.0)}, GPUS["RTX 4090"]
    assert Pass("k", 2, idle=True).seconds(costs, gpu) == (0.0,) * 4 < Pass("k", 2).seconds(costs, gpu)


def test_a_slow_float64_pipe_is_a_floor_of_its_own() -> None:
    """A sum in float64, a product and a conversion an element: little on an H100, all of it on an RTX 4090."""
    one, costs = Pass("k", 2, reads=1), {"k": sass.Cost(5.5, 0.0, 1.0, 2.0)}
    memory, issued, narrow, wide = one.seconds(costs, GPUS["RTX 4090"])
    assert memory == 4 / 1.008e12 and wide == pytest.approx(2 / (128 * 2 * 2.52e9)) and issued < narrow * 10 < memory
    assert wide > 0.75 * memory and one.seconds(costs, GPUS["H100 SXM"])[3] < 0.15e-12
    for gpu in GPUS.values():  # the rates that the data sheets name, in TFLOPS
        assert gpu.rate(gpu.float64) <= gpu.rate(gpu.float32) / 2
    peaks = {name: 2e-12 * gpu.rate(gpu.float32) for name, gpu in GPUS.items()}
    named = {"H100 SXM": 67, "H200 SXM": 67, "A100 SXM 80 GB": 19.5, "L4": 30.3, "RTX 4090": 82.6, "RTX 5090": 104.8}
    assert peaks == pytest.approx(named, rel=0.01)


def test_a_read_on_the_host_is_counted() -> None:
    with Recorder() as seen:
        torch.ones(1).item()
    assert seen.syncs == 1 and seen.calls == []


def test_all_ops_of_an_estimate_are_known() -> None:
    called = {op for options in CASES.values() for op, _ in record(options, 2).calls}
    adapted = {op for op, _ in record({"sampler": HMC(adapt_step_size=True)}, 2).calls}
    later = {op for op, _ in record(CASES["carried"], 2, later=True).calls}
    # The last is for half-precision parameters alone.
    apart = {"grad_norm_", "ascend_"}  # where some parameters are saved and some are not
    assert called | adapted | later | apart | {"displacement_"} == PASSES.keys()


LISTING = """
code for sm_90
arch = sm_90
\t\tFunction : _ZN4tsam4cuda1kE
        /*0000*/                   LDC R1, c[0x0][0x28] ;            /* 0x0 */
        /*0010*/                   MUFU.RSQ R2, R3 ;                 /* 0x0 */
        /*0020*/                   STS.128 [R2], R4 ;                /* 0x0 */
        /*0030*/              @!P0 BRA 0x10 ;                        /* 0x0 */
        /*0040*/                   LDG.E.128 R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0050*/               @P1 BRA 0x70 ;                        /* 0x0 */
        /*0060*/                   FADD R4, R4, R5 ;                 /* 0x0 */
        /*0070*/              @UP0 STG.E.128 desc[UR4][R2.64], R4 ;  /* 0x0 */
        /*0080*/               @P0 BRA `(0x40) ;                     /* 0x0 */
        /*0090*/                   LDG.E R4, desc[UR4][R2.64] ;      /* 0x0 */
        /*00a0*/               @P0 BRA 0x90 ;                        /* 0x0 */
        /*00b0*/                   EXIT ;                            /* 0x0 */
\t\tFunction : _ZN4tsam4cuda1fE
        /*0000*/                   EXIT ;                            /* 0x0 */
        /*0010*/                   BRA 0x10 ;                        /* 0x0 */
"""


def test_a_turn_is_the_vector_loop_and_the_draw() -> None:
    (key, code), (_, other) = sass.kernels(LISTING.splitlines())
    assert key == ("_ZN4tsam4cuda1kE", "sm_90") and len(code) == 12
    ends = [(loop[0].address, loop[-1].address) for loop in sass.loops(code)]
    assert ends == [(0x10, 0x30), (0x40, 0x80), (0x90, 0xA0)]
    assert sass.accesses(code) == {"LDG.128": 1, "STG.128": 1, "LDG.32": 1}
    assert sorted(i.address for loop in sass.turn(code) for i in loop) == list(range(0x10, 0x90, 0x10))
    # A vector loop that draws by itself stands alone.
    inside = [
        sass.Instruction(i.address, "MUFU" if i.name == "FADD" else i.name, i.modifiers, i.operands) for i in code
    ]
    assert [[i.address for i in loop] for loop in sass.turn(inside)] == [list(range(0x40, 0x90, 0x10))]
    assert sass.turn(other) == []
    assert sass.cost(code) == sass.Cost(2.0, 0.25) and sass.cost(other) is None


def test_of_float64_the_usual_way_counts() -> None:
    """What a guarded branch jumps over is rare; what it jumps to from both sides is not."""
    text = """
arch = sm_80
Function : k
        /*0000*/  LDG.E.128 R4, [R2] ;
        /*0010*/  @P1 BRA 0x40 ;
        /*0020*/  DFMA R4, R4, R4, R6 ;
        /*0030*/  F2F.F64.F32 R4, R4 ;
        /*0040*/  DADD R4, R4, R6 ;
        /*0050*/  @P2 BRA 0x80 ;
        /*0060*/  FADD R4, R4, R6 ;
        /*0070*/  BRA 0xa0 ;
        /*0080*/  DADD R4, R4, R6 ;
        /*0090*/  DADD R4, R4, R6 ;
        /*00a0*/  MUFU.RCP64H R4, R5 ;
        /*00b0*/  @P0 BRA 0x0 ;
"""
    ((_, code),) = sass.kernels(text.splitlines())
    assert [i.pipe for i in code].count("float64") == 6
    assert sass.fewest(code, "float64") == 2 and sass.fewest(code, "float32") == 0
    assert sass.cost(code) == sass.Cost(3.0, 0.25, 0.0, 0.5)


def command(*arguments: str | Path) -> int:
    return main(["gpu-cost", *map(str, arguments)])


def test_without_a_library_the_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--library", tmp_path / "none.so", "--out", tmp_path / "out") == 2
    assert f"there is no file {tmp_path / 'none.so'}" in capsys.readouterr().err
    wheel = shutil.make_archive(str(tmp_path / "empty"), "zip", ROOT / "bench", "__init__.py")
    Path(wheel).rename(tmp_path / "empty.whl")
    assert command("--library", tmp_path / "empty.whl") == 2
    assert "empty.whl holds no libtsam_cuda.so" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def programs(folder: Path, listing: str, names: str) -> None:
    for name, text in (("cuobjdump", listing), ("c++filt", names)):
        (folder / f"{name}.txt").write_text(text)
        (folder / name).write_text(f'#!/bin/sh\nwhile read -r line; do echo "$line"; done < "{folder}/{name}.txt"\n')
        (folder / name).chmod(0o755)


def test_without_a_disassembler_or_a_kernel_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / sass.LIBRARY
    library.touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command("--library", library) == 2
    assert "cuobjdump is not on PATH" in capsys.readouterr().err
    (tmp_path / "cuobjdump").write_text("#!/bin/sh\necho no device code >&2\nexit 3\n")
    (tmp_path / "cuobjdump").chmod(0o755)
    assert command("--library", library) == 2
    assert f"{library} exits 3: no device code" in capsys.readouterr().err
    programs(tmp_path, LISTING, "tsam::cuda::f()\nvoid tsam::cuda::perturb_chunks<float>(int)\n")
    assert command("--library", library, "--lists", "mlp") == 2
    assert "the library has no loop of" in capsys.readouterr().err


def test_the_command_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = sorted({p.kernel for options in SAMPLERS.values() for p in passes(options) if p.lists})
    body = "\n".join(line for line in LISTING.splitlines() if "/*00" in line and "1fE" not in line)[
        : LISTING.index("EXIT")
    ]
    mangled = [f"k{n:02}" for n in range(len(kernels))]
    listing = "arch = sm_90\n" + "\n".join(f"Function : {name}\n{body}" for name in mangled)
    programs(tmp_path, listing, "\n".join(f"void tsam::cuda::{kernel[:-1]}, false>(int)" for kernel in kernels) + "\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / sass.LIBRARY).touch()
    assert command("--library", tmp_path / sass.LIBRARY, "--lists", "mlp", "--out", tmp_path / "out") == 0
    text = (tmp_path / "out" / "gpu-cost.md").read_text()
    assert text in capsys.readouterr().out and "a model" in text.lower() and "not a measurement" in text
    found = json.loads((tmp_path / "out" / "gpu-cost.json").read_text())
    assert [row["estimate"] for row in found["results"]][:-1] == list(SAMPLERS)
    assert {cost["issued"] for cost in found["environment"]["instructions"].values()} == {2.0}
    assert torch.tensor([row["floor"] for row in found["results"]]).min() > 0
