"""The rooms of the Python package: arrows that run one way, and nobody in another's private names.

``python tests/test_layout.py`` writes the sheet into CONTRIBUTING.md: each module, what it is, what it imports.
An import for a type checker alone counts as any other.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import tsam_ext

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "tsam_ext"
PAGE, SHEET = ROOT / "CONTRIBUTING.md", r"(?s)(?<=```text\n)optim: .*?(?=\n```)"
# From the top downwards: a module imports only from those below it. reference/ stands alone, it imports torch only.
ORDER = [
    "optim",
    "persistence",
    "planning",
    "progress",
    "health",
    "diagnostics",
    "base",
    "hooks",
    "checkpoint",
    "closures",
    "settings",
    "samplers",
    "estimates",
    "estimates.hamiltonian",
    "estimates.perturbation",
    "estimates.estimate",
    "estimates.displacement",
    "estimates.step",
    "estimates.parts",
    "estimates.item",
    "chain",
    "carry",
    "sampler_state",
    "origin",
    "gradients",
    "loss_scale",
    "metrics",
    "metrics.spectrum",
    "metrics.sharpness",
    "metrics.surfaces",
    "metrics.evaluation",
    "metrics.objective",
    "processes",
    "together",
    "shared_tilt",
    "exchange",
    "agreement",
    "replicas",
    "mean",
    "flat",
    "table",
    "module_state",
    "shards",
    "history",
    "hmc",
    "trace",
    "walk",
    "phase_space",
    "integrators",
    "functional",
    "functional.in_place",
    "functional.moves",
    "functional.dynamics",
    "functional.tilted",
    "functional.transforms",
    "engine",
    "engine.spread",
    "engine.ranks",
    "engine.state",
    "engine.grad_mode",
    "engine.notices",
    "engine.checks",
    "_compile",
    "_cuda",
    "_ops",
    "_C",
    "_version",
]


def modules() -> dict[str, Path]:
    """Every module of the package by its name, but for the package itself and its oracle."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py*")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if path.suffix in {".py", ".pyi"} and name and parts[0] != "reference":
            found[name] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that one of them imports."""
    here = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module.split(".") if node.module else []
        if node.level:
            start = here[: len(here) - node.level + 1] + module
        elif module[:1] == ["tsam_ext"]:
            start = module[1:]
        else:
            continue
        for alias in node.names:
            whole = ".".join([*start, alias.name])
            found.add(whole if whole in known else ".".join(start))
    return found - {name, ""}


def arrows() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}


def sheet() -> str:
    """Each module, the first line of its docstring, and what it imports."""
    known, found, lines = modules(), arrows(), []
    for name in ORDER:
        if known[name].suffix == ".pyi":
            continue
        what = (ast.get_docstring(ast.parse(known[name].read_text())) or "").split("\n")[0]
        below = " ".join(room for room in ORDER if room in found[name])
        lines.append(f"{name}: {what}" if what else name)
        lines += [f"    <- {below}"] if below else []
    return "\n".join(lines)


def test_every_module_has_its_place() -> None:
    assert set(modules()) == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("name", ORDER)
def test_arrows_run_downwards(name: str) -> None:
    below = set(ORDER[ORDER.index(name) + 1 :])
    assert arrows()[name] <= below


def test_the_oracle_imports_torch_alone() -> None:
    for path in (PACKAGE / "reference").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{path.name} imports from {node.module}"
                assert "tsam_ext" not in (node.module or ""), f"{path.name} imports the package that it is to check"


def test_the_sheet_in_contributing_is_true() -> None:
    (shown,) = re.findall(SHEET, PAGE.read_text())
    assert shown == sheet(), "python tests/test_layout.py writes it anew"


def defined_by(node: ast.ClassDef) -> set[str]:
    """The underscore names that a class makes: methods, class attributes, what it assigns to self."""
    names = set()
    for item in ast.walk(node):
        if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(item.name)
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            names.add(item.target.id)
        elif isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store):
            names.add(item.id)
        elif isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store) and ast.unparse(item.value) == "self":
            names.add(item.attr)
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def classes() -> Iterator[tuple[Path, ast.ClassDef]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                yield path, node


def test_nobody_uses_another_class_s_private_names() -> None:
    """On self only names that the class itself makes, inherited ones neither; on other objects none of any class."""
    private: set[str] = set().union(*(defined_by(node) for _, node in classes()))
    assert "_spread" in private
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        own: dict[ast.AST, set[str]] = {}  # each node inside a class -> what that class makes
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                own |= dict.fromkeys(ast.walk(node), defined_by(node))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in private:
                at_home = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                where = f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"
                assert at_home and node.attr in own.get(node, set()), where


def test_the_optimizer_names_no_sampler() -> None:
    """Neither an import nor a word of its code; the default of ``sampler`` and docstrings apart."""
    tree = ast.parse((PACKAGE / "optim.py").read_text())
    words = {"ascent", "noise", "hmc", "chain", "trajectory"}
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.Module)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            assert sum(isinstance(d, ast.Constant) and d.value == "ascent" for d in node.args.kw_defaults) == 1
            node.args.kw_defaults = [None] * len(node.args.kw_defaults)
    for node in ast.walk(tree):
        names = [node.id] if isinstance(node, ast.Name) else [node.attr] if isinstance(node, ast.Attribute) else []
        names += [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            if "()" not in name:  # a message that names a public method
                found = words & set(re.split(r"[^a-z]+", name.lower()))
                assert not found, f"optim.py:{getattr(node, 'lineno', 0)}: {name}"


def test_no_module_and_function_have_one_name() -> None:
    names = {name.rsplit(".", 1)[-1]: name for name in modules()}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert node.name not in names, f"{path.relative_to(PACKAGE)}: {node.name} and {names[node.name]}"


def test_dir_shows_the_public_names() -> None:
    assert dir(tsam_ext) == sorted(tsam_ext.__all__)
    assert tsam_ext.reference.__name__ == "tsam_ext.reference"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tsam_ext.nothing  # type: ignore[attr-defined]


if __name__ == "__main__":
    PAGE.write_text(re.sub(SHEET, sheet(), PAGE.read_text()))
