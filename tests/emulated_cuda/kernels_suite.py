"""Which tests of tests/kernels run on the emulated card: those that put tensors on a device."""

import pytest

# by file and function; all others that have the fixture `device` pass there
NOT_EMULATED: dict[str, str] = {}


def left_out(item: pytest.Item) -> bool:
    """Whether a test is one of the kernels' that knows of no card, so that `make test` has shown all that it shows."""
    return item.path.parent.name == "kernels" and "device" not in getattr(item, "fixturenames", ())


def reason_to_skip(item: pytest.Item) -> str | None:
    return NOT_EMULATED.get(f"{item.path.name}::{getattr(item, 'originalname', item.name)}")
