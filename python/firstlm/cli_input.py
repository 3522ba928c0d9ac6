"""What the commands read: prompts, models, plans; and the plan fields that they print as JSON."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer


def settings_of(arguments: list[str]) -> list[str]:
    """NAME=VALUE of every setting, from NAME=VALUE, --NAME=VALUE and --NAME VALUE."""
    found = []
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("--") and "=" not in argument:
            value = next(rest, None)
            if value is None or value.startswith("--"):
                raise typer.BadParameter(f"{argument} needs a value, as {argument} VALUE")
            argument = f"{argument}={value}"
        found.append(argument.removeprefix("--"))
    return found


def names(text: str) -> list[str]:
    """The names of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def integers(text: str | None, option: str) -> tuple[int, ...] | None:
    """The positive integers of a comma-separated list; None stays None."""
    if text is None:
        return None
    found = names(text)
    if not all(name.isdecimal() and int(name) > 0 for name in found):
        raise typer.BadParameter(f"{option} takes positive integers, as 1,2,4; got {text!r}")
    return tuple(map(int, found))


def numbers(text: str, option: str) -> list[float]:
    """The numbers of a comma-separated list."""
    try:
        found = [float(name) for name in names(text)]
    except ValueError:
        found = []
    if not found:
        raise typer.BadParameter(f"{option} takes numbers, as 0.1,0.2; got {text!r}")
    return found


def read_prompts(given: list[str], file: str | None, interactive: bool = False) -> list[Any]:
    """Texts or chats, from the command line, a JSONL file, or stdin; none for a conversation."""
    if interactive:
        return []
    if file is not None:
        if given:
            raise typer.BadParameter("give a prompt or --file, not both")
        try:
            return list(read_jsonl(file))
        except UnicodeDecodeError:
            raise ValueError(f"{file} is not UTF-8 text") from None
    if given and given != ["-"]:
        return list(given)
    if not given and sys.stdin.isatty():
        raise typer.BadParameter("give a prompt, --file JSONL, or text on stdin")
    text = sys.stdin.read().strip()
    if not text:
        raise ValueError("stdin holds no prompt")
    return [text]


def read_jsonl(file: str) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:
        lines = sys.stdin if file == "-" else stack.enter_context(open(file, encoding="utf-8"))
        count = 0
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                prompt = row["prompt"] if "prompt" in row else row["messages"]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(
                    f'line {number} of {file} is not {{"prompt": text}} or {{"messages": [...]}}'
                ) from None
            if prompt and not isinstance(prompt, str) and not _is_chat(prompt):
                raise ValueError(
                    f"line {number} of {file} holds a prompt that is neither text nor a list of "
                    '{"role": text, "content": text}'
                )
            # A chat of a training file ends with the answer; the question is what comes before.
            if isinstance(prompt, list) and prompt and prompt[-1]["role"] == "assistant":
                prompt = prompt[:-1]
            if not prompt:
                raise ValueError(f"line {number} of {file} holds an empty prompt")
            count += 1
            yield prompt
        if count == 0:
            raise ValueError(f"{file} holds no prompts")


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in prompt
    )


def end_tokens(model, tokenizer) -> set[int]:
    """The tokens after which `generate` stops."""
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return set(ends) if isinstance(ends, list) else {ends}


def batches(prompts: list[Any], batch_size: int) -> Iterator[list[Any]]:
    from tqdm.auto import tqdm

    starts = range(0, len(prompts), batch_size)
    for start in tqdm(starts, unit="batch", disable=len(starts) == 1 or not sys.stderr.isatty()):
        yield prompts[start : start + batch_size]


def check_model_exists(name: str) -> None:
    """Refuse a path that leads nowhere, before a hub is asked for it.

    Raises:
        ValueError: no such path, or a folder that holds no model.
    """
    from firstlm import checkpoint, embedded_model

    path = Path(name)
    if embedded_model.is_alias(name) or name == checkpoint.SHIPPED or path.is_file():
        return
    if path.is_dir():
        names = ("config.json", "engine.json")
        if not (checkpoint.is_checkpoint(path) or any((path / n).is_file() for n in names)):
            raise ValueError(
                f"{name} is neither a firstlm checkpoint (no router_config.json) nor a "
                "Hugging Face model (no config.json)"
            )
        return
    # A hub id is "name" or "owner/name"; anything else can only have meant a path.
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        raise ValueError(f"{name} does not exist")


def load(checkpoint: str, dtype: str | None):
    """(model, tokenizer) of a checkpoint or base."""
    check_model_exists(checkpoint)
    quiet_libraries()
    from firstlm.checkpoint import is_checkpoint
    from firstlm.loading import from_pretrained
    from firstlm.tokenizer import load_tokenizer

    model = from_pretrained(checkpoint, dtype=dtype, merge_adapter=True)
    if not is_checkpoint(checkpoint):
        note_no_routers(checkpoint)
    return model, load_tokenizer(checkpoint)


def quiet_libraries() -> None:
    """No bars where nobody looks, and no warning of PEFT's that users can do nothing about."""
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    # PEFT asks transformers under a name that transformers has deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning)


def note_no_routers(checkpoint: str) -> None:
    note(f"{checkpoint} has no trained routers: every layer is kept; see `firstlm train`")


def encode(rows: list[Any], tokenizer, model, raw: bool) -> dict[str, Any]:
    from firstlm.data import encode_prompt, pad_prompts

    if raw and not all(isinstance(row, str) for row in rows):
        raise ValueError("--raw takes texts; chats need the chat template")
    ids = [tokenizer(row)["input_ids"] if raw else encode_prompt(row, tokenizer) for row in rows]
    return {name: t.to(model.device) for name, t in pad_prompts(ids, tokenizer).items()}


def check_plan_options(skip_plan: str | None, budget: float | None, budget_mode: str) -> None:
    """For before a model loads; raises typer.BadParameter."""
    if budget is not None and skip_plan is not None:
        raise typer.BadParameter("give --skip-plan or --budget, not both")
    if budget is None and budget_mode == "exact":
        raise typer.BadParameter("--budget-mode exact needs --budget, the share of layers to skip")


def plan_arguments(
    num_layers: int, skip_plan: str | None, budget: float | None, budget_mode: str
) -> dict[str, Any]:
    """What `generate` and `plan` of a model take, of options that `check_plan_options` passed."""
    if budget is not None:
        return {"budget": budget, "budget_mode": budget_mode}
    if skip_plan is None:
        return {}
    return {"skip_plan": parse_plan(skip_plan, num_layers)}


def parse_plan(text: str, num_layers: int):
    """A `SkipPlan` from its JSON, a file with it, its text form, or 'full'.

    Raises:
        ValueError: none of these.
    """
    from firstlm.skip_plan import KEPT, SKIPPED, SkipPlan

    text = text.strip()
    if text == "full":
        return SkipPlan.full(num_layers)
    if text and not set(text) - {KEPT, SKIPPED}:
        return SkipPlan.from_mask([mark == KEPT for mark in text])
    inline = text.startswith("{")
    if not inline and not Path(text).is_file():
        raise ValueError(f"--skip-plan {text!r} is neither a plan's JSON nor a file with it")
    try:
        value = json.loads(text if inline else Path(text).read_text(encoding="utf-8"))
        # `firstlm plan --json` prints the plan among other fields: take that line as well.
        value = value.get("skip_plan", value)
    except (ValueError, AttributeError):
        raise ValueError(
            f"--skip-plan {shorten(text) if inline else text} is not one JSON object: a plan is "
            'one line of `firstlm plan --json`, or {"version", "num_layers", "kept"}, its skip_plan'
        ) from None
    return SkipPlan.from_json(json.dumps(value))


def plan_fields(skip_plan, keep_prob) -> dict[str, Any]:
    return {
        "skip_plan": json.loads(skip_plan.to_json()),
        "skip_rate": skip_plan.skip_rate,
        "keep_prob": None if keep_prob is None else [round(p, 6) for p in keep_prob.tolist()],
    }


def shorten(prompt: Any, width: int = 60) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def note(text: str) -> None:
    """Something for the user that is not the result."""
    typer.echo(text, err=True)
