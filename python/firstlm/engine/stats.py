"""What a call of an engine took and read."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class EngineStats:
    """Figures of one call of an engine; also of one that was cancelled.

    A step is one pass of the decode loop over all prompts of the call; the weights of a layer are
    read once a step, however many prompts keep it. With one prompt a step is a token.

    Attributes:
        prompts: of the call.
        prompt_tokens: of all prompts.
        reused_tokens: of these, those whose keys and values were there from an earlier call.
        new_tokens: of all answers.
        prefill_ms: passes over the prompts, planning included.
        ttft_ms: from the call to the first token.
        decode_ms, steps: from there to the last token.
        weight_bytes, cache_bytes: of weights and of keys and values, read in these steps.
        layer_runs: [L], in how many of these steps each layer was run; empty before the first.
        kv_bytes, kv_bytes_full: of the keys and values that the next token would see, at the end
            (storage has up to half as much again), and what they would be if no layer were skipped.
        router_ms: of the prefill, spent on routers.
        read_gb_per_s: what the memory can give, if `Engine.measure_bandwidth` has measured it.
    """

    prompts: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    prefill_ms: float = 0.0
    ttft_ms: float = 0.0
    decode_ms: float = 0.0
    steps: int = 0
    weight_bytes: int = 0
    cache_bytes: int = 0
    layer_runs: list[int] = field(default_factory=list)
    kv_bytes: int = 0
    kv_bytes_full: int = 0
    router_ms: float = 0.0
    read_gb_per_s: float | None = None
    _first_tokens: int = field(default=0, repr=False)
    _start: float = field(default_factory=time.perf_counter, repr=False)

    def begin_decode(self, rows: int) -> None:
        """The first token of every row is there."""
        self.ttft_ms = 1e3 * (time.perf_counter() - self._start)
        self.decode_ms, self._first_tokens = 0.0, rows

    @property
    def tpot_ms(self) -> float:
        """Milliseconds a step."""
        return self.decode_ms / self.steps if self.steps else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all answers a second, the first ones and the prefill not counted."""
        decoded = self.new_tokens - self._first_tokens
        return 1e3 * decoded / self.decode_ms if self.decode_ms else 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Tokens of all prompts a second."""
        computed = self.prompt_tokens - self.reused_tokens
        return 1e3 * computed / self.prefill_ms if self.prefill_ms else 0.0

    @property
    def weight_bytes_per_step(self) -> float:
        """Of layers that any prompt keeps, and the output head."""
        return self.weight_bytes / self.steps if self.steps else 0.0

    @property
    def layers_per_step(self) -> float:
        """Layers run a step."""
        return sum(self.layer_runs) / self.steps if self.steps else 0.0

    @property
    def bandwidth_share(self) -> float | None:
        """Bytes read in the decode over what the memory could have given in that time.

        None before the read bandwidth was measured.
        """
        if self.read_gb_per_s is None:
            return None
        possible = self.read_gb_per_s * 1e9 * self.decode_ms / 1e3
        return (self.weight_bytes + self.cache_bytes) / possible if possible else 0.0

    def to_json(self) -> dict[str, Any]:
        """All figures as plain values."""
        derived = ("tpot_ms", "tokens_per_s", "prefill_tokens_per_s", "weight_bytes_per_step",
                   "layers_per_step", "bandwidth_share")  # fmt: skip
        values = {name: value for name, value in asdict(self).items() if name[0] != "_"}
        return values | {name: getattr(self, name) for name in derived}
