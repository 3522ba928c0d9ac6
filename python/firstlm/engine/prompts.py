"""What the calls of an engine take: one prompt or several, as text, chat messages or token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from firstlm.engine.text import EngineTokenizer

Kind = Literal["text", "chat", "ids"]
_ACCEPTED = (
    "a text, chat messages [{'role': …, 'content': …}] or token ids [int], or a list of such"
)


@dataclass(frozen=True)
class Prompts:
    """Prompts of one kind.

    Attributes:
        kind: "text", "chat" or "ids".
        single: one was given, not a list.
        values: as given.
    """

    kind: Kind
    single: bool
    values: list[Any]

    @classmethod
    def of(cls, prompts: Any, name: str = "prompts") -> Prompts:
        """Sorts out what was given; `name` is the argument's, for messages.

        Raises:
            TypeError: none of the accepted kinds, or several of them.
            ValueError: an empty prompt.
        """
        prompts = as_list(prompts)
        kind = _kind_of_one(prompts)
        if kind is not None:
            return cls(kind, True, [_ids(prompts) if kind == "ids" else prompts])
        if not _is_list(prompts):
            raise TypeError(f"{name} takes {_ACCEPTED}, got {type(prompts).__name__}")
        values = list(prompts)
        kinds = {"ids" if value == [] else _kind_of_one(value) for value in values}
        if not values:
            return cls("ids", False, [])
        if len(kinds) > 1 or None in kinds:
            raise TypeError(f"{name} takes {_ACCEPTED}, all of one kind")
        kind = kinds.pop()
        assert kind is not None
        return cls(kind, False, [_ids(v) for v in values] if kind == "ids" else values)

    def encode(self, tokenizer: EngineTokenizer | None, raw: bool) -> list[list[int]]:
        """Token ids of every prompt.

        Args:
            tokenizer: of the engine, if it has one.
            raw: texts as they are; else through the chat template, as in training.

        Raises:
            ValueError: there is no tokenizer, or a prompt has no tokens.
        """
        if self.kind == "ids":
            rows = self.values
        else:
            tokenizer = require_tokenizer(tokenizer)
            rows = [_encode(value, tokenizer, raw) for value in self.values]
        for index, row in enumerate(rows):
            if not row:
                raise ValueError(f"prompt {index} has no tokens; at least one is needed")
        return rows


def require_tokenizer(tokenizer: EngineTokenizer | None) -> EngineTokenizer:
    """Raises ValueError if there is none."""
    if tokenizer is None:
        raise ValueError(
            "this engine has no tokenizer: give token ids, or make it with "
            "Engine.from_model(model, tokenizer=...)"
        )
    return tokenizer


def _encode(prompt: Any, tokenizer: EngineTokenizer, raw: bool) -> list[int]:
    from firstlm.data import encode_prompt

    if raw:
        if not isinstance(prompt, str):
            raise ValueError("raw=True takes texts; chats need the chat template")
        return tokenizer(prompt)["input_ids"]
    return encode_prompt(prompt, tokenizer)  # type: ignore[arg-type]


def as_list(prompt: Any) -> Any:
    """Tensors and numpy arrays as lists, also those in a list; anything else as it is."""
    if hasattr(prompt, "tolist"):
        return prompt.tolist()
    if _is_list(prompt):
        return [part.tolist() if hasattr(part, "tolist") else part for part in prompt]
    return prompt


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _kind_of_one(prompt: Any) -> Kind | None:
    if isinstance(prompt, str):
        return "text"
    if not _is_list(prompt) or not prompt:
        return None
    if all(is_message(part) for part in prompt):
        return "chat"
    if all(_is_id(part) for part in prompt):
        return "ids"
    return None


def is_message(value: Any) -> bool:
    """Whether it is one message of a chat."""
    return isinstance(value, Mapping) and {"role", "content"} <= value.keys()


def _is_id(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _ids(prompt: Sequence[Any]) -> list[int]:
    return [value.__index__() for value in prompt]
