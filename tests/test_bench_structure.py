"""The benchmarks' own structure: imports between the modules of bench go one way, also those for types alone."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


def modules(folder: Path) -> dict[str, Path]:
    """Every module below a folder by its dotted name, but for __init__ and the recipes, which stand alone."""
    paths = (path.relative_to(folder) for path in folder.rglob("*.py") if path.name != "__init__.py")
    return {".".join(path.with_suffix("").parts): folder / path for path in paths if path.parts[0] != "recipes"}


def imports(name: str, known: dict[str, Path]) -> set[str]:
    """Modules of bench that a module imports, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(known[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                module = name.split(".")[: -node.level] + module
            elif module[:1] == ["bench"]:
                module = module[1:]
            else:
                continue
            found |= {".".join(module), *(".".join([*module, alias.name]) for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("bench.") for alias in node.names if alias.name.startswith("bench.")}
    return found & known.keys()


def order(folder: Path) -> list[str]:
    """The modules, each after those that it imports; CycleError where that cannot be."""
    known = modules(folder)
    return list(TopologicalSorter({name: imports(name, known) for name in known}).static_order())


def test_the_imports_have_no_circle() -> None:
    found = order(BENCH)
    assert set(found) == set(modules(BENCH))
    assert found.index("overhead_report") < found.index("overhead") < found.index("__main__")
    assert found.index("paper.task") < found.index("paper.trainer") < found.index("paper.command") < len(found) - 1


@pytest.mark.parametrize(
    "back", ["from .one import A", "from bench.one import A", "from . import one", "import bench.one"]
)
def test_a_circle_for_types_alone_is_seen(back: str, tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("from . import two\n")
    (tmp_path / "two.py").write_text(f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {back}\n")
    with pytest.raises(CycleError):
        order(tmp_path)


@pytest.mark.parametrize("back", ["from bench.one import A", "from bench import one", "from .. import one"])
def test_a_circle_through_a_folder_is_seen(back: str, tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "one.py").write_text("from .room.two import B\n")
    (tmp_path / "room" / "two.py").write_text("from .three import C\n")
    (tmp_path / "room" / "three.py").write_text(f"{back}\n")
    with pytest.raises(CycleError):
        order(tmp_path)
