"""`videoanchor --print-completion SHELL`: what a shell reads to complete commands, options, choices and paths."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .settings_file import commands_of
from .video.remote import path_or_url

SHELLS = ("bash", "zsh", "tcsh")


class PrintCompletion(argparse.Action):
    """Prints the script for a shell, and ends; made by shtab (extra `completion`), so that nothing runs at each TAB."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:  # noqa: ARG002
        if find_spec("shtab") is None:
            parser.exit(2, "videoanchor: missing shtab: pip install 'videoanchor-triton[completion]'\n")
        import shtab  # pyright: ignore[reportMissingImports]

        for command in commands_of(parser).values():
            for action in command._actions:
                if action.type in (Path, path_or_url):
                    action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
        sys.stdout.write(shtab.complete(parser, shell=values))
        parser.exit()
