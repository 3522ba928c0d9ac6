"""The two ways to decode, the native engine and the hf path, behind one interface that measures.

An *arm* is what a call is asked to skip: `{"budget": 0.3}`, or `{"skip_plan": SkipPlan.full(30)}`.
L layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from firstlm import measure, scoring
from firstlm.data import PromptAnswerCollator, pad_prompts
from firstlm.held_out import Example, rows_of
from firstlm.layer_calls import LayerCalls
from firstlm.skip_plan import mask_to_plans, plans_to_mask

Arm = Mapping[str, Any]
# {"tpot_ms", "ttft_ms": [a repeat], "layers_per_token": counted, "kv_bytes": at the end,
#  "bytes_per_token": of the weights and the keys and values that a step reads}
Timed = dict[str, Any]


class PlanNotFollowed(RuntimeError):
    """A model ran other layers than its plans say."""


class DecodePath(Protocol):
    """A model that decodes.

    Attributes:
        facts: engine ("native" or "hf"), precision, threads.
    """

    facts: dict[str, Any]

    def time(
        self, example: Example, arms: Mapping[str, Arm], new_tokens: int, repeats: int
    ) -> dict[str, Timed]:
        """Every arm on one prompt at batch 1, taking turns; the first pass is not timed."""
        ...

    def answers(self, examples: Sequence[Example], arm: Arm, max_new_tokens: int) -> list[str]:
        """Greedy answers."""
        ...

    def losses(self, examples: Sequence[Example], arm: Arm) -> list[tuple[float, int]]:
        """(cross-entropy summed over the answer's tokens, their number) of every example."""
        ...

    def plans(self, examples: Sequence[Example], arm: Arm) -> torch.Tensor:
        """The keep mask [N, L] that the examples' prompts have under an arm."""
        ...

    def counted_answers(
        self, examples: Sequence[Example], keep: torch.Tensor, max_new_tokens: int
    ) -> list[tuple[str, float]]:
        """Greedy answers under the plans `keep` [N, L], and layers a token went through, counted.

        Raises:
            PlanNotFollowed: the layers that ran are not those of the plans.
        """
        ...

    def any_plan(self) -> contextlib.AbstractContextManager[None]:
        """While it is open, plans may skip protected layers."""
        ...


class NativePath:
    """firstlm's engine."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.facts = {
            "engine": "native",
            "precision": engine.config.decoder["precision"],
            "threads": engine.num_threads,
        }

    def time(
        self, example: Example, arms: Mapping[str, Arm], new_tokens: int, repeats: int
    ) -> dict[str, Timed]:
        names = list(arms)
        found: dict[str, Timed] = {}
        for name in names:
            self._decode(example, arms[name], new_tokens)
            stats = self._engine.stats
            found[name] = {
                "tpot_ms": [],
                "ttft_ms": [],
                "layers_per_token": stats.layers_per_step,
                "kv_bytes": stats.kv_bytes,
                "bytes_per_token": (stats.weight_bytes + stats.cache_bytes) / max(stats.steps, 1),
            }
        for repeat in range(repeats):
            # Turn the order around each time: who goes second finds warmer caches.
            for name in names if repeat % 2 == 0 else reversed(names):
                self._decode(example, arms[name], new_tokens)
                found[name]["tpot_ms"].append(self._engine.stats.tpot_ms)
                found[name]["ttft_ms"].append(self._engine.stats.ttft_ms)
        return found

    def _decode(self, example: Example, arm: Arm, new_tokens: int) -> None:
        self._engine.forget()  # a prompt that was read before has no TTFT
        tokens = self._engine.generate(
            example.prompt_ids, max_new_tokens=new_tokens, temperature=0, ignore_eos=True, **arm
        )
        if len(tokens) != new_tokens:
            raise RuntimeError(
                f"{len(tokens)} tokens were produced instead of {new_tokens}: arms of different "
                "lengths cannot be compared"
            )

    def answers(self, examples: Sequence[Example], arm: Arm, max_new_tokens: int) -> list[str]:
        prompts = [example.prompt_ids for example in examples]
        found = self._engine.generate(
            prompts, max_new_tokens=max_new_tokens, temperature=0, details=True, **arm
        )
        return [one.text.strip() for one in found]

    def losses(self, examples: Sequence[Example], arm: Arm) -> list[tuple[float, int]]:
        found = self._engine.score(
            [example.prompt_ids for example in examples],
            [example.answer_ids for example in examples],
            **arm,
        )
        return [(-scores.double().sum().item(), len(scores)) for scores in found]

    def plans(self, examples: Sequence[Example], arm: Arm) -> torch.Tensor:
        found = self._engine.plan([example.prompt_ids for example in examples], **arm)
        return torch.stack([plan.to_mask() for plan in found.skip_plans])

    def counted_answers(
        self, examples: Sequence[Example], keep: torch.Tensor, max_new_tokens: int
    ) -> list[tuple[str, float]]:
        found = []
        for example, plan in zip(examples, mask_to_plans(keep), strict=True):
            text = self.answers([example], {"skip_plan": plan}, max_new_tokens)[0]
            stats = self._engine.stats
            asked = [stats.steps * kept for kept in plan.to_mask().tolist()]
            if stats.steps and stats.layer_runs != asked:
                raise PlanNotFollowed(
                    f"in {stats.steps} steps the layers ran {stats.layer_runs} times under a plan "
                    f"that keeps {plan.kept}"
                )
            found.append((text, float(len(plan.kept))))
        return found

    @contextlib.contextmanager
    def any_plan(self) -> Iterator[None]:
        routers = self._engine.core.routers
        if routers is None:
            yield
            return
        before = routers.config
        routers.config = dataclasses.replace(before, protected=[])
        try:
            yield
        finally:
            routers.config = before


class HfPath:
    """transformers' generate on the routed model."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._collator = PromptAnswerCollator(tokenizer)
        self.facts = {
            "engine": "hf",
            "precision": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }

    def time(
        self, example: Example, arms: Mapping[str, Arm], new_tokens: int, repeats: int
    ) -> dict[str, Timed]:
        found = measure.time_arms(
            self._model, self._tokenizer, [example.prompt], arms,
            new_tokens=new_tokens, repeats=repeats,
        )  # fmt: skip
        return {
            name: {
                "tpot_ms": one.tpot_ms,
                "ttft_ms": one.ttft_ms,
                "layers_per_token": one.layer_calls_per_token[0],
                "kv_bytes": one.kv_bytes[0],
                "bytes_per_token": self._bytes_read(one.layer_calls_per_token[0], one.kv_bytes[0]),
            }
            for name, one in found.items()
        }

    def _bytes_read(self, layers: float, kv_bytes: int) -> float:
        """Of a step: `layers` decoder layers of mean size, the output head, keys and values."""
        own = [
            sum(p.nbytes for name, p in layer.named_parameters() if "router." not in name)
            for layer in self._model.decoder_layers
        ]
        head = self._model.get_output_embeddings()
        head_bytes = 0 if head is None else head.weight.nbytes
        return layers * sum(own) / len(own) + head_bytes + kv_bytes

    def answers(self, examples: Sequence[Example], arm: Arm, max_new_tokens: int) -> list[str]:
        prompts = [example.prompt for example in examples]
        found = measure.answer(
            self._model, self._tokenizer, prompts, max_new_tokens=max_new_tokens, **arm
        )
        return found.texts

    def losses(self, examples: Sequence[Example], arm: Arm) -> list[tuple[float, int]]:
        model, before = self._model, self._model.router_config
        plan = arm.get("skip_plan")
        if plan is None:
            model.set_thresholds(before.thresholds_for(arm["budget"]))
        try:
            scores = scoring.score(
                model, rows_of(examples), self._collator,
                keep_mask=None if plan is None else self._mask(plan, len(examples)),
            )  # fmt: skip
        finally:
            model.router_config = before
        return list(zip(scores.loss.tolist(), scores.tokens.tolist(), strict=True))

    def _mask(self, plan: Any, rows: int) -> torch.Tensor:
        return plans_to_mask(plan, rows, len(self._model.decoder_layers))

    def plans(self, examples: Sequence[Example], arm: Arm) -> torch.Tensor:
        batch = pad_prompts([example.prompt_ids for example in examples], self._tokenizer)
        batch = {name: tensor.to(self._model.device) for name, tensor in batch.items()}
        plans = self._model.plan(**batch, **arm).skip_plans
        return torch.stack([plan.to_mask() for plan in plans])

    def counted_answers(
        self, examples: Sequence[Example], keep: torch.Tensor, max_new_tokens: int
    ) -> list[tuple[str, float]]:
        found = measure.answer(
            self._model, self._tokenizer, [example.prompt for example in examples],
            max_new_tokens=max_new_tokens, batch_size=len(examples), skip_plan=mask_to_plans(keep),
        )  # fmt: skip
        assert found.calls is not None
        check_layer_calls(found.calls, keep, self._model.router_config.prefill)
        return list(zip(found.texts, keep.sum(1).double().tolist(), strict=True))

    @contextlib.contextmanager
    def any_plan(self) -> Iterator[None]:
        before = self._model.router_config
        self._model.router_config = dataclasses.replace(before, protected=[])
        try:
            yield
        finally:
            self._model.router_config = before


def check_layer_calls(calls: LayerCalls, keep: torch.Tensor, prefill: str) -> None:
    """Compares the rows that layers computed for one batch with its plans.

    Args:
        calls: counted while the batch was decoded.
        keep: bool [B, L].
        prefill: of the routers; with "full" the prompt runs through every layer.

    Raises:
        PlanNotFollowed: they differ.
    """
    rows = keep.sum(0)  # [L]
    expected = {"decode": rows * calls.decode_steps}
    expected["prefill"] = rows if prefill == "route" else torch.full_like(rows, len(keep))
    for what, count in expected.items():
        counted = getattr(calls, what)
        if not torch.equal(counted, count):
            layer = int((counted != count).nonzero()[0])
            raise PlanNotFollowed(
                f"layer {layer} ran {int(counted[layer])} rows in {what}, and the plans of these "
                f"{len(keep)} prompts say {int(count[layer])}"
            )


def check_options(engine: str, precision: str | None, dtype: Any) -> None:
    """Refuse options of the other path.

    Raises:
        ValueError: there are some.
    """
    if engine not in ("auto", "native", "hf"):
        raise ValueError(f"engine must be 'auto', 'native' or 'hf', got {engine!r}")
    if engine == "native" and dtype is not None:
        raise ValueError("dtype is of the hf path; the engine takes precision")
    if (engine == "hf" or dtype is not None) and precision is not None:
        raise ValueError("precision is of the engine; the hf path takes dtype")


def open_path(
    model: Any,
    tokenizer: Any,
    engine: str = "auto",
    precision: str | None = None,
    dtype: Any = None,
    threads: int | None = None,
    progress: bool = False,
) -> DecodePath:
    """The path for a model: "native", "hf", or "auto": native where the engine runs the model.

    Args:
        model: from firstlm.from_pretrained; its `router_config` holds the calibrated rates.
        precision: of the engine; None: int8.
        dtype: asked of the hf path, which "auto" then takes.
        threads: of the engine; None: as many as torch uses.
        progress: show on stderr what happens.

    Raises:
        ValueError: options of the other path; UnsupportedModel: engine="native", but it does not
            run the model.
    """
    check_options(engine, precision, dtype)
    if engine == "hf" or dtype is not None:
        return HfPath(model, tokenizer)
    from firstlm.engine import Engine
    from firstlm.engine.config import UnsupportedModel

    try:
        return NativePath(
            Engine.from_model(
                model,
                precision or "int8",
                num_threads=threads,
                tokenizer=tokenizer,
                progress=progress,
            )
        )
    except UnsupportedModel as error:
        if engine == "native":
            raise
        print(f"firstlm: {error}", file=sys.stderr)
        return HfPath(model, tokenizer)
