"""A conversation with an engine: every turn reads only what is new.

The plan of the first turn stays for the later ones, since a layer that was skipped has no keys and
values of what was said. `replan=True`, another `skip_plan` or a `budget` reads the whole
conversation again under new plans.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from firstlm.engine.answers import Generation
from firstlm.engine.call import Call, check_options, run
from firstlm.engine.planning import Prefilled, is_reusable, prefill_prompts
from firstlm.engine.prefix import KeptSequence
from firstlm.engine.prompts import is_message
from firstlm.engine.stats import EngineStats
from firstlm.skip_plan import SkipPlan

if TYPE_CHECKING:
    from firstlm.engine.engine import Engine


class Chat:
    """Made by `Engine.chat`. Turns of one conversation come one after the other.

    Attributes:
        messages: what was said so far, role and content.
        last: `Generation` of the last turn that was not closed.
        stats: of the last turn; `reused_tokens` are those that were not read again.
    """

    def __init__(
        self, engine: Engine, messages: Sequence[dict[str, str]], options: dict[str, Any]
    ) -> None:
        check_options("chat", options)
        listed = isinstance(messages, Sequence) and not isinstance(messages, str)
        if not listed or not all(map(is_message, messages)):
            raise TypeError(
                "messages takes chat messages [{'role': …, 'content': …}], got "
                f"{messages!r:.80}: a question goes to send(text)"
            )
        self.messages = [dict(message) for message in messages]
        self.stats = EngineStats()
        self.last: Generation | None = None
        self._engine = engine
        self._options = options
        self._planned: tuple[Tensor, Tensor | None] | None = None  # keep [L], keep_prob [L]
        self._kept: KeptSequence | None = None

    @property
    def skip_plan(self) -> SkipPlan | None:
        """Of the conversation; None before the first turn."""
        return None if self._planned is None else SkipPlan.from_mask(self._planned[0])

    def send(self, text: str, *, replan: bool = False, **options: Any) -> str:
        """Says something and returns the answer.

        Args:
            text: of the user.
            replan: find new plans, which reads the whole conversation again.
            **options: of this turn, those of `Engine.generate` but for `details`. Another `prefill`
                than that of the turns before, or "full" where layers are skipped, reads the whole
                conversation again under the same plan; a `budget`, whatever its `budget_mode`,
                finds a new plan.

        Raises:
            TypeError, ValueError: as `Engine.generate`; the conversation stays as it was.
        """
        return "".join(self.stream(text, replan=replan, **options))

    def stream(
        self, text: str, *, replan: bool = False, **options: Any
    ) -> Generator[str, None, None]:
        """As `send`, piece by piece. Of an iterator that is closed, what it gave is remembered.

        Raises:
            TypeError, ValueError: as `send`, at once.
        """
        check_options("a turn of a chat", options)
        messages = [*self.messages, {"role": "user", "content": text}]
        call = self._engine.prepare(messages, as_text=True, **self._with_own(options))
        replan = replan or options.get("budget") is not None
        if self._planned is not None and options.get("skip_plan") is not None:
            replan = replan or call.choice.skip_plans != [self.skip_plan]
        return self._stream(messages, call, replan)

    def _with_own(self, options: dict[str, Any]) -> dict[str, Any]:
        """With the conversation's, but for its plan and budget where the turn has one of them."""
        own = dict(self._options)
        if options.get("skip_plan") is not None or options.get("budget") is not None:
            own = {name: own[name] for name in own if name not in ("skip_plan", "budget")}
        return own | options

    def _stream(
        self, messages: list[dict[str, str]], call: Call, replan: bool
    ) -> Generator[str, None, None]:
        pieces: list[str] = []
        steps = run(self._engine.core, call, lambda c: self._read(c, replan), one_by_one=True)
        try:
            for ((_, piece),) in steps:
                if piece:
                    pieces.append(piece)
                    yield piece
            self.last = call.generation(0)
        finally:
            steps.close()
            self._engine.ended(call.stats)
            self.stats = call.stats
            if call.prefilled is not None:
                keep, keep_prob = call.prefilled.keep, call.prefilled.keep_prob
                self._planned = keep[0], None if keep_prob is None else keep_prob[0]
                reusable = self._is_reusable(call, keep[0])
                self._kept = call.kept_sequence() if reusable else None
                self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    def _is_reusable(self, call: Call, keep: Tensor) -> bool:
        return is_reusable(keep, call.choice.prefill_of(self._engine.core))

    def _read(self, call: Call, replan: bool) -> Prefilled:
        core, rows = self._engine.core, call.rows
        if self._planned is None or replan:
            return prefill_prompts(core, rows, call.choice, call.stats)
        keep, keep_prob = self._planned
        kept, self._kept = self._kept, None  # if this call fails, what it holds is not known
        reusable = kept is not None and self._is_reusable(call, keep)
        reused = kept.cut_to(rows[0]) if kept is not None and reusable else 0
        if kept is not None and reused:
            call.stats.reused_tokens += reused
            logits = core.extend([kept.sequence], [rows[0][reused:]], [1], call.stats)
            sequences = [kept.sequence]
        else:  # a turn failed, a window has moved on, or prefill="full": again, under this plan
            choice = dataclasses.replace(
                call.choice, skip_plans=[SkipPlan.from_mask(keep)], budget=None
            )
            again = prefill_prompts(core, rows, choice, call.stats)
            logits, sequences = again.logits, again.sequences
        return Prefilled(
            sequences, logits, keep[None], None if keep_prob is None else keep_prob[None]
        )
