"""The shipped corpora keep what their data cards say, and the program that builds them works."""

from __future__ import annotations

import collections
import importlib.util
import itertools
import re
import sys
from pathlib import Path

import pytest

from firstlm.corpus import CORPORA_FOLDER, CORPUS_NAMES, load_corpus

SCRIPTS = Path(__file__).parent.parent / "scripts"
SPLITS = ("train", "validation", "test")
SIZES = {"train": 4000, "validation": 500, "test": 1000}  # at least
INSTRUCTIONS = {
    "debian-synopsis": "Summarize this Debian package description in one line.",
    "debian-en-de": "Translate this package description to German.",
}


@pytest.fixture(scope="module")
def corpora() -> dict[tuple[str, str], list[dict[str, str]]]:
    """(corpus, split) -> rows, with every field of the files."""
    from firstlm.corpus import _read_jsonl

    return {
        (name, split): [row for _, row in _read_jsonl(CORPORA_FOLDER / name / f"{split}.jsonl.xz")]
        for name in CORPUS_NAMES
        for split in SPLITS
    }


def words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


def trigrams(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return set(zip(found, found[1:], found[2:], strict=False)) or {tuple(found)}


def text_of(row: dict[str, str]) -> str:
    return row["prompt"].split("\n\n", 1)[1]


def family(source: str) -> str:
    return re.sub(r"[\d.]+", "", source).strip("-+~")


@pytest.mark.parametrize("name", CORPUS_NAMES)
def test_every_split_is_large_enough_and_loads_by_name(name, corpora):
    for split in SPLITS:
        loaded = load_corpus(name, split)
        assert len(loaded) >= SIZES[split]
        assert loaded["id"][:] == [row["id"] for row in corpora[name, split]]
        assert set(loaded["task"]) == {name}


def test_every_row_has_its_fields_and_its_corpus_instruction(corpora):
    for (name, _), rows in corpora.items():
        for row in rows:
            assert list(row) == ["id", "package", "source", "prompt", "answer"]
            assert all(text and text.strip() == text for text in row.values())
            assert row["prompt"].startswith(INSTRUCTIONS[name] + "\n\n")
            assert row["id"] == f"{name}/{row['package']}"
            assert "\n" not in row["answer"]


def test_no_row_appears_twice(corpora):
    for name in CORPUS_NAMES:
        rows = [row for split in SPLITS for row in corpora[name, split]]
        for field in ("id", "prompt", "answer"):
            assert len({row[field] for row in rows}) == len(rows), f"{field} of {name}"


def test_no_source_package_or_other_version_of_it_is_in_two_splits_of_either_corpus(corpora):
    families = {
        split: {family(row["source"]) for name in CORPUS_NAMES for row in corpora[name, split]}
        for split in SPLITS
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not families[one] & families[other]
    packages = {
        split: {row["package"] for name in CORPUS_NAMES for row in corpora[name, split]}
        for split in SPLITS
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not packages[one] & packages[other]


def test_no_text_shares_40_percent_of_its_trigrams_with_a_text_of_another_split(corpora):
    held_out = [
        (split, trigrams(text_of(row)))
        for (_, split), rows in corpora.items()
        if split != "train"
        for row in rows
    ]
    holders = collections.defaultdict(list)
    for i, (_, grams) in enumerate(held_out):
        for gram in grams:
            holders[gram].append(i)
    for (name, split), rows in corpora.items():
        for row in rows:
            grams = trigrams(text_of(row))
            shared = collections.Counter(i for gram in grams for i in holders.get(gram, ()))
            for i, count in shared.items():
                other_split, other = held_out[i]
                if other_split != split:
                    overlap = count / min(len(grams), len(other))
                    assert overlap < 0.4, f"{name}/{split} {row['id']}: {text_of(row)}"


def test_no_answer_of_a_held_out_row_was_trained_on(corpora):
    for name in CORPUS_NAMES:
        keys = {
            split: {tuple(words(r["answer"])) for r in corpora[name, split]} for split in SPLITS
        }
        for one, other in itertools.combinations(SPLITS, 2):
            assert not keys[one] & keys[other]


def test_no_synopsis_stands_in_its_description_as_it_is(corpora):
    for split in SPLITS:
        for row in corpora["debian-synopsis", split]:
            assert " ".join(words(row["answer"])) not in " ".join(words(text_of(row))), row["id"]
            assert len(row["answer"].split()) >= 3


def test_no_package_without_contents_and_no_address_of_a_person_is_left(corpora):
    for rows in corpora.values():
        for row in rows:
            assert not re.search(r"-(dbg|dbgsym)$", row["package"])
            assert not re.search(r"transitional|dummy|debug symbols", row["prompt"], re.IGNORECASE)
            for text in (row["prompt"], row["answer"]):
                assert not re.search(r"\S@\S+\.\w", text), row["id"]


def test_german_answers_are_german_and_of_a_like_length(corpora):
    function_words = {"der", "die", "das", "und", "ist", "für", "mit", "von", "ein", "eine", "zu"}
    for split in SPLITS:
        rows = corpora["debian-en-de", split]
        share = sum(bool(function_words & set(words(row["answer"]))) for row in rows) / len(rows)
        assert share > 0.95
        assert all(0.8 <= len(row["answer"]) / len(text_of(row)) <= 1.8 for row in rows)


@pytest.mark.parametrize("name", CORPUS_NAMES)
def test_the_data_card_states_the_counts_that_are_shipped(name, corpora):
    card = (CORPORA_FOLDER / name / "README.md").read_text(encoding="utf-8")
    for split in SPLITS:
        assert f"| {split} | {len(corpora[name, split]):,} |" in card
    for part in ("Source", "Licence", "Filters", "Near-duplicates", "Splits", "Rebuild"):
        assert f"**{part}**" in card
    assert re.search(r"Release file of \w+, \d+ \w+ \d{4}", " ".join(card.split()))


# --- the program


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location(
            "build_debian_corpus", SCRIPTS / "build_debian_corpus.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(SCRIPTS))


def test_descriptions_unfold_into_paragraphs_with_a_bullet_a_line(script):
    from debian_descriptions import unfold

    synopsis, paragraphs = unfold(
        "short text\n First line\n wraps here, Audio-\n Server und Video-\n und Tonspuren:\n"
        "  - one that\n    goes on\n  - two\n .\n   laid out\n   by hand\n .\n Homepage: http://x"
    )
    assert synopsis == "short text"
    assert paragraphs == [
        "First line wraps here, Audio-Server und Video- und Tonspuren:\n- one that goes on\n- two",
        "laid out\nby hand",
    ]


def test_sentences_end_before_capitals_but_not_after_abbreviations(script):
    text = "It reads files, e.g. PNG. Version 2.0 is fast! See J. Doe et al. It ends."
    assert script.sentences(text) == [
        "It reads files, e.g. PNG.",
        "Version 2.0 is fast!",
        "See J. Doe et al.",
        "It ends.",
    ]


def test_a_paragraph_is_cut_only_where_both_languages_have_as_many_sentences(script):
    english = "This first sentence has a good many words in it. " + "Another one goes on. " * 20
    german = "Dieser erste Satz hat eine ganze Menge Wörter in sich. " + "Ein anderer. " * 20
    source, target = script.fit_sentences(english.strip(), german.strip())
    assert len(script.sentences(source)) == len(script.sentences(target)) > 1
    assert script.fit_sentences(english.strip(), german.strip() + " Und noch einer.") is None


def test_near_duplicates_are_found_whatever_their_numbers_and_punctuation(script):
    seen = script.NearDuplicates()
    seen.add("The GNU compiler, version 11: translates C programs to machine code.", "gcc-11")
    again = "the gnu compiler version 12 translates C programs to machine code"
    assert seen.find(again) == 1.0
    assert seen.find(again, but="gcc-11") == 0.0
    assert seen.find("A wholly different text about painting with water colours.") == 0.0


def write_indices(state: Path) -> None:
    """A small archive in apt's own formats: packages 0 to 39, some translated, two versions."""
    lists = state / "lists"
    lists.mkdir(parents=True)
    prefix = "mirror_dists_bookworm_"
    topics = ["music", "video", "text", "image", "network", "game", "science", "kernel"]
    verbs = ["plays", "edits", "converts", "archives", "prints"]
    packages, english, german = [], [], []
    for i in range(40):
        topic, verb = topics[i % 8], verbs[i // 8]
        name = f"pkg{chr(97 + i % 26)}{chr(97 + i // 26)}"
        unlike = " ".join(f"{topic}{verb}{chr(97 + j)}" for j in range(8))
        packages.append(
            f"Package: {name}\nSource: {name}-src (1.0)\nSection: misc\n"
            f"Description: handles {topic}\nDescription-md5: md5{i}\n"
        )
        english.append(
            f"Package: {name}\nDescription-md5: md5{i}\n"
            f"Description-en: tool which {verb} {topic} well\n"
            f" It {verb} {topic} for people: {unlike}.\n .\n Written in {name}.\n"
        )
        german.append(
            f"Package: {name}\nDescription-md5: md5{i}\n"
            f"Description-de: Werkzeug für {topic}\n"
            f" Es ist für {topic} und die Leute mit {verb}: {unlike}.\n .\n Mit {name}.\n"
        )
    english[0] = english[0].replace("It ", "A transitional package. It ")
    (lists / f"{prefix}main_binary-amd64_Packages").write_text("\n".join(packages))
    (lists / f"{prefix}main_i18n_Translation-en").write_text("\n".join(english))
    (lists / f"{prefix}main_i18n_Translation-de").write_text("\n".join(german))
    release = "Version: 12.0\nDate: Sat, 10 Jun 2023 08:53:33 UTC\n"
    (lists / f"{prefix}InRelease").write_text(release)


def test_the_same_indices_give_the_same_files(script, tmp_path, monkeypatch, capsys):
    write_indices(tmp_path / "state")
    for out in ("one", "two"):
        arguments = ["--state", str(tmp_path / "state"), "--out", str(tmp_path / out)]
        monkeypatch.setattr(sys, "argv", ["build_debian_corpus.py", *arguments])
        script.main()
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 2 * 4
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    counts = [len(load_corpus(tmp_path / "one" / n, s)) for n in CORPUS_NAMES for s in SPLITS]
    assert sum(counts) == 2 * 39, "all but the transitional package"
    assert "10 Jun 2023" in (tmp_path / "one" / "debian-en-de" / "README.md").read_text()
    assert "debian-synopsis: " in capsys.readouterr().out
