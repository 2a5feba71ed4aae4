"""The command line, `videoanchor COMMAND`: a module of `commands` for each.

Exit codes: 0 done, 2 wrong input, 1 failure, 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .commands import batch, convert, demo, eval, info, run, tune, viz
from .errors import InputError

if TYPE_CHECKING:  # it imports torch
    from .batch.tensor_parallel_process import Leader

COMMANDS = (demo, run, batch, eval, tune, viz, convert, info)


def main(argv: Sequence[str] | None = None, leader: "Leader | None" = None) -> int:
    """Entry point of `videoanchor`.

    Args:
        leader: where the command's model is split among processes and this is the first of them.
    """
    args = _parser().parse_args(argv)
    args.argv, args.leader = sys.argv[1:] if argv is None else [*argv], leader
    try:
        if leader is None:
            _refuse_torchrun()
        return args.command(args)
    except InputError as error:
        print(f"videoanchor {args.name}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that vanished
        print(f"videoanchor {args.name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"videoanchor {args.name}: interrupted", file=sys.stderr)
        return 130


def _refuse_torchrun() -> None:
    size = os.environ.get("WORLD_SIZE", "")
    if size.isdecimal() and int(size) > 1:
        raise InputError(
            f"{size} processes (WORLD_SIZE, as torchrun sets it) would each do all of it and write over the others: "
            "start one, without torchrun; `run` and `batch` split a model themselves, with --tensor-parallel N"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="videoanchor",
        description="VideoAnchor for video language models: visual tokens are scored by sparse subspace clustering and "
        "every decoder attention is gated by the scores.",
        epilog="Start with: videoanchor demo",
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
