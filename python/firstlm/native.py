"""The native classes and functions, `firstlm._native`: built for one Python, as the ops are not."""

from __future__ import annotations

from firstlm import ops  # first: it registers the ops that the classes call

try:
    from firstlm import _native
except ImportError as error:
    raise ImportError(
        f"firstlm's native classes do not load beside {ops.LIBRARY}: they are not built, or for "
        "another Python or torch. In firstlm's source folder run: "
        f"pip install --no-build-isolation .\n{error}"
    ) from error

from pathlib import Path

read_all = _native.read_all
SkipCacheStorage = _native.SkipCacheStorage
LIBRARY = Path(_native.__file__)

__all__ = ["LIBRARY", "SkipCacheStorage", "read_all"]
