"""Held-out examples in two parts: one that thresholds are found on, one that they are judged on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from firstlm.corpus import answer_of, prompt_of
from firstlm.data import IGNORE_INDEX, answer_end, encode_prompt
from firstlm.train_data import load_set

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LEAST = 2  # examples of a part


@dataclass(frozen=True)
class Example:
    """A prompt and the answer that it should get.

    Attributes:
        prompt: a text, or a chat as a list of messages.
        prompt_ids, answer_ids: tokens; those of the answer with its end.
        answer: its text.
        id, task: of the row and of the corpus that it is from.
    """

    prompt: Any
    prompt_ids: list[int]
    answer_ids: list[int]
    answer: str
    id: str = ""
    task: str = ""

    def row(self) -> dict[str, list[int]]:
        """input_ids, labels, prompt_mask, as scoring.score takes them."""
        before, after = len(self.prompt_ids), len(self.answer_ids)
        return {
            "input_ids": self.prompt_ids + self.answer_ids,
            "labels": [IGNORE_INDEX] * before + self.answer_ids,
            "prompt_mask": [1] * before + [0] * after,
        }


@dataclass(frozen=True)
class HeldOut:
    """Two parts that share no example.

    Attributes:
        calibration: thresholds are found on these.
        check: everything else is measured on these.
        too_long: examples that were passed over because of their length.
    """

    calibration: list[Example]
    check: list[Example]
    too_long: int

    def fingerprint(self) -> str:
        """Hex sha256 of the tokens of both parts."""
        parts = [[e.row()["input_ids"] for e in part] for part in (self.calibration, self.check)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def load_held_out(
    source: Any,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    calibration: int,
    check: int,
    seed: int,
    columns: Mapping[str, Any] | None = None,
) -> HeldOut:
    """Draws examples for both parts.

    Args:
        source: as in corpus.load_corpus. A file or Dataset without splits is held out as a whole.
        split: of corpora and folders.
        max_length: longer examples (prompt + answer, tokens) are passed over.
        calibration, check: examples of the parts; of fewer, both get their share.
        seed: of the draw.
        columns: of corpus.load_corpus.

    Raises:
        ValueError: what load_corpus raises, or too few examples.
    """
    found, too_long, total = load_examples(
        source, split, tokenizer,
        max_length=max_length, count=calibration + check, seed=seed, columns=columns,
    )  # fmt: skip
    if len(found) < 2 * _LEAST:
        raise ValueError(
            f"no held-out data: {len(found)} of {total} examples fit {max_length} tokens, "
            f"and two parts need {_LEAST} each; give more data or raise max_length"
        )
    first = round(len(found) * calibration / (calibration + check))
    first = min(max(first, _LEAST), len(found) - _LEAST)
    return HeldOut(found[:first], found[first:], too_long)


def load_examples(
    source: Any,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    count: int,
    seed: int,
    columns: Mapping[str, Any] | None = None,
    shared: bool = False,
) -> tuple[list[Example], int, int]:
    """Draws examples; arguments as of load_held_out.

    Args:
        shared: a file without splits was trained on: what training lends to `split` is taken.

    Returns:
        `count` examples or as many as fit, how many were passed over because of their length, and
        how many there are in all.
    """
    own = None if shared else source
    dataset = load_set(own, source, split, None, seed, columns or {})
    end = answer_end(tokenizer)
    found: list[Example] = []
    too_long = 0
    for row in dataset.shuffle(seed=seed):
        answer = answer_of(row)
        answer_ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"]) + end
        prompt = prompt_of(row)
        prompt_ids = encode_prompt(prompt, tokenizer)
        if len(prompt_ids) + len(answer_ids) > max_length:
            too_long += 1
            continue
        found.append(Example(prompt, prompt_ids, answer_ids, answer, str(row["id"]), row["task"]))
        if len(found) == count:
            break
    return found, too_long, len(dataset)


def spread_over_tasks(examples: Sequence[Example], count: int) -> list[int]:
    """Indices of `count` examples, at even distances where those of a task lie together."""
    ordered = sorted(range(len(examples)), key=lambda i: examples[i].task)  # stable
    count = min(count, len(examples))
    return [ordered[(2 * i + 1) * len(examples) // (2 * count)] for i in range(count)]


def rows_of(examples: Sequence[Example]) -> list[dict[str, list[int]]]:
    """The rows of some examples."""
    return [example.row() for example in examples]
