"""python -m bench COMMAND: the command line of the benchmarks, one module per command; exit codes are command.py's."""

from __future__ import annotations

import argparse
import sys

from . import gpu, gpu_cost, many_gpus, ops, overhead, step
from .command import EXIT_CODES, HelpFormatter
from .paper import command as paper
from .training import compare, cost, half_precision, landscape, sweep, train


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Benchmarks of tsam_ext.", epilog=EXIT_CODES, formatter_class=HelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    trained = (train, compare, sweep, cost, paper, landscape, half_precision)
    for module in (*trained, step, overhead, ops, gpu_cost, many_gpus, gpu):
        module.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
    except KeyboardInterrupt:
        kept = "train, compare, sweep, landscape and paper keep what is finished; --resume goes on from there"
        print(f"\ninterrupted; {kept}", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
