"""health.py and scoring.py: figures that tell a router that has learnt from one that has not."""

from __future__ import annotations

import json

import pytest
import torch

from firstlm import RouterConfig, SkipPlan
from firstlm.checkpoint import router_state_dict
from firstlm.health import HealthReport, router_health
from firstlm.scoring import score
from tiny_models import routed_model
from tiny_training import COLLATOR, examples


class TaskRows(list):
    tasks = ["a", "b"] * 10


ROWS = TaskRows(examples(20))


@pytest.fixture(scope="module")
def model():
    return routed_model("llama", torch.float64)


@pytest.fixture(scope="module")
def report(model) -> HealthReport:
    initial = {n: torch.zeros_like(p) for n, p in router_state_dict(model).items()}
    return router_health(model, ROWS, COLLATOR, 0.5, initial=initial, batch_size=8)


def cross_entropy(model, rows, **how) -> float:
    """Token by token, one example at a time."""
    total, tokens = 0.0, 0
    for i, row in enumerate(rows):
        batch = COLLATOR([row])
        plan = how["plans"][i] if "plans" in how else None
        with torch.no_grad():
            out = model(**batch, use_cache=False, skip_plan=plan, gate=how.get("gate"))
        total += out.loss.item() * (batch["labels"][:, 1:] != -100).sum().item()
        tokens += (batch["labels"][:, 1:] != -100).sum().item()
    return total / tokens


def plans_of(model, rows) -> list[SkipPlan]:
    return [
        model.plan(input_ids=torch.tensor([r["input_ids"][: sum(r["prompt_mask"])]])).skip_plans[0]
        for r in rows
    ]


def test_scores_are_those_of_one_example_at_a_time_in_their_order(model):
    scores = score(model, ROWS, COLLATOR, batch_size=6)
    assert scores.cross_entropy == pytest.approx(cross_entropy(model, ROWS), rel=1e-6)
    plans = plans_of(model, ROWS)
    assert [SkipPlan.from_mask(m) for m in scores.keep_mask] == plans
    assert scores.skip_rate == pytest.approx(sum(p.skip_rate for p in plans) / 20)
    assert scores.distinct_plans == len(set(plans)) > 1
    full = score(model, ROWS, COLLATOR, keep_mask=torch.ones(6, dtype=torch.bool))
    expected = cross_entropy(model, ROWS, plans=[SkipPlan.full(6)] * 20)
    assert full.cross_entropy == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="empty"):
        score(model, [], COLLATOR)


def test_scoring_leaves_the_mode_alone(model):
    model.train()
    score(model, ROWS[:2], COLLATOR)
    assert model.training
    model.eval()


def test_the_report_measures_what_it_names(report, model):
    plans = plans_of(model, ROWS)
    assert report.prompts == 20 and report.skip_rate_asked == 0.5
    assert report.skip_rate == pytest.approx(sum(p.skip_rate for p in plans) / 20)
    assert report.distinct_plans == len(set(plans))
    assert report.cross_entropy == pytest.approx(cross_entropy(model, ROWS), rel=1e-6)
    soft = cross_entropy(model, ROWS, gate="soft")
    assert report.cross_entropy_soft == pytest.approx(soft, rel=1e-6)
    assert report.soft_hard_gap == pytest.approx(report.cross_entropy - soft, rel=1e-5)
    full = cross_entropy(model, ROWS, plans=[SkipPlan.full(6)] * 20)
    assert report.cross_entropy_full == pytest.approx(full, rel=1e-6)
    for layer in report.layers:
        kept = sum(layer.layer in p.kept for p in plans) / 20
        assert layer.kept == pytest.approx(kept)
        assert layer.protected == (layer.layer == 0)
    assert report.adaptive_layers == sum(0.05 <= layer.kept <= 0.95 for layer in report.layers)
    lengths = [float(sum(row["prompt_mask"])) for row in ROWS]
    kept = torch.tensor([[float(len(p.kept)) for p in plans], lengths])
    assert report.length_correlation == pytest.approx(torch.corrcoef(kept)[0, 1].item(), abs=1e-6)


def test_every_layer_that_is_not_decided_is_correlated_with_prompt_length(report, model):
    """Point-biserial: difference of the mean lengths, kept and skipped, over their deviation."""
    plans = plans_of(model, ROWS)
    lengths = torch.tensor([float(sum(row["prompt_mask"])) for row in ROWS])
    for layer in report.layers:
        kept = torch.tensor([layer.layer in p.kept for p in plans])
        if bool(kept.all()) or not bool(kept.any()):
            assert layer.length_correlation is None
            continue
        share = kept.float().mean()
        apart = lengths[kept].mean() - lengths[~kept].mean()
        expected = apart / lengths.std(unbiased=False) * (share * (1 - share)).sqrt()
        assert layer.length_correlation == pytest.approx(expected.item(), abs=1e-5)
        assert f"| {layer.length_correlation:+.2f} |" in report.to_markdown()
    assert report.layers[0].length_correlation is None  # protected
    assert sum(layer.length_correlation is not None for layer in report.layers) > 2


def test_distance_from_init_is_the_norm_of_what_moved(report, model):
    state = router_state_dict(model)
    total = sum(p.double().square().sum() for p in state.values()).sqrt().item()
    assert report.distance == pytest.approx(total)
    one = torch.cat([state["layers.3.weight"].flatten(), state["layers.3.bias"]]).norm().item()
    assert report.layers[3].distance == pytest.approx(one, rel=1e-5)
    none = router_health(model, ROWS, COLLATOR, 0.5)
    assert none.distance is None and none.layers[0].distance is None


def test_every_prompt_gets_another_prompts_plan_when_plans_are_shuffled(model):
    from firstlm.health import derangement

    for count in (1, 2, 7, 20):
        order = derangement(count, seed=0).tolist()
        assert sorted(order) == list(range(count))
        assert count == 1 or all(i != j for i, j in enumerate(order))


def test_tasks_are_reported_apart(report):
    assert set(report.tasks) == {"a", "b"} and report.tasks["a"].prompts == 10
    mean = (report.tasks["a"].skip_rate + report.tasks["b"].skip_rate) / 2
    assert mean == pytest.approx(report.skip_rate)


def test_a_report_is_json_and_reads_back(report):
    text = json.dumps(report.to_json())
    assert HealthReport.from_json(json.loads(text)) == report


def test_the_table_shows_every_layer_and_the_warnings(report):
    text = report.to_markdown()
    assert text.count("\n| ") > 6 + 10
    assert "0 (protected)" in text and "50.0% /" in text
    for warning in report.warnings():
        assert warning in text


def test_routers_that_never_moved_are_called_out():
    still = routed_model("llama", torch.float64, RouterConfig(protected=[0]), draw=False)
    initial = {n: p.clone() for n, p in router_state_dict(still).items()}
    report = router_health(still, ROWS, COLLATOR, 0.3, initial=initial)
    assert report.distance == 0.0 and report.length_correlation is None
    words = " ".join(report.warnings())
    assert "still where they started" in words and "30.0% was asked" in words


def test_one_plan_for_all_is_called_out():
    model = routed_model("llama", torch.float64, RouterConfig(protected=[0]), draw=False)
    model.set_thresholds([0.5, 0.5, 0.99, 0.5, 0.5, 0.5])
    report = router_health(model, ROWS, COLLATOR, 1 / 6)
    assert report.distinct_plans == 1 and report.skip_rate == pytest.approx(1 / 6)
    assert any("static plan would do the same" in w for w in report.warnings())
    assert report.cross_entropy_shuffled == report.cross_entropy == report.cross_entropy_most_kept
