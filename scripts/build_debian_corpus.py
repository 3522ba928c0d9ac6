#!/usr/bin/env python3
"""Build the two corpora that firstlm ships from Debian's package indices.

debian-synopsis: the long description of a package -> its one-line synopsis.
debian-en-de:    a paragraph of an English description -> its German translation.

    python scripts/build_debian_corpus.py

The indices (Packages, Translation-en, Translation-de) come through apt's own client into a
private state folder, checked against Debian's signed Release file. Only the standard library is
used, and the same indices give the same rows in the same order. docs/corpora.md explains each
filter.
"""

from __future__ import annotations

import argparse
import collections
import json
import lzma
import os
import re
import tempfile
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from debian_descriptions import (
    SUITE,
    Description,
    fetch_indices,
    read_descriptions,
    release_date,
    says_something,
)

CORPORA = Path(__file__).resolve().parent.parent / "python" / "firstlm" / "corpora"
CARD = Path(__file__).with_name("debian_corpus_card.md")
SIZES = {"test": 1000, "validation": 500, "train": 6000}  # rows at most, drawn in this order

SYNOPSIS_INSTRUCTION = "Summarize this Debian package description in one line."
TRANSLATION_INSTRUCTION = "Translate this package description to German."

DESCRIPTION_CHARS = (120, 500)  # of a description to summarise
ENGLISH_CHARS = (50, 260)  # of a text to translate
GERMAN_CHARS = (50, 240)  # about 80 tokens of an English tokenizer at most
LENGTH_RATIO = (0.8, 1.8)  # German characters / English characters
ROWS_PER_FAMILY = 3
NEAR_DUPLICATE = 0.4  # shared word trigrams / trigrams of the shorter text


# --- pairs -------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Lower-case words without digits or punctuation: the key under which texts are equal."""
    return " ".join(re.findall(r"[^\W\d_]+", text.lower()))


def synopsis_pairs(description: Description) -> Iterator[tuple[str, str]]:
    """(long description, synopsis), unless it would teach little."""
    text, synopsis = "\n\n".join(description.english), description.synopsis
    length_fits = DESCRIPTION_CHARS[0] <= len(text) <= DESCRIPTION_CHARS[1]
    # A synopsis that stands in the text as it is needs no summarising.
    if length_fits and len(synopsis.split()) >= 3 and normalise(synopsis) not in normalise(text):
        yield text, synopsis


def translation_pairs(description: Description) -> Iterator[tuple[str, str]]:
    """(English, German) of each paragraph that both languages have, or of its opening.

    An opening is as many leading sentences as fit, and is only taken where both languages have
    equally many sentences.
    """
    english, german = description.english, description.german
    if len(english) != len(german):
        return
    for source, target in zip(english, german, strict=True):
        pair = None if "\n" in source + target else fit_sentences(source, target)
        if pair is not None and looks_translated(*pair):
            yield pair


def fit_sentences(source: str, target: str) -> tuple[str, str] | None:
    """The whole pair if it fits, else the most leading sentences that do, else None."""
    english, german = sentences(source), sentences(target)
    if len(english) != len(german):
        english, german = [source], [target]
    for count in range(len(english), 0, -1):
        source, target = " ".join(english[:count]), " ".join(german[:count])
        source_fits = ENGLISH_CHARS[0] <= len(source) <= ENGLISH_CHARS[1]
        if source_fits and GERMAN_CHARS[0] <= len(target) <= GERMAN_CHARS[1]:
            return source, target
    return None


ABBREVIATION = re.compile(
    r"(\b(etc|vs|bzw|ca|usw|sog|inkl|evtl|ggf|vgl|Dr|St|No|Nr|Inc|Ltd)|\b\w|\b\w\. ?\w)\.$"
)


def sentences(paragraph: str) -> list[str]:
    """Split after . ! ? before a capital, but not after abbreviations and initials."""
    parts: list[str] = []
    for piece in re.split(r"(?<=[.!?]) (?=[\"'„“(]?[A-ZÄÖÜ0-9])", paragraph):
        if parts and ABBREVIATION.search(parts[-1]):
            parts[-1] += " " + piece
        else:
            parts.append(piece)
    return parts


GERMAN_WORDS = frozenset(
    "der die das den dem des ein eine einen einem einer eines und oder ist sind"  # noqa: SIM905
    " für mit von zu zur zum auf aus nicht kann wird werden es sie im in als auch durch"
    " bei diese dieser".split()
)
ENGLISH_WORDS = frozenset(
    "the and is are of for with to this that it which by from or".split()  # noqa: SIM905
)


def looks_translated(source: str, target: str) -> bool:
    """True if the target is German and says as much: length, numbers, last character."""
    words = re.findall(r"[^\W\d_]+", target.lower())
    german = sum(word in GERMAN_WORDS for word in words)
    english = sum(word in ENGLISH_WORDS for word in words)
    return (
        german >= 0.15 * len(words)
        and english <= 0.25 * german  # quoted English names may stay
        and LENGTH_RATIO[0] <= len(target) / len(source) <= LENGTH_RATIO[1]
        and sorted(re.findall(r"\d+", source)) == sorted(re.findall(r"\d+", target))
        and source[-1] == target[-1]
    )


# --- splits ------------------------------------------------------------------------------------


class NearDuplicates:
    """Texts kept so far, found again by the word trigrams that they share."""

    def __init__(self) -> None:
        self._size: list[int] = []
        self._package: list[str] = []
        self._holders: dict[str, list[int]] = collections.defaultdict(list)

    @staticmethod
    def trigrams(text: str) -> set[str]:
        words = normalise(text).split()
        return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}

    def find(self, text: str, but: str = "") -> float:
        """The largest overlap (0 to 1) with a kept text of any package other than `but`."""
        grams = self.trigrams(text)
        shared = collections.Counter(i for gram in grams for i in self._holders.get(gram, ()))
        return max(
            (
                count / min(len(grams), self._size[i])
                for i, count in shared.items()
                if self._package[i] != but
            ),
            default=0.0,
        )

    def add(self, text: str, package: str) -> None:
        grams = self.trigrams(text)
        for gram in grams:
            self._holders[gram].append(len(self._size))
        self._size.append(len(grams))
        self._package.append(package)


def build_rows(descriptions: list[Description]) -> dict[str, dict[str, list[dict[str, str]]]]:
    """corpus -> split -> rows. Test rows are drawn first, so that train gives way to them."""
    kinds = {
        "debian-synopsis": (SYNOPSIS_INSTRUCTION, synopsis_pairs),
        "debian-en-de": (TRANSLATION_INSTRUCTION, translation_pairs),
    }
    usable = [d for d in descriptions if says_something(d)]
    corpora: dict[str, dict[str, list[dict[str, str]]]] = {name: {} for name in kinds}
    seen = NearDuplicates()  # one for both corpora: a text may not change split between them
    answers = {name: set[str]() for name in kinds}
    for split, size in SIZES.items():
        for name, (instruction, make_pairs) in kinds.items():
            rows = corpora[name].setdefault(split, [])
            per_family: collections.Counter[str] = collections.Counter()
            for d in usable:
                if d.split != split or per_family[d.family] >= ROWS_PER_FAMILY:
                    continue
                pair = first_new(make_pairs(d), d.package, seen, answers[name])
                if pair is None:
                    continue
                text, answer = pair
                per_family[d.family] += 1
                answers[name].add(normalise(answer))
                seen.add(text, d.package)
                rows.append(
                    {
                        "id": f"{name}/{d.package}",
                        "package": d.package,
                        "source": d.source,
                        "prompt": f"{instruction}\n\n{text}",
                        "answer": answer,
                    }
                )
                if len(rows) == size:
                    break
    return corpora


def first_new(
    pairs: Iterable[tuple[str, str]], package: str, seen: NearDuplicates, answers: set[str]
) -> tuple[str, str] | None:
    """The first pair whose text and answer no other package has brought already."""
    for text, answer in pairs:
        if normalise(answer) not in answers and seen.find(text, but=package) < NEAR_DUPLICATE:
            return text, answer
    return None


# --- files -------------------------------------------------------------------------------------


def write_split(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write rows as .jsonl.xz, replacing `path` only when complete."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace(path, lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


CARD_TEXTS = {
    "debian-synopsis": {
        "task": "Summarisation: the long description of a Debian package -> its one-line synopsis.",
        "instruction": SYNOPSIS_INSTRUCTION,
        "indices": "Packages and Translation-en",
        "licence": "",
        "filters": (
            f"descriptions of {DESCRIPTION_CHARS[0]} to {DESCRIPTION_CHARS[1]} characters;"
            " synopses of three words or more that do not stand in the description as they are;"
            " no transitional, dummy, meta, task or debug-symbol packages; no Rust crates (one"
            " template for thousands of packages), no e-mail addresses."
        ),
    },
    "debian-en-de": {
        "task": "Translation: a paragraph of a Debian package's description, English -> German.",
        "instruction": TRANSLATION_INSTRUCTION,
        "indices": "Packages, Translation-en and Translation-de",
        "licence": (
            "The German texts are by the volunteers of the Debian Description Translation Project,"
            " published in the archive beside the originals; the index states no licence of their"
            " own. "
        ),
        "filters": (
            "descriptions with equally many paragraphs in both languages; of these the first"
            " paragraph that passes, or as many of its leading sentences as fit where both"
            f" languages have equally many; English of {ENGLISH_CHARS[0]} to {ENGLISH_CHARS[1]} and"
            f" German of {GERMAN_CHARS[0]} to {GERMAN_CHARS[1]} characters, ratio"
            f" {LENGTH_RATIO[0]} to {LENGTH_RATIO[1]}; the same numbers and last character;"
            " German by its function words; no lists; the package filters of debian-synopsis."
        ),
    },
}


def card(name: str, splits: dict[str, list[dict[str, str]]], date: str, version: str) -> str:
    """The data card of a corpus, with its counts."""

    def spread(lengths: list[int]) -> str:
        return f"{sorted(lengths)[len(lengths) // 2]}, {max(lengths)}"

    lines = [
        f"| {split} | {len(rows):,} | {len({row['source'] for row in rows}):,}"
        f" | {spread([len(row['prompt']) for row in rows])}"
        f" | {spread([len(row['answer']) for row in rows])} |"
        for split, rows in sorted(splits.items(), key=lambda item: -len(item[1]))
    ]
    filled = CARD.read_text(encoding="utf-8").format(
        name=name,
        table="\n".join(lines),
        date=date,
        version=version,
        suite=SUITE,
        overlap=NEAR_DUPLICATE,
        per_family=ROWS_PER_FAMILY,
        **CARD_TEXTS[name],
    )
    return "".join(wrap(line) + "\n" for line in filled.splitlines())


def wrap(line: str) -> str:
    if line.startswith("|"):
        return line
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, 100, subsequent_indent=indent, break_on_hyphens=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build debian-synopsis and debian-en-de.")
    parser.add_argument("--out", type=Path, default=CORPORA, help="folder of the corpora")
    parser.add_argument("--state", type=Path, help="apt state folder; reused if it has the indices")
    parser.add_argument("--mirror", default="http://deb.debian.org/debian")
    parser.add_argument("--keyring", default="/usr/share/keyrings/debian-archive-keyring.gpg")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        state = (arguments.state or Path(temporary)).resolve()
        if not list(state.glob("lists/*_Translation-de")):
            fetch_indices(state, arguments.mirror, arguments.keyring)
        date, version = release_date(state)
        corpora = build_rows(read_descriptions(state))
    for name, splits in corpora.items():
        for split, rows in splits.items():
            write_split(arguments.out / name / f"{split}.jsonl.xz", rows)
        replace(arguments.out / name / "README.md", card(name, splits, date, version).encode())
        print(f"{name}: " + ", ".join(f"{len(rows)} {split}" for split, rows in splits.items()))


if __name__ == "__main__":
    main()
