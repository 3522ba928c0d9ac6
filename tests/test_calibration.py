"""firstlm.calibrate: rates hold on other prompts, budgets are chosen by measuring."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import firstlm
from firstlm import calibration, decode_paths
from firstlm.adapter import attach_adapter
from firstlm.budget import keep_masks, rate_key, skip_rate_of
from firstlm.calibration import Effort
from firstlm.checkpoint import read_router_config
from firstlm.cli_info import model as info_of
from firstlm.held_out import load_held_out
from firstlm.router import RouterConfig
from firstlm.train_config import LoraPhaseConfig
from tiny_gguf import draw_routers, tiny_model_folder

LAYERS = 6
WORDS = ["package", "library", "shell", "compiler", "for", "a", "small", "system", "with", "tools"]
EFFORT = Effort(
    prompts=24, examples=11, timing_prompts=2, repeats=2, new_tokens=4, max_new_tokens=6
)
HF = {"engine": "hf", "effort": EFFORT}
NATIVE = {"engine": "native", "precision": "float32", "effort": EFFORT}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint whose routers disagree, with an adapter that matters and one rate of old."""
    root = tmp_path_factory.mktemp("calibration")
    base = tiny_model_folder(root / "base", layers=LAYERS)
    model = firstlm.from_pretrained(base, router=RouterConfig(protected=[0]))
    draw_routers(model)
    attach_adapter(model, LoraPhaseConfig(rank=2), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.router_config.calibration = {"0.15": [0.25] * LAYERS}
    model.save_pretrained(root / "checkpoint")
    AutoTokenizer.from_pretrained(base).save_pretrained(root / "checkpoint")
    return root / "checkpoint"


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "held-out.jsonl"
    generator = torch.Generator().manual_seed(0)
    lines = []
    for _ in range(120):
        count = int(torch.randint(1, 8, (1,), generator=generator))
        picks = torch.randint(len(WORDS), (count + 1,), generator=generator).tolist()
        prompt = " ".join(WORDS[i] for i in picks[1:])
        lines.append(json.dumps({"prompt": prompt, "answer": WORDS[picks[0]]}))
    file.write_text("\n".join(lines))
    return file


def other_files(folder: Path) -> dict[str, bytes]:
    files = [f for f in folder.rglob("*") if f.is_file() and f.name != "router_config.json"]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def test_rates_are_found_on_one_part_and_hold_on_the_other(checkpoint: Path, data: Path) -> None:
    before, files = read_router_config(checkpoint), other_files(checkpoint)
    effort = Effort(prompts=60, max_length=120)
    result = firstlm.calibrate(checkpoint, data, [0.5, 0.2], effort=effort)
    after = read_router_config(checkpoint)
    assert [row["asked"] for row in result.rows] == [0.2, 0.5]
    for row in result.rows:
        assert row["achieved"] == pytest.approx(row["asked"], abs=0.06)
        assert 1 < row["distinct_plans"] <= 60
    assert after.calibration.keys() == {"0.15", "0.20", "0.50"}
    assert after.calibration["0.15"] == before.calibration["0.15"]
    assert after.thresholds == before.thresholds and after.choice is None
    assert other_files(checkpoint) == files  # no work folder is left either
    assert result.choice is None and result.to_json()["prompts"] == {"calibration": 60, "check": 60}
    # What was reported is what the checkpoint does.
    model = firstlm.from_pretrained(checkpoint, merge_adapter=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    held_out = load_held_out(
        str(data), "validation", tokenizer, max_length=120, calibration=60, check=60, seed=0
    )
    assert len(held_out.calibration) == len(held_out.check) == 60
    model.set_thresholds(after.thresholds_for(0.5))
    rate = skip_rate_of(keep_masks(model, [e.prompt_ids for e in held_out.check]))
    assert rate == pytest.approx(result.rows[1]["achieved"])
    json.dumps(result.to_json())


@pytest.mark.parametrize("options", [HF, NATIVE], ids=["hf", "native"])
def test_a_budget_is_measured_chosen_and_stored(
    checkpoint: Path, data: Path, options: dict
) -> None:
    result = firstlm.calibrate(
        checkpoint, data, [0.3, 0.6], min_quality=0.001, metric="cross_entropy", **options
    )
    config = read_router_config(checkpoint)
    choice = config.choice
    assert choice["met"] and choice["rate"] in (0.3, 0.6)
    assert config.thresholds == config.calibration[rate_key(choice["rate"])]
    assert choice["asked"] == {"min_quality": 0.001, "metric": "cross_entropy"}
    assert choice["path"]["engine"] == options["engine"]
    assert choice["machine"]["cpu"] and choice["versions"]["torch"] and choice["seed"] == 0
    assert [row["asked"] for row in choice["rows"]] == [0.0, 0.3, 0.6]
    full = choice["rows"][0]
    assert full["skip_rate_timed"] == 0 and full["tpot_reduction"] == 0
    for row in choice["rows"]:
        assert row["tpot_ms"]["n"] == 2 * 2 and row["tpot_ms"]["median"] > 0
    chosen = next(row for row in result.rows if row["asked"] == choice["rate"])
    assert chosen["skip_rate_timed"] > 0
    quality = chosen["quality"]
    assert quality["n"] == 11 and quality["ci95"][0] <= quality["relative"] <= quality["ci95"][1]
    # The default of the checkpoint is now what was chosen, and info says so.
    model = firstlm.from_pretrained(checkpoint)
    assert model.router_config.thresholds == config.thresholds
    assert info_of(str(checkpoint))["routers"]["chosen"]["rate"] == choice["rate"]
    model.set_thresholds([0.5] * LAYERS)
    assert model.router_config.choice is None


def test_both_paths_measure_the_same_quality(checkpoint: Path, data: Path) -> None:
    model = firstlm.from_pretrained(checkpoint, merge_adapter=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    found = load_held_out(
        str(data), "validation", tokenizer, max_length=120, calibration=4, check=9, seed=0
    )
    model.router_config.calibration = {"0.40": [0.6] * LAYERS}
    paths = [
        decode_paths.open_path(model, tokenizer, "hf"),
        decode_paths.open_path(model, tokenizer, "native", "float32"),
    ]
    plan = firstlm.SkipPlan.full(LAYERS)
    totals = []
    for arm in ({"skip_plan": plan}, {"budget": 0.4}):
        (hf, native) = (path.losses(found.check, arm) for path in paths)
        assert [tokens for _, tokens in hf] == [tokens for _, tokens in native]
        losses = [torch.tensor([loss for loss, _ in own]) for own in (hf, native)]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
        answers = [path.answers(found.check, arm, 6) for path in paths]
        assert answers[0] == answers[1]
        totals.append(losses[0].sum())
    assert not torch.isclose(*totals)
    assert model.router_config.thresholds == [0.5] * LAYERS  # left as they were


def test_a_request_that_nothing_meets_keeps_every_layer(checkpoint: Path, data: Path) -> None:
    before = read_router_config(checkpoint)
    options = {"effort": EFFORT, "engine": "hf", "tpot_ms": 1e-6, "min_quality": 1.0}
    result = firstlm.calibrate(checkpoint, data, [0.4], **options)
    config = read_router_config(checkpoint)
    assert config.choice["rate"] == 0.0 and config.choice["met"] is False
    assert "no calibrated rate is fast enough" in config.choice["reason"]
    text = calibration_text(result)
    assert "the request cannot be met" in text and "every layer is kept" in text
    model = firstlm.from_pretrained(checkpoint)
    inputs = AutoTokenizer.from_pretrained(checkpoint)("a package", return_tensors="pt")
    assert model.plan(inputs["input_ids"]).skip_plans[0] == firstlm.SkipPlan.full(LAYERS)
    assert model.plan(inputs["input_ids"], budget=0.4).skip_plans[0].skip_rate > 0
    # Calibrated again, it starts from thresholds that still tell layers apart.
    firstlm.calibrate(checkpoint, data, [0.4], effort=EFFORT, default_rate=0.4)
    again = read_router_config(checkpoint)
    assert again.thresholds == again.calibration["0.40"]
    torch.testing.assert_close(
        torch.tensor(again.thresholds), torch.tensor(config.calibration["0.40"]), atol=0.05, rtol=0
    )
    assert again.calibration["0.15"] == before.calibration["0.15"]
    assert again.choice["asked"] == {"rate": 0.4}


def calibration_text(result: firstlm.Calibration) -> str:
    from firstlm.calibration_text import as_text

    return as_text(result)


class Stop(Exception):
    """In the place of a kill."""


def test_an_interrupted_calibration_goes_on(
    checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after every kind of measurement, it never measures the same thing twice."""
    config, files = (checkpoint / "router_config.json").read_bytes(), other_files(checkpoint)
    done: list[object] = []
    left = [0]

    def counted(owner: object, name: str, label) -> None:
        original = getattr(owner, name)

        def run(*args, **kwargs):
            if left[0] == 0:
                raise Stop
            found = original(*args, **kwargs)
            left[0] -= 1
            done.append(label(*args))
            return found

        monkeypatch.setattr(owner, name, run)

    path = decode_paths.HfPath
    counted(calibration, "keep_masks", lambda model, *_: tuple(model.router_config.thresholds))
    counted(path, "time", lambda self, example, *_: ("time", *example.prompt_ids))
    counted(path, "losses", lambda self, some, arm, *_: (*some[0].prompt_ids, str(arm)))
    finds: list[float] = []
    original = calibration.calibrate_thresholds

    def find(model, prompts, rates, **options):
        finds.extend(rates)
        return original(model, prompts, rates, **options)

    monkeypatch.setattr(calibration, "calibrate_thresholds", find)
    ask = {"min_quality": 0.001, "metric": "cross_entropy"} | HF
    for _ in range(20):
        left[0] = 1
        try:
            result = firstlm.calibrate(checkpoint, data, [0.3, 0.6], **ask)
            break
        except Stop:
            assert (checkpoint / "router_config.json").read_bytes() == config
    assert len(done) == len(set(done)) == 2 + 2 + 2 * 2  # rates, prompts, arms × chunks of 8 of 11
    assert finds == [0.3, 0.6]
    assert result.choice["met"] and other_files(checkpoint) == files
    # The measurements of another question are of no use.
    left[0] = 3
    with pytest.raises(Stop):
        firstlm.calibrate(checkpoint, data, [0.3], **ask)
    left[0], count = 2, len(done)
    with pytest.raises(Stop):
        firstlm.calibrate(checkpoint, data, [0.3], **ask | {"seed": 1})
    assert len(done) == count + 2


def test_ctrl_c_says_how_to_go_on(
    checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "keep_masks", interrupt)
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt, match="run the same command again"):
        firstlm.calibrate(
            checkpoint, data, [0.3], effort=EFFORT, work_dir=tmp_path / "work", threads=1
        )
    assert (tmp_path / "work" / "measured.json").is_file()
    assert not (checkpoint / ".calibration").exists() and torch.get_num_threads() == threads


def test_what_cannot_work_is_refused_before_any_work(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    def refused(message: str, *args, **options) -> None:
        arguments = args or (checkpoint, data, [0.3])
        with pytest.raises(ValueError, match=message):
            firstlm.calibrate(*arguments, **options)

    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "a", "answer": "b"}\n' * 3)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "a" * 300, "answer": "b"}) + "\n")
    refused(r"0\.9 cannot be reached: 1 of 6 layers are protected", checkpoint, data, [0.9])
    refused("rates is empty", checkpoint, data, [])
    refused("no held-out data: 3 of 3 examples fit 128 tokens", checkpoint, few, [0.3])
    refused("no held-out data: 0 of 1", checkpoint, long, [0.3])
    refused("neither a file", checkpoint, "no-such-corpus", [0.3])
    refused("is no folder of a checkpoint", tmp_path, data, [0.3])
    refused("held-out data, got 'train'", split="train")
    refused("give one", tpot_ms=3, default_rate=0.3)
    refused("needs a rate above 0", checkpoint, data, [0.0], tpot_ms=3)
    refused("precision is of the engine", engine="hf", precision="int8")
    refused("dtype is of the hf path", engine="native", dtype="float32")
    refused("128 positions", tpot_ms=3, effort=Effort(new_tokens=126))
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        Effort(repeats=0)


def test_default_rates_stop_where_protected_layers_do(checkpoint: Path, data: Path) -> None:
    config = json.loads((checkpoint / "router_config.json").read_text())
    config["protected"] = [0, 1, 2, 3]
    (checkpoint / "router_config.json").write_text(json.dumps(config))
    result = firstlm.calibrate(checkpoint, data, effort=EFFORT)
    assert [row["asked"] for row in result.rows] == [0.1, 0.2, 0.3]


def test_configs_without_a_choice_are_those_of_before() -> None:
    config = RouterConfig()
    assert "choice" not in config.to_dict()
    chosen = RouterConfig(choice={"rate": 0.3})
    assert RouterConfig.from_dict(chosen.to_dict()) == chosen
    with pytest.raises(ValueError, match="did you mean 'choice'"):
        RouterConfig.from_dict({"choise": {}})
