"""Examples to train and measure on, each a prompt with one answer, from wherever they are kept.

    load_corpus("debian-synopsis", "validation")                     # shipped with the package
    load_corpus("my.jsonl", prompt_column="question")                # or a datasets object
    load_corpus(["debian-synopsis", "debian-en-de"], weights=[1, 1])    # a mixture

Everything is checked here, before any work starts: `data.py` can rely on texts that are not empty.
"""

from __future__ import annotations

import dataclasses
import difflib
import gzip
import json
import lzma
import os
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from firstlm import lm_eval_source

if TYPE_CHECKING:
    import datasets

Message: TypeAlias = dict[str, str]  # {"role": ..., "content": ...}
Source: TypeAlias = "str | os.PathLike[str] | datasets.Dataset | datasets.DatasetDict"

CORPORA_FOLDER = Path(__file__).parent / "corpora"
CORPUS_NAMES = ("debian-synopsis", "debian-en-de")
FILE_OPENERS: dict[str, Callable[..., Any]] = {
    ".jsonl": open,
    ".jsonl.gz": gzip.open,
    ".jsonl.xz": lzma.open,
}


def load_corpus(
    source: Source | Sequence[Source],
    split: str | None = None,
    *,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    messages_column: str | None = None,
    max_examples: int | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> datasets.Dataset:
    """Load examples, each a prompt and its answer.

    Args:
        source: the name of a shipped corpus (`CORPUS_NAMES`); a `.jsonl`, `.jsonl.gz` or
            `.jsonl.xz` file; a folder that holds one such file a split; a `datasets.Dataset` or
            `DatasetDict`; `lm-eval:TASK`, a task of lm-evaluation-harness or the path of its YAML
            file; or a list of these, which is a mixture.
        split: "train" where it is not given. A single file or Dataset has only "train".
        prompt_column, answer_column: the columns of single-turn data; "prompt" and "answer".
        messages_column: the column of chat data; "messages": a list of `role` and `content`, the
            last one the assistant's answer, all before it the prompt. Where no column is named and
            both kinds are present, messages are read.
        max_examples: keep the first so many (of a mixture: so many in all, each source's first).
        weights: of a mixture: the share of each source; as many examples are taken as the first
            source to run out allows. Without weights every example is taken.
        seed: of the order in which a mixture is interleaved. One source keeps its order.

    Returns:
        A Dataset with the columns `id`, `task` (the source's name), and either `prompt` and
        `answer` or `messages` (also for a mixture of both kinds).

    Raises:
        ValueError: an unknown name, split or column, a malformed line (with its number), an empty
            prompt or answer, a chat that does not end with an answer, unusable weights.
        TypeError: a source of another type.
    """
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples must be at least 1, got {max_examples}")
    if messages_column and (prompt_column or answer_column):
        raise ValueError("name either messages_column or prompt_column and answer_column, not both")
    columns = _Columns(prompt_column, answer_column, messages_column)
    if isinstance(source, Sequence) and not isinstance(source, str):
        return _mix([_load(s, split, columns) for s in source], weights, max_examples, seed)
    if weights is not None:
        raise ValueError("weights belong to a mixture: give a list of sources")
    examples = _load(source, split, columns)
    return _to_dataset(examples[:max_examples])


@dataclasses.dataclass(frozen=True)
class _Columns:
    """The columns that the user named, if any."""

    prompt: str | None
    answer: str | None
    messages: str | None


def _load(source: Source, split: str | None, columns: _Columns) -> list[dict[str, Any]]:
    """Read one source as checked examples."""
    import datasets

    if lm_eval_source.is_task(source):
        source = lm_eval_source.load_task(source)
    if isinstance(source, str | os.PathLike):
        path, name = _find_file(source, split)
        rows, unit, where = _read_jsonl(path), "line", str(path)
    elif isinstance(source, datasets.Dataset | datasets.DatasetDict):
        dataset = _pick_split(source, split)
        name = dataset.info.dataset_name or "dataset"
        rows, unit, where = enumerate(dataset), "row", f"the {name}"
    else:
        streamed = type(source).__name__.startswith("Iterable")
        hint = "; load it without streaming=True" if streamed else ""
        raise TypeError(
            "a corpus is a name, a path, a datasets.Dataset or a DatasetDict, not a"
            f" {type(source).__name__}{hint}"
        )
    examples = [
        _check_example(row, columns, name, f"{unit} {number} of {where}", f"{name}/{number}")
        for number, row in rows
    ]
    if not examples:
        raise ValueError(f"{where} holds no examples")
    return examples


def _pick_split(
    source: datasets.Dataset | datasets.DatasetDict, split: str | None
) -> datasets.Dataset:
    if not hasattr(source, "keys"):
        _only_train(split, "a single Dataset", "a DatasetDict")
        return source
    if (split or "train") not in source:
        raise ValueError(f"no split {split or 'train'!r}; the DatasetDict has {list(source)}")
    return source[split or "train"]


def _only_train(split: str | None, what: str, instead: str) -> None:
    if split not in (None, "train"):
        raise ValueError(f"{what} has no split {split!r}, only 'train': give {instead}")


def _find_file(source: str | os.PathLike[str], split: str | None) -> tuple[Path, str]:
    """The JSONL file of a shipped name, a folder or a path, and the corpus's name."""
    path = CORPORA_FOLDER / source if source in CORPUS_NAMES else Path(source)
    if path.is_dir():
        wanted = [path / f"{split or 'train'}{ending}" for ending in FILE_OPENERS]
        existing = [file for file in wanted if file.is_file()]
        if not existing:
            there = sorted(file.name for file in path.iterdir())
            raise ValueError(f"no {wanted[0].name} (or .gz, .xz) in {path}; it holds {there}")
        return existing[0], path.name
    if path.is_file():
        _only_train(split, str(path), "a folder with one file a split")
        return path, path.name.split(".jsonl")[0]
    near = difflib.get_close_matches(str(source), CORPUS_NAMES, n=1)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"{str(source)!r} is neither a file, a folder nor a shipped corpus"
        f" ({', '.join(CORPUS_NAMES)}){guess}"
    )


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object); blank lines are passed over."""
    ending = next((e for e in FILE_OPENERS if path.name.endswith(e)), None)
    if ending is None:
        raise ValueError(f"{path} should end in one of {', '.join(FILE_OPENERS)}")
    for number, line in enumerate(_lines_of(path, FILE_OPENERS[ending]), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {path} is a {type(row).__name__}, not an object")
        yield number, row


def _lines_of(path: Path, opener: Callable[..., Any]) -> Iterator[str]:
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked: {error}") from None


def _check_example(
    row: Mapping[str, Any], columns: _Columns, task: str, where: str, default_id: str
) -> dict[str, Any]:
    """Reduce a row to `id`, `task` and its prompt and answer, or say what is wrong with it."""
    example: dict[str, Any] = {
        "id": str(row.get("id", default_id)),
        "task": str(row.get("task", task)),  # kept when what was loaded before is mixed
    }
    messages = columns.messages or "messages"
    prompt, answer = columns.prompt or "prompt", columns.answer or "answer"
    plain_is_named = columns.prompt or columns.answer
    if not plain_is_named and row.get(messages) is not None:
        return example | {"messages": _check_messages(row[messages], where)}
    if columns.messages or prompt not in row or answer not in row:
        plain = f"{prompt!r} and {answer!r}"
        either = plain if plain_is_named else f"{messages!r}, or {plain}"
        wanted = repr(messages) if columns.messages else either
        raise ValueError(f"{where} lacks {wanted}; its columns are {sorted(row)}")
    example["prompt"] = _check_text(row[prompt], f"{where}: {prompt!r}")
    example["answer"] = _check_text(row[answer], f"{where}: {answer!r}")
    return example


def _check_messages(messages: Any, where: str) -> list[Message]:
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(f"{where}: a chat is a list of two messages or more")
    checked = []
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{where}: a message has a 'role' and a 'content', got {message!r}")
        if not isinstance(message["content"], str):
            raise ValueError(f"{where}: only text messages are supported, got {message!r}")
        checked.append({"role": str(message["role"]), "content": message["content"]})
    if checked[-1]["role"] != "assistant":
        raise ValueError(
            f"{where}: the last message is the answer and should be the assistant's, not"
            f" the {checked[-1]['role']}'s"
        )
    _check_text(checked[-1]["content"], f"{where}: the answer")
    return checked


def _check_text(text: Any, what: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{what} should be text, got {text!r}")
    if not text.strip():
        raise ValueError(f"{what} is empty")
    return text


def _mix(
    sources: list[list[dict[str, Any]]],
    weights: Sequence[float] | None,
    max_examples: int | None,
    seed: int,
) -> datasets.Dataset:
    counts = _mixture_counts([len(examples) for examples in sources], weights, max_examples)
    mixed = [
        example
        for examples, count in zip(sources, counts, strict=True)
        for example in examples[:count]
    ]
    random.Random(seed).shuffle(mixed)
    return _to_dataset(mixed)


def _mixture_counts(
    sizes: Sequence[int], weights: Sequence[float] | None, max_examples: int | None
) -> list[int]:
    """How many examples of each source a mixture takes; they sum to at most `max_examples`."""
    if not sizes:
        raise ValueError("a mixture needs at least one source, got an empty list")
    shares: Sequence[float] = sizes if weights is None else weights
    if len(shares) != len(sizes) or min(shares) <= 0:
        raise ValueError(f"{len(sizes)} sources need as many positive weights, got {weights}")
    whole = sum(shares)
    total = int(min(size * whole / share for size, share in zip(sizes, shares, strict=True)))
    total = min(total, max_examples or total)
    counts = [int(total * share / whole) for share in shares]
    for i in range(total - sum(counts)):  # what rounding down left over, one to each of the first
        counts[i] += counts[i] < sizes[i]
    return counts


def _to_dataset(examples: list[dict[str, Any]]) -> datasets.Dataset:
    """A Dataset with one kind of column: messages as soon as one example is a chat."""
    import datasets

    if any("messages" in example for example in examples):
        examples = [
            {"id": e["id"], "task": e["task"], "messages": [*prompt_of(e), _answer_message(e)]}
            for e in examples
        ]
    return datasets.Dataset.from_list(examples)


def prompt_of(example: Mapping[str, Any]) -> list[Message]:
    """The messages before the answer; a plain prompt is one message of the user."""
    if "messages" in example:
        return list(example["messages"][:-1])
    return [{"role": "user", "content": example["prompt"]}]


def answer_of(example: Mapping[str, Any]) -> str:
    """The text that the model should learn to write."""
    return example["messages"][-1]["content"] if "messages" in example else example["answer"]


def _answer_message(example: Mapping[str, Any]) -> Message:
    return {"role": "assistant", "content": answer_of(example)}
