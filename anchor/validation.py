"""Checks of single settings, with errors that name them."""

import math
from numbers import Integral, Real


def check_number(name: str, value: object, *, low: float, high: float = math.inf, low_included: bool = False) -> None:
    """Raise unless `value` is a finite number above `low` (or equal to it, if included) and below `high`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    if not (math.isfinite(number) and number < high and (number > low or (low_included and number == low))):
        below = f" and < {high}" if high < math.inf else ""
        raise ValueError(f"{name} must be finite and {'>=' if low_included else '>'} {low}{below}, got {value}")


def check_integer(name: str, value: object, *, low: int, high: int | None = None) -> None:
    """Raise unless `value` is an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if int(value) < low or (high is not None and int(value) > high):
        raise ValueError(f"{name} must be >= {low}{f' and <= {high}' if high is not None else ''}, got {value}")


def check_choice(name: str, value: object, choices: tuple[object, ...], otherwise: str = "") -> None:
    """Raise unless `value` is one of `choices`; `otherwise` ends the message."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}{otherwise}, got {value!r}")


def check_keep(keep: object) -> None:
    """Raise unless `keep` is a share in (0, 1] or a number, at least 1."""
    if isinstance(keep, bool) or not isinstance(keep, Real):
        raise TypeError(f"keep must be a number, got {keep!r}")
    if not (int(keep) >= 1 if isinstance(keep, Integral) else 0 < float(keep) <= 1):
        raise ValueError(f"keep must be a share of the visual tokens in (0, 1], or a number of them, got {keep!r}")
