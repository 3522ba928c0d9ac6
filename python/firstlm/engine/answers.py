"""The answers of a call while they grow: tokens, text, and where they end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from firstlm.engine.core import DecoderCore
from firstlm.engine.settings import Settings
from firstlm.engine.stats import EngineStats
from firstlm.engine.text import EngineTokenizer, StopStrings, TextStream
from firstlm.skip_plan import SkipPlan

_CHUNK_MS = 50  # Python is back this often, to hear Ctrl-C
_MOST_STEPS = 64
_STEPS_BEFORE_STOP_IS_SEEN = 8


@dataclass
class Generation:
    """One answer.

    Attributes:
        tokens: its ids, the one that ended it included.
        text: without the stop; None if the engine has no tokenizer.
        prompt_tokens: number of tokens of the prompt.
        finish_reason: "stop" (end of sequence or a stop of the call) or "length".
        skip_plan: under which it was made.
        keep_prob: f32 [L], what the routers said; None under a given plan.
    """

    tokens: list[int]
    text: str | None
    prompt_tokens: int
    finish_reason: str
    skip_plan: SkipPlan
    keep_prob: torch.Tensor | None


class Answer:
    """One answer while it grows.

    Args:
        tokenizer: None: no text.
        settings: of the call.
        limit: at most so many tokens.
        as_text: text is wanted piece by piece, or has to be watched for a stop.
    """

    def __init__(
        self,
        tokenizer: EngineTokenizer | None,
        settings: Settings,
        limit: int,
        as_text: bool = False,
    ) -> None:
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self._tokenizer = tokenizer
        self._settings = settings
        self.limit = limit
        self._stream = None
        if as_text or settings.stop_strings:
            assert tokenizer is not None
            self._stream = TextStream(tokenizer)
        self._stops = StopStrings(settings.stop_strings)
        self._pieces: list[str] = []

    def push(self, tokens: Sequence[int]) -> tuple[list[int], str]:
        """Takes tokens; those after the end are dropped.

        Returns:
            The tokens that were taken, and the text that is certain now (if text is wanted).
        """
        taken, text = [], ""
        for token in tokens:
            if self.finish_reason is not None:
                break
            taken.append(token)
            self.tokens.append(token)
            ends = token in self._settings.end_tokens
            if self._stream is not None and not ends:
                text += self._stops.push(self._stream.push([token]))
            if ends or self._stops.found:
                self.finish_reason = "stop"
            elif len(self.tokens) == self.limit:
                self.finish_reason = "length"
        if self.finish_reason is not None and taken:
            text += self._last_text()
            if self._stops.found:  # by what the limit had cut off
                self.finish_reason = "stop"
        self._pieces.append(text)
        return taken, text

    def _last_text(self) -> str:
        if self._stream is None:
            return ""
        return self._stops.push(self._stream.finish()) + self._stops.finish()

    def text(self) -> str | None:
        """The whole text so far."""
        if self._stream is not None:
            return "".join(self._pieces)
        if self._tokenizer is None:
            return None
        ended = self.tokens and self.tokens[-1] in self._settings.end_tokens
        return self._tokenizer.decode(self.tokens[:-1] if ended else self.tokens)


def decode_steps(
    core: DecoderCore,
    decoding: Any,
    answers: Sequence[Answer],
    stats: EngineStats,
    one_by_one: bool = False,
    watched: bool = False,
) -> Iterator[list[tuple[list[int], str]]]:
    """Runs the decode loop and yields, chunk by chunk, what `Answer.push` returns of every row.

    Args:
        one_by_one: a step a chunk.
        watched: stop strings may end a row, so that long chunks would be decoded for nothing.
    """
    steps, most = 1, _STEPS_BEFORE_STOP_IS_SEEN if watched else _MOST_STEPS
    first = True
    while not all(decoding.finished):
        ran, before = stats.steps, stats.decode_ms
        found = core.advance(decoding, steps, stats)
        taken = [answer.push(tokens) for answer, tokens in zip(answers, found, strict=True)]
        stats.new_tokens += sum(len(tokens) for tokens, _ in taken)
        for row, answer in enumerate(answers):
            if answer.finish_reason is not None and not decoding.finished[row]:
                decoding.finish(row)
        if first:
            stats.begin_decode(len(answers))
        elif not one_by_one and stats.steps > ran:
            step_ms = (stats.decode_ms - before) / (stats.steps - ran)
            steps = max(1, min(most, int(_CHUNK_MS / step_ms)))
        first = False
        yield taken
