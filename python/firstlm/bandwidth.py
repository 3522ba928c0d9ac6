"""Read bandwidth of the machine, measured beside what it is the limit of; cold buffers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from firstlm.native import read_all

__all__ = ["cold_bytes", "last_level_cache_bytes", "read_all", "read_gb_per_s", "rotating"]

T = TypeVar("T")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def last_level_cache_bytes() -> int:
    """Size of the largest CPU cache as the system gives it; 32 MiB where it does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * _UNITS[text[-1]] if text[-1] in _UNITS else int(text))
    return max(sizes, default=32 * 2**20)


def cold_bytes() -> int:
    """Bytes to go through between two reads of the same buffer, so that no cache still has it."""
    return min(max(2 * last_level_cache_bytes(), 64 * 2**20), 2**30)


def rotating(make: Callable[[], T], nbytes: int, total_bytes: int) -> Iterator[T]:
    """Endlessly one of several values in turn, as many as are `total_bytes` together.

    Args:
        make: makes a value.
        nbytes: bytes of one that will be touched.
        total_bytes: at least one value is made; with `cold_bytes()` none is still in a cache.
    """
    values = [make() for _ in range(math.ceil(total_bytes / nbytes) + 1)]
    while True:
        yield from values


def read_gb_per_s(nbytes: int | None = None, repeats: int = 10) -> list[float]:
    """Gigabytes (1e9 bytes) a second that torch's threads read, one value a repeat.

    Args:
        nbytes: of the buffer; default: larger than the caches.
    """
    buffer = torch.ones((nbytes or 2 * cold_bytes()) // 4, dtype=torch.float32)
    read_all(buffer)  # pages and threads are there
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        read_all(buffer)
        rates.append(buffer.nbytes / 1e9 / (time.perf_counter() - start))
    return rates
