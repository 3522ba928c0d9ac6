"""Early exit by confidence: both ends of the threshold, what lies between, and its rate."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

import firstlm
from firstlm import RouterConfig, measure
from firstlm.evaluation.early_exit import (
    answer_early_exit,
    calibrate_early_exit,
    early_exit,
    first_exit,
    score_early_exit,
)
from firstlm.scoring import score
from firstlm.skip_plan import SkipPlan
from tiny_gguf import tiny_model_folder
from tiny_models import NUM_LAYERS, routed_model
from tiny_training import COLLATOR, examples

FAMILIES = ["llama", "gpt2", "opt", "gpt_neox", "gemma3"]


def model_of(family="llama"):
    return routed_model(family, router=RouterConfig(protected=[0, 1, -1], keep_bias=0.0))


@pytest.mark.parametrize("family", FAMILIES)
def test_above_every_probability_it_is_the_full_model(family):
    model, rows = model_of(family), examples(7, seed=1)
    found = score_early_exit(model, rows, COLLATOR, 1.01, batch_size=3)
    full = score(model, rows, COLLATOR, keep_mask=torch.ones(NUM_LAYERS, dtype=torch.bool))
    torch.testing.assert_close(found.loss, full.loss)
    assert torch.equal(found.tokens, full.tokens)
    assert set(found.layers_run.tolist()) == set(found.usual_layers.tolist()) == {NUM_LAYERS}


@pytest.mark.parametrize("family", FAMILIES)
def test_at_zero_it_is_the_exit_at_a_fixed_layer(family):
    """Where nothing goes deeper, keys and values above the exit do not matter."""
    model, rows = model_of(family), examples(7, seed=1)
    assert first_exit(model) == 2
    found = score_early_exit(model, rows, COLLATOR, 0.0, batch_size=3)
    keep = torch.arange(NUM_LAYERS) < 2
    fixed = score(model, rows, COLLATOR, keep_mask=keep)
    torch.testing.assert_close(found.loss, fixed.loss)
    assert set(found.layers_run.tolist()) == {2}


def test_each_token_leaves_at_its_first_sure_layer():
    model, rows = model_of(), examples(5, seed=2)
    threshold = calibrate_early_exit(model, rows, COLLATOR, [0.3])[0.3]
    found = score_early_exit(model, rows, COLLATOR, threshold, batch_size=2)
    for i, row in enumerate(rows):
        ids = torch.tensor([row["input_ids"]])
        start = sum(row["prompt_mask"])
        by_layer = []
        for count in range(2, NUM_LAYERS + 1):  # the model cut after `count` layers
            keep = (torch.arange(NUM_LAYERS) < count)[None]
            with torch.no_grad():
                logits = model(ids, skip_plan=keep, use_cache=False).logits[0, start - 1 : -1]
            by_layer.append(logits.log_softmax(-1))
        loss, layers = 0.0, 0
        for k, target in enumerate(row["input_ids"][start:]):
            sure = [float(p[k].max().exp()) >= threshold for p in by_layer[:-1]] + [True]
            exit_ = sure.index(True)
            loss -= float(by_layer[exit_][k, target])
            layers += exit_ + 2
        assert float(found.loss[i]) == pytest.approx(loss, rel=1e-6)
        assert float(found.layers_run[i]) == pytest.approx(layers / int(found.tokens[i]))


def test_thresholds_come_near_the_asked_rates():
    model, rows = model_of(), examples(40, seed=3)
    rates = [0.0, 0.1, 0.3, 0.5, 4 / 6]
    thresholds = calibrate_early_exit(model, rows, COLLATOR, rates)
    for rate in rates:
        found = score_early_exit(model, rows, COLLATOR, thresholds[rate])
        assert 1 - float(found.layers_run.mean()) / NUM_LAYERS == pytest.approx(rate, abs=0.01)
    assert sorted(thresholds.values(), reverse=True) == [thresholds[rate] for rate in rates]
    with pytest.raises(ValueError, match=r"at most 0\.667"):
        calibrate_early_exit(model, rows, COLLATOR, [0.8])


def test_models_that_scale_their_logits_are_refused():
    with (
        pytest.raises(ValueError, match="final_logit_softcapping"),
        early_exit(model_of("gemma2"), 0.5),
    ):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("early"))


def test_greedy_answers_of_both_ends_of_the_threshold(folder):
    prompts = ["a", "What is a package?", "b c", "1 + 1 ="]
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = firstlm.from_pretrained(
        folder, router=RouterConfig(protected=[0, -1]), dtype=torch.float64
    )
    num_layers = len(model.decoder_layers)

    def plain(plan):
        return measure.answer(model, tokenizer, prompts, max_new_tokens=6, skip_plan=plan)

    def early(threshold):
        return answer_early_exit(
            model, tokenizer, prompts, threshold, max_new_tokens=6, batch_size=3
        )

    never, always = early(1.01), early(0.0)
    assert never.texts == plain(SkipPlan.full(num_layers)).texts
    assert never.layers_run == [num_layers] * 4
    model.router_config.protected = [0]
    assert always.texts == plain(SkipPlan((0,), num_layers)).texts
    assert always.layers_run == [1] * 4
    middle = early(0.5)
    assert len(middle.texts) == 4 and all(1 <= n <= num_layers for n in middle.layers_run)
