"""firstlm.train: phases in order, alone, continued, interrupted and taken up again; controls."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets as hf_datasets
import pytest
import torch

import firstlm
from firstlm.atomic import staged_folder, write_text
from firstlm.checkpoint import read_router_config, router_state_dict
from firstlm.data import load_corpus
from firstlm.phases import router_phase
from firstlm.run_folder import RunFolder
from firstlm.train_config import DataConfig
from firstlm.train_data import hashes_of, load_train_data
from firstlm.training import resolve_auto
from tiny_models import routed_model, tiny_base_path
from tiny_training import examples
from train_once import SMALL, datasets, log_of, run, settings, weights


@pytest.fixture(scope="module")
def base() -> str:
    return str(tiny_base_path("llama"))


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> firstlm.TrainResult:
    """An uninterrupted run of all phases."""
    return run(base, str(tmp_path_factory.mktemp("runs") / "whole"))


# ---- the phases ----


def test_all_phases_run_and_leave_a_checkpoint_that_loads_and_skips(whole, base):
    assert [p.name for p in whole.phases] == ["warmup", "routers", "lora"]
    model = firstlm.from_pretrained(whole.checkpoint, dtype=torch.float32)
    rows = datasets()["test_dataset"]
    plans = [
        model.plan(input_ids=torch.tensor([r["input_ids"][: sum(r["prompt_mask"])]])).skip_plans[0]
        for r in rows
    ]
    rate = sum(p.skip_rate for p in plans) / len(plans)
    assert rate == pytest.approx(whole.health.skip_rate, abs=1e-6)
    ids = torch.tensor([rows[0]["input_ids"][:5]])
    assert model.generate(ids, max_new_tokens=3).shape == (1, 8)


def test_the_asked_rate_holds_after_each_phase_on_held_out_prompts(whole):
    for phase in whole.phases[1:]:
        assert phase.skip_rate_asked == 0.34
        assert phase.skip_rate == pytest.approx(0.34, abs=0.02)
    assert whole.health.skip_rate_asked == 0.34


def test_calibrated_rates_are_stored(whole):
    config = read_router_config(whole.checkpoint)
    assert set(config.calibration) == {"0.34", "0.50"}
    assert config.calibration["0.34"] == pytest.approx(config.thresholds)


def test_the_log_has_a_line_per_step_with_asked_and_achieved_rate(whole):
    lines = [r for r in log_of(whole.output_dir) if "loss" in r]
    assert [r["total_step"] for r in lines] == list(range(1, 81))
    assert [r["step"] for r in lines if r["phase"] == "lora"] == list(range(1, 41))
    for record in lines:
        assert 0 <= record["skip_rate"] < 1 and 0 <= record["skip_rate_asked"] <= 0.34
        assert record["cross_entropy"] > 0


def test_result_and_config_are_written_and_a_second_run_reads_them(whole, base):
    stored = json.loads((whole.output_dir / "result.json").read_text())
    assert stored == json.loads(json.dumps(whole.to_json()))
    before = (whole.output_dir / "train_log.jsonl").stat().st_mtime_ns
    started = time.perf_counter()
    again = run(base, str(whole.output_dir))
    assert again.to_json() == whole.to_json()
    assert (whole.output_dir / "train_log.jsonl").stat().st_mtime_ns == before
    assert time.perf_counter() - started < 5
    assert (whole.output_dir / "health.md").read_text().startswith("| held-out prompts")


def test_no_base_weights_and_no_training_state_are_left_over(whole):
    files = [p for p in whole.output_dir.rglob("*") if p.is_file()]
    assert not [p for p in files if p.name.startswith(("model", "pytorch_model", "optimizer"))]
    assert not [p for p in whole.output_dir.rglob("*") if "partial" in p.name]


@pytest.mark.parametrize("phase", ["warmup", "routers", "lora"])
def test_each_phase_alone_is_possible(phase, base, tmp_path):
    result = run(base, str(tmp_path / "run"), phases=[phase], **SMALL)
    assert [p.name for p in result.phases] == [phase]
    assert (result.checkpoint / "adapter").is_dir() == (phase != "routers")
    firstlm.from_pretrained(result.checkpoint)


def test_lora_without_phase_1_starts_routers_as_the_settings_say(base, tmp_path):
    """Routers that all say the same would drop the layers of lowest index."""
    result = run(base, str(tmp_path / "run"), phases=["lora"], **SMALL)
    importance = json.loads((result.output_dir / "importance.json").read_text())["routers"]
    cheapest = sorted(range(1, 6), key=importance.__getitem__)[:2]
    kept = {layer.layer: layer.kept for layer in result.health.layers}
    assert [layer for layer in range(6) if kept[layer] == 0.0] == sorted(cheapest)


def test_the_stored_rate_is_measured_also_where_nothing_steers_it(whole, base, tmp_path):
    changes = SMALL | {"phases": ["warmup"], "checkpoint": str(whole.checkpoint)}
    changes["lora"] = {"rank": 4}
    result = run(base, str(tmp_path / "run"), **changes)
    assert result.phases[0].skip_rate == pytest.approx(result.health.skip_rate, abs=1e-6)
    assert result.phases[0].skip_rate > 0.1


@pytest.mark.parametrize("way", ["checkpoint", "base"])
@pytest.mark.parametrize("start", ["routers", "lora"])
def test_training_continues_from_a_checkpoint_of_either_phase(way, start, whole, base, tmp_path):
    folder = whole.output_dir / start / "final"
    changes = {"phases": ["lora"], **SMALL, "lora": {"steps": 1, "lr": 1e-9, "rank": 4}}
    if way == "checkpoint":
        changes["checkpoint"] = str(folder)
    result = run(base if way == "checkpoint" else str(folder), str(tmp_path / "run"), **changes)
    stored, new = weights(folder), weights(result.checkpoint)
    assert new["router.safetensors"] == stored["router.safetensors"]
    a = firstlm.from_pretrained(folder, dtype=torch.float32)
    b = firstlm.from_pretrained(result.checkpoint, dtype=torch.float32)
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0, msg=name)


def test_router_settings_that_a_checkpoint_has_decided_are_named(whole, base, tmp_path):
    changes = {"phases": ["lora"], **SMALL, "checkpoint": str(whole.checkpoint)}
    changes["router"] = {"protected": [-6, -1], "pooling": "last", "keep_bias": 3.0}
    with pytest.warns(UserWarning, match="settings win") as caught:
        run(base, str(tmp_path / "run"), **changes)
    text = next(str(w.message) for w in caught if "settings win" in str(w.message))
    assert "router.pooling='last' (theirs: 'mean')" in text
    assert "router.protected=[0, 5] (theirs: [0])" in text and "router.keep_bias=3.0" in text
    assert "prefill" not in text


def test_layers_that_hold_their_share_in_phase_1_hold_the_asked_rate_together():
    config = firstlm.TrainConfig.from_dict({"skip_rate": 0.3, "routers": {"hold": "per_layer"}})
    model = routed_model("llama", router=firstlm.RouterConfig(protected=[0, -1]), draw=False)
    share = router_phase(config, 10, model).follower.keep_share
    assert sum(1 - share[layer] for layer in (1, 2, 3, 4)) / 6 == pytest.approx(0.3)


def test_routers_start_from_importance_and_move(whole):
    model = firstlm.from_pretrained(whole.checkpoint, dtype=torch.float32)
    assert whole.health.distance > 0.01
    moved = {layer.layer: layer.distance for layer in whole.health.layers}
    assert moved[0] == 0.0 and all(moved[i] > 0 for i in range(1, 6))
    importance = json.loads((whole.output_dir / "importance.json").read_text())
    assert set(importance) == {"warmup", "routers"} and len(importance["routers"]) == 6
    assert len(router_state_dict(model)) == 12


def test_routers_can_start_from_searched_plans(base, tmp_path):
    changes = SMALL | {"router": {"protected": [0], "keep_bias": "plans"}}
    changes |= {"plan_search_examples": 4, "plan_search_trials": 3, "phases": ["routers"]}
    result = run(base, str(tmp_path / "run"), **changes)
    plans = json.loads((result.output_dir / "task_plans.json").read_text())
    assert [len(kept) for kept in plans["tasks"].values()] == [4]


def test_epochs_count_passes_over_the_examples(base, tmp_path):
    changes = SMALL | {"lora": {"epochs": 1.5, "rank": 4}, "phases": ["lora"]}
    assert run(base, str(tmp_path / "run"), **changes).phases[0].steps == 19  # 75 of batches of 4


# ---- interruptions ----


def start(base: str, folder: Path) -> subprocess.Popen:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    script = Path(__file__).parent / "train_once.py"
    return subprocess.Popen(
        [sys.executable, str(script), base, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(folder: Path, phase: str, step: int, process: subprocess.Popen) -> None:
    """Returns once the run has logged that step."""
    while process.poll() is None:
        log = folder / "train_log.jsonl"
        if log.is_file():
            for line in log.read_text().splitlines():
                if line.endswith("}"):
                    record = json.loads(line)
                    if record["phase"] == phase and record["step"] >= step:
                        return
        time.sleep(0.01)
    raise AssertionError(f"the run ended before it was interrupted: {process.communicate()}")


def test_ctrl_c_sigterm_and_sigkill_then_the_same_command_gives_the_same_weights(
    whole, base, tmp_path
):
    folder = tmp_path / "cut"
    for number, phase, step in (
        (signal.SIGTERM, "routers", 10),
        (signal.SIGINT, "lora", 8),
        (signal.SIGKILL, "lora", 24),
    ):
        process = start(base, folder)
        wait_for(folder, phase, step, process)
        process.send_signal(number)
        output, errors = process.communicate()
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            assert process.returncode == 128 + number, errors
            assert f"of phase '{phase}'" in output and "same command again" in output
    (folder / "lora" / ".checkpoint-35.partial").mkdir()  # killed while it was writing
    result = run(base, str(folder))
    assert weights(result.checkpoint) == weights(whole.checkpoint)
    assert read_router_config(result.checkpoint) == read_router_config(whole.checkpoint)
    ours, theirs = log_of(folder), log_of(whole.output_dir)
    assert [(r["phase"], r["step"]) for r in ours] == [(r["phase"], r["step"]) for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {
            k: v for k, v in b.items() if k != "seconds"
        }


def test_a_folder_with_a_run_of_other_settings_is_left_alone(whole, base):
    with pytest.raises(ValueError, match=r"other settings \(skip_rate\).*overwrite=true"):
        run(base, str(whole.output_dir), skip_rate=0.5)
    with pytest.raises(ValueError, match="holds a run already"):
        run(base, str(whole.output_dir), resume=False)


def test_a_start_that_failed_leaves_nothing_that_locks_the_folder(base, tmp_path):
    with pytest.raises(ValueError, match="protected"):
        run(base, str(tmp_path / "run"), **SMALL | {"router": {"protected": [77]}})
    assert not (tmp_path / "run").exists()
    firstlm.TrainConfig(seed=9).to_yaml(tmp_path / "run" / "config.yaml")  # killed before a phase
    result = run(base, str(tmp_path / "run"), phases=["warmup"], resume=False, **SMALL)
    assert [p.name for p in result.phases] == ["warmup"]


@pytest.mark.parametrize("changes", [{}, {"resume": False, "overwrite": True}])
def test_a_config_that_the_user_wrote_is_not_replaced(changes, base, tmp_path):
    text = f"# what came of rank 8, see notes\nbase: {base}\n"
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml was not written by a run.*rename"):
        run(base, str(tmp_path), **SMALL, **changes)
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == text


def test_an_output_dir_that_cannot_hold_a_run_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        with pytest.raises(ValueError, match="file"):
            firstlm.train(base="no/such", output_dir=str(tmp_path / place))


def test_a_run_is_not_taken_for_one_on_other_data(base, tmp_path):
    folder = str(tmp_path / "run")
    run(base, folder, phases=["warmup"], **SMALL)
    changes = settings(base, folder) | {"phases": ["warmup"], **SMALL}
    with pytest.raises(ValueError, match=r"other data \(train\).*overwrite=true"):
        firstlm.train(changes, **datasets() | {"train_dataset": examples(50, seed=9)})


def test_held_out_splits_of_the_training_data_are_watched_too(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"prompt": "say", "answer": split}))
    of = DataConfig(train=str(tmp_path))
    before = hashes_of(of, {})
    (tmp_path / "validation.jsonl").write_text(json.dumps({"prompt": "say", "answer": "else"}))
    after = hashes_of(of, {})
    assert {name for name in after if after[name] != before[name]} == {"validation"}
    several = DataConfig(train=[str(tmp_path), "debian-synopsis"])
    assert hashes_of(several, {}) == after
    assert not hashes_of(DataConfig(train="debian-synopsis"), {})


def test_a_finished_run_is_found_where_it_was_moved_to(base, tmp_path):
    run(base, str(tmp_path / "run"), phases=["warmup"], **SMALL)
    (tmp_path / "run").rename(tmp_path / "moved")
    result = run(base, str(tmp_path / "moved"), phases=["warmup"], **SMALL)
    assert result.checkpoint.is_dir() and result.log.is_file()
    assert all(Path(phase.checkpoint).is_dir() for phase in result.phases)


def test_the_settings_of_a_finished_run_stay_those_that_it_ran_with(base, tmp_path):
    run(base, str(tmp_path), phases=["warmup"], **SMALL)
    before = (tmp_path / "config.yaml").read_bytes()
    changes = SMALL | {"data": SMALL["data"] | {"test_prompts": 5}, "save_every": 99}
    result = run(base, str(tmp_path), phases=["warmup"], **changes)
    assert result.health.prompts == 16 and (tmp_path / "config.yaml").read_bytes() == before


def test_only_the_main_process_judges_what_the_folder_holds(tmp_path):
    """The others may look when it has just written the settings of a fresh run."""
    config = firstlm.TrainConfig(resume=False)
    main = RunFolder(tmp_path, writes=True)
    assert main.open(config, {}) is None
    main.begin(config, {})
    (tmp_path / "train_log.jsonl").write_text("")
    RunFolder(tmp_path, writes=False).open(config, {})
    with pytest.raises(ValueError, match="holds a run already"):
        main.open(config, {})


def test_overwrite_starts_anew(base, tmp_path):
    changes = {"phases": ["warmup"], **SMALL}
    run(base, str(tmp_path / "run"), **changes)
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    result = run(base, str(tmp_path / "run"), **changes, seed=5, resume=False, overwrite=True)
    assert [p.name for p in result.phases] == ["warmup"]
    assert (tmp_path / "run" / "thesis.txt").is_file()
    assert firstlm.TrainConfig.from_yaml(tmp_path / "run" / "config.yaml").seed == 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"base": "./no-such-model"},
        {"data": {"train": "no-such.jsonl"}},
        {"router": {"protected": [77]}},
        {"warmup_from": "{run}"},
        {"checkpoint": "{run}/checkpoint"},
        {"control": "static", "control_plan": "most_kept:{run}"},
    ],
)
def test_overwrite_deletes_nothing_for_a_run_that_cannot_start(wrong, whole, base):
    folder = whole.output_dir
    files = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    wrong = {k: v.format(run=folder) if isinstance(v, str) else v for k, v in wrong.items()}
    changes = settings(base, str(folder)) | {"resume": False, "overwrite": True} | wrong
    sets = {} if "data" in wrong else datasets()
    with pytest.raises((ValueError, OSError)):
        firstlm.train(changes, **sets)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == files


def test_wrong_settings_stop_before_anything_is_written(base, tmp_path):
    with pytest.raises(ValueError, match=r"lora\.lr=-1"):
        run(base, str(tmp_path / "run"), lora={"lr": -1.0})
    with pytest.raises(ValueError, match=r"did you mean 'lora\.steps'"):
        firstlm.train(base=base, output_dir=str(tmp_path / "run"), lora={"step": 3})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"skip_rate": 0.7, "router": {"protected": [0, 1, 2]}}, "lower skip_rate"),
        ({"control": "static", "control_plan": [0, 6]}, "from 0 to 5"),
        ({"control": "static", "control_plan": [1, 2, 3, 4]}, "protected layers 0"),
        ({"control": "static", "control_plan": "most_kept:nowhere"}, "finished run"),
        ({"control": "length", "plan_search_common": "nowhere"}, "train that control first"),
        ({"router": {"keep_bias": "plans", "head": "mlp"}}, "router.head=linear"),
    ],
)
def test_settings_that_do_not_fit_the_model_stop_before_training(
    changes, complaint, base, tmp_path
):
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        run(base, str(tmp_path / "run"), **(SMALL | changes))
    assert not (tmp_path / "run" / "train_log.jsonl").exists()
    assert not (tmp_path / "run" / "importance.json").exists()


# ---- data ----


def test_a_jsonl_file_without_splits_lends_examples_to_each_set(tmp_path, base):
    rows = [{"prompt": f"say {i}", "answer": str(i), "id": f"n{i}"} for i in range(200)]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    tokens = _CountingTokenizer()
    sets = load_train_data(DataConfig(train=str(file)), tokens, None, {}, 0, progress=False)
    named = [set(getattr(sets, name).ids) for name in ("train", "validation", "test")]
    assert len(named[0] | named[1] | named[2]) == 200 == sum(map(len, named))
    assert min(map(len, named)) >= 3
    again = load_train_data(DataConfig(train=str(file)), tokens, None, {}, 1, progress=False)
    assert again.test.ids == sets.test.ids


def test_a_datasets_object_is_taken_as_it_is_and_long_examples_are_counted():
    table = hf_datasets.Dataset.from_list(
        [{"prompt": "word " * n, "answer": "a b", "id": str(n)} for n in (2, 3, 300)]
    )
    given = {"train": table, "validation": table, "test": table}
    sets = load_train_data(DataConfig(max_length=50), _CountingTokenizer(), None, given, 0, False)
    assert len(sets.train) == 2 and sets.too_long == {"train": 1, "validation": 1, "test": 1}
    assert sets.prompts(sets.train)[0] == sets.train[0]["input_ids"][:2]


def test_columns_of_other_names_are_settings(tmp_path):
    file = tmp_path / "mine.jsonl"
    rows = [{"question": f"say {i}", "reply": "b", "id": f"n{i}"} for i in range(200)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = DataConfig(train=str(file), prompt_column="question", answer_column="reply")
    sets = load_train_data(config, _CountingTokenizer(), None, {}, 0, progress=False)
    assert len(sets.train) + len(sets.validation) + len(sets.test) == 200


def test_a_file_too_small_to_lend_examples_says_what_to_do(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n')
    with pytest.raises(ValueError, match=r"too small to lend.*data\.validation"):
        load_train_data(
            DataConfig(train=str(file)), _CountingTokenizer(), None, {}, 0, progress=False
        )


def test_files_in_a_mixture_need_named_held_out_sets(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n')
    config = DataConfig(train=["debian-synopsis", str(file)])
    with pytest.raises(ValueError, match=r"name data\.validation"):
        load_train_data(config, _CountingTokenizer(), None, {}, 0, progress=False)


def test_shipped_corpora_give_their_own_splits():
    config = DataConfig(train="debian-synopsis", max_examples=20, validation_prompts=5)
    sets = load_train_data(config, _CountingTokenizer(), None, {}, 0, progress=False)
    assert len(sets.train) == 20 and len(sets.validation) == 5
    assert sets.test.ids[0] == load_corpus("debian-synopsis", "test")[0]["id"]


class _CountingTokenizer:
    """One token a word: what load_train_data needs of a tokenizer."""

    chat_template = None
    eos_token_id = pad_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1 + len(word) for word in text.split()]}


# ---- files ----


def test_files_and_folders_are_whole_or_absent(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "one")
    write_text(tmp_path / "a" / "b.txt", "two")
    assert (tmp_path / "a" / "b.txt").read_text() == "two"
    with staged_folder(tmp_path / "f") as staging:
        (staging / "x").write_text("old")
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "f") as staging:
        (staging / "x").write_text("half")
        raise RuntimeError
    assert (tmp_path / "f" / "x").read_text() == "old"
    with staged_folder(tmp_path / "f") as staging:
        (staging / "y").write_text("new")
    assert [p.name for p in (tmp_path / "f").iterdir()] == ["y"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "f"]


def test_what_a_killed_publisher_left_goes_with_the_next_one(tmp_path):
    for name in (".f.old.1", ".f.old.2", ".g.old.3"):
        (tmp_path / name / name[1]).mkdir(parents=True)
    with staged_folder(tmp_path / "f") as staging:
        (staging / "x").write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".g.old.3", "f"]
    (tmp_path / ".f.old.4").mkdir()
    with staged_folder(tmp_path / "f") as staging:
        (staging / "x").write_text("newer")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".g.old.3", "f"]


@pytest.mark.parametrize(("fast", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_auto_takes_bfloat16_where_it_is_fast_and_asking_for_it_elsewhere_warns(
    fast, chosen, base, tmp_path, monkeypatch, recwarn
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    config = firstlm.TrainConfig.from_dict(settings(base, str(tmp_path)))
    assert resolve_auto(replace(config, dtype="auto")).dtype == chosen
    assert not recwarn
    assert resolve_auto(replace(config, dtype="bfloat16")).dtype == "bfloat16"
    assert len(recwarn) == (not fast)


def test_settings_of_the_tests_are_valid(base):
    firstlm.TrainConfig.from_dict(settings(base, "x")).validate()
