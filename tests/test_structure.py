"""The house rules that a machine can keep: layers, file sizes, names, and one signature in three places.

Arrows (csrc/README.md): core <- cpu; no torch below csrc/ops; torch.ops in _ops.py alone. The rooms of the Python
package: test_layout.py.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tsam_ext
from tsam_ext import _C, _ops

ROOT = Path(__file__).parents[1]
SOURCES = ("csrc", "python", "tests", "bench", "cmake")
SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh"}


def files() -> Iterator[Path]:
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in SUFFIXES and "build" not in path.parts:
                yield path


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def test_no_file_is_too_long_or_named_after_nothing() -> None:
    for path in files():
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines"
        assert not re.search(r"(^|_)(utils?|helpers?|common|misc)(_|$)", path.stem), path


def test_every_file_says_what_it_is() -> None:
    for path in files():
        text = path.read_text()
        if path.suffix == ".py" and path.name != "_version.py":
            assert ast.get_docstring(ast.parse(text)), f"{path.relative_to(ROOT)} has no docstring"
        elif path.suffix in {".h", ".cpp", ".cu", ".cuh"}:
            assert text.startswith("//"), f"{path.relative_to(ROOT)} has no opening comment"


def test_the_core_is_free_of_torch_and_of_the_other_layers() -> None:
    core = list((ROOT / "csrc" / "core").iterdir())
    assert len(core) >= 6
    names = {path.name for path in core}
    standard = {"algorithm", "cmath", "cstdint", "cstring", "utility", "vector"}
    for path in core:
        for name in includes(path):
            assert name in names | standard, f"{path.name} includes {name}"
        if path.name != "macros.h":
            assert "__CUDACC__" not in path.read_text(), path.name


def test_kernels_are_free_of_torch_and_module_of_kernels() -> None:
    cpu = ROOT / "csrc" / "cpu"
    for name in (
        "apply.h",
        "copy.h",
        "halves.h",
        "hmc_pass.h",
        "lanes.h",
        "leapfrog_pass.h",
        "rows.h",
        "sums.h",
        "kernels.h",
        "kernels.cpp",
        "isa.cpp",
    ):
        assert not any("torch" in i or "ops/" in i for i in includes(cpu / name)), name
    assert all("pybind11" in i for i in includes(ROOT / "csrc" / "module.cpp"))
    for path in (ROOT / "csrc").rglob("*.cpp"):
        for name in includes(path):
            if name.startswith(("ATen/", "c10/")) or name == "torch/extension.h":
                raise AssertionError(f"{path.name} includes {name}: only the stable headers may be seen")


def test_cuda_kernels_are_free_of_torch_and_every_launch_is_checked() -> None:
    cuda = ROOT / "csrc" / "cuda"
    for path in cuda.iterdir():
        text = re.sub(r"//.*", "", path.read_text())
        if path.suffix == ".cuh":
            assert not any("torch" in i or "ops/" in i for i in includes(path)), path.name
        assert not any(i.startswith("../cpu/") for i in includes(path)), f"{path.name} includes the CPU back end"
        assert "<<<" not in text, f"{path.name}: launch() is the way, whose error may not be ignored"
        if path.name != "device.cuh":
            assert "__shared__" not in text and "__grid_constant__" not in text, path.name
        if path.name not in ("device.cuh", "launch.h"):
            assert "TSAM_SIMT" not in text, path.name
    for path in (ROOT / "csrc" / "cpu").iterdir():
        assert not any("cuda/" in i for i in includes(path)), path.name


def test_torch_ops_is_named_in_one_file() -> None:
    package = ROOT / "python" / "tsam_ext"
    uses = [path.name for path in package.rglob("*.py") if "torch.ops." in path.read_text()]
    assert uses == ["_ops.py"]


STEP = ["optim", "progress", "origin", "mean", "phase_space", "table", "_ops"]
STEP += [f"estimates/{name}" for name in ("estimate", "hamiltonian", "perturbation")]
STEP += [
    "engine/checks",
    "engine/spread",
    *(f"functional/{name}" for name in ("dynamics", "in_place", "moves", "tilted")),
]


@pytest.mark.parametrize("name", STEP)
def test_no_sync_and_no_print_in_the_step(name: str) -> None:
    text = (ROOT / "python" / "tsam_ext" / f"{name}.py").read_text()
    found = re.findall(r"\.item\(\)|\.tolist\(\)|\.cpu\(\)|(?<![\w.])print\(", text)
    assert not found, found


KINDS = {
    "Tensor[]": "list[Tensor]",
    "float[]": "list[float]",
    "bool[]": "list[bool]",
    "int[]": "list[int]",
}


def signatures_of_schema() -> dict[str, list[tuple[str, str]]]:
    found = {}
    for name in dir(_C):
        if name.startswith("__"):
            continue
        schema = getattr(torch.ops.tsam, name).default._schema
        kinds = [
            (a.name, str(a.type) + (f" = {a.default_value}" if a.has_default_value() else "")) for a in schema.arguments
        ]
        found[name] = [(arg, re.sub(r"List\[(\w+)\]", r"list[\1]", kind)) for arg, kind in kinds]
    return found


def normal(kind: str) -> str:
    kind = kind.replace("torch.", "").replace("collections.abc.Sequence", "list").replace("typing.", "")
    kind = kind.replace("SupportsFloat | SupportsIndex", "float").replace("SupportsInt | SupportsIndex", "int")
    return kind.strip()


def test_stub_docstring_and_schema_agree() -> None:
    schema = signatures_of_schema()
    assert schema.keys() == set(_ops.NAMES)
    stub = {}
    for node in ast.parse((ROOT / "python" / "tsam_ext" / "_C.pyi").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            defaults = [f" = {ast.unparse(value)}" for value in node.args.defaults]
            defaults = [""] * (len(node.args.args) - len(defaults)) + defaults
            stub[node.name] = [
                (a.arg, normal(ast.unparse(a.annotation)) + default)
                for a, default in zip(node.args.args, defaults, strict=True)
                if a.annotation
            ]
    assert stub == schema
    for name, arguments in schema.items():
        document = (getattr(_C, name).__doc__ or "").split("\n")[0]
        inside = document[document.index("(") + 1 : document.rindex(") ->")]
        documented = [
            (part.split(":", 1)[0].strip(), normal(part.split(":", 1)[1])) for part in re.split(r", (?=\w+:)", inside)
        ]
        assert documented == arguments, name


def test_the_binary_knows_no_unstable_symbol_of_torch() -> None:
    assert _C.__file__
    done = subprocess.run(["nm", "-D", "-C", _C.__file__], capture_output=True, text=True, check=True)
    undefined = [line.split(" U ", 1)[1] for line in done.stdout.splitlines() if " U " in line]
    assert any(name.startswith("aoti_torch_") for name in undefined)
    for name in undefined:
        assert not re.match(r"(at|c10|torch|caffe2)::", name), name
    defined = [line for line in done.stdout.splitlines() if " T " in line]
    assert [line.split()[-1] for line in defined] == ["PyInit__C"]
    header = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu.so" in header
    assert "RPATH" not in header
    assert "RUNPATH" not in header


def test_kernel_objects_share_no_weak_symbol(tmp_path: Path) -> None:
    """A template that two instruction sets both define weakly would keep either one's instructions."""
    target = tmp_path / "kernels.o"
    source = ROOT / "csrc" / "cpu" / "kernels.cpp"
    subprocess.run(
        [
            "g++",
            "-c",
            "-O3",
            "-std=c++17",
            "-DTSAM_ISA=avx2",
            "-mavx2",
            "-mfma",
            source,
            "-o",
            target,
        ]
        if "avx2" in Path("/proc/cpuinfo").read_text()
        else ["g++", "-c", "-O3", "-std=c++17", "-DTSAM_ISA=baseline", source, "-o", target],
        check=True,
    )
    table = subprocess.run(["nm", "-C", target], capture_output=True, text=True, check=True).stdout
    shared = [line for line in table.splitlines() if re.search(r" [TWVuDB] ", line)]
    assert len(shared) == 1, shared
    assert "kernel_table" in shared[0]


def test_public_docstrings_run() -> None:
    import doctest

    from tsam_ext import diagnostics, hmc, integrators, optim, samplers
    from tsam_ext.functional import dynamics, tilted
    from tsam_ext.metrics import objective, sharpness, spectrum, surfaces

    measures = (objective, sharpness, spectrum, surfaces)
    for module in (diagnostics, dynamics, hmc, integrators, optim, samplers, tilted, *measures):
        result = doctest.testmod(module)
        assert result.attempted > 0
        assert result.failed == 0


def test_everything_public_is_documented_and_there() -> None:
    for name in tsam_ext.__all__:
        thing = getattr(tsam_ext, name)
        assert name == "__version__" or inspect.getdoc(thing), name
    for name, member in inspect.getmembers(tsam_ext.TSAM):
        if not name.startswith("_") and callable(member) and member.__qualname__.startswith("TSAM"):
            assert inspect.getdoc(member), name
