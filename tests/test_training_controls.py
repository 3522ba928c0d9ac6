"""The controls of firstlm.train: rivals under plans that are no router's, and what these go by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import firstlm
from firstlm.controls import importance_bias, importance_plan, layers_to_drop, most_kept_plan
from firstlm.layer_importance import measure_importance
from firstlm.length_plans import LengthPlans, classes_of, length_bounds
from firstlm.trainer import Trainer
from tiny_models import routed_model, tiny_base_path
from tiny_training import COLLATOR, examples
from train_once import SMALL, datasets, log_of, run, weights


@pytest.fixture(scope="module")
def base() -> str:
    return str(tiny_base_path("llama"))


@pytest.mark.parametrize(
    ("control", "plan", "steps", "kept"),
    [
        ("lora_only", "importance", [8], 6),
        ("static", "importance", [2, 6], 4),
        ("static", "greedy", [2, 6], 4),
        ("static", "uniform", [2, 6], 4),
        ("static", "random:3", [2, 6], 4),
        ("static", "first", [2, 6], 4),
        ("static", "last", [2, 6], 4),
        ("static", "block_influence", [2, 6], 4),
        ("static", [0, 1, 4, 5], [2, 6], 4),
    ],
)
def test_controls_train_for_as_many_steps_and_carry_their_plan(
    control, plan, steps, kept, base, tmp_path
):
    result = run(base, str(tmp_path / "run"), control=control, control_plan=plan, **SMALL)
    assert [p.steps for p in result.phases] == steps
    assert result.health.distinct_plans == 1
    model = firstlm.from_pretrained(result.checkpoint)
    chosen = model.plan(input_ids=torch.tensor([[5, 6, 7]])).skip_plans[0]
    assert len(chosen.kept) == kept
    if isinstance(plan, list):
        assert list(chosen.kept) == plan


@pytest.mark.parametrize("grouped", [False, True])
def test_controls_see_the_batch_of_the_same_step_of_the_run(grouped, base, tmp_path, monkeypatch):
    names = {tuple(row["input_ids"]): i for i, row in enumerate(datasets()["train_dataset"])}
    steps: list[list[int]] = []
    original = Trainer.compute_loss

    def record(trainer, model, inputs, *args, **kwargs):
        rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ids = [names[tuple(row[mask.bool()].tolist())] for row, mask in rows]
        if trainer._micro_step == 0:
            steps.append([])
        steps[-1] += ids
        return original(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", record)
    seen = {}
    for control in ("none", "lora_only", "static"):
        steps.clear()
        changes = {"control": control, "group_by_length": grouped, **SMALL}
        run(base, str(tmp_path / control), **changes)
        seen[control] = list(steps)
    assert [len(step) for step in seen["none"]] == [4] * 8
    assert seen["lora_only"] == seen["static"] == seen["none"]


def test_a_length_control_trains_and_carries_a_plan_a_class_of_prompt_lengths(
    base, tmp_path, monkeypatch
):
    masks: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = Trainer._gate_arguments

    def record(trainer, prompt_lengths):
        arguments = original(trainer, prompt_lengths)
        if trainer.phase.name == "lora":
            masks.append((prompt_lengths, arguments["skip_plan"]))
        return arguments

    monkeypatch.setattr(Trainer, "_gate_arguments", record)
    changes = {"control": "length", "plan_search_trials": 12, "plan_search_examples": 8, **SMALL}
    result = run(base, str(tmp_path / "run"), **changes)
    assert [p.steps for p in result.phases] == [2, 6]
    plans = LengthPlans.load(result.checkpoint)
    common = json.loads((result.output_dir / "control_plan.json").read_text())["kept"]
    assert len(plans.kept) == 2 and len(plans.bounds) == 1
    assert sum(map(len, plans.kept)) == 2 * len(common)  # a layer more here is one less there
    lengths = torch.tensor([sum(r["prompt_mask"]) for r in datasets()["train_dataset"]])
    assert 0.3 < (lengths < plans.bounds[0]).double().mean() < 0.7
    for seen, mask in masks:
        assert torch.equal(mask, plans.of(seen))
    assert masks


@pytest.mark.parametrize(("control", "weight"), [("static", 0.5), ("lora_only", 0.0)])
def test_a_control_that_skips_is_distilled_as_first_is(
    control, weight, base, tmp_path, monkeypatch
):
    seen = []
    original = Trainer.compute_loss

    def record(trainer, *args, **kwargs):
        seen.append((trainer.phase.name, trainer.phase.distill.weight))
        return original(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", record)
    lora = SMALL["lora"] | {"distill": {"weight": 0.5}}
    run(base, str(tmp_path / "run"), control=control, **SMALL | {"lora": lora})
    assert {w for name, w in seen if name == "lora"} == {weight}


def test_length_classes_are_of_like_size_and_cover_every_length():
    lengths = torch.tensor([3, 9, 4, 8, 5, 7, 6, 2, 1])
    assert length_bounds(lengths, 3) == [4, 7]
    plans = LengthPlans([4, 7], [[0], [0, 1], [2]], 3)
    expected = [[1, 0, 0], [1, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1]]
    assert plans.of(torch.tensor([3, 4, 6, 7, 99])).int().tolist() == expected


@given(st.lists(st.integers(1, 6), min_size=1, max_size=20), st.integers(2, 5))
def test_no_length_class_is_empty_however_many_prompts_are_of_one_length(lengths, count):
    bounds = length_bounds(torch.tensor(lengths), count)
    classes = classes_of(torch.tensor(lengths), bounds)
    assert set(classes.tolist()) == set(range(len(bounds) + 1))
    assert len(bounds) < count


def test_a_control_takes_over_a_finished_warm_up_and_trains_the_same_weights(base, tmp_path):
    own = run(base, str(tmp_path / "own"), control="static", **SMALL)
    with open(own.log, "a") as file:
        file.write('{"phase": "lo')  # a run that is still writing
    changes = {"control": "static", "warmup_from": str(tmp_path / "own"), **SMALL}
    taken = run(base, str(tmp_path / "taken"), **changes)
    assert weights(taken.checkpoint) == weights(own.checkpoint)
    assert taken.phases[0].seconds == own.phases[0].seconds  # it was not trained again
    assert Path(taken.phases[0].checkpoint).is_relative_to(tmp_path / "taken")
    killed = tmp_path / "killed"  # while it took over
    (killed / "warmup").mkdir(parents=True)
    again = run(base, str(killed), **changes)
    assert again.phases[0].seconds == own.phases[0].seconds
    steps = [(r["phase"], r["step"]) for r in log_of(taken.output_dir) if "loss" in r]
    assert steps == [("warmup", i) for i in (1, 2)] + [("lora", i) for i in range(1, 7)]
    first = run(base, str(tmp_path / "first"), **changes | {"control": "none"})
    assert [p.name for p in first.phases] == ["warmup", "routers", "lora"]
    assert first.phases[0].seconds == own.phases[0].seconds


def test_a_warm_up_of_other_settings_is_refused(base, tmp_path):
    run(base, str(tmp_path / "own"), phases=["warmup"], **SMALL)
    changes = {"warmup_from": str(tmp_path / "own"), **SMALL}
    for different in ({"seed": 1}, {"skip_rate": 0.2}, {"lora": {"rank": 2}}):
        with pytest.raises(ValueError, match=rf"another one \([a-z.]*{next(iter(different))}"):
            run(base, str(tmp_path / "taken"), **changes | different)
    with pytest.raises(ValueError, match="no run with a finished warm-up"):
        run(base, str(tmp_path / "b"), **changes | {"warmup_from": str(tmp_path)})
    with pytest.raises(ValueError, match="has no warm-up"):
        run(base, str(tmp_path / "b"), control="lora_only", **changes)


@pytest.mark.parametrize(
    ("stored", "complaint"),
    [
        ({"kept": [0, 1, 4, 5], "num_layers": 6}, None),
        ({"kept": [0, 1, 4, 5], "num_layers": 30}, "of 30 layers, and this model has 6"),
        ({"kept": [1, 4, 5], "num_layers": 6}, "its plan skips the protected layers 0"),
        ({"kept": [0, 6], "num_layers": 6}, "from 0 to 5"),
        ([0, 1], "is no plan that firstlm train wrote"),
        ({"kept": 4, "num_layers": 6}, "is no plan that firstlm train wrote"),
    ],
)
def test_a_common_plan_that_does_not_fit_is_refused_before_the_warm_up(
    stored, complaint, base, tmp_path
):
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "control_plan.json").write_text(json.dumps(stored))
    changes = {"control": "length", "plan_search_common": str(tmp_path / "static"), **SMALL}
    changes |= {"plan_search_trials": 1, "plan_search_examples": 4}
    if complaint is None:
        result = run(base, str(tmp_path / "run"), **changes)
        assert json.loads((result.output_dir / "control_plan.json").read_text()) == stored
        (tmp_path / "static" / "control_plan.json").unlink()
        (result.output_dir / "result.json").unlink()
        run(base, str(tmp_path / "run"), **changes)  # taken up again, it knows the plan
        return
    with pytest.raises(ValueError, match=complaint):
        run(base, str(tmp_path / "run"), **changes)
    assert not (tmp_path / "run").exists()


def test_the_most_kept_layers_of_a_run_make_a_static_control(base, tmp_path):
    whole = run(base, str(tmp_path / "whole"), **SMALL)
    changes = {"control": "static", "control_plan": f"most_kept:{whole.output_dir}", **SMALL}
    changes["skip_rate"] = 0.5  # its own, not that of the run
    result = run(base, str(tmp_path / "run"), **changes)
    shares = [layer.kept for layer in whole.health.layers]
    plan = json.loads((result.output_dir / "control_plan.json").read_text())["kept"]
    assert len(plan) == 3
    assert min(shares[i] for i in plan) >= max(shares[i] for i in range(6) if i not in plan)
    with pytest.raises(FileNotFoundError, match=r"no health\.json"):
        run(base, str(tmp_path / "b"), **changes | {"control_plan": "most_kept:nowhere"})


@pytest.mark.parametrize("prefill", ["route", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_importance_is_the_rise_of_cross_entropy_without_the_layer(family, prefill):
    model = routed_model(family, router=firstlm.RouterConfig(prefill=prefill), draw=False)
    rows = examples(6)
    calls = []
    importance = measure_importance(model, rows, COLLATOR, batch_size=4, progress=calls.append)
    assert sum(calls) == 6
    batch = COLLATOR(rows)
    with torch.no_grad():
        full = model(**batch, skip_plan=firstlm.SkipPlan.full(6), use_cache=False).loss
        for layer in range(6):
            plan = firstlm.SkipPlan(tuple(i for i in range(6) if i != layer), 6)
            rise = model(**batch, skip_plan=plan, use_cache=False).loss - full
            assert importance[layer] == pytest.approx(rise.item(), abs=2e-6), layer


def test_static_plans_drop_the_least_and_keep_the_protected():
    plan = importance_plan([0.1, 0.5, -0.1, 0.3, 0.2, 0.4], 1 / 3, protected=[0])
    assert plan == [True, True, False, True, False, True]
    assert most_kept_plan([1.0, 0.2, 0.9, 0.1, 0.8, 1.0], 1 / 3, [0]) == [
        True, False, True, False, True, True,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="protect fewer"):
        layers_to_drop(0.94, 6, [0])


def test_importance_bias_starts_routers_at_the_static_plan():
    importance = [9.0, 0.5, -0.1, 0.3, 0.2, 0.4]
    bias = importance_bias(importance, 1 / 3, spread=2.0, protected=[0])
    assert [b >= 0 for b in bias] == importance_plan(importance, 1 / 3, [0])
    assert sorted(range(1, 6), key=lambda i: bias[i]) == [2, 4, 3, 5, 1]
