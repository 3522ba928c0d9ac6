"""Text to token ids and back: the tokenizer of an engine, pieces of text, and stop strings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

TOKENIZER_NAME = "tokenizer.json"
CHAT_NAME = "chat.json"
_UNFINISHED = "\ufffd"  # what a decoder makes of the first bytes of a character


class EngineTokenizer:
    """A fast tokenizer of transformers, without transformers; `data.encode_prompt` takes it.

    Args:
        backend: `tokenizers.Tokenizer`.
        chat_template: jinja, or None.
        special_tokens: bos_token, eos_token, … as chat templates name them.
    """

    def __init__(
        self, backend: Any, chat_template: str | None, special_tokens: Mapping[str, str]
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens)

    @classmethod
    def of(cls, tokenizer: Any) -> EngineTokenizer | None:
        """That of transformers; None if it has no fast one."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        template = tokenizer.chat_template
        template = tokenizer.get_chat_template() if template is not None else None
        copy = type(backend).from_str(backend.to_str())
        return cls(copy, template, {k: str(v) for k, v in tokenizer.special_tokens_map.items()})

    def save(self, folder: Path) -> None:
        """Writes the files that `load` reads."""
        self._backend.save(str(folder / TOKENIZER_NAME))
        chat = {"chat_template": self.chat_template, "special_tokens": self.special_tokens}
        (folder / CHAT_NAME).write_text(json.dumps(chat, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> EngineTokenizer | None:
        """The inverse of `save`; None if nothing was saved."""
        if not (folder / TOKENIZER_NAME).is_file():
            return None
        from tokenizers import Tokenizer

        chat = json.loads((folder / CHAT_NAME).read_text(encoding="utf-8"))
        backend = Tokenizer.from_file(str(folder / TOKENIZER_NAME))
        return cls(backend, chat["chat_template"], chat["special_tokens"])

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """`{"input_ids": ids}`, as transformers'."""
        return {"input_ids": self._backend.encode(text, add_special_tokens=add_special_tokens).ids}

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = False,
    ) -> list[int] | str:
        """As transformers', for messages of text."""
        from firstlm.engine.chat_template import render

        assert self.chat_template is not None and not return_dict
        text = render(self.chat_template, messages, add_generation_prompt, self.special_tokens)
        return self(text, add_special_tokens=False)["input_ids"] if tokenize else text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens; special ones are left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def special_token_id(self, text: str) -> int | None:
        """The special token that is this text, if there is one: it is in no decoded text."""
        special = {
            token.content: i
            for i, token in self._backend.get_added_tokens_decoder().items()
            if token.special
        }
        return special.get(text)


class TextStream:
    """The text of tokens as they come, in pieces of whole characters.

    The pieces together are the text of all tokens. What a token adds is read off a window of the
    tokens before it, since decoders treat the first one of a text specially.
    """

    def __init__(self, tokenizer: EngineTokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # tokens; the first `_given` of them are in the pieces so far
        self._given = 0

    def push(self, ids: Sequence[int]) -> str:
        """The new text; empty while the last character is unfinished."""
        self._window += ids
        text = self._new_text()
        if not text or text.endswith(_UNFINISHED):
            return ""
        self._window, self._given = self._window[self._given :], len(self._window) - self._given
        return text

    def finish(self) -> str:
        """What is left, whole or not."""
        text = self._new_text()
        self._given = len(self._window)
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._window[: self._given])
        return self._tokenizer.decode(self._window)[len(before) :]


class StopStrings:
    """Cuts a text that comes in pieces before the first of some strings.

    Args:
        stops: not empty strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""  # may be the beginning of a stop
        self.found = False

    def push(self, piece: str) -> str:
        """The text that is certain now; nothing after a stop was found."""
        if self.found:
            return ""
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def finish(self) -> str:
        """What was held back for a stop that did not come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
