"""The host emulation of CUDA against planted bugs: each is seen by a stated build, and correct kernels pass in all.

A build is plain (in three orders), ``address`` (ASan and UBSan) or ``thread`` (TSan). If a bug here goes unseen, nobody
knows what the emulated kernels' tests are worth.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from simt_programs import ORDERS, SIMT, build, run

# What a launch returns as its error, in every order.
REPORTED = {
    "divergent barriers": r"divergent barriers: thread .* waits at selftest.cpp:\d+, thread .* to selftest.cpp:\d+",
    "early return": r"has returned, and thread .* waits for it at the barrier selftest.cpp:\d+|others have returned",
    "barrier in an uneven loop": r"barrier selftest.cpp:\d+",
    "barrier against warp": r"deadlock: no thread can go on; thread .* selftest.cpp:\d+; thread .* selftest.cpp:\d+",
    "mask without self": r"is not in the mask that it gives at selftest.cpp:\d+",
    "shuffle with the exited": r"that thread has returned|has returned, and thread .* waits for its lane",
    "mask of a partial warp": r"the block has no such thread",
    "masks that differ": r"waits for its lane|that thread has returned",
    "vote in a branch": r"deadlock",
    "different operations": r"lanes that do not meet",
    "too much shared": r"more than 48 KiB of shared memory",
    "too many threads": r"a block of 1025 threads",
}
# Wrong numbers in at least one order; undefined, so no order has to be right.
SEEN_BY_ORDER = (
    "read before write",
    "missing barrier in a tree",
    "missing second barrier",
    "uninitialised shared",
    "missing syncwarp",
    "lane outside the mask",
    "block after block",
)
SEEN_BY_ADDRESS = {
    "shared past the end": "heap-buffer-overflow",
    "shared before the start": "heap-buffer-overflow",
    "dynamic past the end": "heap-buffer-overflow",
    "global past the end": "heap-buffer-overflow",
    "tail of a vector": "heap-buffer-overflow",
    "misaligned vector": "misaligned address",
}
SEEN_BY_THREAD = (
    "read before write",
    "missing barrier in a tree",
    "missing second barrier",
    "missing syncwarp",
    "shuffle for syncwarp",
    "all blocks, one cell",
    "block after block",
)
RIGHT = ("right: reverse", "right: reduction", "right: scan", "right: warps")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("simt")


def selftest(folder: Path, name: str) -> Path:
    return build(folder, SIMT / "selftest.cpp", name)


def test_every_case_of_the_program_has_its_test(folder: Path) -> None:
    code, listed = run(selftest(folder, "plain"))
    assert code == 0
    assert set(listed.split("\n")) - {""} == {*REPORTED, *SEEN_BY_ORDER, *SEEN_BY_ADDRESS, *SEEN_BY_THREAD, *RIGHT}
    assert len({*REPORTED, *SEEN_BY_ORDER, *SEEN_BY_ADDRESS, *SEEN_BY_THREAD}) >= 16


@pytest.mark.parametrize("build_name", ["plain", "address", "thread"])
@pytest.mark.parametrize("case", RIGHT)
def test_correct_kernels_pass(folder: Path, case: str, build_name: str) -> None:
    for order in ORDERS:
        assert run(selftest(folder, build_name), case, **order) == (0, ""), order


@pytest.mark.parametrize("case", REPORTED)
def test_a_launch_reports(folder: Path, case: str) -> None:
    for order in ORDERS:
        code, output = run(selftest(folder, "plain"), case, **order)
        assert code == 2, output
        assert re.search(REPORTED[case], output), output


@pytest.mark.parametrize("case", SEEN_BY_ORDER)
def test_an_order_gives_wrong_numbers(folder: Path, case: str) -> None:
    outcomes = [run(selftest(folder, "plain"), case, **order) for order in ORDERS]
    assert (1, "wrong numbers\n") in outcomes, outcomes


@pytest.mark.parametrize("case", SEEN_BY_ADDRESS)
def test_the_address_sanitizers_report(folder: Path, case: str) -> None:
    code, output = run(selftest(folder, "address"), case)
    assert code != 0
    assert SEEN_BY_ADDRESS[case] in output, output


@pytest.mark.parametrize("case", SEEN_BY_THREAD)
def test_the_thread_sanitizer_reports(folder: Path, case: str) -> None:
    code, output = run(selftest(folder, "thread"), case)
    assert code == 99
    assert "data race" in output, output


def test_the_same_seed_runs_the_same_order(folder: Path) -> None:
    case, texts = "early return", []
    for seed in ("1", "1", "2", "3"):
        texts.append(run(selftest(folder, "plain"), case, TSAM_SIMT_ORDER="random", TSAM_SIMT_SEED=seed)[1])
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("build_name", ["plain", "address"])
def test_the_list_kernels_run_clean(folder: Path, build_name: str) -> None:
    """Under TSan too, but that takes minutes: tests/README.md."""
    program = build(folder, SIMT / "kernels.cpp", build_name)
    for order in ORDERS:
        assert run(program, **order) == (0, "ok\n"), order
