"""A word-level tokenizer of 101 tokens with a chat template, for the tiny models."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}<start>{{ message['role'] }} {{ message['content'] }}<end>"
    "{% endfor %}{% if add_generation_prompt %}<start>assistant {% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Tokens 0-4 are <pad>, <start>, <end>, <unk> and the roles; then words."""
    words = ["<pad>", "<start>", "<end>", "<unk>", "user", "assistant", "system", "say"]
    words += [chr(ord("a") + i) for i in range(26)]
    words += [f"word{i}" for i in range(101 - len(words))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
        padding_side="left",
    )
