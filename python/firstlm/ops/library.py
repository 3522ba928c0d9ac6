"""The library of native ops: plain torch ops without a Python ABI, so torch itself loads it."""

from __future__ import annotations

from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "_ops.so"


def _load_library(path: Path) -> None:
    rebuild = "pip install --no-build-isolation ."
    if not path.exists():
        raise ImportError(
            f"firstlm's native ops are not built: {path} does not exist. "
            f"In firstlm's source folder run: {rebuild} (or -e . for an editable install)"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"{path} does not load with torch {torch.__version__}; it was probably built with "
            f"another torch. In firstlm's source folder run: {rebuild}\n{error}"
        ) from error


_load_library(LIBRARY)


def isa() -> str:
    """Name of the instruction set whose kernels run: the best one, or what FIRSTLM_ISA names."""
    return torch.ops.firstlm.isa()


def isa_levels() -> list[str]:
    """Names that FIRSTLM_ISA takes on this machine, the portable one first."""
    return torch.ops.firstlm.isa_levels()
