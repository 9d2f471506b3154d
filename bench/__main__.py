"""``python -m bench COMMAND``: the command line of the benchmarks, one module a command.

Exit codes: 0 shown, 1 not shown (the reason is printed), 2 wrong usage, no g++, or (gpu-cost) no library or
disassembler, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys

from . import gpu, gpu_cost, ops, overhead, step, train


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of tsam_ext.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train.add_parser(commands)
    ops.add_parser(commands)
    overhead.add_parser(commands)
    step.add_parser(commands)
    gpu.add_parser(commands)
    gpu_cost.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
    except KeyboardInterrupt:
        print("\ninterrupted; train keeps its finished runs, train --resume goes on from them", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
