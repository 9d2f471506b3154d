"""Loads the ops on CUDA tensors, libtsam_cuda.so, where torch is a CUDA build.

The library links CUDA's runtime statically and needs a driver of the same major version. Where it is missing, cannot be
loaded or the driver is too old, the ops on CPU tensors go on working, and those on CUDA tensors say why they do not.
"""

from __future__ import annotations

import ctypes
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import _C, _ops

__all__ = ["why_not"]

LIBRARY = "libtsam_cuda.so"
OLDEST_GPU = (7, 5)  # the first of TSAM_CUDA_ARCHITECTURES (cmake/cuda.cmake)
OLDEST_DRIVER = 12040  # kernel parameters of 32 KB need 12.1, fatbins compressed for size 12.4


def _versions(library: ctypes.CDLL) -> tuple[int, int]:
    """CUDA versions of the library's runtime and of the driver (0: there is none), as 1000 major + 10 minor."""
    runtime, driver = ctypes.c_int(0), ctypes.c_int(0)
    library.tsam_cuda_versions(ctypes.byref(runtime), ctypes.byref(driver))
    return runtime.value, driver.value


def too_old(runtime: int, driver: int) -> str | None:
    """What is wrong with a driver of that version, or None: any of the runtime's major from OLDEST_DRIVER on."""
    least = max(runtime // 1000 * 1000, OLDEST_DRIVER)
    if driver == 0 or driver >= least:
        return None
    needed, found = (f"{v // 1000}.{v % 1000 // 10}" for v in (least, driver))
    return f"it needs an NVIDIA driver for CUDA {needed} or newer, and this machine's is for CUDA {found}"


def load(folder: Path) -> str | None:
    """Loads the library in ``folder``; why its ops cannot be used, or None."""
    path = folder / LIBRARY
    if not path.is_file():
        return "this tsam_ext was built without CUDA (TSAM_CUDA in the README)"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{LIBRARY} cannot be loaded: {error}"
    return too_old(*_versions(library))


def why_not(device: torch.device) -> str | None:
    """Why no kernel runs on tensors of a device, or None: those of the CPU always do."""
    if device.type == "cpu":
        return None
    return (cause or gpu_too_old(device)) if device.type == "cuda" else "there are kernels for cpu and cuda tensors"


def gpu_too_old(device: torch.device) -> str | None:
    """What is wrong with a GPU older than all that the library is built for, or None. Wakes no CUDA that sleeps."""
    awake = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    found = torch.cuda.get_device_capability(device) if awake else OLDEST_GPU
    if found >= OLDEST_GPU:
        return None
    return "its compute capability is {}.{}, and the kernels need {}.{} or newer".format(*found, *OLDEST_GPU)


def refuse(cause: str) -> None:
    """Makes every op refuse CUDA tensors with the cause."""
    for name in _ops.NAMES:

        def op(*args: Any, _name: str = name) -> NoReturn:
            raise RuntimeError(f"tsam.{_name}: no CUDA: {cause}.")

        _library.impl(name, op, "CUDA", allow_override=True)  # type: ignore[no-untyped-call]


_library = torch.library.Library("tsam", "IMPL")  # type: ignore[no-untyped-call]
cause: str | None = "this torch is not a CUDA build"  # why CUDA tensors have no kernels here, or None
if torch.version.cuda is not None:
    _folder = Path(_C.__file__).parent
    cause = load(_folder)
    if cause is not None:
        refuse(cause)
        # Not where nobody built it: most of those machines have no GPU.
        if (_folder / LIBRARY).is_file():
            warnings.warn(f"tsam_ext runs on the CPU only: {cause}.", RuntimeWarning, stacklevel=2)


def capturing(device: torch.device) -> bool:
    """Whether what is launched on ``device`` now goes into a CUDA graph instead of running."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
