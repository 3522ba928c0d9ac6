"""The README's code and commands run as written, and its figures are those of a stored result."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import firstlm
from firstlm import bench_tables, cli, figures
from firstlm.evaluation import tables
from firstlm.evaluation.statistics import best_rows
from tiny_gguf import draw_routers, tiny_model_folder

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def after_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder as the first run leaves it, but with a checkpoint of a tiny model."""
    base = tiny_model_folder(tmp_path / "base", layers=6)
    checkpoint = tmp_path / "runs" / "quickstart" / "checkpoint"
    model = firstlm.from_pretrained(base)
    draw_routers(model)
    model.router_config.calibration = {"0.00": [0.0] * 6, "0.50": [0.5] * 6}
    model.save_pretrained(checkpoint)
    AutoTokenizer.from_pretrained(base).save_pretrained(checkpoint)
    lines = [json.dumps({"prompt": f"say {i}", "answer": f"word {i}"}) for i in range(40)]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FIRSTLM_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples_run_as_written(
    code: str, after_quickstart: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(code, "README.md", "exec"), {})
    assert "▮" in capsys.readouterr().out


def test_there_is_a_python_example() -> None:
    assert len(blocks("python")) >= 1


@pytest.mark.parametrize(
    "line",
    [
        line
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith("firstlm ")
    ],
)
def test_commands_run_as_written(
    line: str, after_quickstart: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = shlex.split(line, comments=True)
    if arguments[1] == "train":
        arguments.append("--print-config")  # the settings are checked, hours are not spent
    if arguments[1] == "calibrate":  # prompts that fit the tiny model, and few of them
        arguments = [a.replace("debian-synopsis", "few.jsonl") for a in arguments]
        if "--min-quality" in arguments:  # a random model's ROUGE-L is 0
            arguments += ["--metric", "cross_entropy", "--examples", "8", "--max-new-tokens", "4"]
            arguments += ["--timing-prompts", "1", "--repeats", "1", "--new-tokens", "3"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert not exit.value.code


def test_scripts_and_linked_files_exist() -> None:
    for script in re.findall(r"bash (scripts/\S+)", README):
        assert (ROOT / script).is_file(), script
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_the_table_is_that_of_the_stored_result() -> None:
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "scripts" / "quickstart.py")
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    summary = json.loads((ROOT / "results" / "quickstart.json").read_text(encoding="utf-8"))
    assert quickstart.markdown(summary) in README


def test_the_table_of_decode_speed_is_that_of_the_stored_result() -> None:
    found = figures.read(ROOT / "results" / "engine" / "decode.json")
    assert bench_tables.summary_table(found) in README


def test_the_table_of_rivals_is_that_of_the_stored_result() -> None:
    found = json.loads((ROOT / "results/mixture-50/results.json").read_text(encoding="utf-8"))
    assert tables.short_table(found["rows"]).markdown() in README


def test_the_table_of_other_runs_is_that_of_the_stored_results() -> None:
    line = re.compile(r"^\| \[.*?\]\((results/.*?)/report\.md\).*? \| (.*) \|$", re.MULTILINE)
    lines = line.findall(README)
    assert len(lines) == 7
    for folder, cells in lines:
        rows = json.loads((ROOT / folder / "results.json").read_text(encoding="utf-8"))["rows"]
        found = []
        for row in filter(tables.is_own, best_rows(rows)):
            if (static := row["vs"].get("static-trained")) is None:
                continue  # a rate without this rival
            lora_only = row["vs"]["lora_only-trained"]
            found.append([
                str(len(row["seeds"])), f"{row['skip_rate']:.1%}",
                tables.difference(static["cross_entropy"], "cross_entropy"),
                f"{lora_only['rouge_l']['share']:.1%}", f"{1 / row['speedup'] - 1:+.1%}",
            ])  # fmt: skip
        assert cells.split(" | ") in found


def test_the_page_of_results_is_made_from_the_stored_results() -> None:
    page = (ROOT / "docs" / "performance_results.md").read_text(encoding="utf-8")
    paths = [
        path for folder in ("engine", "ops") for path in (ROOT / "results" / folder).glob("*.json")
    ]
    assert len(paths) == 8
    for path in paths:
        assert bench_tables.tables(figures.read(path)) in page, path.name
