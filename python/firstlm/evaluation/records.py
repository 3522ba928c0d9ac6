"""What an evaluation measures: one `Method` under one `ExampleResult` a prompt, and its `Timing`.

Everything else (metrics, intervals, tables, plots) is computed from these, so that a report can be
made again without running a model. Letters: N examples, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Weights = Literal["trained", "first", "base"]


@dataclass(frozen=True)
class Method:
    """One way to choose layers, at one skip rate, with one seed.

    Attributes:
        name: "first", "lora_only", "static", "random", "uniform", "shuffled", ...
        weights: whose weights run: "trained" for this method with FiRST's number of optimizer
            steps; "first": FiRST's own under this method's plans; "base": not finetuned.
        skip_rate_asked: of all layers; 0 where nothing is skipped.
        seed: number of the training (the folder's position) or, of random plans, of the draw.
        checkpoint: folder of the weights; None for the base model.
    """

    name: str
    weights: Weights
    skip_rate_asked: float
    seed: int = 0
    checkpoint: str | None = None

    @property
    def key(self) -> str:
        """Unique in an evaluation, fit for a file name: "static-trained-0.25-seed0"."""
        return f"{self.name}-{self.weights}-{self.skip_rate_asked:.4g}-seed{self.seed}"


@dataclass(frozen=True)
class ExampleResult:
    """One example under one method.

    Attributes:
        example: its id in the corpus.
        task: the corpus that it is from.
        prompt_tokens: length of the prompt.
        kept: the layers of its skip plan; of an early exit by confidence, as many first layers as
            the reference's tokens go through on average.
        layers_run: layers a generated token went through, counted inside the model.
        loss: cross-entropy summed over the reference's tokens, in nats, teacher-forced.
        tokens: tokens of the reference.
        answer: what the model wrote, greedily.
        reference: what it should have written.
    """

    example: str
    task: str
    prompt_tokens: int
    kept: tuple[int, ...]
    layers_run: float
    loss: float
    tokens: int
    answer: str
    reference: str


@dataclass
class Timing:
    """Decode under a method's plans beside the same weights with nothing skipped, in turns.

    Attributes:
        engine, precision, threads: what ran.
        prompts, repeats, new_tokens: prompts timed, timed passes over each, tokens of every pass.
        tpot_ms, ttft_ms: a value a prompt and repeat; full_*: of the plan that keeps all layers.
        ideal_speedup: of the mean over prompts, from the bytes that a token reads.
        kv_bytes, full_kv_bytes: a value a prompt, held when the last token is out.
    """

    engine: str
    precision: str
    threads: int
    prompts: int
    repeats: int
    new_tokens: int
    tpot_ms: list[float]
    ttft_ms: list[float]
    full_tpot_ms: list[float]
    full_ttft_ms: list[float]
    ideal_speedup: float
    kv_bytes: list[int]
    full_kv_bytes: list[int]


@dataclass
class MethodResult:
    """A method with all that was measured of it; `notes` says what a reader must know."""

    method: Method
    num_layers: int
    examples: list[ExampleResult]
    timing: Timing | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Evaluation:
    """All methods on the same examples, in the same order.

    Attributes:
        settings: what was asked for (data, rates, lengths, seeds), to be written beside figures.
        checks: name of a self-check -> what it found; a failed one raises before this exists.
    """

    settings: dict[str, Any]
    methods: list[MethodResult]
    checks: dict[str, str] = field(default_factory=dict)
