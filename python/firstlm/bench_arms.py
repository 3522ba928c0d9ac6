"""The runtimes of `firstlm bench decode` behind one interface: the same tokens in, timings out.

Every arm is greedy and produces exactly as many tokens as it is asked for: no end of text stops it.
Letters: B sequences, T prompt tokens, L layers.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from firstlm.bench_models import BenchModel, Sizes, Stopwatch, Timing, gguf_sizes, hf_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NATIVE, LLAMA_CPP, HF = "firstlm", "llama.cpp", "transformers"


class Arm(ABC):
    """One runtime with one set of weights.

    Attributes:
        runtime, precision: names for the reader.
        sizes: bytes that its steps read.
    """

    runtime: str
    precision: str
    sizes: Sizes

    @property
    def name(self) -> str:
        return f"{self.runtime} {self.precision}"

    @abstractmethod
    def run(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, keep: Tensor | None = None
    ) -> Timing:
        """Read B prompts of one length and produce `new_tokens`, at least 2, for each.

        Args:
            keep: skip plans, bool [B, L]; only firstlm's engine takes any.
        """

    def again(self, new_tokens: int) -> Timing:
        """The tokens of the last run's prompts once more, without reading the prompts again."""
        raise NotImplementedError(f"{self.name} cannot go back to the end of a prompt")

    def close(self) -> None:  # noqa: B027
        """Free what the arm holds."""


class HfArm(Arm):
    """`generate` of transformers."""

    runtime = HF

    def __init__(self, model: PreTrainedModel) -> None:
        self.precision = str(model.dtype).removeprefix("torch.")
        self.sizes = hf_sizes(model)
        self._model = model

    @torch.inference_mode()
    def run(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, keep: Tensor | None = None
    ) -> Timing:
        from firstlm.measure import TokenClock

        if keep is not None or len(prompts) > 1:
            raise ValueError(f"{self.name} is timed at batch 1 without skip plans")
        ids = torch.tensor(prompts)  # [1, T]
        clock = TokenClock()
        start = time.perf_counter()
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            streamer=clock,
        )
        first, last = clock.arrivals[0], clock.arrivals[-1]
        tokens = output[:, ids.shape[1] :].tolist()
        return Timing(first - start, last - first, new_tokens - 1, tokens)


class LlamaCppArm(Arm):
    """llama.cpp's own calls on a GGUF file.

    Args:
        context: tokens of the longest sequence.
        sequences: the largest B.
    """

    runtime = LLAMA_CPP

    def __init__(
        self, path: Path, kind: str, config: Any, *, threads: int, context: int, sequences: int = 1
    ) -> None:
        from firstlm.llama_cpp_model import LlamaCppModel

        self.precision = kind
        self.sizes = gguf_sizes(path, config)
        self._model = LlamaCppModel(path, num_threads=threads, context=context, sequences=sequences)
        self._first: list[int] = []
        self._prompt_tokens = 0

    def run(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, keep: Tensor | None = None
    ) -> Timing:
        if keep is not None:
            raise ValueError(f"{self.name} takes no skip plans")
        self._model.clear()
        self._prompt_tokens = len(prompts[0])
        watch = Stopwatch()
        self._first = [
            int(self._model.extend(prompt, row).argmax()) for row, prompt in enumerate(prompts)
        ]
        return self._decode(watch(), watch, new_tokens)

    def again(self, new_tokens: int) -> Timing:
        for row in range(len(self._first)):
            self._model.crop(self._prompt_tokens, row)
        return self._decode(None, Stopwatch(), new_tokens)

    def _decode(self, ttft: float | None, watch: Stopwatch, new_tokens: int) -> Timing:
        tokens = [self._first]
        for _ in range(new_tokens - 1):
            tokens.append(self._model.step(tokens[-1]).argmax(-1).tolist())
        decode = watch()
        return Timing(
            ttft, decode, new_tokens - 1, [list(row) for row in zip(*tokens, strict=True)]
        )

    def close(self) -> None:
        self._model.close()


class NativeArm(Arm):
    """firstlm's engine."""

    runtime = NATIVE
    _GREEDY: dict[str, Any] = {"temperature": 0.0}  # noqa: RUF012

    def __init__(self, model: BenchModel, precision: str, *, threads: int) -> None:
        self.precision = precision
        engine = model.engine(precision, threads)
        self._decoder = engine.core.decoder  # nothing else of it is timed
        self._num_layers = model.hf.config.num_hidden_layers
        self._sequences: list[Any] = []
        self._logits = torch.empty(0)
        self._prompts: list[list[int]] = []
        self.sizes = self._count()

    def run(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, keep: Tensor | None = None
    ) -> Timing:
        B = len(prompts)
        if keep is None:
            keep = torch.ones(B, self._num_layers, dtype=torch.bool)
        self._prompts = [list(prompt) for prompt in prompts]
        watch = Stopwatch()
        self._sequences = [self._decoder.sequence() for _ in range(B)]
        self._logits, _ = self._decoder.extend(self._sequences, self._prompts, keep, None, [1] * B)
        return self._decode(watch, new_tokens, prompt_was_read=True)

    def again(self, new_tokens: int) -> Timing:
        for sequence, prompt in zip(self._sequences, self._prompts, strict=True):
            sequence.crop(len(prompt))
        return self._decode(Stopwatch(), new_tokens, prompt_was_read=False)

    def _decode(self, watch: Stopwatch, new_tokens: int, *, prompt_was_read: bool) -> Timing:
        B = len(self._sequences)
        decoding = self._decoder.decoding(
            self._sequences,
            # A copy, as they are overwritten; by numpy: torch's threads, once woken, would spin
            # for milliseconds against the decode that is timed.
            torch.from_numpy(self._logits.numpy().copy()),
            [self._GREEDY] * B,
            self._prompts,
            [],
            [new_tokens] * B,
        )
        first = decoding.advance(1)  # out of the prompt's logits: no forward
        ttft = watch()
        rest = decoding.advance(new_tokens - 1)
        decode = watch()
        tokens = [a + b for a, b in zip(first, rest, strict=True)]
        return Timing(ttft if prompt_was_read else None, decode, new_tokens - 1, tokens)

    def _count(self) -> Sizes:
        """Sizes from what the engine counts that it reads: of one layer, and of all."""
        L, T = self._num_layers, 4
        one = torch.zeros(1, L, dtype=torch.bool)
        one[0, 0] = True
        read = {}
        for layers, keep in ((1, one), (L, torch.ones_like(one))):
            self.run([[0] * T], 2, keep)
            before = self._decoder.counters()
            self.again(2)
            after = self._decoder.counters()
            read[layers] = {n: after[n] - before[n] for n in ("weight_bytes", "cache_bytes")}
        weights = read[L]["weight_bytes"]
        layer = (weights - read[1]["weight_bytes"]) // max(L - 1, 1)
        kv_token = read[L]["cache_bytes"] // (L * (T + 1))
        return Sizes((layer,) * L, weights - L * layer, kv_token)

    def close(self) -> None:
        self._sequences, self._decoder = [], None
