"""Every JSON with figures is written here: medians with their spread, versions, seed and machine.

A measured quantity is `{"median", "p10", "p90", "n"}`; a count is a plain number. Every file says
with which versions, on which machine and from which seed it came, so that it can be repeated.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from firstlm.atomic import write_json

SCHEMA_VERSION = 1
VERSIONED_PACKAGES = ("torch", "transformers", "peft", "numpy", "llama_cpp_python")


def measured(values: Iterable[float]) -> dict[str, float | int]:
    """`{"median", "p10", "p90", "n"}` of repeated measurements.

    Raises:
        ValueError: there are none, or one is not finite.
    """
    array = np.asarray(list(values), dtype=np.float64)
    if array.size == 0:
        raise ValueError("no values were measured: at least one is needed")
    if not np.isfinite(array).all():
        raise ValueError(f"measured values must be finite, got {array.tolist()}")
    p10, median, p90 = np.percentile(array, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90), "n": int(array.size)}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that figures depend on, where installed."""
    import firstlm

    # The package's own is known also where it runs from its source folder.
    found = {"python": platform.python_version(), "firstlm": firstlm.__version__}
    for package in VERSIONED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """The machine: CPU model, cores this process may use, threads of torch, memory, OS, GPU."""
    import torch

    return {
        "cpu": cpu_model(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "os": _os_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def record(figures: Mapping[str, Any], *, seed: int) -> dict[str, Any]:
    """`figures` with what every file carries: schema_version, seed, versions, machine.

    Raises:
        ValueError: `figures` holds one of these keys, or a number that JSON cannot hold.
    """
    header = {
        "schema_version": SCHEMA_VERSION,
        "seed": seed,
        "versions": versions(),
        "machine": machine(),
    }
    if taken := header.keys() & figures.keys():
        raise ValueError(f"{sorted(taken)} are written by firstlm.figures, not by its callers")
    _refuse_nonfinite(figures, "figures")
    return {**figures, **header}


def write(path: str | os.PathLike[str], figures: Mapping[str, Any], *, seed: int) -> dict[str, Any]:
    """Write `record(figures)` so that the file is whole or absent; returns what was written."""
    value = record(figures, seed=seed)
    write_json(path, value)
    return value


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Figures of a file that `write` wrote.

    Raises:
        ValueError: the file is not JSON with figures, or of a schema that this version cannot read.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    found = value.get("schema_version") if isinstance(value, dict) else None
    if found != SCHEMA_VERSION:
        raise ValueError(
            f"{path}: schema_version is {found}, this firstlm reads {SCHEMA_VERSION}; measure again"
        )
    return value


def cpu_model() -> str:
    """The CPU's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def available_cores() -> int:
    """Cores that this process may run on, which a container or taskset may have lowered."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Physical memory, or None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _os_name() -> str:
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.machine()}"
    except (OSError, KeyError):
        return platform.platform()


def _refuse_nonfinite(value: Any, path: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_nonfinite(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _refuse_nonfinite(item, f"{path}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path} is {value}: JSON has no such number")
