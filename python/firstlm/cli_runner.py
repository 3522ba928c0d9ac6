"""The two paths that `firstlm generate` can take, behind one interface, and the choice of one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol

import typer

from firstlm import cli_input

Say = Callable[[str], None]


@dataclass
class Answered:
    """An answer: its text, how many tokens it took, and the plan that it was made under."""

    text: str
    tokens: int
    skip_plan: Any
    keep_prob: Any | None  # f32 [L]


@dataclass(frozen=True)
class Options:
    """What the command was asked for, apart from prompts.

    Attributes:
        raw: without the chat template.
        max_new_tokens, sampling, seed: of every answer; sampling has temperature and, if that is
            not 0, top_k and top_p.
        skip_plan: its text, or None.
        budget, budget_mode: as in generate.
    """

    raw: bool
    max_new_tokens: int
    sampling: dict[str, Any]
    seed: int
    skip_plan: str | None
    budget: float | None
    budget_mode: str


class Runner(Protocol):
    """A model that answers."""

    name: str

    def answer(self, rows: list[Any], say: Say | None = None) -> list[Answered]:
        """Answers to prompts; that to a single one is also said piece by piece, if wanted."""
        ...

    def turn(self, messages: list[dict[str, str]], say: Say) -> Answered:
        """The next answer of a conversation, under the plan of its first turn."""
        ...


class NativeRunner:
    """firstlm's engine."""

    def __init__(self, engine: Any, options: Options) -> None:
        precision = engine.config.decoder["precision"]
        self.name = f"native engine, {precision}, {engine.num_threads} threads"
        self._engine = engine
        choice = cli_input.plan_arguments(
            engine.num_layers, options.skip_plan, options.budget, options.budget_mode
        )
        self._arguments = options.sampling | choice | {"max_new_tokens": options.max_new_tokens}
        self._raw, self._seed = options.raw, options.seed
        self._chat: Any = None

    def answer(self, rows: list[Any], say: Say | None = None) -> list[Answered]:
        call = {"raw": self._raw, "seed": self._seed, **self._arguments}
        if not self._raw:  # a file may hold texts and chats
            rows = [_as_chat(row) for row in rows]
        self._seed += len(rows)
        if say is not None:
            (row,) = rows
            _say_all(self._engine.stream(row, **call), say)
            return [self._answered(self._engine.last)]
        return [self._answered(one) for one in self._engine.generate(rows, details=True, **call)]

    def turn(self, messages: list[dict[str, str]], say: Say) -> Answered:
        if self._chat is None or self._chat.messages != messages[:-1]:
            self._chat = self._engine.chat(messages[:-1], **self._arguments)
        self._seed += 1
        _say_all(self._chat.stream(messages[-1]["content"], seed=self._seed), say)
        return self._answered(self._chat.last)

    @staticmethod
    def _answered(one: Any) -> Answered:
        return Answered(one.text, len(one.tokens), one.skip_plan, one.keep_prob)


def _as_chat(prompt: Any) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _say_all(pieces: Generator[str, None, None], say: Say) -> None:
    with contextlib.closing(pieces):  # at once also after Ctrl-C, so that the turn is remembered
        for piece in pieces:
            say(piece)


class HfRunner:
    """transformers' generate on the routed model."""

    def __init__(self, model: Any, tokenizer: Any, options: Options) -> None:
        from transformers import set_seed

        self.name = f"hf path, {str(model.dtype).removeprefix('torch.')}"
        self._model, self._tokenizer = model, tokenizer
        num_layers = len(model.decoder_layers)
        self._choice = cli_input.plan_arguments(
            num_layers, options.skip_plan, options.budget, options.budget_mode
        )
        sampling = options.sampling
        self._arguments: dict[str, Any] = {"max_new_tokens": options.max_new_tokens}
        self._arguments |= (
            {"do_sample": True, **sampling} if sampling["temperature"] else {"do_sample": False}
        )
        self._raw = options.raw
        set_seed(options.seed)

    def answer(self, rows: list[Any], say: Say | None = None) -> list[Answered]:
        return self._generate(rows, say, self._choice)

    def turn(self, messages: list[dict[str, str]], say: Say) -> Answered:
        (answered,) = self._generate([messages], say, self._choice)
        self._choice = {"skip_plan": answered.skip_plan}  # a later turn keeps the first one's
        return answered

    def _generate(self, rows: list[Any], say: Say | None, choice: dict[str, Any]) -> list[Answered]:
        model, tokenizer = self._model, self._tokenizer
        inputs = cli_input.encode(rows, tokenizer, model, self._raw)
        streamer = {} if say is None else {"streamer": _streamer(tokenizer, say)}
        output = model.generate(
            **inputs, **choice, **self._arguments, **streamer,
            return_dict_in_generate=True, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        new_tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        ends = cli_input.end_tokens(model, tokenizer)
        found = []
        for row, text in enumerate(texts):
            ids = new_tokens[row].tolist()
            tokens = next((n for n, i in enumerate(ids, start=1) if i in ends), len(ids))
            found.append(Answered(text, tokens, output.skip_plans[row], output.keep_prob[row]))
        return found


def _streamer(tokenizer: Any, say: Say) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            say(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def choose(
    engine: str,
    checkpoint: str,
    precision: str | None,
    threads: int | None,
    dtype: str | None,
    options: Options,
) -> Runner:
    """The path for a model: "native", "hf", or "auto": native where the engine runs the model.

    Args:
        precision, threads: of the engine.
        dtype: of the hf path, which "auto" then takes.

    Raises:
        typer.BadParameter: options of the other path.
        UnsupportedModel: engine="native" and the engine does not run the model.
    """
    if engine == "native" and dtype is not None:
        raise typer.BadParameter("--dtype is of the hf path; the engine takes --precision")
    if dtype is not None or engine == "hf":
        if precision is not None:
            raise typer.BadParameter("--precision is of the engine; the hf path takes --dtype")
        return _hf(checkpoint, dtype, threads, options)
    cli_input.check_model_exists(checkpoint)
    from firstlm.engine import Engine
    from firstlm.engine.config import UnsupportedModel

    try:
        native = Engine.from_pretrained(checkpoint, precision, num_threads=threads)
    except UnsupportedModel as error:
        if engine == "native":
            raise
        dropped = "" if precision is None else f"; without effect there: --precision {precision}"
        cli_input.note(f"{error}{dropped}")
        return _hf(checkpoint, None, threads, options)
    if native.is_unrouted:
        cli_input.note_no_routers(checkpoint)
    return NativeRunner(native, options)


def _hf(checkpoint: str, dtype: str | None, threads: int | None, options: Options) -> HfRunner:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return HfRunner(*cli_input.load(checkpoint, dtype), options)


def converse(runner: Runner) -> None:
    """Reads questions from the terminal and answers, until the end of the input.

    Ctrl-C ends an answer; at the prompt it ends the conversation. `/new` forgets what was said.
    """
    cli_input.note(f"{runner.name}. /new starts again, Ctrl-D ends")
    messages: list[dict[str, str]] = []
    while (question := _question()) is not None:
        if question == "/new":
            messages = []
            continue
        messages.append({"role": "user", "content": question})
        pieces: list[str] = []

        def say(piece: str, pieces: list[str] = pieces) -> None:
            pieces.append(piece)
            typer.echo(piece, nl=False)

        try:
            plan = runner.turn(messages, say).skip_plan
            typer.echo()
            cli_input.note(f"{plan}  skip rate {plan.skip_rate:.1%}")
        except KeyboardInterrupt:
            typer.echo()
        messages.append({"role": "assistant", "content": "".join(pieces)})


def _question() -> str | None:
    """What the user typed, None at the end."""
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return None
        if text:
            return text
