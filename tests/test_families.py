"""Every family, against transformers itself."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import firstlm
from firstlm import SkipPlan
from firstlm.cache_argument import cache_of
from firstlm.loading import check_routable
from firstlm.prompt import position_ids_of
from tiny_models import (
    FAMILIES,
    assert_adaptive,
    base_model,
    pad,
    prompts,
    routed_model,
    tiny_config,
)

LENGTHS = [13, 5, 9, 11]
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_all_layers_kept_logits_are_the_bases_to_the_bit(family, dtype):
    base, routed = base_model(family, dtype), routed_model(family, dtype, draw=False)
    batch = pad(prompts(LENGTHS))
    batch["position_ids"] = position_ids_of(batch["attention_mask"])
    with torch.no_grad():
        expected, actual = base(**batch).logits, routed(**batch).logits
    assert routed(**batch).keep_mask.all()
    assert torch.equal(actual, expected)


@every_family
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str
)
def test_with_all_layers_kept_generate_gives_the_bases_tokens(family, options):
    base, routed = (
        base_model(family, torch.float32),
        routed_model(family, torch.float32, draw=False),
    )
    batch = pad(prompts(LENGTHS))
    tokens = []
    for model in (base, routed):
        torch.manual_seed(0)
        tokens.append(model.generate(**batch, max_new_tokens=12, min_new_tokens=12, **options))
    assert torch.equal(*tokens)


@every_family
def test_a_batch_of_different_plans_decodes_as_each_prompt_alone(family):
    model = routed_model(family)
    rows = prompts(LENGTHS)
    options = {"max_new_tokens": 14, "do_sample": False, "return_dict_in_generate": True}
    batch = model.generate(**pad(rows), **options)
    assert_adaptive(batch.skip_plans)
    for b, row in enumerate(rows):
        alone = model.generate(input_ids=row[None], **options)
        answer = alone.sequences[0, len(row) :]
        assert alone.skip_plans == [batch.skip_plans[b]]
        assert batch.sequences[b, max(LENGTHS) :][: len(answer)].tolist() == answer.tolist()


@every_family
def test_plan_and_forward_ignore_padding(family):
    model = routed_model(family)
    rows = prompts(LENGTHS)
    alone = [model.plan(row[None]) for row in rows]
    assert_adaptive([plan for out in alone for plan in out.skip_plans])
    for side in ("left", "right"):
        batch = pad(rows, side)
        together = model.plan(**batch)
        expected = torch.cat([out.keep_prob for out in alone])
        torch.testing.assert_close(together.keep_prob, expected, rtol=0, atol=1e-7)
        assert together.skip_plans == [plan for out in alone for plan in out.skip_plans]
        positions = position_ids_of(batch["attention_mask"])
        with torch.no_grad():
            logits = model(**batch, position_ids=positions).logits
            for b, row in enumerate(rows):
                own = logits[b][batch["attention_mask"][b].bool()]
                reference = model(input_ids=row[None]).logits[0]
                torch.testing.assert_close(own, reference, rtol=0, atol=1e-7)


@every_family
def test_decoding_with_the_cache_equals_recomputing_without_it(family):
    model = routed_model(family)
    rows = prompts(LENGTHS)
    batch = pad(rows)
    out = model.generate(
        **batch, max_new_tokens=12, min_new_tokens=12, return_dict_in_generate=True
    )
    assert_adaptive(out.skip_plans)
    mask = torch.cat([batch["attention_mask"], torch.ones(len(rows), 12, dtype=torch.long)], 1)
    with torch.no_grad():
        logits = model(
            input_ids=out.sequences,
            attention_mask=mask,
            position_ids=position_ids_of(mask),
            skip_plan=out.skip_plans,
            use_cache=False,
        ).logits
    logits[..., 2] = -torch.inf  # min_new_tokens forbids the end of the sequence
    predicted = logits[:, max(LENGTHS) - 1 : -1].argmax(-1)
    assert predicted.tolist() == out.sequences[:, max(LENGTHS) :].tolist()


@every_family
def test_skipped_rows_are_not_computed(family):
    model = routed_model(family)
    with model.count_layer_calls() as calls:
        out = model.generate(
            **pad(prompts(LENGTHS)),
            max_new_tokens=6,
            min_new_tokens=6,
            return_dict_in_generate=True,
        )
    assert_adaptive(out.skip_plans)
    kept = torch.stack([plan.to_mask() for plan in out.skip_plans]).sum(0)
    assert calls.prefill.tolist() == kept.tolist()
    assert calls.decode.tolist() == (5 * kept).tolist()  # the prefill gives the first token
    assert calls.per_token() == pytest.approx(float(kept.sum()) / len(LENGTHS))


@every_family
def test_the_cache_holds_only_kept_pairs(family):
    model = routed_model(family)
    out = model.generate(**pad(prompts(LENGTHS)), max_new_tokens=6, return_dict_in_generate=True)
    cache = cache_of(out)
    kept = torch.stack([plan.to_mask() for plan in out.skip_plans]).sum(0)
    assert [layer.num_rows for layer in cache.layers] == kept.tolist()
    memory = cache.memory()
    assert 0 < memory["bytes"] < memory["full"]


@every_family
def test_low_precision_decodes_alike_under_the_same_plan(family):
    model = routed_model(family, torch.bfloat16)
    exact = routed_model(family)
    rows = prompts(LENGTHS)
    plans, reference = model.plan(**pad(rows)), exact.plan(**pad(rows))
    near = (plans.keep_prob - 0.5).abs() < 1e-2
    for b, row in enumerate(rows):
        alone = model.plan(row[None])
        differ = plans.skip_plans[b].to_mask() != alone.skip_plans[0].to_mask()
        assert not (differ & ~near[b]).any(), "a plan changed away from its threshold"
    assert_adaptive(reference.skip_plans)
    with torch.no_grad():
        batch = pad(rows)
        positions = position_ids_of(batch["attention_mask"])
        logits = model(**batch, position_ids=positions, skip_plan=reference.skip_plans).logits
        for b, row in enumerate(rows):
            alone = model(input_ids=row[None], skip_plan=reference.skip_plans[b]).logits[0]
            own = logits[b, -len(row) :]
            tolerance = 16 * torch.finfo(torch.bfloat16).eps * alone.abs().max().item()
            torch.testing.assert_close(own, alone, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (transformers.T5Config(d_model=16, num_layers=1), "encoder-decoder"),
        (transformers.MambaConfig(hidden_size=16, num_hidden_layers=1), "state-space"),
        (transformers.ViTConfig(hidden_size=16, num_hidden_layers=1), "not a causal LM"),
    ],
    ids=["encoder-decoder", "state-space", "no language model"],
)
def test_unsupported_models_get_one_clear_error_at_load(config, says, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=says):
        firstlm.from_pretrained(tmp_path)


def test_a_model_that_tells_its_layers_nothing_is_refused_at_load(tmp_path):
    config = transformers.BloomConfig(vocab_size=11, hidden_size=16, n_layer=2, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not pass keyword arguments on"):
        firstlm.from_pretrained(tmp_path)


def test_layers_with_a_router_of_experts_are_refused():
    model = base_model("llama")
    model.model.layers[0].router = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="a router of their own"):
        check_routable(model)


def test_a_model_keeps_its_class_name_and_layer_names():
    routed, base = routed_model("llama"), base_model("llama")
    assert type(routed).__name__ == "LlamaForCausalLM"
    assert isinstance(routed, transformers.LlamaForCausalLM)
    assert type(routed.decoder_layers[0]).__name__ == "LlamaDecoderLayer"
    added = set(routed.state_dict()) - set(base.state_dict())
    assert added and all(".router." in name for name in added)


def test_the_class_of_the_base_is_left_alone():
    routed_model("llama")
    fresh = AutoModelForCausalLM.from_config(tiny_config("llama"))
    assert not any("router" in name for name, _ in fresh.named_parameters())
    assert not hasattr(fresh, "plan")


def test_a_given_plan_equals_a_model_without_the_skipped_layers():
    model, base = routed_model("llama"), base_model("llama")
    plan = SkipPlan((0, 2, 5), 6)
    kept = torch.nn.ModuleList(base.model.layers[i] for i in plan.kept)
    base.model.layers = kept
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    base.config.num_hidden_layers = len(kept)
    ids = prompts([12])[0][None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, skip_plan=plan).logits, base(input_ids=ids).logits)
    tokens = [
        m.generate(input_ids=ids, max_new_tokens=10, **extra)
        for m, extra in ((model, {"skip_plan": plan}), (base, {}))
    ]
    assert torch.equal(*tokens)
