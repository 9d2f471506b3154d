"""The build against manylinux_2_28 (cmake/manylinux.py, manylinux.cpp), on libraries made here.

A stub has of each name the newest version within the limits, and of names that moved into libc the library that had
them; a library linked to the stubs and to our definitions passes the check, and the check names what is above. Our
definitions count an exception's holders as libstdc++ does: it lives while one is left, and is destroyed once.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="manylinux.py is for x86-64 alone")
ROOT = Path(__file__).parents[1]
PROBE = """
#include <cmath>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <sstream>
#include <string>
#include <thread>
#include <vector>
static int alive = 0;
struct Counted {
  Counted() { alive += 1; }
  Counted(const Counted&) { alive += 1; }
  ~Counted() { alive -= 1; }
};
extern "C" double logarithm(double x) { return std::log(x); }
extern "C" int living() { return alive; }
extern "C" int thrown_and_held(int holders) {  // how many live while it is held, or -1 where it is not what was thrown
  std::vector<std::exception_ptr> held;
  try {
    throw Counted();
  } catch (...) {
    held.assign(holders, std::current_exception());
  }
  for (int i = 1; i < holders; ++i) held.pop_back();
  int during = alive;
  try {
    std::rethrow_exception(held.back());
  } catch (const Counted&) {
    return during;
  } catch (...) {
  }
  return -1;
}
extern "C" int too_many(long n) {
  try {
    static_cast<void>(std::allocator<long>().allocate(n));
  } catch (const std::bad_array_new_length&) {
    return 1;
  } catch (...) {
  }
  return 0;
}
extern "C" const char* streamed(int number) {
  static std::string text;
  static std::once_flag once;
  thread_local auto shared = std::make_shared<int>(number);
  std::ostringstream out;
  std::stringstream both;
  std::thread([&both, copy = shared] { std::call_once(once, [&] { both << *copy; }); }).join();
  out << both.str() << '.';
  text = out.str();
  return text.c_str();
}
"""


@pytest.fixture(scope="module")
def manylinux() -> ModuleType:
    spec = importlib.util.spec_from_file_location("manylinux", ROOT / "cmake" / "manylinux.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stubs(manylinux: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stubs")
    manylinux.write_stubs(folder, "g++")
    return folder


def link(folder: Path, source: str, *options: str | Path, language: str = "c++", name: str = "probe") -> Path:
    text, library = folder / f"{name}.source", folder / f"lib{name}.so"
    text.write_text(source)
    subprocess.run(
        ["g++", "-std=c++17", "-shared", "-fPIC", "-x", language, text, "-x", "none", *options, "-o", library],
        check=True,
    )
    return library


def versioned(folder: Path, name: str) -> Path:
    """A library of names whose versions are known: new ones, old ones, and some that have both."""
    lines, pairs = [".text"], [
        ("moved@GLIBC_2.2.5", "moved@@GLIBC_2.99"),
        ("pthread_moved@GLIBC_2.3", "pthread_moved@@GLIBC_2.34"),
        ("of_another@GLIBC_2.2.5", "of_another@@GLIBC_2.34"),
        *((f"both{i}@GLIBC_2.2.5", f"both{i}@@GLIBC_2.28") for i in range(8)),  # in the table in either order
        ("late@@GLIBC_2.29",),
        ("gone@GLIBC_2.2.5",),
        ("plain@@GLIBC_2.3",),
    ]  # fmt: skip
    for i, symbols in enumerate(pairs):
        for j, symbol in enumerate(symbols):
            lines += [
                f"x{i}_{j}: ret",
                f".globl x{i}_{j}",
                f".type x{i}_{j},@function",
                f".symver x{i}_{j},{symbol},remove",
            ]
    script = folder / "versions.map"
    versions = sorted({symbol.rpartition("@")[2] for symbols in pairs for symbol in symbols})
    script.write_text("".join(f"{version} {{ }};\n" for version in versions))
    options = ["-nostdlib", f"-Wl,--version-script={script}", f"-Wl,-soname,lib{name}.so"]
    return link(folder, "\n".join(lines) + "\n", *options, language="assembler", name=name)


def test_a_stub_has_the_newest_version_within_the_limits(manylinux: ModuleType, tmp_path: Path) -> None:
    got = manylinux.allowed("c", versioned(tmp_path, "versions"))
    assert {name: symbol.version for name, symbol in got.pop("c").items()} == {
        "moved": "GLIBC_2.2.5",
        **{f"both{i}": "GLIBC_2.28" for i in range(8)},
        "plain": "GLIBC_2.3",
    }
    assert {name: symbol.version for name, symbol in got.pop("pthread").items()} == {"pthread_moved": "GLIBC_2.3"}
    assert not got


def test_the_check_names_what_is_above_the_limits(manylinux: ModuleType, tmp_path: Path) -> None:
    versioned(tmp_path, "versions")
    source = 'extern "C" {{ void {0}(); void call_{0}() {{ {0}(); }} }}\n'
    names = ("plain", "both0", "moved", "late", "aoti_torch_any", "PyAny", "nowhere")
    library = link(tmp_path, "".join(map(source.format, names)), f"-L{tmp_path}", "-lversions", "-nostdlib")
    assert sorted(manylinux.faults(library)) == [
        "late asks for GLIBC_2.29",
        "moved asks for GLIBC_2.99",
        "nowhere is in no library within the limits",
    ]
    assert manylinux.main(["check", str(library)]) == 1
    assert manylinux.main(["check", str(link(tmp_path, source.format("plain"), "-nostdlib", f"-L{tmp_path}",
                                             "-lversions", name="fine"))]) == 0  # fmt: skip


@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_what_is_linked_to_the_stubs_passes_and_works(
    manylinux: ModuleType, stubs: Path, tmp_path: Path, level: str
) -> None:
    ours = tmp_path / "ours.o"
    subprocess.run(
        ["g++", "-std=c++17", "-O2", "-fPIC", "-c", ROOT / "cmake" / "manylinux.cpp", "-o", ours], check=True
    )
    script = tmp_path / "exports.map"
    script.write_text("{ global: logarithm; living; thrown_and_held; too_many; streamed; local: *; };")
    inside = f"-Wl,--version-script={script}"
    library = link(tmp_path, PROBE, level, ours, inside, "-Wl,--no-as-needed", f"-L{stubs}", "-lpthread")
    assert manylinux.faults(library) == []
    probe = ctypes.CDLL(str(library))
    for holders in (1, 2, 5):
        assert probe.thrown_and_held(holders) == 1
        assert probe.living() == 0
    assert probe.too_many(ctypes.c_long(-1)) == 1
    probe.streamed.restype = ctypes.c_char_p
    assert probe.streamed(17) == b"17."
    probe.logarithm.restype = ctypes.c_double
    assert probe.logarithm(ctypes.c_double(1)) == 0
