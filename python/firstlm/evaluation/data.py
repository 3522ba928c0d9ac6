"""The examples of an evaluation: validation ones that plans are chosen on, test ones that count."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstlm.corpus import CORPUS_NAMES
from firstlm.held_out import Example, load_examples, load_held_out
from firstlm.train_config import TrainConfig


@dataclass(frozen=True)
class EvaluationData:
    """Examples of one or several tasks, those of a task side by side.

    Attributes:
        validation: plans and thresholds are found on these.
        test: everything is measured on these.
        too_long: examples that were passed over because of their length.
    """

    validation: list[Example]
    test: list[Example]
    too_long: int

    @property
    def tasks(self) -> list[str]:
        """In order."""
        return list(dict.fromkeys(example.task for example in self.test))

    def batches(self, size: int) -> list[list[int]]:
        """Indices of test examples: one task and like length, always the same ones together."""
        found = []
        for task in self.tasks:
            rows = [i for i, example in enumerate(self.test) if example.task == task]
            rows.sort(key=lambda i: len(self.test[i].prompt_ids))
            found += [rows[start : start + size] for start in range(0, len(rows), size)]
        return found


def fingerprint(examples: Sequence[Example]) -> str:
    """Hex sha256 of ids and tokens, in order."""
    parts = [[e.id, e.task, e.prompt_ids, e.answer_ids, e.answer] for e in examples]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def load_evaluation_data(
    sources: Sequence[Any],
    tokenizer: Any,
    *,
    examples: int,
    validation: int,
    max_length: int,
    seed: int,
    columns: Mapping[str, Any] | None = None,
    checkpoints: Sequence[str | Path] = (),
) -> EvaluationData:
    """Draws examples of every source.

    Args:
        sources: tasks, each as in corpus.load_corpus. Of a file or Dataset without splits one part
            becomes validation and the rest is tested.
        examples, validation: of each source.
        max_length: longer examples (prompt + answer, tokens) are passed over.
        seed: of the draw.
        checkpoints: what is evaluated. Of a file without splits that one of them was trained on,
            the shares that training held out are taken.

    Raises:
        ValueError: what load_corpus raises, too few examples, examples that come twice, or a file
            that was trained on as a whole.
    """
    chosen: list[Example] = []
    tested: list[Example] = []
    too_long = 0
    options: dict[str, Any] = {"max_length": max_length, "seed": seed, "columns": columns}
    for source in sources:
        shared = _was_trained_on(source, checkpoints)
        if shared or _has_splits(source):
            parts = {}
            for split, count in (("validation", validation), ("test", examples)):
                found, passed, total = load_examples(
                    source, split, tokenizer, count=count, shared=shared, **options
                )
                if len(found) < 2:
                    raise ValueError(
                        f"{source}: {len(found)} of {total} {split} examples fit {max_length} "
                        "tokens: give more data or raise max_length"
                    )
                parts[split] = found
                too_long += passed
            own, measured = parts["validation"], parts["test"]
        else:
            held_out = load_held_out(
                source, "test", tokenizer, calibration=validation, check=examples, **options
            )
            own, measured = held_out.calibration, held_out.check
            too_long += held_out.too_long
        chosen += own
        tested += measured
    _check_once(tested)
    return EvaluationData(chosen, tested, too_long)


def _has_splits(source: Any) -> bool:
    if isinstance(source, (str, Path)):
        return source in CORPUS_NAMES or not Path(source).is_file()
    return isinstance(source, Mapping)


def _was_trained_on(source: Any, checkpoints: Sequence[str | Path]) -> bool:
    """Whether a file without splits is what training drew all its sets from."""
    if _has_splits(source) or not isinstance(source, (str, Path)):
        return False
    return any(_trains_on(Path(source), Path(folder).parent) for folder in checkpoints)


def _trains_on(file: Path, run: Path) -> bool:
    config = run / "config.yaml"
    if not config.is_file():
        return False
    train = TrainConfig.from_yaml(config).data.train
    several = not isinstance(train, str)
    named = list(train) if several else [train]
    if not any(part and Path(part).resolve() == file.resolve() for part in named):
        return False
    if several:  # of a mixture, training lends nothing
        raise ValueError(f"{file}: {run} was trained on it: name examples that were held out")
    return True


def _check_once(examples: Sequence[Example]) -> None:
    """Results are told apart by task and id."""
    seen = set()
    for example in examples:
        if (example.task, example.id) in seen:
            raise ValueError(
                f"example {example.id!r} of {example.task!r} comes twice: give every example an id "
                "of its own, and files other names (a task is called as its file)"
            )
        seen.add((example.task, example.id))
