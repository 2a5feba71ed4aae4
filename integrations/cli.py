"""The command line, `videoanchor COMMAND`: a module of `commands` for each.

Exit codes: 0 done, 2 wrong input, 1 failure, 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence

from .commands import batch, convert, demo, eval, info, run, tune, viz
from .errors import InputError

COMMANDS = (demo, run, batch, eval, tune, viz, convert, info)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `videoanchor`."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
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
