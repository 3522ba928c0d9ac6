"""generate() of a routed model: every decoding option, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

import firstlm
from firstlm import RouterConfig, SkipCache, SkipPlan
from firstlm.cache_argument import cache_of
from tiny_models import (
    NUM_LAYERS,
    assert_adaptive,
    base_model,
    pad,
    prompts,
    routed_model,
    tiny_base_path,
)

LENGTHS = [13, 5, 9, 11]
LENGTH = {"max_new_tokens": 10, "min_new_tokens": 10, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def model():
    return routed_model("llama")


def plans_of(model, rows):
    return [model.plan(row[None]).skip_plans[0] for row in rows]


def test_output_carries_plans_and_keep_probabilities(model):
    rows = prompts(LENGTHS)
    out = model.generate(**pad(rows), **LENGTH)
    assert out.skip_plans == plans_of(model, rows)
    assert_adaptive(out.skip_plans)
    assert out.keep_prob.shape == (len(rows), NUM_LAYERS)
    assert (out.keep_prob >= 0.5).logical_or(torch.arange(NUM_LAYERS) == 0).tolist() == [
        plan.to_mask().tolist() for plan in out.skip_plans
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "do_sample": True},
    ],
    ids=str,
)
def test_beams_and_return_sequences_share_their_prompts_plan(model, options):
    rows = prompts(LENGTHS)
    torch.manual_seed(0)
    out = model.generate(**pad(rows), **options, **LENGTH)
    assert out.skip_plans == plans_of(model, rows)
    assert len(out.keep_prob) == len(rows)
    assert len(out.sequences) == len(rows) * options.get("num_return_sequences", 1)


def test_beams_of_a_batch_equal_the_beams_of_each_prompt(model):
    rows = prompts(LENGTHS)
    options = LENGTH | {"num_beams": 3}
    batch = model.generate(**pad(rows), **options)
    for b, row in enumerate(rows):
        alone = model.generate(row[None], **options)
        assert torch.equal(batch.sequences[b, max(LENGTHS) :], alone.sequences[0, len(row) :])


def test_beams_equal_those_of_a_model_without_the_skipped_layers(model):
    plan = SkipPlan((0, 1, 4), NUM_LAYERS)
    base = base_model("llama")
    base.model.layers = torch.nn.ModuleList(base.model.layers[i] for i in plan.kept)
    for index, layer in enumerate(base.model.layers):
        layer.self_attn.layer_idx = index
    base.config.num_hidden_layers = len(plan.kept)
    options = LENGTH | {"num_beams": 4}
    expected = base.generate(**pad(prompts(LENGTHS)), **options)
    actual = model.generate(**pad(prompts(LENGTHS)), skip_plan=plan, **options)
    assert torch.equal(actual.sequences, expected.sequences)


def test_streamers_and_stopping_criteria_work(model):
    class Streamer(TextStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    class AfterFour(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 9 + 4)

    row, streamer = prompts([9])[0], Streamer()
    out = model.generate(
        row[None],
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([AfterFour()]),
        max_new_tokens=20,
    )
    assert out.shape[1] == 9 + 4
    assert streamer.ended and streamer.tokens == out[0].tolist()


def test_a_long_answer_to_a_short_prompt_works(model):
    out = model.generate(prompts([3])[0][None], max_new_tokens=64, min_new_tokens=64)
    assert out.shape[1] == 67


def test_given_plans_override_the_routers(model):
    rows = prompts(LENGTHS)
    one = SkipPlan((0, 3), NUM_LAYERS)
    assert model.generate(**pad(rows), skip_plan=one, **LENGTH).skip_plans == [one] * 4
    each = [SkipPlan(tuple(range(n + 1)), NUM_LAYERS) for n in range(4)]
    out = model.generate(**pad(rows), skip_plan=each, num_beams=2, **LENGTH)
    assert out.skip_plans == each
    for b, row in enumerate(rows):
        alone = model.generate(row[None], skip_plan=each[b], num_beams=2, **LENGTH)
        assert torch.equal(out.sequences[b, max(LENGTHS) :], alone.sequences[0, len(row) :])


@pytest.mark.parametrize("prefill", ["route", "full"])
@pytest.mark.parametrize("budget", [0.0, 0.34, 0.5])
def test_an_exact_budget_drops_the_lowest_scores_of_an_unskipped_pass(prefill, budget):
    config = RouterConfig(protected=[0, -1], prefill=prefill)
    model = routed_model("llama", router=config)
    rows = prompts(LENGTHS)
    full = SkipPlan.full(NUM_LAYERS)
    scores = model.plan(**pad(rows), skip_plan=full).keep_prob
    out = model.generate(**pad(rows), budget=budget, budget_mode="exact", **LENGTH)
    for plan, row in zip(out.skip_plans, scores, strict=True):
        assert len(plan.skipped) == round(budget * NUM_LAYERS)
        middle = row[1:-1]
        lowest = middle.argsort()[: len(plan.skipped)] + 1
        assert sorted(plan.skipped) == sorted(lowest.tolist())
    again = model.plan(**pad(rows), budget=budget, budget_mode="exact")
    assert again.skip_plans == out.skip_plans


def test_a_threshold_budget_uses_the_calibrated_thresholds():
    config = RouterConfig(
        protected=[0], calibration={"0.2": [0.3] * NUM_LAYERS, "0.4": [0.7] * NUM_LAYERS}
    )
    model = routed_model("llama", router=config)
    rows = pad(prompts(LENGTHS))
    for budget, threshold in ((0.2, 0.3), (0.3, 0.5), (0.4, 0.7)):
        expected = model.plan(**rows, thresholds=[threshold] * NUM_LAYERS)
        assert model.generate(**rows, budget=budget, **LENGTH).skip_plans == expected.skip_plans
    with pytest.raises(ValueError, match=r"calibrated: 0\.2, 0\.4"):
        model.generate(**rows, budget=0.6)


def test_prefill_full_reads_unskipped_states_and_frees_their_keys():
    model = routed_model("llama", router=RouterConfig(protected=[0], prefill="full"))
    rows = prompts(LENGTHS)
    with model.count_layer_calls() as calls:
        out = model.generate(**pad(rows), **LENGTH)
    unskipped = model.plan(**pad(rows), skip_plan=SkipPlan.full(NUM_LAYERS))
    torch.testing.assert_close(out.keep_prob, unskipped.keep_prob)
    kept = torch.stack([plan.to_mask() for plan in out.skip_plans]).sum(0)
    assert_adaptive(out.skip_plans)
    assert calls.prefill.tolist() == [4] * NUM_LAYERS
    assert calls.decode.tolist() == (9 * kept).tolist()
    assert [layer.num_rows for layer in cache_of(out).layers] == kept.tolist()


def test_a_fixed_seed_samples_the_same_tokens_twice(model):
    rows, options = pad(prompts(LENGTHS)), LENGTH | {"do_sample": True}
    tokens = []
    for _ in range(2):
        torch.manual_seed(3)
        tokens.append(model.generate(**rows, **options).sequences)
    assert torch.equal(*tokens)


class TestSecondTurn:
    """A later turn on a kept cache keeps the first turn's plan; new plans prefill everything."""

    def first_turn(self, model):
        row = prompts([9])[0][None]
        out = model.generate(row, **LENGTH)
        ids = torch.cat([out.sequences, prompts([6], seed=1)[0][None]], 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, out

    def test_keeps_the_plan_and_computes_only_new_tokens(self, model):
        conversation, first = self.first_turn(model)
        with model.count_layer_calls() as calls:
            second = model.generate(**conversation, cache=cache_of(first), **LENGTH)
        assert second.skip_plans == first.skip_plans
        assert calls.prefill.sum() == 0
        fresh = model.generate(**conversation, skip_plan=first.skip_plans[0], **LENGTH)
        assert torch.equal(second.sequences, fresh.sequences)

    @pytest.mark.parametrize("name", ["cache", "past_key_values"])
    def test_the_cache_may_be_passed_by_either_name(self, model, name):
        conversation, first = self.first_turn(model)
        second = model.generate(**conversation, **{name: cache_of(first)}, **LENGTH)
        assert cache_of(second) is cache_of(first)
        with torch.no_grad():
            out = model(input_ids=conversation["input_ids"][:, :1], **{name: cache_of(second)})
        assert cache_of(out) is cache_of(first)

    def test_two_caches_are_refused(self, model):
        conversation, first = self.first_turn(model)
        other = SkipCache(model.config)
        with pytest.raises(ValueError, match="pass the cache once"):
            model.generate(**conversation, cache=cache_of(first), past_key_values=other)

    def test_replan_prefills_the_whole_conversation(self, model):
        conversation, first = self.first_turn(model)
        fresh = model.generate(**conversation, **LENGTH)
        assert fresh.skip_plans != first.skip_plans, "the drawn routers must change their mind"
        cache = cache_of(first)
        second = model.generate(**conversation, cache=cache, replan=True, **LENGTH)
        assert second.skip_plans == fresh.skip_plans
        assert torch.equal(second.sequences, fresh.sequences)

    def test_another_plan_prefills_the_whole_conversation(self, model):
        conversation, first = self.first_turn(model)
        other = SkipPlan((0, 5), NUM_LAYERS)
        fresh = model.generate(**conversation, skip_plan=other, **LENGTH)
        cache = cache_of(first)
        second = model.generate(**conversation, cache=cache, skip_plan=other, **LENGTH)
        assert second.skip_plans == [other]
        assert torch.equal(second.sequences, fresh.sequences)

    def test_the_same_plan_keeps_the_cache(self, model):
        conversation, first = self.first_turn(model)
        with model.count_layer_calls() as calls:
            model.generate(
                **conversation,
                cache=cache_of(first),
                skip_plan=first.skip_plans,
                **LENGTH,
            )
        assert calls.prefill.sum() == 0

    def test_another_number_of_sequences_is_refused_until_the_cache_has_it(self, model):
        conversation, first = self.first_turn(model)
        cache = cache_of(first)
        greedy = model.generate(**conversation, skip_plan=first.skip_plans[0], **LENGTH).sequences
        options = LENGTH | {"num_return_sequences": 3, "do_sample": True, "top_k": 1}
        with pytest.raises(ValueError, match="1 sequences, the batch 3: repeat"):
            model.generate(**conversation, cache=cache, **options)
        cache.batch_repeat_interleave(3)
        three = model.generate(**conversation, cache=cache, **options).sequences
        assert torch.equal(three, greedy.expand(3, -1))

    def test_replan_with_new_tokens_only_is_refused(self, model):
        conversation, first = self.first_turn(model)
        with pytest.raises(ValueError, match="whole conversation"):
            model.generate(
                conversation["input_ids"][:, -6:],
                attention_mask=conversation["attention_mask"],
                cache=cache_of(first),
                replan=True,
            )
        assert cache_of(first).get_seq_length() > 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prefill_chunk_size": 4}, "whole prompt in one pass"),
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "leave it unset"),
        ({"cache_implementation": "dynamic"}, "leave it unset"),
        ({"cache_implementation": "quantized"}, "leave it unset"),
        ({"cache_implementation": "offloaded"}, "leave it unset"),
        ({"cache": DynamicCache()}, "SkipCache"),
        ({"prompt_lookup_num_tokens": 3}, "assisted"),
        ({"dola_layers": "low"}, "DoLa"),
        ({"custom_generate": "some/repo"}, "bypass"),
        ({"budget": 1.5}, r"\[0, 1\)"),
        ({"budget": 0.3}, "exact"),
        ({"budget": 0.3, "budget_mode": "nearest"}, "budget_mode"),
        ({"budget": 0.95, "budget_mode": "exact"}, "may be skipped"),
        ({"budget": 0.3, "skip_plan": SkipPlan((0,), NUM_LAYERS)}, "not both"),
        ({"skip_plan": SkipPlan((0,), 4)}, "does not fit"),
        ({"skip_plan": SkipPlan((1, 2), NUM_LAYERS)}, r"protected layers \[0\]"),
        ({"skip_plan": [SkipPlan((0,), NUM_LAYERS)] * 3}, "3 plans for 1 prompts"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_with_a_way_out(model, options, says):
    with pytest.raises(ValueError, match=says):
        model.generate(prompts([5])[0][None], **options)


def test_plan_refuses_what_generate_refuses(model):
    ids = prompts([5])[0][None]
    with pytest.raises(ValueError, match=r"protected layers \[0\]"):
        model.plan(ids, skip_plan=SkipPlan((1, 2), NUM_LAYERS))
    with pytest.raises(ValueError, match="not both"):
        model.plan(ids, skip_plan=SkipPlan.full(NUM_LAYERS), budget=0.3, budget_mode="exact")


@pytest.mark.parametrize("budget", [None, 0.5])
def test_padding_without_a_mask_is_no_prompt_of_plan_or_generate(model, budget):
    rows = pad(prompts(LENGTHS))
    options = {} if budget is None else {"budget": budget, "budget_mode": "exact"}
    expected = model.plan(**rows, **options)
    found = model.plan(rows["input_ids"], **options)
    assert found.skip_plans == expected.skip_plans
    assert torch.equal(found.keep_prob, expected.keep_prob)
    answers = model.generate(rows["input_ids"], **options, **LENGTH)
    assert answers.skip_plans == expected.skip_plans


def test_beams_of_the_models_own_generation_config_count_as_one_prompt():
    model = routed_model("llama")
    model.generation_config.num_beams = 3
    config = GenerationConfig(max_new_tokens=3, return_dict_in_generate=True)
    out = model.generate(**pad(prompts(LENGTHS)), generation_config=config)
    assert len(out.skip_plans) == len(out.keep_prob) == len(LENGTHS)


def test_embeddings_stand_in_for_ids_that_are_none(model):
    rows = pad(prompts(LENGTHS))
    embeds = model.get_input_embeddings()(rows["input_ids"])
    mask = rows["attention_mask"]
    out = model.generate(input_ids=None, inputs_embeds=embeds, attention_mask=mask, **LENGTH)
    assert out.skip_plans == model.plan(**rows).skip_plans


def test_assisted_and_paged_generation_are_refused(model):
    with pytest.raises(ValueError, match="assistant_model"):
        model.generate(prompts([5])[0][None], assistant_model=base_model("llama"))
    with pytest.raises(ValueError, match="left-padded batch"):
        model.generate_batch([[1, 2, 3]])


def test_forward_refuses_a_foreign_cache_and_other_plans(model):
    ids = prompts([5])[0][None]
    with torch.no_grad():
        with pytest.raises(TypeError, match="SkipCache"):
            model(input_ids=ids, cache=DynamicCache())
        cache = cache_of(model(input_ids=ids, skip_plan=SkipPlan((0, 1), NUM_LAYERS)))
        with pytest.raises(ValueError, match="differs from the plans of the cache"):
            model(input_ids=ids[:, :1], cache=cache, skip_plan=SkipPlan((0,), NUM_LAYERS))


def test_a_cache_follows_the_plans_that_were_set_on_it(model):
    row = prompts([9])[0][None]
    for plan in (SkipPlan((0, 1, 2), NUM_LAYERS), SkipPlan((0, 5), NUM_LAYERS)):
        cache = SkipCache(model.config)
        cache.set_plans(plan, 1)
        found = model.generate(row, cache=cache, **LENGTH)
        assert found.skip_plans == [plan]
        given = model.generate(row, skip_plan=plan, **LENGTH)
        assert torch.equal(found.sequences, given.sequences)
        cache = SkipCache(model.config)
        cache.set_plans(plan, 1)
        routed = model.generate(row, cache=cache, replan=True, **LENGTH)
        assert routed.skip_plans == plans_of(model, row)


def test_a_cache_is_kept_outside_of_no_grad_where_nothing_but_routers_learns():
    row = prompts([9])[0][None]
    model = routed_model("llama")  # its routers learn, its base does not
    expected = model.generate(row, **LENGTH).sequences
    ids, cache, tokens = row, None, row
    while tokens.shape[1] < expected.shape[1]:
        out = model(ids, past_key_values=cache)
        cache = cache_of(out)
        ids = out.logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, ids], 1)
    assert torch.is_grad_enabled() and torch.equal(tokens, expected)
    assert cache_of(model(row, gate="soft")) is None
    assert cache_of(model.requires_grad_(True)(row)) is None


def test_a_cache_under_autograd_is_refused():
    model = routed_model("llama").requires_grad_(True)
    with pytest.raises(RuntimeError, match="no autograd history"):
        model(input_ids=prompts([5])[0][None], cache=SkipCache(model.config))


def test_all_skipped_never_happens_without_protected_layers():
    model = routed_model("llama", router=RouterConfig(protected=[], keep_bias=-9.0), draw=False)
    out = model.generate(**pad(prompts(LENGTHS)), **LENGTH)
    assert {plan.kept for plan in out.skip_plans} == {(NUM_LAYERS - 1,)}


def test_a_base_that_caches_nothing_by_default_still_generates(tmp_path):
    shutil.copytree(tiny_base_path("llama"), tmp_path / "base")
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "base" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"use_cache": False}))
    base = firstlm.from_pretrained(tmp_path / "base")
    ids = prompts([5])[0][None]
    usual = firstlm.from_pretrained(tiny_base_path("llama"))
    expected = usual.generate(ids, max_new_tokens=3)
    assert torch.equal(base.generate(ids, max_new_tokens=3), expected)
    config = GenerationConfig(max_new_tokens=3)
    assert torch.equal(base.generate(ids, generation_config=config), expected)
    for explicit in (
        {"use_cache": False},
        {"generation_config": GenerationConfig(use_cache=False)},
    ):
        with pytest.raises(ValueError, match="use_cache=False"):
            base.generate(ids, **explicit)
