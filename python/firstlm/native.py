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

MAX_THREADS = _native.MAX_THREADS
Decoder = _native.Decoder
Decoding = _native.Decoding
Sequence = _native.Sequence
SkipCacheStorage = _native.SkipCacheStorage
check_sampling = _native.check_sampling
pack = _native.pack
pack_columns = _native.pack_columns
packed_bytes = _native.packed_bytes
probabilities = _native.probabilities
read_all = _native.read_all
unpack = _native.unpack
LIBRARY = Path(_native.__file__)

__all__ = [
    "LIBRARY",
    "MAX_THREADS",
    "Decoder",
    "Decoding",
    "Sequence",
    "SkipCacheStorage",
    "check_sampling",
    "pack",
    "pack_columns",
    "packed_bytes",
    "probabilities",
    "read_all",
    "unpack",
]
