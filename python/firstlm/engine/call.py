"""One call of an engine: what was asked, checked before any work, and the run of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from firstlm.engine.answers import Answer, Generation, decode_steps
from firstlm.engine.core import DecoderCore
from firstlm.engine.planning import PlanChoice, Prefilled
from firstlm.engine.prefix import KeptSequence
from firstlm.engine.prompts import Prompts
from firstlm.engine.settings import Settings, settings_of
from firstlm.engine.stats import EngineStats
from firstlm.skip_plan import SkipPlan

if TYPE_CHECKING:
    from firstlm.engine.saved import EngineConfig
    from firstlm.engine.text import EngineTokenizer


@dataclass
class Call:
    """A call that generates.

    Attributes:
        prompts: as given.
        rows: their token ids.
        settings: of sampling and ends.
        choice: of plans.
        answers: one a row.
        stats: of the call.
        prefilled: None before the prompts are read.
    """

    prompts: Prompts
    rows: list[list[int]]
    settings: Settings
    choice: PlanChoice
    answers: list[Answer]
    stats: EngineStats
    prefilled: Prefilled | None = None

    def generation(self, row: int) -> Generation:
        """The answer to one of the prompts."""
        answer, prefilled = self.answers[row], self.prefilled
        assert prefilled is not None and answer.finish_reason is not None
        return Generation(
            tokens=answer.tokens,
            text=answer.text(),
            prompt_tokens=len(self.rows[row]),
            finish_reason=answer.finish_reason,
            skip_plan=SkipPlan.from_mask(prefilled.keep[row]),
            keep_prob=None if prefilled.keep_prob is None else prefilled.keep_prob[row],
        )

    def kept_sequence(self) -> KeptSequence | None:
        """The sequence of a call of one prompt as it is now, for a later one."""
        if len(self.rows) != 1 or self.prefilled is None:
            return None
        sequence, keep_prob = self.prefilled.sequences[0], self.prefilled.keep_prob
        tokens = [*self.rows[0], *self.answers[0].tokens]
        try:
            sequence.crop(len(tokens))  # steps beyond a stop
        except RuntimeError:  # a sliding window has moved on
            return None
        return KeptSequence(
            tokens[: sequence.length],
            self.prefilled.keep[0],
            sequence,
            None if keep_prob is None else keep_prob[0],
        )


def prepare(
    config: EngineConfig,
    core: DecoderCore,
    tokenizer: EngineTokenizer | None,
    prompts: Any,
    *,
    max_new_tokens: int = 128,
    seed: int | Sequence[int] = 0,
    stop: str | int | Sequence[str | int] | None = None,
    skip_plan: SkipPlan | Sequence[SkipPlan] | torch.Tensor | None = None,
    budget: float | None = None,
    budget_mode: str = "threshold",
    prefill: str | None = None,
    raw: bool = False,
    ignore_eos: bool = False,
    as_text: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
) -> Call:
    """Checks the arguments of `Engine.generate`, and encodes the prompts.

    Args:
        as_text: text is wanted piece by piece, where the prompts are no token ids.

    Raises:
        TypeError, ValueError: arguments that are not accepted.
    """
    asked = Prompts.of(prompts)
    rows = asked.encode(tokenizer, raw)
    settings = settings_of(
        config.generation, tokenizer, len(rows), config.decoder["vocab_size"],
        max_new_tokens=max_new_tokens, seed=seed, stop=stop, ignore_eos=ignore_eos,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty,
    )  # fmt: skip
    choice = PlanChoice.of(core, len(rows), skip_plan, budget, budget_mode, prefill)
    check_rows(config, rows, room=1)
    as_text = as_text and asked.kind != "ids"
    limits = [min(max_new_tokens, config.max_length - len(row)) for row in rows]
    answers = [Answer(tokenizer, settings, limit, as_text) for limit in limits]
    stats = EngineStats(prompts=len(rows), prompt_tokens=sum(map(len, rows)))
    return Call(asked, rows, settings, choice, answers, stats)


# What a call may be asked for, beside its prompts.
OPTIONS = tuple(
    name for name, parameter in inspect.signature(prepare).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "as_text"
)  # fmt: skip


def check_options(taker: str, options: Iterable[str]) -> None:
    """Raises TypeError for names of options that no call takes; `taker` names who was asked."""
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise TypeError(f"{taker} takes no {unknown[0]!r}; accepted: {', '.join(OPTIONS)}")


def check_rows(
    config: EngineConfig, rows: Sequence[list[int]], room: int, what: str = "prompt"
) -> None:
    """Raises ValueError for ids outside of the vocabulary, and for rows that are too long.

    Args:
        room: tokens that must be free after each row; -1: its last token is not read.
        what: names a row in messages.
    """
    vocab_size, most = config.decoder["vocab_size"], config.max_length - room
    for index, row in enumerate(rows):
        if not 0 <= min(row) <= max(row) < vocab_size:
            wrong = min(row) if min(row) < 0 else max(row)
            raise ValueError(
                f"{what} {index}: token ids must lie in [0, {vocab_size}), got {wrong}"
            )
        if len(row) > most:
            raise ValueError(
                f"{what} {index} has {len(row)} tokens, at most {most} are accepted: the model's "
                f"maximum of {config.max_length} counts prompt and answer together"
            )


def run(
    core: DecoderCore,
    call: Call,
    read: Callable[[Call], Prefilled],
    one_by_one: bool = False,
) -> Generator[list[tuple[list[int], str]], None, None]:
    """Reads the prompts and decodes; yields what every row has got, see `decode_steps`.

    Args:
        read: of the prompts.
        one_by_one: yield after every token.
    """
    prefilled = call.prefilled = read(call)
    settings, rows = call.settings, call.rows
    penalized = settings.sampling["repetition_penalty"] != 1
    decoding = core.decoder.decoding(
        prefilled.sequences,
        prefilled.logits,
        [settings.of_row(row) for row in range(len(rows))],
        [list(row) if penalized else [] for row in rows],
        settings.end_tokens,
        [answer.limit for answer in call.answers],
    )
    watched = bool(settings.stop_strings)
    try:
        yield from decode_steps(core, decoding, call.answers, call.stats, one_by_one, watched)
    finally:
        memory = [sequence.memory() for sequence in prefilled.sequences]
        call.stats.kv_bytes = sum(use["bytes"] for use in memory)
        call.stats.kv_bytes_full = sum(use["full"] for use in memory)
