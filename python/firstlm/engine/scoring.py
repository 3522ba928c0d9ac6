"""Log-probabilities of given continuations. Letters: B prompts, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from firstlm.engine.core import DecoderCore
from firstlm.engine.planning import PlanChoice, prefill_prompts
from firstlm.engine.stats import EngineStats

_CHUNK = 128  # tokens whose logits are held at once


def score_rows(
    core: DecoderCore,
    prompts: Sequence[list[int]],
    continuations: Sequence[list[int]],
    choice: PlanChoice,
    stats: EngineStats,
) -> list[torch.Tensor]:
    """log p of every token of every continuation: f32 [T], one tensor a prompt."""
    found = []
    for row, (prompt, tokens) in enumerate(zip(prompts, continuations, strict=True)):
        prefilled = prefill_prompts(core, [prompt], choice.of_row(row), stats)
        sequence, logits = prefilled.sequences[0], prefilled.logits  # [1, V]
        parts = []
        for start in range(0, len(tokens), _CHUNK):
            chunk = tokens[start : start + _CHUNK]
            # A token's logits come from the one before it; the last are for the next chunk.
            more = core.extend([sequence], [chunk], [len(chunk)], stats)
            parts.append(_log_probs(torch.cat([logits, more[:-1]]), chunk))
            logits = more[-1:]
        found.append(torch.cat(parts))
    return found


def _log_probs(logits: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """[T] of logits [T, V]."""
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return chosen - logits.logsumexp(1)
