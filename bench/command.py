"""What the commands of python -m bench share: the form of a parser, options that several of them have, exit codes.

A command is a module with add_parser(commands) and run(options); its docstring is its help text, so no markup there.
Exit codes are those of EXIT_CODES. What is WRONG fails a command always, a TARGET MISSED only with --strict.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

EXIT_CODES = """exit codes:
  0    it ran, and nothing is wrong
  1    something is wrong (lines that begin with WRONG): a loss that is not
       finite, a way that computes something else, a check that fails; with
       --strict also where a target is missed (TARGET MISSED)
  2    it cannot run: wrong usage, or something that it needs is not there
  130  interrupted"""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Text as it is written, and the default behind each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        if text and default not in (None, False, argparse.SUPPRESS):
            shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
            text += f" (default: {shown})"
        return text and text.replace("%", "%%")


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    document: str | None,
    *,
    summary: str,
    targets: str = "",
) -> argparse.ArgumentParser:
    """Adds a command; ``targets`` says in words what --strict demands, empty: there is nothing to demand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=document,
        epilog=EXIT_CODES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    outcome = parser.add_argument_group("results")
    outcome.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the files of results")
    if targets:
        outcome.add_argument("--strict", action="store_true", help=f"exit 1 where a target is missed: {targets}")
    parser.set_defaults(run=run, parser=parser)
    return parser


def positive(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected a number above 0")
    return value


def above_zero(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {value}, expected a number above 0")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"got {value}, expected a number from 0 to 1")
    return value


def add_rounds(parser: argparse.ArgumentParser, rounds: int, quick: int | None = None) -> None:
    """--rounds; where --quick takes fewer, the default is left open until :func:`rounds_of`."""
    if quick is None:
        parser.add_argument("--rounds", type=positive, default=rounds, help="timings of each way")
    else:
        told = f"timings of each way (default: {rounds}; with --quick {quick})"
        parser.add_argument("--rounds", type=positive, help=told)
    parser.set_defaults(usual_rounds=(rounds, rounds if quick is None else quick))


def rounds_of(options: argparse.Namespace) -> int:
    """--rounds as given, or the default."""
    usual, quick = options.usual_rounds
    return int(options.rounds or (quick if getattr(options, "quick", False) else usual))


def add_nets(parser: argparse.ArgumentParser, flag: str, default: Sequence[str], what: str) -> None:
    """An option that names nets of nets.py."""
    from .nets import NETS

    parser.add_argument(flag, nargs="+", choices=NETS, default=list(default), metavar="NET",
                        help=f"{what}, of {', '.join(NETS)}")  # fmt: skip


def add_no_compile(parser: argparse.ArgumentParser) -> None:
    """--no-compile."""
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")


def command_line(options: argparse.Namespace) -> str:
    """The command that does this again: what differs from the defaults, but for the folder of results."""
    words, usual = [options.parser.prog], vars(options.parser.parse_args([]))
    for key, value in vars(options).items():
        if key in usual and key not in ("out", "resume") and value != usual[key]:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{key.replace('_', '-')}", *(shlex.quote(str(one)) for one in values)]
    return " ".join(words)


def cannot_run(options: argparse.Namespace, reason: object) -> int:
    """Says why; returns the exit code."""
    print(f"{options.parser.prog}: {reason}", file=sys.stderr)
    return 2


def conclude(wrong: Sequence[str], missed: Sequence[str] = (), *, strict: bool = False) -> int:
    """Prints what is wrong and which targets are missed; returns the exit code."""
    for line in wrong:
        print(f"WRONG: {line}")
    for line in missed:
        print(f"TARGET MISSED: {line}")
    if missed and not strict:
        print("a missed target fails the command only with --strict")
    return int(bool(wrong) or (strict and bool(missed)))
