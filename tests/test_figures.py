"""Figures carry their spread and origin; files are whole, and refused where they would mislead."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from firstlm import figures


def test_measured_gives_median_and_spread() -> None:
    got = figures.measured(range(11))
    assert got == {"median": 5.0, "p10": 1.0, "p90": 9.0, "n": 11}
    assert figures.measured([7]) == {"median": 7.0, "p10": 7.0, "p90": 7.0, "n": 1}


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_measured_refuses_nothing_and_nonfinite(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"at least one|must be finite"):
        figures.measured(values)


def test_written_figures_say_where_they_come_from(tmp_path: Path) -> None:
    path = tmp_path / "new" / "figures.json"
    written = figures.write(path, {"tpot_ms": figures.measured([1, 2, 3])}, seed=7)
    read = figures.read(path)
    assert read == written == json.loads(path.read_text())
    assert read["seed"] == 7
    assert read["schema_version"] == figures.SCHEMA_VERSION
    assert {"python", "torch", "transformers", "peft"} <= read["versions"].keys()
    assert read["machine"]["cores"] == figures.available_cores() >= 1
    assert read["machine"]["cpu"]
    assert os.listdir(path.parent) == ["figures.json"]


def test_reserved_keys_and_nonfinite_figures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="versions"):
        figures.record({"versions": {}}, seed=0)
    with pytest.raises(ValueError, match=r"figures.a.b\[1\] is nan"):
        figures.write(tmp_path / "x.json", {"a": {"b": [1.0, float(np.nan)]}}, seed=0)
    assert not (tmp_path / "x.json").exists()


def test_reading_another_schema_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text('{"schema_version": 99}')
    with pytest.raises(ValueError, match="schema_version is 99"):
        figures.read(path)
    path.write_text("not json")
    with pytest.raises(ValueError, match="is not JSON"):
        figures.read(path)
