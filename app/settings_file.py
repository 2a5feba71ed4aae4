"""Settings files: `--config FILE` and `--print-config` of every command.

They are TOML, which Python reads by itself and in which a value has one type (in YAML `no` is false and 1e-3 is text).
A value is read by argparse, as if it stood on the command line.
"""

import argparse
import json
import tomllib
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from ..integrations.errors import InputError

Build = Callable[[], argparse.ArgumentParser]


def add_settings_options(parser: argparse.ArgumentParser) -> None:
    """--config and --print-config of a command whose other options are there, and a hidden --no-NAME of each flag."""
    for name, action in _settings(parser).items():
        if action.const is True:
            no = {"action": "store_false", "default": action.default, "help": argparse.SUPPRESS}
            parser.add_argument(f"--no-{name}", dest=action.dest, **no)
    files = parser.add_argument_group("settings files")
    files.add_argument(
        "--config",
        type=Path,
        metavar="FILE.toml",
        help="settings by their names here, as in max-frames = 16; the command line wins, and --no-NAME takes back a "
        "flag that the file sets",
    )
    files.add_argument(
        "--print-config", action="store_true", help="print the settings as such a file, and do nothing else"
    )


def parse(build: Build, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a command by its settings file and its command line, which wins.

    Args:
        build: makes the parser; its commands have had `add_settings_options`.

    Returns:
        those of the command; with `print_config`, "settings" is the text to print, and nothing is required.

    Raises:
        InputError: the file cannot be read, or a setting in it is unknown or wrong.
    """
    loose, strict = build(), commands_of(build())
    for name, command in commands_of(loose).items():
        _require_nothing(command)
        command.format_help, command.format_usage = strict[name].format_help, strict[name].format_usage
    first = loose.parse_args(argv)
    if first.config is None and not first.print_config:
        return build().parse_args(argv)
    content = {} if first.config is None else _content(first.config)
    args = _arguments(build, argv, first, content)
    if first.print_config:
        as_text = _arguments(lambda: _untyped(build()), argv, first, content)
        args.settings = _toml(_settings(commands_of(build())[first.name]), as_text)
    return args


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command by its name."""
    (found,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return found.choices


def _settings(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """What a file can set, by its name there: that of an option without the dashes, or of an argument."""
    named = {(action.option_strings or [action.dest])[0].removeprefix("--"): action for action in parser._actions}
    return {
        name: action
        for name, action in named.items()
        if action.dest not in ("help", "config", "print_config") and action.const is not False
    }


def _require_nothing(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        action.required = False


def _untyped(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """With values as they were written, but for numbers."""
    for command in commands_of(parser).values():
        for action in command._actions:
            if action.type not in (int, float):
                action.type = str
    return parser


def _content(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--config {path}: cannot be read as TOML: {error}") from error


def _arguments(
    build: Build, argv: Sequence[str] | None, first: argparse.Namespace, content: dict[str, Any]
) -> argparse.Namespace:
    """Those of a command, by the content of its settings file; `first` has read the command line alone."""
    parser = build()
    settings = _settings(commands_of(parser)[first.name])
    found = _read(first.config, content, commands_of(build())[first.name])
    for name, value in found.items():
        settings[name].required = False
        settings[name].default = [] if _appends(settings[name]) else value
    if first.print_config:
        _require_nothing(commands_of(parser)[first.name])
    args = parser.parse_args(argv)
    for name, value in found.items():  # argparse would add those of the command line to them
        if _appends(settings[name]) and not getattr(args, settings[name].dest):
            setattr(args, settings[name].dest, value)
    return args


def _appends(action: argparse.Action) -> bool:
    return isinstance(action, argparse._AppendAction)


def _read(path: Path, content: dict[str, Any], command: argparse.ArgumentParser) -> dict[str, Any]:
    """The settings in the content of a file, each by its name, as `command` reads them; of an argument the text."""

    def refuse(message: str) -> NoReturn:
        raise InputError(f"--config {path}: {message}")

    settings = _settings(command)
    _require_nothing(command)
    command.error = refuse
    found = {}
    for name, value in content.items():
        if name not in settings:
            near = get_close_matches(name, settings, n=1)
            ask = f"did you mean {near[0]!r}?" if near else "--print-config shows those there are"
            refuse(f"{command.prog} has no setting {name!r}: {ask}")
        action = settings[name]
        if action.const is True:
            if not isinstance(value, bool):
                refuse(f"{name}: expected true or false, got {value!r}")
            found[name] = value
        elif action.option_strings:
            found[name] = getattr(command.parse_args(_tokens(name, action, value, refuse)), action.dest)
        else:
            found[name] = _text(name, value, refuse)
    return found


def _tokens(name: str, action: argparse.Action, value: Any, refuse: Callable[[str], NoReturn]) -> list[str]:
    """The setting as it stands on a command line."""
    if isinstance(value, list) and action.metavar == "A,B,...":
        return [f"--{name}={','.join(_text(name, one, refuse) for one in value)}"]
    one = not isinstance(value, list) and action.nargs == "+"
    if one or not (action.nargs in ("*", "+") or _appends(action)):
        return [f"--{name}={_text(name, value, refuse)}"]
    if not isinstance(value, list):
        refuse(f"{name}: expected a list, got {value!r}")
    texts = [_text(name, one, refuse) for one in value]
    return [f"--{name}={text}" for text in texts] if _appends(action) else [f"--{name}", *texts]


def _text(name: str, value: Any, refuse: Callable[[str], NoReturn]) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        refuse(f"{name}: expected text or a number, got {value!r}")
    return str(value)


def _toml(settings: dict[str, argparse.Action], args: argparse.Namespace) -> str:
    """The settings of `args` as a file; those that are not set as comments."""
    values = {name: getattr(args, action.dest) for name, action in settings.items()}
    lines = [f"# {name} =" if value is None else f"{name} = {_value(value)}" for name, value in values.items()]
    text = "\n".join(lines)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"--print-config: TOML is UTF-8, and a setting here is not: {error}") from error
    return text


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, int | float):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
