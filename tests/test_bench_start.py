"""`firstlm bench start`: loads in processes of their own, and routers that read the prompt."""

from __future__ import annotations

import sys

import pytest

from firstlm import bench_start, bench_tables, cli, figures
from tiny_gguf import tiny_model_folder


def test_the_command_measures_loads_and_routers(tmp_path, monkeypatch, capsys):
    folder = tiny_model_folder(tmp_path / "base", layers=3)
    path = tmp_path / "start.json"
    arguments = ["bench", "start", "-c", folder, "--precision", "float32", "--threads", 1]
    arguments += ["--prompt-tokens", "5,9", "--repeats", 2, "--output", path]
    monkeypatch.setattr(sys, "argv", ["firstlm", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    out = capsys.readouterr().out
    assert not exit.value.code, out
    found = figures.read(path)
    assert found["start_s"]["n"] == 2 and 0 < found["start_s"]["median"] < 100
    assert [row["prompt_tokens"] for row in found["routing"]] == [5, 9]
    for row in found["routing"]:
        assert 0 < row["router_ms"]["median"] < row["prefill_ms"]["median"]
        assert 0 < row["share"]["median"] < 1
    for bar in found["bars"]:
        assert bar["met"] == (bar["value"] <= bar["limit"]) and bar["quantity"] in out
    assert "first token" in bench_tables.tables(found)


def test_routers_that_were_never_trained_are_drawn(tmp_path):
    engine = bench_start._routed_engine(
        str(tiny_model_folder(tmp_path / "base", layers=3)), "float32", 1, 0
    )
    assert not engine.is_unrouted
