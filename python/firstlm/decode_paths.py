"""The two ways to decode, the native engine and the hf path, behind one interface that measures.

An *arm* is what a call is asked to skip: `{"budget": 0.3}`, or `{"skip_plan": SkipPlan.full(30)}`.
L layers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from firstlm import measure, scoring
from firstlm.data import PromptAnswerCollator
from firstlm.held_out import Example, rows_of

Arm = Mapping[str, Any]
Timed = dict[str, Any]  # {"tpot_ms": [a repeat], "layers_per_token": counted}


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
            layers = self._engine.stats.layers_per_step
            found[name] = {"tpot_ms": [], "layers_per_token": layers}
        for repeat in range(repeats):
            # Turn the order around each time: who goes second finds warmer caches.
            for name in names if repeat % 2 == 0 else reversed(names):
                self._decode(example, arms[name], new_tokens)
                found[name]["tpot_ms"].append(self._engine.stats.tpot_ms)
        return found

    def _decode(self, example: Example, arm: Arm, new_tokens: int) -> None:
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


class HfPath:
    """transformers' generate on the routed model."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        import torch

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
            name: {"tpot_ms": one.tpot_ms, "layers_per_token": one.layer_calls_per_token[0]}
            for name, one in found.items()
        }

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
                keep_mask=None if plan is None else plan.to_mask(),
            )  # fmt: skip
        finally:
            model.router_config = before
        return list(zip(scores.loss.tolist(), scores.tokens.tolist(), strict=True))


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
            Engine.from_model(model, precision or "int8", None, threads, tokenizer, progress)
        )
    except UnsupportedModel as error:
        if engine == "native":
            raise
        print(f"firstlm: {error}", file=sys.stderr)
        return HfPath(model, tokenizer)
