"""What the three models share: the gate over the model that lmms-eval's own class loads."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from loguru import logger  # pyright: ignore[reportMissingImports]

from ..enable import Handle, enable
from .settings import split_settings


class GatedModel:
    """Mixin before a chat class of lmms-eval: takes the settings of the gate out of `--model_args`, lets that class
    load its checkpoint, and gates it.

    With alpha_k = alpha_v = alpha_q = 0, the baseline, nothing is scored: the same attention with a gate of 1.

    Attributes:
        handle: what `enable` returned.
    """

    handle: Handle

    def __init__(self, **arguments: Any) -> None:
        config, rest = split_settings(arguments)
        super().__init__(**rest)
        if config.alpha_k == config.alpha_v == config.alpha_q == 0:
            config = replace(config, scorer="uniform", arithmetic="exact")
        self.handle = enable(self.model, config)  # pyright: ignore[reportAttributeAccessIssue]

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """Answers as lmms-eval's class does, except that a failure ends the run: some of its classes log the error and
        go on, so that a question that was never answered counts as a wrong answer.

        Raises:
            SystemExit: generation failed.
        """
        with _failures_end_the_run(self.model):  # pyright: ignore[reportAttributeAccessIssue]
            return super().generate_until(requests)  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def _failures_end_the_run(model: Any) -> Iterator[None]:
    generate = model.generate

    def generate_or_exit(*args: Any, **kwargs: Any) -> Any:
        try:
            return generate(*args, **kwargs)
        except Exception as error:
            logger.exception("generation failed")
            raise SystemExit(f"generation failed, and the run ends here: {error}") from error

    model.generate = generate_or_exit
    try:
        yield
    finally:
        model.generate = generate
