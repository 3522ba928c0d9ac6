"""The name of the cache among transformers' arguments and outputs: `cache`, before 5.24
`past_key_values`. Ours take both, whatever transformers is installed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, MutableMapping
from typing import Any

from transformers.generation import GenerationMixin

NAMES = ("cache", "past_key_values")
_parameters = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
NAME = next(name for name in NAMES if name in _parameters)


def find_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments, or None.

    Raises:
        ValueError: two different ones, one under each name.
    """
    caches = [arguments[name] for name in NAMES if arguments.get(name) is not None]
    if len(caches) == 2 and caches[0] is not caches[1]:
        raise ValueError("pass the cache once, as cache or as past_key_values")
    return caches[0] if caches else None


def set_cache(arguments: MutableMapping[str, Any], cache: Any) -> None:
    """Make `cache` the one among keyword arguments, under transformers' name."""
    for name in NAMES:
        arguments.pop(name, None)
    arguments[NAME] = cache


def cache_of(output: Any) -> Any:
    """The cache of an output of `forward` or `generate`."""
    return getattr(output, NAME)
