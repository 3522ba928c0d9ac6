"""The three sets of a run: trained on, validated on (thresholds, curves), held out (the report)."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstlm.data import CORPUS_NAMES, encode_dataset, load_corpus
from firstlm.scoring import Collator
from firstlm.train_config import DataConfig

_HELD_OUT_SHARE = 20  # a file without splits gives one example in so many to each held-out set


@dataclass
class TrainData:
    """Encoded rows (input_ids, labels, prompt_mask) of every set, and the collator of batches.

    Attributes:
        too_long: examples left out because of max_length, by set.
    """

    train: Sequence[Mapping[str, Any]]
    validation: Sequence[Mapping[str, Any]]
    test: Sequence[Mapping[str, Any]]
    collator: Collator
    too_long: dict[str, int]

    def prompts(self, rows: Sequence[Mapping[str, Any]], count: int | None = None) -> list[Any]:
        """Token ids of the prompts of (the first `count`) rows."""
        number = len(rows) if count is None else min(count, len(rows))
        return [
            [t for t, p in zip(rows[i]["input_ids"], rows[i]["prompt_mask"], strict=True) if p]
            for i in range(number)
        ]


def load_train_data(
    settings: DataConfig,
    tokenizer: Any,
    collator: Collator,
    given: Mapping[str, Any],
    seed: int,
    progress: bool,
) -> TrainData:
    """Loads and tokenises the three sets.

    Args:
        settings: names or paths, used for every set that `given` does not hold.
        tokenizer: of the model; unused for sets that are given as tokens.
        collator: for TrainData.
        given: "train", "validation", "test" -> a datasets.Dataset, a path, or encoded rows.
        seed: of a mixture's order.
        progress: show bars.

    Raises:
        ValueError: what data.load_corpus and data.encode_dataset raise, or an empty set.
    """
    limits = {
        "train": settings.max_examples,
        "validation": settings.validation_prompts,
        "test": settings.test_prompts,
    }
    sets: dict[str, Any] = {}
    too_long: dict[str, int] = {}
    for name, limit in limits.items():
        source = given.get(name)
        if source is None:
            source = getattr(settings, name)
        if _is_encoded(source):
            sets[name] = _first(source, limit)
        else:
            columns = {
                f"{kind}_column": getattr(settings, f"{kind}_column")
                for kind in ("prompt", "answer", "messages")
            }
            train = given.get("train") or settings.train
            dataset = load_set(source, train, name, limit, seed, columns)
            encoded = encode_dataset(dataset, tokenizer, settings.max_length, progress=progress)
            too_long[name] = len(encoded.too_long)
            sets[name] = encoded
        if not len(sets[name]):
            raise ValueError(f"the {name} set is empty")
    return TrainData(collator=collator, too_long=too_long, **sets)


def hashes_of(settings: DataConfig, given: Mapping[str, Any]) -> dict[str, str]:
    """Set -> hash of its examples, for sets that are given as objects or lie in files of the user.

    A run's settings do not say what these hold, and a run must not go on with others.
    """
    found: dict[str, str] = {}
    for name in ("train", "validation", "test"):
        source = given.get(name, getattr(settings, name))
        if source is None:  # a split of the training data
            source = given.get("train", settings.train)
        parts = list(_bytes_of(source, name))
        if parts:
            found[name] = hashlib.sha256(b"".join(parts)).hexdigest()
    return found


def _bytes_of(source: Any, split: str) -> Iterator[bytes]:
    """What a source that is no shipped corpus holds."""
    if isinstance(source, (str, Path)):
        for file in _files_of(source, split):
            yield file.read_bytes()
    elif isinstance(source, Mapping):  # a DatasetDict
        yield from _bytes_of(source.get(split), split)
    elif hasattr(source, "__len__"):
        for i in range(len(source)):
            part = source[i]
            if isinstance(part, (str, Path)):  # of a mixture
                yield from _bytes_of(part, split)
            else:
                yield repr(part).encode()


def _files_of(source: str | Path, split: str) -> list[Path]:
    """The files that a source named by the user is read from; none of a shipped corpus."""
    path = Path(source)
    if source in CORPUS_NAMES or not path.exists():
        return []
    return sorted(path.glob(f"{split}.jsonl*")) if path.is_dir() else [path]


def _is_encoded(source: Any) -> bool:
    if source is None or isinstance(source, (str, Path)) or not hasattr(source, "__getitem__"):
        return False
    if not len(source) or not isinstance(source[0], Mapping):
        return False
    return "input_ids" in source[0]


def _first(rows: Any, limit: int | None) -> Any:
    return rows if limit is None or len(rows) <= limit else [rows[i] for i in range(limit)]


def load_set(
    source: Any, train: Any, split: str, limit: int | None, seed: int, columns: Mapping[str, Any]
) -> Any:
    """A set's examples: its own source, a split of the training corpora, or a share of a file.

    Args:
        source: of this set; None: taken from `train`.
        train: of the training set.
        split: which set.
        limit: the first so many.
        seed: of a mixture's order.
        columns: of corpus.load_corpus.
    """
    if source is not None and split != "train":
        # A file given for a held-out set is all of it; a corpus or folder has the split.
        parts = list(source) if isinstance(source, (list, tuple)) else [source]
        whole = [_has_one_split(part) for part in parts]
        if any(whole) and not all(whole):
            raise ValueError(f"data.{split} mixes files and corpora: give one kind")
        own = None if all(whole) else split
        return load_corpus(source, own, max_examples=limit, seed=seed, **columns)
    several = isinstance(train, (list, tuple))
    lone = [s for s in train if _has_one_split(s)] if several else []
    if lone and split != "train":
        raise ValueError(
            f"data.train holds files without splits ({lone[0]}) in a mixture: name data.validation "
            "and data.test as well"
        )
    if several or not _has_one_split(train):
        return load_corpus(train, split, max_examples=limit, seed=seed, **columns)
    dataset = load_corpus(train, **columns)
    whole = len(dataset)
    dataset = dataset.select([i for i in range(whole) if _share_of(dataset[i]["id"]) == split])
    if not len(dataset):
        raise ValueError(
            f"data.train has {whole} examples and no splits, too small to lend any to {split}: "
            "name data.validation and data.test as well"
        )
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def _has_one_split(source: Any) -> bool:
    if isinstance(source, (str, Path)):
        return source not in CORPUS_NAMES and Path(source).is_file()
    return not isinstance(source, Mapping)  # a DatasetDict has splits, a Dataset has none


def _share_of(example_id: str) -> str:
    """Which set an example of an unsplit file belongs to, by its id alone."""
    bucket = zlib.crc32(str(example_id).encode()) % _HELD_OUT_SHARE
    return {0: "validation", 1: "test"}.get(bucket, "train")
