"""`Engine`: the native decode loop, from prompts to answers."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch

from firstlm import bandwidth, native
from firstlm.arguments import whole_number
from firstlm.engine import saved
from firstlm.engine.answers import Generation
from firstlm.engine.call import Call, check_options, check_rows, prepare, run
from firstlm.engine.chat import Chat
from firstlm.engine.core import DecoderCore
from firstlm.engine.planning import (
    PlanChoice,
    Prefilled,
    is_reusable,
    known_plans,
    prefill_prompts,
)
from firstlm.engine.prefix import PrefixStore
from firstlm.engine.prompts import Prompts, require_tokenizer
from firstlm.engine.routers import EngineRouters
from firstlm.engine.saved import SavedEngine
from firstlm.engine.scoring import Score, score_rows
from firstlm.engine.stats import EngineStats
from firstlm.router import RouterConfig
from firstlm.skip_plan import RoutingOutput, SkipPlan, mask_to_plans


class Engine:
    """A model whose decode runs in C++, from packed weights: `Engine.from_pretrained(...)`.

    Calls may come from several threads: they take turns. Engines share nothing but the process's
    threads.

    Example:
        >>> engine = firstlm.Engine.from_pretrained("embedded", precision="int8")
        >>> engine.generate("What is a package?")
        >>> for piece in engine.stream("What is a package?"):
        ...     print(piece, end="", flush=True)

    Attributes:
        config: what `engine.json` of a saved engine holds.
        tokenizer: None if the engine was made without one; token ids still work.
        stats: `EngineStats` of the call that ended last.
        read_gb_per_s: what `measure_bandwidth` found.
        last: `Generation` of the stream that ended last.
        core: the native decoder.
    """

    def __init__(self, parts: SavedEngine, num_threads: int | None = None) -> None:
        """Of the parts of an engine; use `from_pretrained`, `from_model` or `load`."""
        self.config = parts.config
        self.tokenizer = parts.tokenizer
        self.stats = EngineStats()
        self.read_gb_per_s: float | None = None
        self.last: Generation | None = None
        self._block = parts.block
        routers = None
        if self.config.router_config is not None:
            routers = EngineRouters(
                RouterConfig.from_dict(self.config.router_config),
                self._block.tensors,
                self.config.trained_prefill,
            )
        threads = _threads(num_threads)
        self.core = DecoderCore(self.config.decoder, self._block.tensors, routers, threads)
        self._prefixes = PrefixStore(capacity=1)

    # -- from where it comes ----------------------------------------------------------------------
    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        precision: str | None = None,
        head_precision: str | None = None,
        num_threads: int | None = None,
        lora: str = "auto",
        cache: bool = True,
        progress: bool | None = None,
        **kwargs: Any,
    ) -> Engine:
        """An engine of whatever `firstlm.from_pretrained` loads, its adapter included.

        Weights are packed once and kept in the user's cache, by the contents of the source.

        Args:
            source: a model or checkpoint as in `firstlm.from_pretrained`, or the folder of a saved
                engine.
            precision: of the layers: "float32", "bfloat16", "int8" (a scale for 64 inputs) or
                "int4" (a scale and a minimum for 32 inputs). None: int8, or the saved engine's.
            head_precision: of embeddings and output head; None: as the layers, but int8 beside
                int4 layers.
            num_threads: None: as many as torch uses.
            lora: "merge": an adapter is merged into the weights before they are packed. "apart": it
                stays beside them in bfloat16, which costs its bytes with every token. "auto": apart
                beside int4 layers, whose grid would round most of it away, else merged.
            cache: keep and use packed weights.
            progress: show what happens on stderr; None: on a terminal.
            **kwargs: handed to `firstlm.from_pretrained` (`router`, `adapter`, `revision`, …);
                such engines are not cached.

        Raises:
            ValueError: a family that the engine does not run (the message names the hf path), an
                unknown precision, no such model, or a saved engine of another precision.
            TypeError: a number of threads that is no whole number.
        """
        from firstlm.engine import packing

        parts = packing.packed_parts(
            source, precision, head_precision, lora, _threads(num_threads), cache,
            sys.stderr.isatty() if progress is None else progress, kwargs,
        )  # fmt: skip
        return cls(parts, num_threads)

    @classmethod
    def from_model(
        cls,
        model: Any,
        precision: str | None = None,
        head_precision: str | None = None,
        num_threads: int | None = None,
        lora: str = "auto",
        tokenizer: Any = None,
        progress: bool | None = None,
    ) -> Engine:
        """An engine of a model in memory, routed or not; the model stays as it is.

        Args:
            model: a causal LM of transformers or of `firstlm.from_pretrained`, LoRA adapters that
                are active included.
            tokenizer: of transformers; None: the engine takes token ids only.
            precision, head_precision, num_threads, lora, progress: as in `from_pretrained`.

        Raises:
            TypeError, ValueError: as `from_pretrained`.
        """
        from firstlm.engine import packing

        parts = packing.parts_of(
            model, tokenizer, packing.Form.of(precision, head_precision, lora),
            _threads(num_threads), sys.stderr.isatty() if progress is None else progress,
        )  # fmt: skip
        return cls(parts, num_threads)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], num_threads: int | None = None) -> Engine:
        """The engine that `save` wrote. Raises ValueError if there is none, or a damaged one."""
        return cls(saved.load(Path(folder)), num_threads)

    def __reduce__(self) -> Any:
        raise TypeError("an Engine is not pickled or copied: use save and load")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes packed weights, routers and tokenizer; `load` needs nothing else.

        The folder appears whole or not at all; an engine that lies there is replaced.

        Raises:
            ValueError: `folder` is a file, or holds something other than an engine.
        """
        saved.save(SavedEngine(self.config, self._block, self.tokenizer), Path(folder))

    # -- what it is -------------------------------------------------------------------------------
    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return self.core.num_layers

    @property
    def is_unrouted(self) -> bool:
        """Whether every prompt has the same plan: no routers, or fresh ones."""
        return self.core.routers is None or self.core.routers.constant is not None

    @property
    def weight_bytes(self) -> int:
        """Of the packed weights and everything beside them."""
        return self._block.data.numel()

    @property
    def num_threads(self) -> int:
        """Threads that a step runs on."""
        return self.core.decoder.num_threads

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and its answer together, at most."""
        return self.config.max_length

    @property
    def router_config(self) -> RouterConfig | None:
        """Of the routers; None if the model has none."""
        return None if self.core.routers is None else self.core.routers.config

    def measure_bandwidth(self) -> float:
        """Gigabytes (1e9 bytes) a second that the memory gives to this engine's number of threads.

        Takes some tenths of a second; `stats.bandwidth_share` of later calls is the share of it.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(self.num_threads)
        try:
            self.read_gb_per_s = statistics.median(bandwidth.read_gb_per_s())
        finally:
            torch.set_num_threads(before)
        return self.read_gb_per_s

    # -- what it does -----------------------------------------------------------------------------
    def generate(
        self,
        prompts: Any,
        max_new_tokens: int = 128,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | Sequence[int] = 0,
        stop: str | int | Sequence[str | int] | None = None,
        skip_plan: SkipPlan | Sequence[SkipPlan] | torch.Tensor | None = None,
        budget: float | None = None,
        budget_mode: str = "threshold",
        prefill: str | None = None,
        *,
        raw: bool = False,
        ignore_eos: bool = False,
        details: bool = False,
    ) -> Any:
        """The answers to some prompts, each under its own skip plan.

        Args:
            prompts: a text, chat messages or token ids, or a list of such. A text is a user's
                message if the tokenizer has a chat template, as in training.
            max_new_tokens: of every answer; the model's maximum length may end it earlier.
            temperature, top_k, top_p, min_p, repetition_penalty: as in transformers, applied in its
                order; None: as the model's generation config says, else greedy. Temperature 0 is
                greedy.
            seed: of the first prompt, the next one counts on from it; or one a prompt.
            stop: texts or token ids that end an answer.
            skip_plan: replaces the routers' decisions: one plan, one a prompt, or a keep mask
                bool [L] or [B, L].
            budget: asked skip rate. "threshold": calibrated thresholds, right on average; "exact":
                the same number of layers for every prompt.
            budget_mode: "threshold" or "exact".
            prefill: "route": dropped layers are skipped for the prompt too; "full": the prompt runs
                through every layer. None: as the routers were trained; another one warns.
            raw: texts are given as they are, without the chat template.
            ignore_eos: the end of sequence does not end an answer, as for measuring.
            details: return `Generation` objects.

        Returns:
            The answers, without the prompts, as the prompts were given: a text for a text, an
            assistant's message for chat messages, ids for ids (with the one that ended them); a
            list for a list.

        Raises:
            TypeError, ValueError: arguments that are not accepted, before any work.
        """
        call = self.prepare(
            prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
            top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed, stop=stop,
            skip_plan=skip_plan, budget=budget, budget_mode=budget_mode, prefill=prefill, raw=raw,
            ignore_eos=ignore_eos,
        )  # fmt: skip
        if call.rows:
            for _ in self._run(call):
                pass
        found = [call.generation(row) for row in range(len(call.rows))]
        values = found if details else [_as_asked(call.prompts.kind, one) for one in found]
        return values[0] if call.prompts.single else values

    def stream(self, prompt: Any, **options: Any) -> Generator[Any, None, None]:
        """The answer to one prompt as it comes: pieces of text, or token ids for token ids.

        The pieces together are what `generate` returns. Closing the iterator ends the decode.

        Args:
            prompt: one text, chat or list of ids.
            **options: those of `generate`, but for `details`.

        Raises:
            TypeError, ValueError: as `generate`, at once; TypeError also for several prompts.
        """
        check_options("stream", options)
        call = self.prepare(prompt, as_text=True, **options)
        if not call.prompts.single:
            raise TypeError("stream takes one prompt; generate takes several")
        return self._stream(call)

    def chat(self, messages: Sequence[dict[str, str]] = (), **options: Any) -> Chat:
        """A conversation that reads every turn's tokens once.

        The first turn's plan stays for the later ones; see `Chat`.

        Args:
            messages: what was said before, for example a system message.
            **options: of every turn, those of `generate` but for `details`. Their names are checked
                here, their values with the first turn.

        Raises:
            TypeError: no chat messages, or an option that no call takes.
            ValueError: an engine without a tokenizer.
        """
        require_tokenizer(self.tokenizer)
        return Chat(self, messages, options)

    def plan(
        self,
        prompts: Any,
        *,
        budget: float | None = None,
        budget_mode: str = "threshold",
        skip_plan: SkipPlan | Sequence[SkipPlan] | torch.Tensor | None = None,
        prefill: str | None = None,
        raw: bool = False,
    ) -> RoutingOutput:
        """The plans of some prompts, without decoding; arguments as in `generate`.

        Returns:
            `skip_plans`, one a prompt (in a list also for a single one), and `keep_prob` f32
            [B, L]; ones where there are no routers to ask.

        Raises:
            TypeError, ValueError: as `generate`.
        """
        rows = Prompts.of(prompts).encode(self.tokenizer, raw)
        choice = PlanChoice.of(self.core, len(rows), skip_plan, budget, budget_mode, prefill)
        check_rows(self.config, rows, room=0)
        stats = EngineStats(prompts=len(rows), prompt_tokens=sum(map(len, rows)))
        keep, keep_prob = known_plans(self.core, len(rows), choice)
        if keep is None and rows:
            found = prefill_prompts(self.core, rows, choice, stats)
            keep, keep_prob = found.keep, found.keep_prob
        self.ended(stats)
        if keep is None:
            return RoutingOutput([], torch.ones(0, self.num_layers))
        scores = torch.ones(keep.shape) if keep_prob is None else keep_prob.clone()
        return RoutingOutput(mask_to_plans(keep), scores)

    def score(
        self,
        prompts: Any,
        continuations: Any,
        *,
        skip_plan: SkipPlan | Sequence[SkipPlan] | torch.Tensor | None = None,
        budget: float | None = None,
        budget_mode: str = "threshold",
        prefill: str | None = None,
        raw: bool = False,
        details: bool = False,
    ) -> torch.Tensor | Score | list[torch.Tensor] | list[Score]:
        """How likely continuations are, each after its prompt, which alone decides its plan.

        Continuations of one prompt that follow each other share its prefill.

        Args:
            prompts: as in `generate`.
            continuations: one a prompt, texts (taken as they are) or token ids. Its last token may
                be the one beyond the model's maximum length: it is not read.
            skip_plan, budget, budget_mode, prefill, raw: as in `generate`.
            details: return `Score` objects.

        Returns:
            f32 [tokens of the continuation], natural logarithms of their probabilities; a list for
            a list of prompts.

        Raises:
            TypeError, ValueError: arguments that are not accepted, before any work.
        """
        asked = Prompts.of(prompts)
        rows = asked.encode(self.tokenizer, raw)
        after = Prompts.of(continuations, "continuations")
        if asked.single != after.single:
            one, several = ("prompts", "continuations")[:: 1 if asked.single else -1]
            raise ValueError(
                f"score takes one continuation for one prompt, or a list for a list: {one} is a "
                f"single one and {several} a list"
            )
        if len(after.values) != len(rows):
            raise ValueError(
                f"score takes one continuation a prompt: got {len(after.values)} for {len(rows)}"
            )
        if after.kind == "chat":
            raise TypeError("continuations takes texts or token ids, got chat messages")
        continued = after.values
        if after.kind == "text":
            tokenizer = require_tokenizer(self.tokenizer)
            continued = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in continued]
        choice = PlanChoice.of(self.core, len(rows), skip_plan, budget, budget_mode, prefill)
        check_rows(self.config, rows, room=0)
        whole = [row + more for row, more in zip(rows, continued, strict=True)]
        check_rows(self.config, whole, room=-1, what="prompt and continuation")
        stats = EngineStats(prompts=len(rows), prompt_tokens=sum(map(len, rows)))
        found = score_rows(self.core, rows, continued, choice, stats)
        self.ended(stats)
        values = found if details else [one.log_probs for one in found]
        return values[0] if asked.single else values

    def forget(self) -> None:
        """Drops what earlier calls have read of their prompts, so that the next one reads all."""
        self._prefixes.clear()

    # -- the parts of a call ----------------------------------------------------------------------
    def prepare(self, prompts: Any, **options: Any) -> Call:
        """A call that has been checked; arguments as in `generate`, see `call.prepare`."""
        return prepare(self.config, self.core, self.tokenizer, prompts, **options)

    def ended(self, stats: EngineStats) -> None:
        """A call has ended, whose figures these are."""
        stats.read_gb_per_s = self.read_gb_per_s
        self.stats = stats

    def _stream(self, call: Call) -> Generator[Any, None, None]:
        with contextlib.closing(self._run(call, one_by_one=True)) as steps:
            for ((tokens, text),) in steps:
                if call.prompts.kind == "ids":
                    yield from tokens
                elif text:
                    yield text
        self.last = call.generation(0)

    def _run(
        self, call: Call, one_by_one: bool = False
    ) -> Generator[list[tuple[list[int], str]], None, None]:
        """Runs a call; what it has read is kept, where a later call could know its plan."""
        known = known_plans(self.core, len(call.rows), call.choice)[0]
        prefill = call.choice.prefill_of(self.core)

        def read(call: Call) -> Prefilled:
            return prefill_prompts(self.core, call.rows, call.choice, call.stats, self._prefixes)

        try:
            yield from run(self.core, call, read, one_by_one)
        finally:
            self.ended(call.stats)
            kept = None if known is None else call.kept_sequence()
            if kept is not None and is_reusable(kept.keep, prefill):
                self._prefixes.put(kept)


def _as_asked(kind: str, generation: Generation) -> Any:
    if kind == "ids":
        return generation.tokens
    if kind == "text":
        return generation.text
    return {"role": "assistant", "content": generation.text}


def _threads(num_threads: int | None) -> int:
    if num_threads is None:
        return min(torch.get_num_threads(), native.MAX_THREADS)
    num_threads = whole_number("num_threads", num_threads)
    if not 1 <= num_threads <= native.MAX_THREADS:
        raise ValueError(f"num_threads must lie in [1, {native.MAX_THREADS}], got {num_threads}")
    return num_threads
