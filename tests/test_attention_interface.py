"""attn_implementation="firstlm" beside transformers' own attention, family by family."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

import firstlm
from firstlm import RouterConfig, attention_interface, ops
from tiny_models import FAMILIES, attention_options, draw_routers, pad, prompts, tiny_base_path

LENGTHS = [13, 5, 9, 11]
GENERATE = {
    "max_new_tokens": 12,
    "min_new_tokens": 12,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def model_with(attention: str | None, family: str, dtype: torch.dtype):
    """A base model with firstlm's attention, or transformers' best for the family."""
    options = {"attn_implementation": attention} if attention else attention_options(family, dtype)
    return AutoModelForCausalLM.from_pretrained(
        tiny_base_path(family), dtype=dtype, **options
    ).eval()


def routed_with(attention: str | None, family: str, dtype: torch.dtype):
    """The same with routers that disagree."""
    options = {"attn_implementation": attention} if attention else attention_options(family, dtype)
    router = RouterConfig(protected=[0], keep_bias=0.0)
    model = firstlm.from_pretrained(tiny_base_path(family), router=router, dtype=dtype, **options)
    return draw_routers(model)


def assert_logits(actual, expected, family: str, dtype: torch.dtype) -> None:
    # gemma2's attention in transformers takes its softmax in float32, whatever the model's type.
    exact = dtype == torch.float64 and family != "gemma2"
    tolerance = 1e-11 if exact else 2e-4
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def steps(monkeypatch):
    """Shapes of the queries that decode_attention has served."""
    served = []
    attend = ops.decode_attention

    def record(query, *args):
        served.append(tuple(query.shape))
        return attend(query, *args)

    monkeypatch.setattr(ops, "decode_attention", record)
    return served


@every_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lengths", [LENGTHS, [9], [7, 7]], ids=str)
def test_a_base_decodes_as_with_transformers_attention(family, dtype, lengths, steps):
    batch = pad(prompts(lengths))
    expected = model_with(None, family, dtype).generate(**batch, **GENERATE)
    assert not steps
    model = model_with("firstlm", family, dtype)
    actual = model.generate(**batch, **GENERATE)
    assert len(steps) == 11 * model.config.num_hidden_layers
    assert torch.equal(actual.sequences, expected.sequences)
    assert_logits(actual.logits, expected.logits, family, dtype)


@every_family
def test_a_routed_batch_decodes_as_with_transformers_attention(family, steps):
    batch = pad(prompts(LENGTHS))
    expected = routed_with(None, family, torch.float64).generate(**batch, **GENERATE)
    actual = routed_with("firstlm", family, torch.float64).generate(**batch, **GENERATE)
    assert actual.skip_plans == expected.skip_plans
    assert torch.equal(actual.sequences, expected.sequences)
    assert {shape[0] for shape in steps} - {len(LENGTHS)}, "some layers serve some rows only"
    assert_logits(actual.logits, expected.logits, family, torch.float64)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_prefill_is_transformers_attention(family, steps):
    batch = pad(prompts(LENGTHS))
    with torch.no_grad():
        ours, theirs = (
            model_with(attention, family, torch.float64)(**batch).logits
            for attention in ("firstlm", None)
        )
    seen = batch["attention_mask"].bool()
    assert_logits(ours[seen], theirs[seen], family, torch.float64)
    assert not steps


def test_a_step_that_needs_gradients_defers(steps):
    model = model_with("firstlm", "llama", torch.float64)
    token = torch.tensor([[5]])
    model(token).logits.sum().backward()
    assert not steps
    with torch.no_grad():
        model(token)
    assert steps


# --- Masks ----------------------------------------------------------------------------------------


def random_step(num_slots: int):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(3, heads, length, 8, generator=generator, dtype=torch.float64)
        for heads, length in ((4, 1), (2, num_slots), (2, num_slots))
    ]


def test_masks_of_one_query_become_slots_unless_they_have_holes():
    sees = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool().view(3, 1, 1, 5)
    slots = attention_interface._slots(sees)
    assert slots.tolist() == [[[[2, 4]]], [[[0, 5]]], [[[0, 0]]]]
    assert torch.equal(attention_interface._mask(slots, 5), sees)
    holes = torch.tensor([[1, 0, 1]]).bool().view(1, 1, 1, 3)
    assert attention_interface._slots(holes) is holes


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_slots_and_masks_give_the_same(softcap, steps):
    """A mask of the caller's is deferred; its slots are served by decode_attention."""
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    slots = torch.tensor([[1, 5], [0, 6], [5, 6]]).view(3, 1, 1, 2)
    run = attention_interface.attention_forward
    step = random_step(6)
    with torch.no_grad():
        ours, _ = run(module, *step, slots, scaling=0.3, softcap=softcap)
        assert len(steps) == 1
        deferred = (
            attention_interface._mask(slots, 6),
            torch.where(attention_interface._mask(slots, 6), 0.0, -1e9).double(),
        )
        for mask in deferred:
            theirs, _ = run(module, *step, mask, scaling=0.3, softcap=softcap)
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert len(steps) == 1
    step[0].requires_grad_()
    theirs, _ = run(module, *step, slots, scaling=0.3, softcap=softcap)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert theirs.requires_grad


def test_attention_sinks_are_refused():
    with pytest.raises(ValueError, match="no attention sinks"):
        attention_interface.attention_forward(
            torch.nn.Module(), *random_step(6), None, s_aux=torch.zeros(4)
        )


def test_models_with_attention_of_their_own_are_refused(monkeypatch):
    monkeypatch.setattr(LlamaPreTrainedModel, "_supports_attention_backend", False)
    with pytest.raises(ValueError, match="has attention of its own"):
        routed_with("firstlm", "llama", torch.float32)
