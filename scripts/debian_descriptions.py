"""Package descriptions of Debian main, in English and German, from apt's indices."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

SUITE = "bookworm"
SHARES = {"test": 18, "validation": 9}  # per cent of the source families; the rest is train

# Packages that hold nothing of their own, so that their description says nothing either.
EMPTY_PACKAGE = re.compile(
    r"transition|dummy|meta-?\s?package|virtual package|empty package|safely (be )?removed"
    r"|debug(ging)? symbols|detached symbols|debcargo|depends on the (latest|current|default)",
    re.IGNORECASE,
)
MAIL_ADDRESS = re.compile(r"\S@\S+\.\w")
EMPTY_NAME = re.compile(r"-(dbg|dbgsym|debug)$|^librust-|^task-")
BULLET = re.compile(r"([-*+o•·]|\d+[.)]) +\S")


# --- apt ---------------------------------------------------------------------------------------


def fetch_indices(state: Path, mirror: str, keyring: str) -> None:
    """Download the signed indices of Debian main into `state` with `apt-get update`."""
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    sources = state / "sources.list"
    sources.write_text(f"deb [arch=amd64 signed-by={keyring}] {mirror} {SUITE} main\n")
    options = {
        "Acquire::Languages": "en,de",
        "Acquire::GzipIndexes": "false",
        "APT::Architecture": "amd64",
        "APT::Architectures": "amd64",
        "APT::Update::Post-Invoke-Success": "",
        "Dir::State": state,
        "Dir::State::Lists": state / "lists",
        "Dir::State::status": state / "status",
        "Dir::Cache": state / "cache",
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "-",
    }
    flags = [part for key, value in options.items() for part in ("-o", f"{key}={value}")]
    subprocess.run(["apt-get", "update", "-q", *flags], check=True)


def find_index(state: Path, ending: str) -> Path:
    """The one downloaded index whose name ends in `ending`."""
    found = sorted((state / "lists").glob(f"*_{SUITE}_{ending}"))
    if len(found) != 1:
        raise FileNotFoundError(f"expected one {ending} in {state / 'lists'}, found {len(found)}")
    return found[0]


def read_deb822(path: Path) -> Iterator[dict[str, str]]:
    """Yield the stanzas of a deb822 file; continuation lines keep their leading space."""
    stanza: dict[str, str] = {}
    key = ""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            line = line.rstrip("\n")
            if not line.strip():
                if stanza:
                    yield stanza
                stanza = {}
            elif line[0] in " \t":
                stanza[key] += "\n" + line
            else:
                key, _, value = line.partition(":")
                stanza[key] = value.strip()
    if stanza:
        yield stanza


def release_date(state: Path) -> tuple[str, str]:
    """(Date, Version) of the suite, as its signed Release file states them."""
    release = find_index(state, "InRelease").read_text(encoding="utf-8")
    date = re.search(r"^Date: (.+)$", release, re.MULTILINE)
    version = re.search(r"^Version: (.+)$", release, re.MULTILINE)
    if date is None or version is None:
        raise ValueError("the InRelease file names no Date or no Version")
    return date.group(1), version.group(1)


# --- descriptions ------------------------------------------------------------------------------


def unfold(description: str) -> tuple[str, list[str]]:
    """Split a Description field into its synopsis and the paragraphs of its long text.

    Wrapped lines are joined, ` .` lines separate paragraphs, bullets stay one to a line.
    """
    synopsis, *lines = description.split("\n")
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        text = " ".join(line.split())
        if text == ".":
            paragraphs.append([])
        elif not text or text.lower().startswith("homepage:"):
            continue
        elif not paragraphs[-1] or BULLET.match(text):
            paragraphs[-1].append(text)
        elif line.startswith("  ") and not BULLET.match(paragraphs[-1][-1]):
            paragraphs[-1].append(text)  # indented: laid out by hand
        else:
            paragraphs[-1][-1] = join_lines(paragraphs[-1][-1], text)
    return " ".join(synopsis.split()), ["\n".join(lines) for lines in paragraphs if lines]


def join_lines(first: str, second: str) -> str:
    """Undo a line break; one after a hyphen (Audio-/Server) stood inside a compound."""
    suspended = re.match(r"(und|oder|bzw|sowie|and|or|to)\b", second)
    inside_word = re.search(r"\w-$", first) and second[0].isalpha() and not suspended
    return first + second if inside_word else f"{first} {second}"


@dataclasses.dataclass(frozen=True)
class Description:
    """What Debian says about one package; `german` is empty where nobody translated it."""

    package: str
    source: str
    synopsis: str
    english: list[str]  # paragraphs
    german: list[str]

    @property
    def family(self) -> str:
        """Source name without version numbers: gcc-11 and gcc-12 are one family."""
        return re.sub(r"[\d.]+", "", self.source).strip("-+~")

    @property
    def split(self) -> str:
        bucket = stable_hash("split", self.family) % 100
        for name, share in SHARES.items():
            if bucket < share:
                return name
            bucket -= share
        return "train"


def stable_hash(*parts: str) -> int:
    """A hash that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")


def read_descriptions(state: Path) -> list[Description]:
    """Join the three indices, in an order drawn by hash so that any prefix is a fair sample."""
    english = read_translation(find_index(state, "main_i18n_Translation-en"), "Description-en")
    german = read_translation(find_index(state, "main_i18n_Translation-de"), "Description-de")
    found: dict[str, Description] = {}
    for stanza in read_deb822(find_index(state, "main_binary-amd64_Packages")):
        package, key = stanza["Package"], stanza.get("Description-md5", "")
        if key not in english or stanza.get("Section") in ("oldlibs", "metapackages"):
            continue
        source = stanza.get("Source", package).split()[0]
        synopsis, paragraphs = unfold(english[key])
        translation = unfold(german[key])[1] if key in german else []
        found[package] = Description(package, source, synopsis, paragraphs, translation)
    return sorted(found.values(), key=lambda d: (stable_hash("order", d.package), d.package))


def read_translation(path: Path, field: str) -> dict[str, str]:
    """Description-md5 -> description of one Translation index."""
    return {s["Description-md5"]: s[field] for s in read_deb822(path) if field in s}


def says_something(description: Description) -> bool:
    text = description.synopsis + "\n" + "\n".join(description.english)
    empty = EMPTY_PACKAGE.search(text) or EMPTY_NAME.search(description.package)
    return not (empty or MAIL_ADDRESS.search(text))
