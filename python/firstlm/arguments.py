"""Kinds of values that public calls take, named in the message where one is of another kind."""

from __future__ import annotations

from typing import Any


def whole_number(name: str, value: Any) -> int:
    """Any kind of integer, of numpy and torch as well. Raises TypeError for others."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} takes a whole number, got {value!r}")
    try:
        return value.__index__()
    except TypeError as error:  # an array of several, or of other numbers
        raise TypeError(f"{name} takes a whole number, got {value!r}") from error


def number(name: str, value: Any) -> float:
    """Any kind of real number. Raises TypeError for others."""
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} takes a number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError) as error:  # an array of several
        raise TypeError(f"{name} takes a number, got {value!r}") from error
