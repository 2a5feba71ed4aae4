"""`python -m pytest -p emulated_cuda.plugin PATHS`: the process has an emulated card from before torch's import."""

import os
from collections.abc import Iterator

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from . import kernels_suite
from .guard import NotEmulatedError

try:
    from .device import EmulatedCuda
except NotEmulatedError as error:
    NOT_EMULATED: NotEmulatedError | None = error
else:
    NOT_EMULATED = None
    CARD = EmulatedCuda()


def pytest_configure() -> None:
    if NOT_EMULATED is not None:
        pytest.exit(str(NOT_EMULATED), returncode=int(NOT_EMULATED.fault))
    import interpreter_fixes

    interpreter_fixes.apply()
    CARD.__enter__()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if kernels_suite.left_out(item)]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
    for item in items:
        if reason := kernels_suite.reason_to_skip(item):
            item.add_marker(pytest.mark.skip(reason=f"the emulated card has no {reason}"))


def pytest_unconfigure() -> None:
    if NOT_EMULATED is None:
        CARD.__exit__(None, None, None)


@pytest.fixture
def card() -> Iterator["EmulatedCuda"]:
    """The emulated card, with nothing counted yet and device 0 current."""
    CARD.reset()
    CARD.current = 0
    yield CARD
    CARD.current = 0


@pytest.fixture
def two_cards(card: "EmulatedCuda") -> Iterator["EmulatedCuda"]:
    """The same while there are two devices."""
    card.devices = 2
    yield card
    card.current, card.devices = 0, 1
