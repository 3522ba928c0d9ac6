"""llama.cpp through llama-cpp-python's C functions, an optional peer: what its own programs do.

Nothing of the package's Python layer runs between two tokens, so that what is timed is llama.cpp.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import weakref
from collections.abc import Sequence
from types import ModuleType

import numpy as np

INSTALL = "llama.cpp is measured through llama-cpp-python: pip install 'firstlm[bench]'"


@functools.cache
def binding() -> ModuleType:
    """The module of C functions, quiet and ready.

    Raises:
        RuntimeError: llama-cpp-python is not installed or does not load.
    """
    try:
        from llama_cpp import llama_cpp
    except ImportError as error:
        raise RuntimeError(f"{INSTALL} ({error})") from None
    except (OSError, RuntimeError) as error:
        raise RuntimeError(f"llama-cpp-python is installed but does not load: {error}") from None
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
    llama_cpp.llama_backend_init()
    return llama_cpp


class LlamaCppModel:
    """A GGUF file and one context, whose settings are llama.cpp's defaults but for its size.

    Args:
        path: the file.
        num_threads: for prompts and for single tokens.
        context: tokens of a sequence, prompt included.
        sequences: how many at a time.

    Raises:
        RuntimeError: the file does not load, or llama-cpp-python is missing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        num_threads: int,
        context: int = 512,
        sequences: int = 1,
    ) -> None:
        self._api = api = binding()
        resources = contextlib.ExitStack()
        self._free = weakref.finalize(self, resources.close)
        params = api.llama_model_default_params()
        model = api.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        resources.callback(api.llama_model_free, model)
        params = api.llama_context_default_params()
        # Sequences have cells of their own, in multiples of 256.
        params.n_ctx = -(-context // 256) * 256 * sequences
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = num_threads
        params.no_perf = True
        self._context = api.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {params.n_ctx} tokens")
        resources.callback(api.llama_free, self._context)
        self._memory = api.llama_get_memory(self._context)
        self._capacity = api.llama_n_batch(self._context)
        self._batch = api.llama_batch_init(self._capacity, 0, 1)
        resources.callback(api.llama_batch_free, self._batch)
        self.vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self.lengths = [0] * sequences

    def clear(self) -> None:
        """Forget all sequences."""
        self._api.llama_memory_clear(self._memory, False)
        self.lengths = [0] * len(self.lengths)

    def crop(self, length: int, sequence: int = 0) -> None:
        """Forget the tokens of a sequence from position `length` on."""
        self._api.llama_memory_seq_rm(self._memory, sequence, length, -1)
        self.lengths[sequence] = min(length, self.lengths[sequence])

    def extend(self, tokens: Sequence[int], sequence: int = 0, *, all_logits: bool = False):
        """Run tokens after those that the sequence has.

        Returns:
            np.ndarray: [V] of the last token, or [T, V] of all; valid until the next call, unless
            `all_logits`.
        """
        rows = []
        for start in range(0, len(tokens), self._capacity):
            piece = tokens[start : start + self._capacity]
            last = start + len(piece) == len(tokens)
            wanted = [all_logits or (last and i == len(piece) - 1) for i in range(len(piece))]
            self._decode([(token, sequence) for token in piece], wanted)
            if all_logits:
                rows.append(self._logits(len(piece)).copy())
        return np.concatenate(rows) if all_logits else self._logits(1)[0]

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """One token for each sequence -> logits [B, V], valid until the next call."""
        self._decode([(token, s) for s, token in enumerate(tokens)], [True] * len(tokens))
        return self._logits(len(tokens))

    def _decode(self, tokens: Sequence[tuple[int, int]], wanted: Sequence[bool]) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, sequence) in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = self.lengths[sequence]
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted[i]
            self.lengths[sequence] += 1
        status = self._api.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode failed with status {status}")

    def _logits(self, rows: int) -> np.ndarray:
        pointer = self._api.llama_get_logits(self._context)  # waits until they are there
        return np.ctypeslib.as_array(pointer, shape=(rows, self.vocab_size))

    def close(self) -> None:
        """Free it now instead of when it is collected; it cannot be used afterwards."""
        self._free()
