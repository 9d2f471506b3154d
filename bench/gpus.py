"""GPUs as their makers describe them: what gpu_cost.py's floors are worked out from. Nothing here is measured.

SMs, boost clock and bandwidth: NVIDIA's data sheets of the H100, H200, A100 and L4 and the white papers "NVIDIA A100
Tensor Core GPU Architecture", "NVIDIA H100 Tensor Core GPU Architecture", "NVIDIA Ada GPU Architecture" (RTX 4090) and
"NVIDIA RTX Blackwell GPU Architecture" (RTX 5090). Results per clock and SM: the CUDA C++ Programming Guide, table
"Throughput of Native Arithmetic Instructions", compute capabilities 8.0, 8.9, 9.0 and 12.0. Four schedulers an SM issue
a warp a clock each. Written down from memory of these pages, which could not be looked at here: check before quoting.
"""

from __future__ import annotations

from dataclasses import dataclass

ISSUED = 4 * 32  # lanes a clock and SM


@dataclass(frozen=True)
class Gpu:
    """``architecture``: whose machine code of the library it runs. float32, float64, integers: lanes a clock and SM."""

    architecture: str
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes a second
    float32: int
    float64: int
    integers: int

    def rate(self, lanes: int) -> float:
        """Lane-instructions a second."""
        return self.multiprocessors * self.clock * lanes


GPUS = {
    "H100 SXM": Gpu("sm_90", 132, 1.98e9, 3.35e12, 128, 64, 64),
    "H200 SXM": Gpu("sm_90", 132, 1.98e9, 4.8e12, 128, 64, 64),
    "A100 SXM 80 GB": Gpu("sm_80", 108, 1.41e9, 2.039e12, 64, 32, 64),
    "L4": Gpu("sm_80", 58, 2.04e9, 0.3e12, 128, 2, 64),
    "RTX 4090": Gpu("sm_80", 128, 2.52e9, 1.008e12, 128, 2, 64),
    "RTX 5090": Gpu("sm_120", 170, 2.407e9, 1.792e12, 128, 2, 128),
}
