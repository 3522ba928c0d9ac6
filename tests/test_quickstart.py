"""The first run on a tiny model: all stages, files and keys; what exists is not made again."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

import firstlm
from firstlm.skip_plan import SkipPlan
from tiny_gguf import tiny_model_folder

SCRIPT = Path(__file__).parent.parent / "scripts" / "quickstart.py"
CONFIG = """
base: {base}
skip_rate: 0.25
progress: false
importance_examples: 4
data: {{max_length: 512, max_examples: 40, validation_prompts: 12, test_prompts: 12}}
warmup: {{steps: 1}}
routers: {{steps: 2}}
lora: {{steps: 2}}
"""


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_first_run_leaves_what_it_promises_and_the_second_reuses_it(
    quickstart, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_model_folder(tmp_path, layers=6)
    (tmp_path / "tiny.yaml").write_text(CONFIG.format(base=base))
    output = tmp_path / "run"
    arguments = ["--config", str(tmp_path / "tiny.yaml"), "--output", str(output)]
    arguments += ["--prompts", "6", "--answer-tokens", "3", "--timed-prompts", "2"]
    arguments += ["--timed-tokens", "3", "--repeats", "2"]
    summary = quickstart.main(arguments)

    assert summary == json.loads((output / "summary.json").read_text())
    assert {
        "skip_rate", "distinct_plans", "prompts", "layers", "layer_calls_per_token", "rouge_l",
        "tpot_ms", "ttft_ms", "kv_bytes", "seed", "versions", "schema_version", "machine",
    } == summary.keys()  # fmt: skip
    assert (summary["prompts"], summary["layers"]) == (6, 6)
    assert summary["rouge_l"].keys() == {"base", "lora", "first"}
    for key in ("tpot_ms", "ttft_ms", "kv_bytes"):
        assert summary[key].keys() == {"full", "routed"}
        assert all(arm.keys() == {"median", "p10", "p90", "n"} for arm in summary[key].values())
    assert summary["tpot_ms"]["routed"]["n"] == 2 * 2
    assert summary["kv_bytes"]["routed"]["n"] == 2

    rows = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    plans = [SkipPlan.from_mask([mark == "▮" for mark in row["plan"]]) for row in rows]
    assert summary["distinct_plans"] == len(set(plans))
    assert summary["skip_rate"] == pytest.approx(sum(plan.skip_rate for plan in plans) / 6)
    assert Image.open(output / "overview.png").width == 1200
    model = firstlm.from_pretrained(output / "checkpoint")
    assert len(model.decoder_layers) == 6
    assert "layer calls per token" in capsys.readouterr().out

    stages = {file: file.stat().st_mtime_ns for file in (output / "stages").rglob("*.json")}
    assert quickstart.main(arguments)["tpot_ms"] == summary["tpot_ms"]
    assert stages == {file: file.stat().st_mtime_ns for file in (output / "stages").rglob("*.json")}
    assert capsys.readouterr().out.count("reused") == 6
