"""Log-probabilities of given continuations. Letters: B prompts, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from firstlm.engine.core import DecoderCore
from firstlm.engine.planning import PlanChoice, Prefilled, prefill_prompts
from firstlm.engine.stats import EngineStats
from firstlm.skip_plan import SkipPlan

_CHUNK = 128  # tokens whose logits are held at once


@dataclass
class Score:
    """How likely a continuation of T tokens is.

    Attributes:
        log_probs: f32 [T], natural logarithms of the tokens' probabilities.
        is_greedy: bool [T], where the token is the most likely one.
        skip_plan: of the prompt.
        keep_prob: f32 [L], what the routers said; None under a given plan.
    """

    log_probs: torch.Tensor
    is_greedy: torch.Tensor
    skip_plan: SkipPlan
    keep_prob: torch.Tensor | None


def score_rows(
    core: DecoderCore,
    prompts: Sequence[list[int]],
    continuations: Sequence[list[int]],
    choice: PlanChoice,
    stats: EngineStats,
) -> list[Score]:
    """The score of every continuation; a prompt that follows itself is read once."""
    found: list[Score] = []
    last: Prefilled | None = None
    for row, (prompt, tokens) in enumerate(zip(prompts, continuations, strict=True)):
        same = row > 0 and (prompt, choice.of_row(row)) == (
            prompts[row - 1],
            choice.of_row(row - 1),
        )
        if last is not None and same and _rewind(last, len(prompt)):
            stats.reused_tokens += len(prompt)
        else:
            last = prefill_prompts(core, [prompt], choice.of_row(row), stats)
        log_probs, is_greedy = _score_tokens(core, last, tokens, stats)
        keep_prob = None if last.keep_prob is None else last.keep_prob[0]
        found.append(Score(log_probs, is_greedy, SkipPlan.from_mask(last.keep[0]), keep_prob))
    return found


def _rewind(prefilled: Prefilled, length: int) -> bool:
    """Back to the end of the prompt; False if a sliding window has moved on."""
    try:
        prefilled.sequences[0].crop(length)
    except RuntimeError:
        return False
    return True


def _score_tokens(
    core: DecoderCore, prefilled: Prefilled, tokens: list[int], stats: EngineStats
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log_probs, is_greedy) [T] of what follows a prompt; the last token is not read."""
    sequence, logits = prefilled.sequences[0], prefilled.logits  # [1, V]
    log_probs, is_greedy = [torch.empty(0)], [torch.empty(0, dtype=torch.bool)]
    for start in range(0, len(tokens), _CHUNK):
        chunk = tokens[start : start + _CHUNK]
        # A token's logits come from the one before it; the last are for the next chunk.
        read = chunk if start + _CHUNK < len(tokens) else chunk[:-1]
        if read:
            logits = torch.cat([logits, core.extend([sequence], [read], [len(read)], stats)])
        asked = torch.tensor(chunk)
        own = logits[: len(chunk)]
        log_probs.append(own.gather(1, asked[:, None])[:, 0] - own.logsumexp(1))
        is_greedy.append(own.argmax(1) == asked)
        logits = logits[-1:]
    return torch.cat(log_probs), torch.cat(is_greedy)
