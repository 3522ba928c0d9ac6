"""From prompts and answers to token rows that know where the prompt ends.

    dataset = load_corpus("debian-synopsis", "train")
    encoded = encode_dataset(dataset, tokenizer, max_length=256)
    batch = PromptAnswerCollator(tokenizer)([encoded[0], encoded[1]])

Prompt tokens are exactly those that `generate()` is given for the same prompt (`encode_prompt`),
and the answer's tokens follow them: nothing is tokenised across the boundary, so routers pool over
the same tokens in training and in use. B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from firstlm.corpus import CORPUS_NAMES, Message, answer_of, load_corpus, prompt_of

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "CORPUS_NAMES",
    "IGNORE_INDEX",
    "EncodedDataset",
    "PromptAnswerCollator",
    "answer_end",
    "encode_dataset",
    "encode_prompt",
    "load_corpus",
    "pad_id",
    "pad_prompts",
]

IGNORE_INDEX = -100  # a label that the loss leaves out

logger = logging.getLogger(__name__)


def encode_prompt(prompt: str | list[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt's tokens as `generate()` is to be given them.

    With a chat template: the template with its generation prompt. Without: the text as it is.

    Raises:
        ValueError: a chat of more than one message, but no chat template.
    """
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return list(
            tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )
    if not isinstance(prompt, str):
        if len(prompt) != 1:
            raise ValueError(
                f"a chat of {len(prompt)} messages needs a chat template, and the tokenizer has"
                " none: set tokenizer.chat_template"
            )
        prompt = prompt[0]["content"]
    return list(tokenizer(prompt)["input_ids"])


def answer_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer, so that generation learns to stop.

    With a chat template: what the template writes after an assistant's message, up to the first
    special token (`<|im_end|>`, `<end_of_turn>`…). Otherwise the end-of-sequence token.

    Raises:
        ValueError: neither exists.
    """
    if tokenizer.chat_template is not None:
        marker = "firstlm-answer"
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": marker}],
            tokenize=False,
        )
        after = text.rpartition(marker)[2]
        ids = list(tokenizer(after, add_special_tokens=False)["input_ids"])
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        first = next((n for n, i in enumerate(ids) if i in special), None)
        if first is not None:
            return ids[: first + 1]
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token: set one, so that answers can end")
    return [tokenizer.eos_token_id]


class EncodedDataset(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Token rows `{"input_ids", "labels", "prompt_mask"}`, equally long lists of one example.

    Attributes:
        ids, tasks: of the rows, in order.
        too_long: ids of the examples that were left out because they do not fit `max_length`.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.ids: list[str] = []
        self.tasks: list[str] = []
        self.too_long: list[str] = []
        self._rows: list[dict[str, list[int]]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self._rows[index]

    def add(self, example: Mapping[str, Any], prompt: list[int], answer: list[int]) -> None:
        if len(prompt) + len(answer) > self.max_length:
            self.too_long.append(example["id"])
            return
        self.ids.append(example["id"])
        self.tasks.append(example["task"])
        self._rows.append(
            {
                "input_ids": prompt + answer,
                "labels": [IGNORE_INDEX] * len(prompt) + answer,
                "prompt_mask": [1] * len(prompt) + [0] * len(answer),
            }
        )

    def report(self) -> str:
        """One line: how many examples there are and how many were left out."""
        total = len(self) + len(self.too_long)
        return (
            f"{len(self):,} of {total:,} examples;"
            f" {len(self.too_long):,} left out, longer than {self.max_length} tokens"
        )


def encode_dataset(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    progress: bool = False,
) -> EncodedDataset:
    """Tokenise what `load_corpus` returned.

    An example longer than `max_length` tokens is left out, listed in `too_long` and reported in
    the log; neither a prompt nor an answer is ever cut.

    Raises:
        ValueError: `max_length` leaves no example, or an answer has no tokens.
    """
    from tqdm.auto import tqdm

    encoded = EncodedDataset(max_length)
    end = answer_end(tokenizer)
    for example in tqdm(dataset, desc="Tokenising", unit="example", disable=not progress):
        answer = list(tokenizer(answer_of(example), add_special_tokens=False)["input_ids"])
        if not answer:
            raise ValueError(f"{example['id']}: no tokens in the answer {answer_of(example)!r}")
        encoded.add(example, encode_prompt(prompt_of(example), tokenizer), answer + end)
    if not len(encoded):
        raise ValueError(f"no example fits max_length={max_length}: {encoded.report()}")
    if encoded.too_long:
        logger.warning("%s (first: %s)", encoded.report(), ", ".join(encoded.too_long[:3]))
    return encoded


@dataclasses.dataclass(frozen=True)
class PromptAnswerCollator:
    """Pads rows of an `EncodedDataset` on the right.

    Returns input_ids, attention_mask, labels (int64) and prompt_mask (bool), all [B, T].
    """

    tokenizer: PreTrainedTokenizerBase
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        pad = functools.partial(_pad, length=length, left=False)
        return {
            "input_ids": pad([row["input_ids"] for row in rows], value=pad_id(self.tokenizer)),
            "attention_mask": pad([[1] * len(row["input_ids"]) for row in rows], value=0),
            "labels": pad([row["labels"] for row in rows], value=IGNORE_INDEX),
            "prompt_mask": pad([row["prompt_mask"] for row in rows], value=0).bool(),
        }


def pad_prompts(
    prompts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, torch.Tensor]:
    """Pad prompts on the left, where `generate()` needs it: input_ids, attention_mask [B, T].

    Without a tokenizer the padding id is 0; masked ids are never read.
    """
    length = max(map(len, prompts))
    pad = functools.partial(_pad, length=length, left=True)
    return {
        "input_ids": pad(prompts, value=0 if tokenizer is None else pad_id(tokenizer)),
        "attention_mask": pad([[1] * len(prompt) for prompt in prompts], value=0),
    }


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, or one that may stand in for it: masked tokens are never read."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def _pad(rows: Sequence[Sequence[int]], *, length: int, value: int, left: bool) -> torch.Tensor:
    padded = torch.full((len(rows), length), value, dtype=torch.int64)  # [B, T]
    for i, row in enumerate(rows):
        columns = slice(length - len(row), length) if left else slice(0, len(row))
        padded[i, columns] = torch.tensor(row, dtype=torch.int64)
    return padded
