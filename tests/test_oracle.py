"""The oracle: bounds from a table of losses, and its measurement on tiny models."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import firstlm
from firstlm import RouterConfig
from firstlm.evaluation import oracle, oracle_text
from firstlm.evaluation.oracle import OracleSettings, PromptRows, analyse, measure, run_oracle
from firstlm.evaluation.oracle_bounds import (
    PlanLosses,
    agreement_of_halves,
    best_per_task,
    best_single,
    chosen_plans,
    cross_validated_ridge,
    paid,
    paid_by_halves,
    summary,
)
from firstlm.measured_file import MeasuredFile
from firstlm.scoring import score
from firstlm.skip_plan import SkipPlan
from tiny_gguf import tiny_model_folder
from tiny_models import NUM_LAYERS, routed_model
from tiny_training import COLLATOR, examples


def table(prompts, candidates, seed, tasks=("a", "b")):
    generator = torch.Generator().manual_seed(seed)
    halves = torch.rand(prompts, candidates, 2, generator=generator, dtype=torch.float64) * 9
    tokens = torch.randint(1, 6, (prompts, 2), generator=generator).double()
    return PlanLosses(halves, tokens, [tasks[i % len(tasks)] for i in range(prompts)])


@given(st.integers(2, 30), st.integers(1, 12), st.integers(0, 1000))
def test_no_way_to_choose_is_below_the_bound(prompts, candidates, seed):
    choosing, report = table(prompts, candidates, seed), table(prompts, candidates, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    features = {"x": tuple(torch.randn(prompts, 5, generator=generator) for _ in range(2))}
    chosen, _ = chosen_plans(choosing, report, features, seed=0)
    bound = paid(report, chosen["per_prompt"])
    assert chosen.keys() == {"single", "per_task", "per_prompt", "x"}
    for plans in chosen.values():
        assert bool((bound <= paid(report, plans)).all())
    assert bool((bound <= paid_by_halves(report, best_single(choosing)) + 1e-9).all())


def test_plans_are_chosen_on_the_choosing_prompts_only():
    choosing, report = table(10, 6, 1), table(10, 6, 2)
    chosen, _ = chosen_plans(choosing, report, {}, seed=0)
    assert set(chosen["single"].tolist()) == {int(choosing.per_token().mean(0).argmin())}
    per_task = best_per_task(choosing)
    assert chosen["per_task"].tolist() == [per_task[task] for task in report.tasks]
    values = choosing.per_token()
    assert per_task["a"] == int(values[::2].mean(0).argmin())


def test_a_half_chooses_what_the_other_pays():
    halves = torch.tensor([[[1.0, 8.0], [2.0, 3.0]], [[5.0, 0.0], [4.0, 0.0]]]).double()
    report = PlanLosses(halves, torch.tensor([[2.0, 2.0], [1.0, 0.0]]).double(), ["a", "a"])
    # Row 0: even tokens take plan 0 (odd ones pay 8), odd ones plan 1 (even ones pay 2).
    # Row 1: the one token has no other half and takes the single plan.
    assert paid_by_halves(report, single=0).tolist() == [10.0, 5.0]
    assert paid_by_halves(report, single=1).tolist() == [10.0, 4.0]


def test_halves_agree_where_the_prompt_decides_and_not_by_chance():
    generator = torch.Generator().manual_seed(3)
    tokens = torch.full((200, 2), 2.0).double()
    tasks = ["a" if i < 100 else "b" for i in range(200)]
    chance = torch.randn(200, 5, 2, generator=generator).double()
    of_task = torch.randn(2, 5, 1, generator=generator).double().repeat_interleave(100, 0) * 9
    assert abs(agreement_of_halves(PlanLosses(chance + of_task, tokens, tasks))) < 0.1
    own = torch.randn(200, 5, 1, generator=generator).double()
    assert agreement_of_halves(PlanLosses(own + chance, tokens, tasks)) == pytest.approx(
        0.5, abs=0.1
    )
    assert agreement_of_halves(PlanLosses(own.repeat(1, 1, 2), tokens, tasks)) == pytest.approx(1)


def test_the_ridge_finds_what_features_know_and_nothing_in_noise():
    generator = torch.Generator().manual_seed(0)
    x, new = (torch.randn(120, 400, generator=generator) for _ in range(2))
    direction = torch.randn(3, 4, generator=generator).double()
    known = torch.cat([x, 6 * x[:, :3]], 1), torch.cat([new, 6 * new[:, :3]], 1)
    known = tuple(torch.cat([k, *[k[:, -3:]] * 40], 1) for k in known)
    predicted, strength = cross_validated_ridge(
        known[0], x[:, :3].double() @ direction, known[1], 0
    )
    truth = new[:, :3].double() @ direction
    assert float((predicted - truth).square().mean()) < 0.3 * float(truth.square().mean())
    noise = torch.randn(120, 4, generator=generator).double()
    predicted, stronger = cross_validated_ridge(x, noise, new, 0)
    assert stronger > strength
    assert float((predicted - noise.mean(0)).square().mean()) < 0.1


def test_the_ridge_is_the_textbook_one():
    generator = torch.Generator().manual_seed(1)
    x, new = torch.randn(9, 3, generator=generator).double(), torch.randn(4, 3, generator=generator)
    y = torch.randn(9, 2, generator=generator).double()
    predicted, strength = cross_validated_ridge(x, y, new, 0)
    mean, spread = x.mean(0), x.std(0, correction=0)
    z, z_new = (x - mean) / spread / 3**0.5, (new.double() - mean) / spread / 3**0.5
    weight = torch.linalg.solve(z.T @ z + strength * torch.eye(3).double(), z.T @ (y - y.mean(0)))
    torch.testing.assert_close(predicted, z_new @ weight + y.mean(0))


def test_a_difference_is_paired_and_its_interval_holds_it():
    tokens = torch.full((50,), 4.0).double()
    losses = torch.rand(50, generator=torch.Generator().manual_seed(2)).double() * 40
    found = summary(losses, tokens, {"single": losses + 2.0}, seed=0)
    assert found["n"] == 50
    assert found["cross_entropy"] == pytest.approx(float(losses.mean()) / 4)
    assert found["minus.single"]["mean"] == pytest.approx(-0.5)
    assert found["minus.single"]["ci95"] == pytest.approx([-0.5, -0.5])


# ---- on tiny models ----


def task_rows(count, seed):
    rows = examples(count, seed)
    tasks = ["long" if sum(row["prompt_mask"]) > 8 else "short" for row in rows]
    return PromptRows(rows, rows.ids, tasks)


SETTINGS = OracleSettings(skip_rate=1 / 3, candidates=6, importance_prompts=3, batch_size=3)


@pytest.fixture(scope="module")
def model():
    return routed_model("llama", router=RouterConfig(protected=[0], keep_bias=0.0))


def sets():
    return task_rows(9, seed=1), task_rows(8, seed=2)


def test_candidates_have_one_size_and_their_losses_are_those_of_score(model, tmp_path):
    choosing, reported = sets()
    store = MeasuredFile(tmp_path, "key")
    found = measure(model, choosing, reported, COLLATOR, SETTINGS, store)
    assert len(found.plans) == len(set(found.plans)) == 6
    assert all(len(plan.skipped) == 2 and 0 in plan.kept for plan in found.plans)
    for rows, losses in ((choosing, found.choosing), (reported, found.reported)):
        for c, plan in enumerate(found.plans):
            expected = score(model, rows, COLLATOR, keep_mask=plan.to_mask())
            torch.testing.assert_close(losses.halves[:, c].sum(-1), expected.loss)
            assert losses.tokens.sum(-1).tolist() == expected.tokens.tolist()
    own = score(model, reported, COLLATOR)
    torch.testing.assert_close(found.own.sum(-1), own.loss)
    assert found.own_rate == pytest.approx(own.skip_rate)
    full = torch.ones(NUM_LAYERS, dtype=torch.bool)
    torch.testing.assert_close(
        found.full.sum(-1), score(model, reported, COLLATOR, keep_mask=full).loss
    )
    assert found.features[0].shape == (9, NUM_LAYERS * 32)
    figures = analyse(found, seed=0)
    ways = figures["ways"]
    assert ways["per_prompt"]["all"]["cross_entropy"] <= ways["single"]["all"]["cross_entropy"]
    assert ways.keys() == oracle_text.WAYS.keys()
    assert ways["single"]["short"]["n"] + ways["single"]["long"]["n"] == 8


def test_even_and_odd_tokens_are_told_apart(model):
    rows = examples(4, seed=3)
    mask = torch.ones(4, NUM_LAYERS, dtype=torch.bool)
    halves = oracle._half_losses(model, rows, COLLATOR, mask, batch_size=3)
    for i, row in enumerate(rows):
        start = sum(row["prompt_mask"])
        for half in (0, 1):
            labels = [
                t if t >= 0 and (k - start) % 2 == half else -100
                for k, t in enumerate(row["labels"])
            ]
            only = [row | {"labels": labels}]
            expected = score(model, only, COLLATOR, keep_mask=mask[0]).loss
            assert float(halves[i, half]) == pytest.approx(float(expected))


def test_an_interrupted_measurement_goes_on_and_finds_the_same(model, tmp_path, monkeypatch):
    choosing, reported = sets()

    def run(folder):
        store = MeasuredFile(tmp_path / folder, "key")
        return measure(model, choosing, reported, COLLATOR, SETTINGS, store)

    whole = run("whole")
    original, passes = oracle._half_losses, []

    def counted(*args):
        passes.append(1)
        if len(passes) == 4:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(oracle, "_half_losses", counted)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    resumed = run("parts")
    assert len(passes) == 4 + (6 - 3) + 6 + 2
    assert resumed.plans == whole.plans
    assert torch.equal(resumed.reported.halves, whole.reported.halves)
    assert analyse(resumed, seed=0) == analyse(whole, seed=0)


def test_it_stops_where_there_are_no_more_plans(model, tmp_path):
    choosing, reported = sets()
    settings = OracleSettings(skip_rate=1 / 6, candidates=50, importance_prompts=2)
    store = MeasuredFile(tmp_path, "key")
    found = measure(model, choosing, reported, COLLATOR, settings, store)
    assert found.plans and set(found.plans) <= {
        SkipPlan(tuple(i for i in range(NUM_LAYERS) if i != out), NUM_LAYERS)
        for out in range(1, NUM_LAYERS)
    }
    assert len(found.plans) == 5


def test_the_whole_run_writes_its_files_and_is_not_measured_twice(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    base = tiny_model_folder(tmp_path / "model")
    firstlm.from_pretrained(base, router=RouterConfig(protected=[0])).save_pretrained(folder)
    data = []
    for task in ("x", "y"):
        rows = [
            {"id": f"{task}{i}", "task": task, "prompt": f"say {task} {i}", "answer": f"{i} {task}"}
            for i in range(150)
        ]
        path = tmp_path / f"{task}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data.append(str(path))
    settings = OracleSettings(skip_rate=1 / 3, candidates=4, choosing=3, reported=4)
    out = tmp_path / "oracle"
    record = run_oracle(folder, data, out, settings, dtype="float32")
    assert record["prompts"] == {"choosing": 6, "reported": 8}
    assert json.loads((out / "oracle.json").read_text()) == record
    assert len((out / "losses.jsonl").read_text().splitlines()) == 1 + record["candidates"]
    assert "| best single plan |" in (out / "oracle.md").read_text()
    assert (out / "oracle.png").stat().st_size > 1000
    monkeypatch.setattr(oracle, "_half_losses", None)
    again = run_oracle(folder, data, out, settings, dtype="float32")
    assert again["ways"] == record["ways"]


@pytest.mark.parametrize("values", [{"candidates": 0}, {"reported": 1}, {"skip_rate": -0.1}])
def test_settings_that_cannot_work_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        OracleSettings(**({"skip_rate": 0.3} | values))
