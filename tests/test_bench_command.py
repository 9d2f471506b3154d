"""What the benchmarks' commands share: exit codes, --strict, help texts with defaults, the command that is quoted."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from bench import command, many_gpus, ops, overhead, step
from bench.__main__ import main
from bench.paper import command as paper
from bench.training import train

COMMANDS = ("train", "paper", "step", "overhead", "ops", "gpu-cost", "many-gpus", "gpu")
WITH_TARGETS = ("train", "step", "overhead", "ops")


def parser_of(module: Any) -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(prog="bench").add_subparsers()
    module.add_parser(commands)
    (parser,) = commands.choices.values()
    return parser


def help_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as error:
        main([name, "--help"] if name else ["--help"])
    assert error.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "missed", "strict", "code"),
    [
        ([], [], False, 0),
        ([], [], True, 0),
        ([], ["slow"], False, 0),
        ([], ["slow"], True, 1),
        (["differs"], [], False, 1),
        (["differs"], ["slow"], False, 1),
        (["differs"], ["slow"], True, 1),
    ],
)
def test_wrong_fails_always_and_a_missed_target_with_strict(
    wrong: list[str], missed: list[str], strict: bool, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.conclude(wrong, missed, strict=strict) == code
    text = capsys.readouterr().out
    assert ("WRONG: differs" in text) is bool(wrong)
    assert ("TARGET MISSED: slow" in text) is bool(missed)
    assert ("only with --strict" in text) is (bool(missed) and not strict)


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_has_no_markup_and_says_the_exit_codes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(name, capsys)
    assert not re.search(r"`|\*\*|:\w+:`|\*\w+\*", text)
    assert re.search(r"1 +something is wrong", text) and re.search(r"130 +interrupted", text)
    assert "default: None" not in text and "default: False" not in text


@pytest.mark.parametrize("name", COMMANDS)
def test_strict_is_there_where_there_are_targets(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ("--strict" in help_of(name, capsys).split("exit codes:")[0]) is (name in WITH_TARGETS)


SWITCHES = {"--help", "--quick", "--strict", "--no-compile", "--resume", "--tune", "--plan", "--bf16", "--compile"}
CHOICES = {"--sampler", "--ops", "--tasks"}  # left out: all, or none


@pytest.mark.parametrize("module", [train, paper, step, overhead, ops, many_gpus])
def test_help_tells_each_default(module: Any) -> None:
    text = parser_of(module).format_help().split("exit codes:")[0]
    told = {part.split()[0]: " ".join(part.split()) for part in re.split(r"\n  (?=--[a-z])", text)[1:]}
    silent = {option for option, part in told.items() if "default: " not in part}
    assert silent <= SWITCHES | CHOICES and len(told) - len(silent) >= 3


@pytest.mark.parametrize(
    ("module", "arguments", "shown"),
    [
        (ops, [], ""),
        (ops, ["--quick", "--out", "elsewhere"], " --quick"),
        (ops, ["--ops", "kick", "restore", "--no-compile", "--dtype", "bfloat16"],
         " --dtype bfloat16 --ops kick restore --no-compile"),
        (ops, ["--dtype", "float32", "--rounds", "7"], " --rounds 7"),
        (overhead, ["--lists", "mlp", "--strict"], " --strict --lists mlp"),
        (step, ["--budget", "45", "--batch", "64"], " --budget 45.0"),
        (many_gpus, ["--gpus", "8", "16", "--bandwidth-node", "450"], " --gpus 8 16"),
    ],
)  # fmt: skip
def test_the_command_that_is_quoted(module: Any, arguments: list[str], shown: str) -> None:
    parser = parser_of(module)
    assert command.command_line(parser.parse_args(arguments)) == parser.prog + shown


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["ops", "--quick", "--strict"], "--strict takes AVX-512 kernels"),
        (["ops", "--strict", "--dtype", "bfloat16"], "--strict takes AVX-512 kernels"),
        (["overhead", "--quick", "--strict"], "--quick has no targets"),
        (["step", "--quick", "--strict"], "--quick has no targets"),
        (["train", "--tune", "--strict"], "--tune has no targets"),
        (["train", "--strict", "--methods", "SAM"], "--methods needs both"),
        (["train", "--delta", "3"], "--delta belongs to --sampler"),
    ],
)
def test_strict_without_targets_cannot_run(
    arguments: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["ops", "--elements", "0"], ["ops", "--dtype", "int8"], ["ops", "--rounds", "few"], ["step", "--batch", "0"],
        ["step", "--budget", "nan"], ["overhead", "--rounds", "0"], ["gpu", "--rounds", "0"], ["gpu", "--strict"],
        ["train", "--label-noise", "2"], ["train", "--seeds", "0"], ["train", "--lr", "inf"], ["dance"], [],
        ["many-gpus", "--gpus", "0"], ["many-gpus", "--utilisation", "2"], ["many-gpus", "--latency", "0"],
    ],
)  # fmt: skip
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
