"""The command line, `videoanchor COMMAND`: a module of `commands` for each.

Exit codes: 0 done, 2 wrong input, 1 failure, 130 interrupted, 143 terminated.
"""

import argparse
import io
import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version

from ..integrations.errors import InputError, Terminated
from .batch.stopping import StoppedError, failure_of
from .commands import batch, check, compare, convert, demo, eval, info, run, tune, viz
from .completion import SHELLS, PrintCompletion
from .settings_file import add_settings_options, commands_of, parse
from .termination import terminated_cleanly
from .text import printable
from .threads import settle_threads

COMMANDS = (demo, run, batch, eval, tune, compare, viz, convert, info, check)
_MISFIT = re.compile(r"operator torchvision::\w+ does not exist|PyTorch and torchvision were compiled with different")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `videoanchor`."""
    settle_threads()
    if isinstance(sys.stdout, io.TextIOWrapper):  # an answer in letters that the terminal lacks is no failure
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = parse(_parser, argv)
    except InputError as error:
        return _ended("", error, 2)
    if args.print_config:
        print(args.settings)
        return 0
    with terminated_cleanly():
        try:
            _refuse_torchrun()
            return args.command(args)
        except InputError as error:
            return _ended(args.name, error, 2)
        except OSError as error:  # a full disk, a folder that vanished
            return _ended(args.name, error, 1)
        except StoppedError as error:
            return _ended(args.name, f"{error}: {args.out} has what was done, the same command goes on", 1)
        except Terminated:
            return _ended(args.name, "terminated", 143)
        except KeyboardInterrupt:
            return _ended(args.name, "interrupted", 130)
        except Exception as error:
            if misfit := _misfit_of_torchvision(error):
                return _ended(args.name, misfit, 2)
            if failure_of(error) != "accelerator":
                raise
            line = str(error).split("\n", 1)[0]
            return _ended(args.name, f"the device failed, and this process cannot use it any more ({line})", 1)


def _ended(command: str, why: object, code: int) -> int:
    print(f"videoanchor {command}".strip() + f": {printable(why)}", file=sys.stderr)
    return code


def _misfit_of_torchvision(error: BaseException) -> InputError | None:
    """What to say where importing transformers' models or processors failed because torchvision was built for another
    torch: transformers names neither."""
    link: BaseException | None = error
    while link is not None and not _MISFIT.search(str(link)):
        link = link.__cause__ or link.__context__
    if link is None:
        return None
    return InputError(
        f"the installed torchvision was built for another torch and cannot be imported ({link}): install torch and "
        "torchvision together, both for the CPU or both for the same CUDA"
    )


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
    parser.add_argument("--version", action="version", version=f"videoanchor-triton {version('videoanchor-triton')}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        help="a script for completion in a shell",
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    for command in commands_of(parser).values():
        add_settings_options(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
