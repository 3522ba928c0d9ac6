"""`firstlm.LM`: routed models in lm-evaluation-harness, as its model "firstlm"."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import firstlm
from firstlm.cli_input import check_model_exists, parse_plan
from firstlm.engine import Engine
from firstlm.engine.saved import CONFIG_NAME as ENGINE_CONFIG_NAME
from firstlm.lm_eval_paths import HfPath, NativePath, Pair
from firstlm.loading import from_pretrained
from firstlm.routed_model import RoutedModel
from firstlm.skip_plan import SkipPlan, check_plan_choice
from firstlm.tokenizer import load_tokenizer

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error}; lm-evaluation-harness is an extra: pip install 'firstlm[eval]'", name=error.name
    ) from error
from tqdm.auto import tqdm

logger = logging.getLogger("lm_eval.firstlm")  # shown as the harness's own messages are


class _NoWeights(torch.nn.Module):
    """Where HFLM expects the model that it moves to a device; ours is loaded there."""

    def tie_weights(self) -> None: ...


@register_model("firstlm")
class LM(HFLM):
    """A routed model for lm-evaluation-harness: `--model firstlm --model_args pretrained=...`.

    Requests are tokenised, truncated and post-processed as with `--model hf`, so a model that keeps
    every layer gives what it gives there. Every request runs under a skip plan of its own, found
    from its context alone:

    - generate_until, loglikelihood (multiple choice too): the routers read the context's tokens,
      never the continuation. The harness counts white space at the end of a context to the
      continuation; in loglikelihood requests the routers do not see it.
    - An empty context, and loglikelihood_rolling (perplexity of a whole text): there is no prompt.
      The routers read what the harness puts before the text, one token (BOS, else EOS, or
      `prefix_token_id`); of a later window of a long text, the tokens before it that the harness
      gives as context. Such plans say little; give a `skip_plan` to measure one.

    Example:
        >>> lm = firstlm.LM("runs/quickstart/checkpoint", budget=0.3, batch_size=8)
        >>> lm_eval.simple_evaluate(model=lm, tasks=["hellaswag"])

    Args:
        pretrained: as in `firstlm.from_pretrained` and `Engine.from_pretrained`; or such a model or
            engine.
        engine: "hf": transformers on the routed model; "native": firstlm's engine.
        router, adapter, revision: as in `firstlm.from_pretrained`.
        dtype: of the hf path's weights; None: as stored.
        precision: of the engine's weights; None: int8.
        budget, budget_mode, skip_plan: as in `generate`; the plan also as its text form, its JSON,
            a file with it, or "full".
        tokenizer: of transformers, or where to load it from; None: the model's own.
        device: of the hf path; None: a GPU if there is one. The engine runs on the CPU.
        num_threads: None: as many as torch uses.
        batch_size: rows of a forward pass, or "auto"; the engine scores one by one.
        max_batch_size, max_length, truncation, add_bos_token, prefix_token_id, think_end_token,
            enable_thinking, chat_template_args: as of the harness's model "hf".
        **kwargs: handed to what loads the model (`attn_implementation`, `head_precision`, …).

    Attributes:
        plan_counts: how many requests ran under each plan since the last `get_model_info`, which
            reports them (in `results["config"]["firstlm"]`).

    Raises:
        ValueError: arguments that do not fit together.
    """

    def __init__(
        self,
        pretrained: Any = "embedded",
        *,
        engine: str | None = None,
        router: Any = None,
        adapter: Any = None,
        revision: str | None = None,
        dtype: Any = None,
        precision: str | None = None,
        budget: float | None = None,
        budget_mode: str = "threshold",
        skip_plan: SkipPlan | str | None = None,
        tokenizer: Any = None,
        device: str | None = None,
        num_threads: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = 64,
        max_length: int | None = None,
        truncation: bool = False,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> None:
        check_plan_choice(skip_plan, budget, budget_mode)
        if trust_remote_code:
            raise ValueError("firstlm runs no remote code: leave trust_remote_code out")
        self._native = _is_native(pretrained, engine)
        if self._native and dtype is not None:
            raise ValueError("dtype is of engine=hf; engine=native takes precision")
        if not self._native and precision is not None:
            raise ValueError("precision is of engine=native; engine=hf takes dtype")
        if isinstance(pretrained, str):
            check_model_exists(pretrained)
        else:
            _refuse_options_of_loading(
                router=router, adapter=adapter, revision=revision, dtype=dtype, precision=precision,
                num_threads=num_threads if self._native else None, **kwargs,
            )  # fmt: skip
        if self._native:
            device = "cpu"  # whatever the harness asks for by default
            if str(batch_size).startswith("auto"):
                batch_size = 8
        elif isinstance(pretrained, RoutedModel):
            device = str(pretrained.device)
        elif device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__(
            pretrained=_source(pretrained),
            backend="causal",
            tokenizer=tokenizer,
            revision=revision,
            device=device,
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
            truncation=truncation,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
            think_end_token=think_end_token,
            enable_thinking=enable_thinking,
            chat_template_args=chat_template_args,
        )
        self.revision = revision
        for name, value in (("router", router), ("adapter", adapter), ("revision", revision)):
            if value is not None:
                kwargs[name] = value
        if self._native:
            if isinstance(pretrained, str):
                kwargs["num_threads"] = num_threads
                pretrained = Engine.from_pretrained(pretrained, precision or "int8", **kwargs)
            choice = _plan_choice(skip_plan, budget, budget_mode, pretrained.num_layers)
            self._path: HfPath | NativePath = NativePath(pretrained, choice)
        else:
            if num_threads is not None:
                torch.set_num_threads(num_threads)
            if isinstance(pretrained, str):
                if self.device.type != "cpu":
                    kwargs.setdefault("device_map", {"": str(self.device)})
                kwargs.setdefault("merge_adapter", True)
                pretrained = from_pretrained(pretrained, dtype=dtype, **kwargs)
            self._model, self._config = pretrained, pretrained.config
            choice = _plan_choice(skip_plan, budget, budget_mode, len(pretrained.decoder_layers))
            self._path = HfPath(pretrained, self.tokenizer, choice)
        self.plan_counts: Counter[SkipPlan] = Counter()

    # -- what HFLM's constructor calls ------------------------------------------------------------
    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        self._config = None  # of the model, once that is loaded

    def _create_model(self, pretrained: str, **kwargs: Any) -> None:
        self._model = _NoWeights()

    def _create_tokenizer(
        self,
        pretrained: str,
        tokenizer: Any,
        revision: str | None = None,
        add_bos_token: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if tokenizer is not None and not isinstance(tokenizer, str):
            self.tokenizer = tokenizer
            return
        if tokenizer is None and (
            not pretrained or (Path(pretrained) / ENGINE_CONFIG_NAME).is_file()
        ):
            raise ValueError(
                "the harness needs a tokenizer of transformers, which an engine does not have: "
                "give tokenizer="
            )
        options: dict[str, Any] = {}
        if add_bos_token is not None:
            options["add_bos_token"] = add_bos_token
        if tokenizer is None and revision != "None":  # HFLM makes None a text
            options["revision"] = revision
        self.tokenizer = load_tokenizer(tokenizer or pretrained, **options)

    # -- requests ---------------------------------------------------------------------------------
    @property
    def max_length(self) -> int:
        """Tokens of a context and what follows it."""
        if self._native and not self._max_length:
            return self._path.engine.max_length
        return super().max_length

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts; see the class for what the routers read."""
        if "skip_plan" not in self._path.choice:
            logger.warning(
                "loglikelihood_rolling has no prompts: the routers read the token before each "
                "text. Give a skip_plan to measure one"
            )
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is what greedy decoding gives) of every request."""
        pairs = [self._fit(context, continuation) for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        hidden = disable_tqdm or self.rank != 0
        with tqdm(total=len(pairs), disable=hidden, desc="Running loglikelihood requests") as bar:
            for i, scored in self._path.score(pairs, override_bs or self._batch_size_for(requests)):
                found[i] = (scored.log_likelihood, scored.is_greedy)
                self.plan_counts[scored.skip_plan] += 1
                if requests[i][0] is not None:  # None: a window of loglikelihood_rolling
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
                bar.update()
        return found

    def _fit(self, context: list[int], continuation: list[int]) -> Pair:
        """Cuts the context on the left where both are too long; the last token is not read.

        Raises:
            ValueError: an empty continuation, or one that alone is too long.
        """
        if not 0 < len(continuation) <= self.max_length:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens, not 1 to {self.max_length}"
            )
        excess = len(context) + len(continuation) - (self.max_length + 1)
        if excess > 0:
            logger.warning("a context loses its first %d tokens: it is too long", excess)
        return context[max(excess, 0) :], continuation

    def _batch_size_for(self, requests: list[tuple[Any, list[int], list[int]]]) -> int:
        if self.batch_size != "auto":
            return self.batch_size
        longest = max(requests, key=lambda request: len(request[1]) + len(request[2]), default=None)
        return 1 if longest is None else self._detect_batch_size([longest])

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any
    ) -> torch.Tensor:
        """Prompts [B, T], left-padded, and their answers, each under its plan."""
        if isinstance(self._path, NativePath):
            mask, pad_id = options.pop("attention_mask"), self.tokenizer.pad_token_id
            room = max_length - context.shape[1]
            tokens, plans = self._path.generate(context, mask, room, stop, pad_id, **options)
        else:
            output = super()._model_generate(
                context, max_length, stop, return_dict_in_generate=True,
                **self._path.choice, **options,
            )  # fmt: skip
            tokens, plans = output.sequences, output.skip_plans
        self.plan_counts.update(plans)
        return tokens

    # -- reports ----------------------------------------------------------------------------------
    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results; `plan_counts` start again."""
        counts, self.plan_counts = self.plan_counts, Counter()
        requests = sum(counts.values())
        skipped = sum(plan.skip_rate * count for plan, count in counts.items())
        choice = {**self._path.choice}
        if "skip_plan" in choice:
            choice["skip_plan"] = str(choice["skip_plan"])
        facts: dict[str, Any] = {
            "version": firstlm.__version__,
            "engine": self._path.name,
            **choice,
            "requests": requests,
            "skip_rate": skipped / requests if requests else None,
            "distinct_plans": len(counts),
        }
        if requests:
            logger.info(
                "firstlm skipped %.1f %% of the layers in %d requests, %d different plans",
                100 * skipped / requests, requests, len(counts),
            )  # fmt: skip
        if isinstance(self._path, NativePath):
            dtype = self._path.engine.config.decoder["precision"]
            return {"model_dtype": dtype, "model_revision": self.revision, "firstlm": facts}
        return {
            "model_num_parameters": self._path.model.num_parameters(),
            "model_dtype": str(self._path.model.dtype),
            "model_revision": self.revision,
            "model_sha": self._path.model.router_config.base_revision or "",
            "firstlm": facts,
        }


def _refuse_options_of_loading(**options: Any) -> None:
    """Raises ValueError for options that a model which is there already cannot follow."""
    if given := [name for name, value in options.items() if value is not None]:
        raise ValueError(
            f"{', '.join(given)}: of how a model is loaded, and this one is: leave it out, or name "
            "the model's folder instead"
        )


def _is_native(pretrained: Any, engine: str | None) -> bool:
    """Whether the engine runs the model.

    Raises:
        TypeError: a model that is neither routed nor an engine.
        ValueError: an unknown engine, or one that is not that of the model.
    """
    if engine not in (None, "hf", "native"):
        raise ValueError(f"engine must be hf or native, got {engine!r}")
    if isinstance(pretrained, str):
        return engine == "native"
    if not isinstance(pretrained, RoutedModel | Engine):
        raise TypeError(
            "pretrained takes a folder, a hub id, a model of firstlm.from_pretrained or a "
            f"firstlm.Engine, got {type(pretrained).__name__}"
        )
    native = isinstance(pretrained, Engine)
    if engine is not None and native != (engine == "native"):
        raise ValueError(f"engine={engine} does not fit a {type(pretrained).__name__}")
    return native


def _source(pretrained: Any) -> str:
    """Where the tokenizer may be; empty for an engine."""
    if isinstance(pretrained, str):
        return pretrained
    return (
        "" if isinstance(pretrained, Engine) else pretrained.router_config.base_model_name_or_path
    )


def _plan_choice(
    skip_plan: SkipPlan | str | None, budget: float | None, budget_mode: str, num_layers: int
) -> dict[str, Any]:
    """The arguments of `generate`."""
    if budget is not None:
        return {"budget": budget, "budget_mode": budget_mode}
    if skip_plan is None:
        return {}
    if isinstance(skip_plan, str):
        skip_plan = parse_plan(skip_plan, num_layers)
    return {"skip_plan": skip_plan}
