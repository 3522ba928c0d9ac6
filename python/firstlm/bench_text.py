"""Text of the shipped corpora's test splits as tokens, for benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of a corpus.

    Attributes:
        tokens: [T].
        is_answer: [T], whether a token belongs to an answer, its end included.
    """

    tokens: list[int]
    is_answer: list[bool]


def windows(
    corpus: str, tokenizer: PreTrainedTokenizerBase, *, length: int, count: int
) -> list[Window]:
    """Examples of the test split, prompt and answer as in training, joined and cut into windows.

    Raises:
        ValueError: the corpus is shorter than `count` windows.
    """
    from firstlm.corpus import load_corpus
    from firstlm.data import encode_dataset

    needed = length * count
    tokens: list[int] = []
    is_answer: list[bool] = []
    limit = 16
    while len(tokens) < needed:
        examples = load_corpus(corpus, "test", max_examples=limit)
        rows = encode_dataset(examples, tokenizer, 2**31)
        tokens = [token for row in rows for token in row["input_ids"]]
        is_answer = [label >= 0 for row in rows for label in row["labels"]]
        if len(examples) < limit:
            break
        limit *= 2
    if len(tokens) < needed:
        raise ValueError(
            f"{corpus} has {len(tokens)} tokens, {count} windows of {length} need more"
        )
    return [
        Window(tokens[start : start + length], is_answer[start : start + length])
        for start in range(0, needed, length)
    ]
