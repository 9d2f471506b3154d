"""Runs op tests on emulated CUDA: builds the package with the CUDA ops over tests/simt, then runs pytest on it.

``python tests/simt/run.py [pytest arguments]``; without tests named, those of OPS. Tests that say ``host_only``
are skipped with their reason. ``--build-only`` prints the package's folder. The build goes to a scratch folder, or
to TSAM_EMULATED_BUILD, where the next run finds it again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPS = (
    "test_emulated.py",
    "test_launch_failures.py",
    "test_list_ops.py",
    "test_direction_ops.py",
    "test_alignment.py",
    "test_noise.py",
    "test_in_place.py",
    "test_functional.py",
    "test_dynamics.py",
    "test_hmc_parity.py",
    "test_hmc_chain.py",
    "test_hmc_carry.py",
    "test_hmc_recycle.py",
    "test_hmc_sample.py",
    "test_hmc_scale.py",
    "test_optim_laws.py",
    "test_optim_sam.py",
    "test_carry.py",
    "test_capturable.py",
    "test_spread.py",
    "test_merged_pass.py",
    "test_norm_ascend.py",
    "test_moves_in_place.py",
    "test_bench_gpu_cost.py",
)
# Optimized, checked by the compiler as strictly as the CPU ops; one set of CPU kernels, for what is not emulated yet.
DEFINITIONS = ("-DTSAM_EMULATE_CUDA=ON", "-DTSAM_BASELINE_ONLY=ON", "-DTSAM_WERROR=ON")
DEFINITIONS += ("-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O2")


def must(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-8000:]}")


def build(folder: Path) -> Path:
    """The folder to put in front of PYTHONPATH; what an earlier build left in ``folder`` is used again."""
    package = folder / "package"
    shutil.rmtree(package / "tsam_ext", ignore_errors=True)
    shutil.copytree(ROOT / "python" / "tsam_ext", package / "tsam_ext", ignore=shutil.ignore_patterns("*.so", "__pyc*"))
    pybind11 = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True).strip()
    must(
        [
            "cmake", "-S", ROOT, "-B", folder / "build", "-G", "Ninja", f"-Dpybind11_DIR={pybind11}",
            f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package / 'tsam_ext'}",
            *DEFINITIONS,
        ]
    )  # fmt: skip
    must(["ninja", "-C", folder / "build", "_C"])
    return package


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="tsam-emulated-") as scratch:
        package = build(Path(os.environ.get("TSAM_EMULATED_BUILD", scratch)))
        if arguments == ["--build-only"]:
            print(package)
            return 0
        environment = {**os.environ, "PYTHONPATH": str(package), "TSAM_EMULATED": "1"}
        environment["TSAM_CPU_PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
        found = subprocess.check_output(
            [sys.executable, "-c", "import tsam_ext; print(tsam_ext.__file__)"], text=True, env=environment, cwd=scratch
        )
        if not Path(found.strip()).is_relative_to(package):  # it would be the CPU's own ops that are tested
            sys.exit(f"Python imports tsam_ext from {found.strip()} (an editable install?), not from {package}")
        named = any(argument.partition("::")[0].endswith((".py", "tests")) for argument in arguments)
        tests = [] if named else [str(ROOT / "tests" / name) for name in OPS]
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments, *tests]
        return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
