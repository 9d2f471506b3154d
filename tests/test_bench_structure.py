"""The benchmarks' own structure: imports between the modules of bench go one way, also those for types alone."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


def imports(path: Path) -> set[str]:
    """Modules of bench that a file imports, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").split(".")[0] == "bench"):
            module = (node.module or "").removeprefix("bench").removeprefix(".")
            found |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("bench.")}
    return found


def order(folder: Path) -> list[str]:
    """The modules, each after those that it imports; CycleError where that cannot be."""
    return list(TopologicalSorter({path.stem: imports(path) for path in folder.glob("*.py")}).static_order())


def test_the_imports_have_no_circle() -> None:
    found = order(BENCH)
    assert set(found) == {path.stem for path in BENCH.glob("*.py")}
    assert found.index("overhead_report") < found.index("overhead") < found.index("__main__")


@pytest.mark.parametrize(
    "back", ["from .one import A", "from bench.one import A", "from . import one", "import bench.one"]
)
def test_a_circle_for_types_alone_is_seen(back: str, tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("from . import two\n")
    (tmp_path / "two.py").write_text(f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {back}\n")
    with pytest.raises(CycleError):
        order(tmp_path)
