"""The recipes for several processes, each run as its docstring says: under torchrun, or by Lightning's own launcher.

Laws: the loss falls; at the end all ranks hold the same bits, as the recipe itself compares them; the losses are those
of one process that has all rows; a run that goes on from a checkpoint ends where the other does.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
from test_recipes import FOLDER, NEEDS, SEVERAL_PROCESSES

pytestmark = pytest.mark.slow

TIMEOUT = 120  # seconds for one run
LINE = re.compile(
    r"^loss (?P<first>\S+) -> (?P<last>[\d.]+)(, resumed (?P<resumed>[\d.]+))?, "
    r"(?P<ranks>\d+) ranks, same weights: (?P<same>\w+)$",
    re.MULTILINE,
)
# What frameworks have left in this process's environment, or whoever started it as one of several.
FOREIGN = ("ACCELERATE_", "GROUP_", "LOCAL_", "MASTER_", "NODE_", "PL_", "RANK", "ROLE_", "TORCHELASTIC_", "WORLD_")

# torch 2.13 under gloo may abort in destructors, after a script's last line: 6 of 15 runs of a DDP loop without TSAM on
# a busy machine. Such a run says nothing, as torchrun then ends the other rank; another one is tried.
EXIT, ATTEMPTS = "terminate called without an active exception\n", 5


def once(arguments: list[str], text: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a script, the last argument, which is to leave no file behind."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
    with tempfile.TemporaryDirectory() as folder:
        place, temporary = Path(folder, "place"), Path(folder, "temporary")
        place.mkdir()
        temporary.mkdir()
        (place / arguments[-1]).write_text(text)
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=place,
            env={**environment, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            printed, complaints = process.communicate(timeout=TIMEOUT)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # and the ranks that it has started
        assert [entry.name for entry in place.iterdir()] == [arguments[-1]]
        return process.returncode, printed, complaints


@cache
def run(name: str, processes: int) -> dict[str, str]:
    """What the recipe's one line says, of a run with that many processes."""
    pytest.importorskip(NEEDS.get(name, "torch"), reason="pip install '.[recipes]'")
    text = (FOLDER / f"{name}.py").read_text()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    if "torchrun" not in text:
        launcher = []
        assert text.count("DEVICES = 2\n") == 1
        text = text.replace("DEVICES = 2\n", f"DEVICES = {processes}\n")
    for _ in range(ATTEMPTS):
        code, printed, complaints = once([*launcher, f"{name}.py"], text)
        if code == 0 or EXIT not in complaints:
            break
    assert code == 0, complaints
    lines = list(LINE.finditer(printed))
    assert len(lines) == 1, printed + complaints
    return lines[0].groupdict()


@pytest.mark.parametrize("name", SEVERAL_PROCESSES)
def test_ranks_learn_and_stay_the_same(name: str) -> None:
    line = run(name, 2)
    assert line["ranks"] == "2"
    assert float(line["last"]) < 0.6 * float(line["first"])
    assert line["same"] == "True"


@pytest.mark.parametrize("name", SEVERAL_PROCESSES)
def test_two_ranks_take_the_steps_of_one_process_with_all_rows(name: str) -> None:
    several, one = run(name, 2), run(name, 1)
    assert one["ranks"] == "1"
    for key in ("first", "last"):
        assert float(several[key]) == pytest.approx(float(one[key]), rel=1e-5)


def test_the_sharded_checkpoint_goes_on() -> None:
    line = run("fsdp2", 2)
    assert line["resumed"] == line["last"]
