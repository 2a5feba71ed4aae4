"""What the three models share: the gate over the model that lmms-eval's own class loads."""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from loguru import logger  # pyright: ignore[reportMissingImports]

from ...anchor.config import VideoAnchorConfig
from ..transformers.enable import enable
from ..transformers.handle import Handle
from .settings import split_settings


class GatedModel:
    """Mixin before a chat class of lmms-eval: takes the settings of the gate out of `--model_args`, lets that class
    load its checkpoint, and gates it.

    With alpha_k = alpha_v = alpha_q = 0, the baseline, nothing is scored: the same attention with a gate of 1.

    lmms-eval logs an `Exception` and exits with 0; only `SystemExit` reaches the shell.

    Attributes:
        handle: what `enable` returned.

    Raises:
        SystemExit: a setting is wrong or unknown (2), or the checkpoint cannot be loaded (1).
    """

    handle: Handle

    def __init__(self, **arguments: Any) -> None:
        config, rest = _settings_or_exit(arguments, super().__init__)
        if config.alpha_k == config.alpha_v == config.alpha_q == 0:
            config = replace(config, scorer="uniform", arithmetic="exact")
        with _failures_end_the_run("the model cannot be loaded"):
            super().__init__(**rest)
            self.handle = enable(self.model, config)  # pyright: ignore[reportAttributeAccessIssue]

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """Answers as lmms-eval's class does, except that a failure ends the run: some of its classes log the error and
        go on, so that a question that was never answered counts as a wrong answer.

        Raises:
            SystemExit: generation failed.
        """
        model: Any = self.model  # pyright: ignore[reportAttributeAccessIssue]
        generate = model.generate

        def generate_or_exit(*args: Any, **kwargs: Any) -> Any:
            with _failures_end_the_run("generation failed"):
                return generate(*args, **kwargs)

        model.generate = generate_or_exit
        try:
            return super().generate_until(requests)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            model.generate = generate


def _settings_or_exit(
    arguments: Mapping[str, Any], load: Callable[..., None]
) -> tuple[VideoAnchorConfig, dict[str, Any]]:
    """`split_settings`; what is left must be arguments of `load`, as some of lmms-eval's classes pass over others."""
    try:
        config, rest = split_settings(arguments)
        known = inspect.signature(load).parameters.keys() - {"kwargs"}
        if unknown := sorted(rest.keys() - known):
            raise ValueError(f"unknown {', '.join(unknown)}: expected {', '.join(sorted(known))}, or one of the gate's")
    except (TypeError, ValueError) as error:
        print(f"--model_args: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    return config, rest


@contextmanager
def _failures_end_the_run(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        logger.exception(what)
        raise SystemExit(f"{what}, and the run ends here: {error}") from error
