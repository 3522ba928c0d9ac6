"""firstlm evaluate: all methods on the same examples, resumable, split over processes, checked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import firstlm
from evaluation_once import run
from firstlm import cli, decode_paths
from firstlm.adapter import attach_adapter
from firstlm.controls import write_plan_into_routers
from firstlm.evaluation import checks, store
from firstlm.evaluation import run as evaluation_run
from firstlm.evaluation.data import EvaluationData, fingerprint, load_evaluation_data
from firstlm.evaluation.files import read_evaluation
from firstlm.evaluation.methods import CONTROLS, vote_by_length
from firstlm.evaluation.records import Evaluation
from firstlm.evaluation.request import Effort
from firstlm.health import derangement
from firstlm.held_out import Example
from firstlm.length_plans import LengthPlans, length_bounds
from firstlm.router import RouterConfig
from firstlm.train_config import LoraPhaseConfig, TrainConfig
from firstlm.train_data import load_set
from tiny_gguf import draw_routers, tiny_model_folder

LAYERS = 6
RATE = 0.34  # two of six layers
WORDS = ["package", "library", "shell", "compiler", "for", "a", "small", "system", "with", "tools"]


def save_checkpoint(base: Path, folder: Path, seed: int, keep: list[bool] | None = None) -> Path:
    """A checkpoint with an adapter that matters: routers that disagree, or one plan for all."""
    model = firstlm.from_pretrained(base, router=RouterConfig(protected=[0]))
    if keep is None:
        draw_routers(model, seed)
    else:
        write_plan_into_routers(model, keep)
    attach_adapter(model, LoraPhaseConfig(rank=2), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder / "checkpoint")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "checkpoint")
    rate = 0.0 if keep is None else 1 - sum(keep) / LAYERS
    (folder / "checkpoint" / "health.json").write_text(json.dumps({"skip_rate_asked": rate}))
    phases = [{"name": "lora", "steps": 7}, {"name": "routers", "steps": 5}]
    (folder / "result.json").write_text(json.dumps({"phases": phases}))
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("evaluation")
    base = tiny_model_folder(root / "base", layers=LAYERS)
    return {
        "first": save_checkpoint(base, root / "first", seed=1),
        "second": save_checkpoint(base, root / "second", seed=2),
        "static": save_checkpoint(base, root / "static", 3, [True, True, False, True, False, True]),
        "lora_only": save_checkpoint(base, root / "lora", 4, [True] * LAYERS),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Two tasks, a file each."""
    root = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for task in ("one", "two"):
        lines = []
        for _ in range(40):
            count = int(torch.randint(1, 7, (1,), generator=generator))
            picks = torch.randint(len(WORDS), (count + 1,), generator=generator).tolist()
            prompt = " ".join(WORDS[i] for i in picks[1:])
            lines.append(json.dumps({"prompt": f"{task} {prompt}", "answer": WORDS[picks[0]]}))
        (root / f"{task}.jsonl").write_text("\n".join(lines))
    return [str(root / "one.jsonl"), str(root / "two.jsonl")]


@pytest.fixture(scope="module")
def whole(folders, data, tmp_path_factory) -> tuple[Evaluation, Path]:
    """An uninterrupted evaluation with everything, and its folder."""
    output = tmp_path_factory.mktemp("whole")
    trained = {name: str(folders[name]) for name in ("static", "lora_only")}
    found = run(
        [folders["first"], folders["second"]], data, output, trained=trained,
        timing_engine="native", precision="float32",
    )  # fmt: skip
    return found, output


def by_key(evaluation: Evaluation) -> dict[str, Any]:
    return {result.method.key: result for result in evaluation.methods}


def masks_of(result) -> torch.Tensor:
    return torch.tensor([[i in e.kept for i in range(LAYERS)] for e in result.examples])


def test_every_method_is_measured_on_the_same_examples(whole) -> None:
    evaluation, output = whole
    found = by_key(evaluation)
    rate = f"{RATE:.4g}"
    for name in CONTROLS:
        for weights in ("first", "base"):
            if name in ("base", "lora_only"):
                continue
            for seed in range(2 if weights == "first" else 1):
                assert f"{name}-{weights}-{rate}-seed{seed}" in found
    assert {"base-base-0-seed0", "lora_only-first-0-seed1", "lora_only-trained-0-seed0"} <= set(
        found
    )
    assert f"static-trained-{rate}-seed0" in found
    names = [(e.example, e.task, e.reference) for e in evaluation.methods[0].examples]
    assert len(names) == 22 and [task for _, task, _ in names] == ["one"] * 11 + ["two"] * 11
    for result in evaluation.methods:
        assert [(e.example, e.task, e.reference) for e in result.examples] == names
        assert all(e.loss > 0 for e in result.examples)
        if result.method.name == "early_exit_confidence":
            layers = [e.layers_run for e in result.examples]
            assert len(set(layers)) > 1 and all(1 <= count <= LAYERS for count in layers)
            assert result.notes and result.timing is None
            continue
        assert all(e.layers_run == len(e.kept) for e in result.examples)
    lines = (output / "examples.jsonl").read_text().splitlines()
    assert len(lines) == 22 * len(found)
    assert read_evaluation(output) == evaluation
    assert (output / "report.md").is_file() and (output / "report.html").is_file()


def examples_of(data: list[str], tokenizer: Any) -> list[Example]:
    """The examples that `run` tests."""
    return load_evaluation_data(
        data, tokenizer, examples=11, validation=16, max_length=100, seed=0
    ).test


def exact_plans(folder: Path, data: list[str]) -> torch.Tensor:
    """Those of `generate(budget=RATE, budget_mode="exact")` for every tested prompt."""
    model = firstlm.from_pretrained(folder, dtype=torch.float32)
    found = []
    for example in examples_of(data, AutoTokenizer.from_pretrained(folder)):
        ids = torch.tensor([example.prompt_ids])
        plan = model.plan(input_ids=ids, budget=RATE, budget_mode="exact").skip_plans[0]
        found.append(plan.to_mask())
    return torch.stack(found)


def test_plans_are_those_of_their_rules(whole, folders, data) -> None:
    evaluation, _ = whole
    found = by_key(evaluation)
    rate = f"{RATE:.4g}"
    for seed in (0, 1):
        first = masks_of(found[f"first-first-{rate}-seed{seed}"])
        assert len({tuple(row) for row in first.tolist()}) > 1
        assert 1 - first.double().mean() == pytest.approx(RATE, abs=0.1)
        shuffled = masks_of(found[f"shuffled-first-{rate}-seed{seed}"])
        assert torch.equal(shuffled, first[derangement(22, seed)])
        exact = masks_of(found[f"exact-first-{rate}-seed{seed}"])
        assert torch.equal(exact, exact_plans(folders[("first", "second")[seed]], data))
        within = masks_of(found[f"shuffled_in_task-first-{rate}-seed{seed}"])
        for part in (slice(0, 11), slice(11, 22)):
            assert sorted(within[part].tolist()) == sorted(first[part].tolist())
    exits = masks_of(found[f"early_exit-base-{rate}-seed0"])
    assert exits.tolist() == [[True] * 4 + [False] * 2] * 22
    trained = masks_of(found[f"static-trained-{rate}-seed0"])
    assert trained.tolist() == [[True, True, False, True, False, True]] * 22
    for name in ("greedy", "static", "most_kept", "random", "uniform", "block_influence"):
        for weights in ("first", "base"):
            mask = masks_of(found[f"{name}-{weights}-{rate}-seed0"])
            assert len({tuple(row) for row in mask.tolist()}) == 1
            assert mask[0].sum() == 4 and mask[0, 0]
    static, note = found[f"static-first-{rate}-seed0"], found[f"static-first-{rate}-seed0"].notes[0]
    better = found[f"{note.rpartition(' ')[2]}-first-{rate}-seed0"]
    assert [e.kept for e in static.examples] == [e.kept for e in better.examples]
    draws = [masks_of(found[f"random-base-{rate}-seed{seed}"])[0] for seed in range(4)]
    assert len({tuple(draw.tolist()) for draw in draws}) > 1
    assert not any("greedy" in key and "trained" in key for key in found)


def test_length_plans_know_the_length_alone() -> None:
    plans = torch.tensor([[True, True, False]] * 20 + [[True, False, True]] * 20)
    found = vote_by_length(plans, [5] * 20 + [50] * 20, [4, 60, 5])
    assert found.tolist() == [[True, True, False], [True, False, True], [True, True, False]]


def test_a_trained_length_control_runs_the_plans_in_its_folder(folders, data, tmp_path) -> None:
    folder = tmp_path / "by_length"
    shutil.copytree(folders["static"].parent, folder)
    test = examples_of(data, AutoTokenizer.from_pretrained(folders["static"]))
    lengths = torch.tensor([len(e.prompt_ids) for e in test])
    plans = LengthPlans(length_bounds(lengths, 2), [[0, 1, 2, 3], [0, 2, 4, 5]], LAYERS)
    plans.save(folder / "checkpoint")
    evaluation = run(
        folders["first"], data, tmp_path / "1", trained={"length": str(folder / "checkpoint")},
        controls=(), engine="native", timing_engine="native", precision="float32",
    )  # fmt: skip
    result = by_key(evaluation)[f"length-trained-{RATE:.4g}-seed0"]
    assert [e.example for e in result.examples] == [e.id for e in test]
    assert torch.equal(masks_of(result), plans.of(lengths))
    assert len({e.kept for e in result.examples}) == 2 and result.timing is not None


def test_a_rival_of_any_name_runs_what_its_own_routers_say(folders, data, tmp_path) -> None:
    evaluation = run(
        folders["first"], data, tmp_path, trained={"mine": {RATE: str(folders["second"])}},
        controls=(),
    )  # fmt: skip
    model = firstlm.from_pretrained(folders["second"], dtype=torch.float32)
    found = masks_of(by_key(evaluation)[f"mine-trained-{RATE:.4g}-seed0"])
    examples = examples_of(data, AutoTokenizer.from_pretrained(folders["second"]))
    for example, mask in zip(examples, found, strict=True):
        plan = model.plan(input_ids=torch.tensor([example.prompt_ids])).skip_plans[0]
        assert torch.equal(plan.to_mask(), mask)


def test_losses_and_answers_are_those_of_single_prompts(whole, folders, data, tmp_path) -> None:
    """Batches, and the engine, which runs prompts one by one, give the same."""
    evaluation, _ = whole
    names = ("shuffled", "early_exit", "early_exit_confidence")
    options = {"controls": names, "weights": ("first",)}
    alone = run(folders["first"], data, tmp_path / "1", effort={"batch_size": 1}, **options)
    native = run(
        folders["first"], data, tmp_path / "2", engine="native", precision="float32", **options
    )
    expected = by_key(evaluation)
    for other in (alone, native):
        for result in other.methods:
            own = expected[result.method.key].examples
            assert [e.kept for e in result.examples] == [e.kept for e in own]
            assert [e.answer for e in result.examples] == [e.answer for e in own]
            losses = [torch.tensor([e.loss for e in part]) for part in (result.examples, own)]
            torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


def test_latency_is_measured_beside_the_full_model(whole) -> None:
    evaluation, _ = whole
    for result in evaluation.methods:
        timing = result.timing
        if result.method.name == "early_exit_confidence":
            continue
        assert timing is not None and (timing.engine, timing.precision) == ("native", "float32")
        assert len(timing.tpot_ms) == len(timing.full_ttft_ms) == 2 * 2 and min(timing.tpot_ms) > 0
        kept = result.examples[0].kept
        if result.method.name in ("base", "lora_only"):
            assert timing.ideal_speedup == 1.0 and timing.kv_bytes == timing.full_kv_bytes
        elif result.method.name in ("uniform", "early_exit"):
            assert timing.ideal_speedup > 1.1
            shares = [a / b for a, b in zip(timing.kv_bytes, timing.full_kv_bytes, strict=True)]
            assert shares == [len(kept) / LAYERS] * 2
    assert evaluation.checks["tokens of every timed answer"] == "4"
    timed = [found for name, found in evaluation.checks.items() if "timed engine's" in name]
    assert timed and all(found.split(" of ")[0] + " prompts" == found.split(" of ")[1]
                         for found in timed)  # fmt: skip
    assert "12 steps" in evaluation.checks["optimizer steps"]


def test_a_file_that_was_trained_on_lends_what_training_held_out(folders, tmp_path) -> None:
    file, tokenizer = tmp_path / "mine.jsonl", AutoTokenizer.from_pretrained(folders["first"])
    rows = [{"id": str(i), "prompt": f"shell {i}", "answer": "tools"} for i in range(400)]
    file.write_text("\n".join(map(json.dumps, rows)))
    checkpoint = shutil.copytree(folders["first"].parent, tmp_path / "run") / "checkpoint"
    options = {"examples": 400, "validation": 400, "max_length": 64, "seed": 0}

    def loaded(train: Any) -> EvaluationData:
        TrainConfig.from_dict({"data": {"train": train}}).to_yaml(tmp_path / "run" / "config.yaml")
        return load_evaluation_data([file], tokenizer, checkpoints=[checkpoint], **options)

    trained_on = {str(row["id"]) for row in load_set(None, str(file), "train", None, 0, {})}
    found = loaded(str(file))
    ids = {example.id for example in found.validation + found.test}
    assert len(ids) == 400 - len(trained_on) and not ids & trained_on
    everything = loaded("debian-synopsis")
    assert {e.id for e in everything.validation + everything.test} == {row["id"] for row in rows}
    with pytest.raises(ValueError, match="was trained on it"):
        loaded([str(file), "debian-synopsis"])


def test_examples_that_results_could_not_tell_apart_are_refused_at_once(folders, tmp_path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["first"])
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        line = json.dumps({"prompt": "a shell", "answer": "tools"})
        (tmp_path / folder / "same.jsonl").write_text("\n".join([line] * 8))
    files = [tmp_path / folder / "same.jsonl" for folder in ("a", "b")]
    with pytest.raises(ValueError, match="'same' comes twice"):
        load_evaluation_data(
            files, tokenizer, examples=4, validation=4, max_length=64, seed=0
        )  # fmt: skip


def test_a_batch_is_of_one_task(folders, data) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["first"])
    options = {"examples": 11, "validation": 9, "max_length": 100, "seed": 0}
    found = load_evaluation_data(data, tokenizer, **options)
    assert found.tasks == ["one", "two"] and len(found.validation) == 18
    batches = found.batches(4)
    assert sorted(i for batch in batches for i in batch) == list(range(22))
    assert [len({found.test[i].task for i in batch}) for batch in batches] == [1] * 6
    assert not {e.id for e in found.validation} & {e.id for e in found.test}
    again = load_evaluation_data(data, tokenizer, **options)
    assert fingerprint(again.test) == fingerprint(found.test)


class Stop(Exception):
    """In the place of a kill."""


def test_killed_and_restarted_it_measures_nothing_twice(
    whole, folders, data, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[str, int]] = []
    left = [0]
    append = store.MethodStore.append

    def counted(self, batch, examples):
        if left[0] == 0:
            with open(self._own, "a") as file:  # a line that a kill has cut short
                file.write('{"batch": 0, "examples": [{"exa')
            raise Stop
        left[0] -= 1
        measured.append((self._method, batch))
        append(self, batch, examples)

    monkeypatch.setattr(store.MethodStore, "append", counted)
    names = ("shuffled", "static", "early_exit_confidence")
    options = {"controls": names, "weights": ("first",)}
    for budget in (0, 3, 2, 11):
        left[0] = budget
        with pytest.raises(Stop):
            run(folders["first"], data, tmp_path, **options)
    left[0] = 1000
    found = run(folders["first"], data, tmp_path, **options)
    assert len(measured) == len(set(measured)) == 4 * 8
    expected = by_key(whole[0])
    for result in found.methods:
        assert result.examples == expected[result.method.key].examples
    # All is there: no model is loaded again. What changes is measured anew.
    monkeypatch.setattr(evaluation_run.loading, "from_pretrained", None)
    assert run(folders["first"], data, tmp_path, **options) == found
    monkeypatch.undo()
    changed = run(folders["first"], data, tmp_path, effort={"max_new_tokens": 2}, **options)
    assert [e.loss for e in changed.methods[0].examples] == [
        e.loss for e in found.methods[0].examples
    ]
    assert changed.methods[0].examples != found.methods[0].examples


def test_two_processes_measure_what_one_does(whole, folders, data, tmp_path) -> None:
    script = Path(__file__).parent / "evaluation_once.py"
    sources = tmp_path / "data"
    sources.mkdir()
    file = shutil.copy(data[0], sources / "one.jsonl")
    python = os.pathsep.join([str(Path(firstlm.__file__).parents[1]), str(script.parent)])
    environment = os.environ | {"PYTHONPATH": python, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    outputs = [tmp_path / "two", tmp_path / "one"]
    for command, output in zip((torchrun, [sys.executable]), outputs, strict=True):
        command = [*command, str(script), str(folders["first"]), str(file), str(output)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    ranks = {path.name.split(".")[-2] for path in (outputs[0] / "examples").iterdir()}
    assert ranks == {"rank0", "rank1"}
    two, one = (read_evaluation(output) for output in outputs)
    assert two == one


def test_a_plan_that_is_not_followed_raises(folders, data, tmp_path, monkeypatch) -> None:
    options = {"controls": ("uniform",), "weights": ("first",)}
    model_class = type(firstlm.from_pretrained(folders["first"]))
    generate = model_class.generate

    def other_plan(self, *args, **kwargs):
        keep = kwargs["skip_plan"][0].to_mask()
        keep[int((~keep).nonzero()[0])] = True
        kwargs["skip_plan"] = [firstlm.SkipPlan.from_mask(keep), *kwargs["skip_plan"][1:]]
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(model_class, "generate", other_plan)
    with pytest.raises(decode_paths.PlanNotFollowed, match="rows in"):
        run(folders["first"], data, tmp_path / "1", **options)
    monkeypatch.undo()
    monkeypatch.setattr(decode_paths.HfPath, "_mask", lambda self, plan, rows: None)
    with pytest.raises(checks.CheckFailed, match="do not reach the model"):
        run(folders["first"], data, tmp_path / "2", **options)


def test_routers_whose_answers_run_other_layers_raise(folders, data, tmp_path, monkeypatch) -> None:
    losses = decode_paths.HfPath.losses

    def unskipped(self, examples, arm):
        full = {"skip_plan": firstlm.SkipPlan.full(LAYERS)}
        return losses(self, examples, full if "budget" in arm else arm)

    monkeypatch.setattr(decode_paths.HfPath, "losses", unskipped)
    with pytest.raises(checks.CheckFailed, match="under the plan they choose"):
        run(folders["first"], data, tmp_path, controls=(), weights=("first",))


def test_an_engine_that_runs_as_many_but_other_layers_raises(
    folders, data, tmp_path, monkeypatch
) -> None:
    answers = decode_paths.NativePath.answers

    def other_plan(self, examples, arm, max_new_tokens):
        keep = arm["skip_plan"].to_mask()
        dropped, kept = int((~keep).nonzero()[0]), int(keep.nonzero()[-1])
        keep[dropped], keep[kept] = True, False
        arm = {"skip_plan": firstlm.SkipPlan.from_mask(keep)}
        return answers(self, examples, arm, max_new_tokens)

    monkeypatch.setattr(decode_paths.NativePath, "answers", other_plan)
    with pytest.raises(decode_paths.PlanNotFollowed, match="the layers ran"):
        run(folders["first"], data, tmp_path, engine="native", precision="float32",
            controls=("uniform",), weights=("first",))  # fmt: skip


def test_a_control_of_other_steps_is_refused(folders, data, tmp_path) -> None:
    copy = shutil.copytree(folders["static"].parent, tmp_path / "static")
    (copy / "result.json").write_text(json.dumps({"phases": [{"name": "lora", "steps": 11}]}))
    with pytest.raises(checks.CheckFailed, match="11 optimizer steps and FiRST for 12"):
        run(folders["first"], data, tmp_path / "out", trained={"static": copy / "checkpoint"})
    (copy / "result.json").unlink()
    text = checks.check_steps(str(folders["first"]), {"static": str(copy / "checkpoint")})
    assert text == "12 steps; unknown of static"
    assert checks.check_steps(str(copy / "checkpoint"), {}).startswith("unknown")


def test_every_run_of_a_control_is_checked_and_on_the_same_examples(
    folders, data, tmp_path
) -> None:
    runs = {name: tmp_path / name for name in ("first", "static")}
    for name, run_folder in runs.items():
        shutil.copytree(folders[name].parent, run_folder)
        TrainConfig().to_yaml(run_folder / "config.yaml")
    own, rival = (str(run_folder / "checkpoint") for run_folder in runs.values())
    assert checks.check_steps(own, {"static": rival}) == "12 steps"
    TrainConfig.from_dict({"lora": {"lr": 1e-4}}).to_yaml(runs["static"] / "config.yaml")
    text = checks.check_steps(own, {"static": rival})
    assert text == "12 steps; static: lora.lr 0.0001 instead of 0.002"
    phases = {"phases": [{"name": "warmup", "steps": 5}, {"name": "lora", "steps": 7}]}
    (runs["first"] / "result.json").write_text(json.dumps(phases))
    assert checks.check_steps(own, {"static": rival}).endswith("; static: no warm-up")
    assert checks.run_settings([rival, own, None]) == {rival: "lora.lr=0.0001", own: ""}
    TrainConfig.from_dict({"batch_size": 2}).to_yaml(runs["static"] / "config.yaml")
    with pytest.raises(checks.CheckFailed, match="batch_size 2 instead of 8"):
        run(own, data, tmp_path / "out", trained={"static": [folders["static"], rival]})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"controls": ["unifrom"]}, "unknown control 'unifrom'"),
        ({"weights": ["mine"]}, "first or base"),
        ({"weights": []}, "first or base"),
        ({"skip_rates": [0.95]}, "cannot be reached"),
        ({"skip_rates": None}, "does not say for which skip rate"),
        ({"skip_rates": [0.0, 0.3]}, "holds 0"),
        ({"engine": "fast"}, "engine must be"),
        ({"precision": "int8"}, "none is used"),
        ({"trained": {"static": "nowhere"}}, "nowhere is no folder of a checkpoint"),
        ({"trained": {"my-rival": "nowhere"}}, "give a rival a name"),
        ({"trained": {"shuffled_mine": "nowhere"}}, "give a rival a name"),
        ({"skip_rates": [0.7], "trained": {"static": "static"}}, "is of a skip rate of"),
        ({"data": []}, "no task"),
        ({"effort": {"exampels": 3}}, "setting 'exampels'; did you mean 'examples'"),
        ({"effort": {"a": 1, "b": 2}}, "'a'; known here: examples, .*, draws\n.*'b'"),
        ({"effort": {"examples": "many"}}, "examples='many': expected a whole"),
        ({"effort": {"examples": 1}}, "examples must be at least 2, got 1"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    folders, data, tmp_path, monkeypatch, changes, message
) -> None:
    monkeypatch.setattr(evaluation_run, "load_evaluation_data", None)
    if changes.get("trained") == {"static": "static"}:
        changes = changes | {"trained": {"static": folders["static"]}}
    sources = changes.pop("data") if "data" in changes else data
    with pytest.raises(ValueError, match=message):
        run(folders["first"], sources, tmp_path, **changes)


def copies_of_runs(folders, root: Path, seeds: dict[str, int], rate: float = RATE) -> list[Path]:
    """Checkpoints named as in `seeds`, with a run's config and the rate it was trained for."""
    for name, seed in seeds.items():
        shutil.copytree(folders["first"].parent, root / name)
        TrainConfig(seed=seed).to_yaml(root / name / "config.yaml")
        health = root / name / "checkpoint" / "health.json"
        health.write_text(json.dumps({"skip_rate_asked": rate}))
    return [root / name / "checkpoint" for name in seeds]


def test_checkpoints_that_are_no_seeds_of_one_training_are_refused(
    folders, data, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(evaluation_run, "load_evaluation_data", None)
    first = copies_of_runs(folders, tmp_path, {"first-0": 0, "first-1": 1})
    rivals = copies_of_runs(folders, tmp_path, {"rival-1": 1, "rival-0": 0})
    (other,) = copies_of_runs(folders, tmp_path, {"other": 2}, rate=0.5)

    def refused(message: str, checkpoints: Any, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            run(checkpoints, data, tmp_path / "out", **changes)

    refused("every training seed has its own folder", [first[0], first[0]])
    refused(r"several skip rates \(.*0.34, .*0.5\)", [first[0], other], skip_rates=None)
    refused("is of no skip rate: 0.34 have", {RATE: first[0], None: other}, skip_rates=None)
    refused("rival-1.* seed 1, and stands where FiRST has seed 0", first, trained={"mine": rivals})
    refused("is of a skip rate of 0.5", first, trained={"mine": other})
    refused("is of a skip rate of 0.44", first, trained={"mine": {0.44: rivals[0]}})
    with pytest.raises(TypeError):  # the data that is not there: nothing was refused before it
        run(first, data, tmp_path / "out", trained={"mine": rivals[::-1], "random": rivals})


def test_an_effort_is_also_a_mapping() -> None:
    assert Effort.of(None) == Effort.of({}) == Effort()
    assert Effort.of({"examples": 48, "max_new_tokens": 5}) == Effort(48, max_new_tokens=5)
    assert Effort.of(Effort(48)) == Effort(48)


def test_the_command(folders, data, tmp_path, monkeypatch, capsys) -> None:
    def command(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["firstlm", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    own = ["-c", folders["first"], "--data", data[0], "--skip-rates", RATE, "-o", tmp_path / "out"]
    effort = ["--examples", 6, "--validation", 8, "--timing-prompts", 1, "--repeats", 1,
              "--new-tokens", 3, "-n", 4, "--max-length", 100, "--threads", 1]  # fmt: skip
    rivals = ["--trained", f"static={folders['static']}", "--controls", "lora_only,uniform"]
    assert command(*own, *effort, *rivals) == 0
    shown = capsys.readouterr().out
    assert shown.strip() == (tmp_path / "out" / "report.md").read_text().strip()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["method"] for row in results["rows"]} == {"first", "lora_only", "uniform", "static"}
    assert results["settings"]["examples"] == 6 and results["machine"] and results["versions"]
    splits = tmp_path / "splits"
    splits.mkdir()
    for split in ("validation", "test"):
        shutil.copy(data[0], splits / f"{split}.jsonl")
    oracle = ["--oracle", "--candidates", 4, "--plan-examples", 4, "--max-length", 100]
    own[3] = splits
    assert command(*own, "--examples", 6, "--validation", 6, *oracle) == 0
    folder = tmp_path / "out" / f"oracle-{RATE:g}"
    assert capsys.readouterr().out.strip() == (folder / "oracle.md").read_text().strip()
    two = f"{folders['first']},{folders['second']}"
    assert command("-c", two, *own[2:], *oracle) == 1
    assert "one checkpoint a skip rate, not 2" in capsys.readouterr().err
    assert command(*own, "--oracle", "--threads", 1, "--controls", "base") == 2
    assert "has no use for --controls, --threads" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command(*own, *oracle) == 1
    monkeypatch.delenv("WORLD_SIZE")
    assert "measures in one process" in capsys.readouterr().err
    assert command(*own, "--draws", 3, "--controls", "uniform") == 2
    assert command(*own, "--timing", "none", "--repeats", 3) == 2
    error = capsys.readouterr().err
    assert "--draws are of the control random" in error and "--repeats and" in error
    assert command(*own, "--candidates", 4) == 2
    assert "--oracle tries" in capsys.readouterr().err
    assert command(*own, "--controls", "nothing") == 1
    assert "unknown control 'nothing'" in capsys.readouterr().err
    assert command(*own, "--trained", "static") == 2
