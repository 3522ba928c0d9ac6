"""Measurements of a model on prompts: answers and their ROUGE-L, latency, layer calls, cache bytes.

Latency compares *arms*: the same model and prompts under different arguments of `generate`, for
example with and without skipping. Arms take turns prompt by prompt, so that a slow minute of the
machine hits all of them, and every arm is made to produce the same number of tokens.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.streamers import BaseStreamer

from firstlm.cache_argument import cache_of
from firstlm.data import encode_prompt, pad_prompts
from firstlm.layer_calls import LayerCalls
from firstlm.skip_plan import SkipPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Answers:
    """What a model wrote for N prompts.

    Attributes:
        texts: the N answers without special tokens.
        skip_plans: the N plans; empty for a model without routers.
        layer_calls_per_token: layers that one generated token of one sequence went through, counted
            inside the layers; None for a model without routers.
        new_tokens: tokens of each answer, with the one that ends it.
        calls: all that was counted; None for a model without routers.
    """

    texts: list[str] = field(default_factory=list)
    skip_plans: list[SkipPlan] = field(default_factory=list)
    layer_calls_per_token: float | None = None
    new_tokens: list[int] = field(default_factory=list)
    calls: LayerCalls | None = None


@dataclass
class ArmTiming:
    """The measurements of one arm; a value a prompt and repeat, in milliseconds, or one a prompt.

    Attributes:
        ttft_ms: from the call of `generate` to the first new token.
        tpot_ms: mean time of each later token.
        kv_bytes: bytes that the cache holds for kept layers when the last token is out.
        layer_calls_per_token: counted in the untimed pass over each prompt.
    """

    ttft_ms: list[float] = field(default_factory=list)
    tpot_ms: list[float] = field(default_factory=list)
    kv_bytes: list[int] = field(default_factory=list)
    layer_calls_per_token: list[float] = field(default_factory=list)


class TokenClock(BaseStreamer):
    """A streamer that notes when each token arrives; the first `put` is the prompt."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.arrivals.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        pass


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    progress: str | None = None,
    **generate_kwargs: Any,
) -> Answers:
    """Greedy answers to `prompts`, in their order; prompts of like length share a batch.

    Args:
        model: routed or any causal LM of transformers.
        prompts: texts, or chats as lists of messages (see `firstlm.data.encode_prompt`).
        progress: title of a progress bar, or None for no bar.
        generate_kwargs: for `generate`, say `skip_plan=` (one, or one a prompt) or `budget=`.

    Raises:
        ValueError: no prompts.
    """
    if not prompts:
        raise ValueError("no prompts: at least one is needed")
    encoded = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    texts: dict[int, str] = {}
    plans: dict[int, SkipPlan] = {}
    lengths: dict[int, int] = {}
    routed = hasattr(model, "count_layer_calls")
    skip_plan = generate_kwargs.pop("skip_plan", None)
    with _bar(progress, len(encoded)) as bar, _evaluating(model), contextlib.ExitStack() as stack:
        calls = stack.enter_context(model.count_layer_calls()) if routed else None
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            inputs = _on_device(pad_prompts([encoded[i] for i in rows], tokenizer), model)
            if isinstance(skip_plan, SkipPlan):
                generate_kwargs["skip_plan"] = skip_plan
            elif skip_plan is not None:
                generate_kwargs["skip_plan"] = [skip_plan[i] for i in rows]
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                pad_token_id=tokenizer.pad_token_id,
                **generate_kwargs,
            )
            new_tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
            decoded = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
            texts |= dict(zip(rows, decoded, strict=True))
            lengths |= dict(zip(rows, _lengths(model, new_tokens), strict=True))
            if routed:
                plans |= dict(zip(rows, output.skip_plans, strict=True))
            bar.update(len(rows))
    return Answers(
        texts=[texts[i].strip() for i in range(len(encoded))],
        skip_plans=[plans[i] for i in range(len(encoded))] if routed else [],
        layer_calls_per_token=calls.per_token() if calls is not None else None,
        new_tokens=[lengths[i] for i in range(len(encoded))],
        calls=calls,
    )


def _lengths(model: PreTrainedModel, new_tokens: torch.Tensor) -> list[int]:
    """Tokens of every row [B, T] up to its first end-of-sequence token; what follows is padding."""
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends, device=new_tokens.device)
    before = torch.isin(new_tokens, ends).long().cumsum(1) == 0  # [B, T]
    return (before.sum(1) + 1).clamp(max=new_tokens.shape[1]).tolist()


def rouge(
    answers: Sequence[str], references: Sequence[str], kinds: Sequence[str]
) -> dict[str, list[float]]:
    """F1 of every answer against its reference, with stemming, in [0, 1].

    Args:
        kinds: of rouge-score: "rouge1", "rouge2", "rougeL".

    Raises:
        ValueError: different numbers of answers and references.
    """
    from rouge_score.rouge_scorer import RougeScorer

    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers do not match {len(references)} references")
    scorer = RougeScorer(list(kinds), tokenizer=_Stemmed())
    scores = [scorer.score(*pair) for pair in zip(references, answers, strict=True)]
    return {kind: [score[kind].fmeasure for score in scores] for kind in kinds}


class _Stemmed:
    """rouge-score's tokenizer; remembers stems, which take most of its time: words repeat."""

    def tokenize(self, text: str) -> list[str]:
        from rouge_score.tokenize import tokenize

        return tokenize(text, self)

    @staticmethod
    @functools.lru_cache(maxsize=1 << 16)
    def stem(word: str) -> str:
        return _porter_stemmer().stem(word)


@functools.cache
def _porter_stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L of every answer, see `rouge`."""
    return rouge(answers, references, ["rougeL"])["rougeL"]


@torch.no_grad()
def time_arms(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    arms: Mapping[str, Mapping[str, Any]],
    *,
    new_tokens: int = 32,
    repeats: int = 3,
    progress: str | None = None,
) -> dict[str, ArmTiming]:
    """Time `generate` at batch 1 under several arguments, the arms taking turns on every prompt.

    The first pass over a prompt warms caches up and is not timed: it counts layer calls and bytes.

    Args:
        model: routed, from `firstlm.from_pretrained`.
        arms: name -> arguments of `generate`, for example
            `{"full": {"skip_plan": SkipPlan.full(30)}, "routed": {}}`.
        new_tokens: tokens that every arm produces for every prompt, at least 2.
        repeats: timed passes over each prompt.
        progress: title of a progress bar, or None for no bar.

    Raises:
        ValueError: no prompts or arms, fewer than 2 tokens, or fewer than 1 repeat.
        RuntimeError: an arm produced another number of tokens.
    """
    if not prompts or not arms:
        raise ValueError(f"prompts and arms are needed, got {len(prompts)} and {len(arms)}")
    if new_tokens < 2 or repeats < 1:
        raise ValueError(
            f"new_tokens must be at least 2 and repeats at least 1, got {new_tokens}, {repeats}"
        )
    timings = {name: ArmTiming() for name in arms}
    names = list(arms)
    total = len(prompts) * len(arms) * (1 + repeats)
    with _bar(progress, total) as bar, _evaluating(model):
        for prompt in prompts:
            ids = torch.tensor([encode_prompt(prompt, tokenizer)], device=model.device)  # [1, T]
            for name in names:
                _count_once(model, tokenizer, ids, arms[name], new_tokens, timings[name])
                bar.update(1)
            for repeat in range(repeats):
                # Turn the order around each time: who goes second finds warmer caches.
                for name in names if repeat % 2 == 0 else reversed(names):
                    ttft, tpot = _time_once(model, tokenizer, ids, arms[name], new_tokens)
                    timings[name].ttft_ms.append(1e3 * ttft)
                    timings[name].tpot_ms.append(1e3 * tpot)
                    bar.update(1)
    return timings


def _generate(model, tokenizer, ids, arguments, new_tokens, **more):
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        pad_token_id=tokenizer.pad_token_id,
        **{**arguments, **more},
    )
    produced = output.sequences.shape[1] - ids.shape[1]
    if produced != new_tokens:
        raise RuntimeError(
            f"{produced} tokens were produced instead of {new_tokens}: arms of different lengths "
            "cannot be compared"
        )
    return output


def _count_once(model, tokenizer, ids, arguments, new_tokens, timing: ArmTiming) -> None:
    with model.count_layer_calls() as calls:
        output = _generate(model, tokenizer, ids, arguments, new_tokens)
    timing.layer_calls_per_token.append(calls.per_token())
    timing.kv_bytes.append(int(cache_of(output).memory()["bytes"]))


def _time_once(model, tokenizer, ids, arguments, new_tokens) -> tuple[float, float]:
    """Seconds to the first token, and mean seconds of each later token."""
    clock = TokenClock()
    start = time.perf_counter()
    _generate(model, tokenizer, ids, arguments, new_tokens, streamer=clock)
    first, last = clock.arrivals[0], clock.arrivals[-1]
    return first - start, (last - first) / (new_tokens - 1)


def _on_device(inputs: Mapping[str, torch.Tensor], model) -> dict[str, torch.Tensor]:
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


@contextlib.contextmanager
def _evaluating(model) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _bar(title: str | None, total: int):
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=title, disable=title is None, leave=True)
