"""Typed settings out of nested dicts and "dotted.name=value" strings; TrainConfig is built on it.

Knows dataclasses of plain values and of other such dataclasses (sections), and nothing of training.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


def setting(default: Any, help: str) -> Any:
    """A dataclass field with a help text; lists are copied for every instance."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ConfigField:
    """One setting, for `--help` and for generated flags."""

    name: str
    type: str
    default: Any
    help: str


def fields_of(cls: type, prefix: str = "") -> list[ConfigField]:
    """All settings of a dataclass and its sections, with dotted names, in the classes' order."""
    found: list[ConfigField] = []
    defaults, hints = cls(), _hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            found += fields_of(hints[f.name], f"{prefix}{f.name}.")
        else:
            help = f.metadata.get("help", "")
            found.append(ConfigField(prefix + f.name, str(f.type), getattr(defaults, f.name), help))
    return found


def build_settings(cls: type[T], values: Mapping[str, Any], overrides: Iterable[str] = ()) -> T:
    """An instance of the dataclass `cls`.

    Args:
        values: nested dicts; missing settings take their defaults.
        overrides: "dotted.name=value" strings, read as YAML; later ones win.

    Raises:
        ValueError: every unknown key (with its near miss) and every value of a wrong type, at once.
    """
    tree = _copy_tree(values)
    complaints: list[str] = []
    for override in overrides:
        _apply_override(tree, override, complaints)
    built = _build(cls, cls, tree, "", complaints)
    raise_all(complaints)
    return built


def raise_all(complaints: list[str]) -> None:
    """Raises one ValueError of all complaints, if there are any."""
    if len(complaints) == 1:
        raise ValueError(complaints[0])
    if complaints:
        raise ValueError("settings that cannot work:\n  - " + "\n  - ".join(complaints))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of nested dicts."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _copy_tree(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy_tree(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def _near_miss(key: str, known: Iterable[str]) -> str:
    known = list(known)
    # Settings are often named without their section (rank for lora.rank): the last part counts too.
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        tails = {name.rpartition(".")[2]: name for name in known}
        near = [
            tails[t]
            for t in difflib.get_close_matches(key.rpartition(".")[2], tails, n=1, cutoff=0.7)
        ]
    return f"; did you mean {near[0]!r}?" if near else ""


def _unknown(path: str, section: str, cls: type, root: type) -> str:
    beside = [section + f.name for f in dataclasses.fields(cls)]
    anywhere = [f.name for f in fields_of(root)] + [f.name for f in dataclasses.fields(root)]
    near = _near_miss(path, beside) or _near_miss(path, anywhere)
    return f"unknown setting {path!r}{near or '; known here: ' + ', '.join(beside)}"


def _build(
    cls: type, root: type, values: Mapping[str, Any], prefix: str, complaints: list[str]
) -> Any:
    hints = _hints(cls)
    kwargs: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if key not in hints:
            complaints.append(_unknown(path, prefix, cls, root))
        elif dataclasses.is_dataclass(hints[key]):
            if isinstance(value, hints[key]):
                kwargs[key] = value
            elif isinstance(value, Mapping):
                kwargs[key] = _build(hints[key], root, value, path + ".", complaints)
            else:
                complaints.append(f"{path} is a section of settings, not {value!r}")
        else:
            try:
                kwargs[key] = _convert(value, hints[key])
            except (TypeError, ValueError):
                complaints.append(f"{path}={value!r}: expected {_type_name(hints[key])}")
    return cls(**kwargs)


def _apply_override(tree: dict[str, Any], override: str, complaints: list[str]) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name.strip():
        complaints.append(f"override {override!r} is not of the form name=value, as lora.steps=100")
        return
    *sections, key = name.strip().split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            complaints.append(f"override {override!r}: {section!r} is not a section of settings")
            return
    try:
        node[key] = yaml.safe_load(text)
    except yaml.YAMLError:
        node[key] = text


def _convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, or TypeError/ValueError. YAML reads 1e-3 as text: so may we."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        for option in get_args(hint):
            try:
                return _convert(value, option)
            except (TypeError, ValueError):
                continue
        raise TypeError
    if origin is Literal:
        if any(value == option and type(value) is type(option) for option in get_args(hint)):
            return value
        raise ValueError
    if origin is list:
        if isinstance(value, tuple):
            value = list(value)
        if not isinstance(value, list):
            raise TypeError
        return [_convert(item, get_args(hint)[0]) for item in value]
    if hint is type(None):
        if value is None:
            return None
        raise TypeError
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise TypeError
        return float(value)
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError
        return value
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, hint):
        return value
    raise TypeError


def _type_name(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(option) for option in get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(str(option) for option in get_args(hint))
    if origin is list:
        return f"a list of {_type_name(get_args(hint)[0])}"
    return {
        type(None): "null",
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
    }.get(hint, str(hint))
