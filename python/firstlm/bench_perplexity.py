"""`firstlm bench perplexity`: what precision costs, in firstlm's engine and in llama.cpp.

Every runtime scores windows of the shipped corpora's test splits, chats as in training: the
log-probability of each token but a window's first, given those before it in the window. The
reference that the others are divided by is transformers in float32.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from firstlm import bench_models, gguf_files
from firstlm.bench_arms import HF, LLAMA_CPP, NATIVE
from firstlm.bench_decode import check_against, check_precisions
from firstlm.bench_models import EQUAL_GGUF, PRECISIONS, BenchModel
from firstlm.bench_text import Window, windows
from firstlm.corpus import CORPUS_NAMES

# How far the engine may be from float32, as a share of its perplexity. Lower is a fault too: 4 bits
# can round a small adapter away, and what is left is the base, which may do better on some text.
BARS = {"bfloat16": 0.005, "int8": 0.01, "int4": 0.04}


@dataclass(frozen=True)
class Effort:
    """Windows of a corpus, and tokens of a window."""

    count: int = 16
    length: int = 512


QUICK = Effort(count=2, length=24)


class Scorer(ABC):
    """A runtime that scores tokens.

    Attributes:
        runtime, precision: names for the reader.
        weight_bytes: of all weights, the embedding included.
    """

    runtime: str
    precision: str
    weight_bytes: int

    @abstractmethod
    def score(self, tokens: Sequence[int]) -> Tensor:
        """Log-probabilities of tokens 1 to T - 1 given those before, f64 [T - 1]."""

    def close(self) -> None:  # noqa: B027
        """Free what the scorer holds."""


def run(
    path: str = "embedded",
    *,
    against: Sequence[str] = ("llama.cpp",),
    precisions: Sequence[str] = PRECISIONS,
    effort: Effort | None = None,
    corpora: Sequence[str] = CORPUS_NAMES,
    threads: int | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    native: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Perplexities, for `firstlm.figures`.

    Args:
        as `bench_decode.run`; transformers in float32 always takes part.
        corpora: whose test splits are read.

    Returns:
        `{"model", "windows", "window_tokens", "rows", "bars"}`. A row is one runtime on one corpus:
        `perplexity` of all tokens, `answer_perplexity` of those of answers, `ratio` and
        `answer_ratio` to the reference, `ratio_error`: the standard error of `ratio` over windows,
        `bits_per_weight`.

    Raises:
        as `bench_decode.run`.
    """
    from tqdm.auto import tqdm

    from firstlm.figures import available_cores

    effort = effort or Effort()
    precisions = check_precisions(precisions)
    check_against(against)
    threads = threads or available_cores()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = bench_models.load(path, work_dir)
        texts = {
            corpus: windows(corpus, model.tokenizer, length=effort.length, count=effort.count)
            for corpus in corpora
        }
        rows: list[dict[str, Any]] = []
        reference: dict[str, list[Tensor]] = {}
        scorers = _scorers(model, against, precisions, threads, effort.length, native)
        kinds = [k for p in precisions for k in EQUAL_GGUF[p]] if "llama.cpp" in against else []
        total = 1 + native * len(precisions) + len(kinds)
        with tqdm(
            total=total * len(corpora) * effort.count, unit="window", disable=not progress
        ) as bar:
            for scorer in scorers:  # one at a time: their weights need not fit together
                for corpus, found in texts.items():
                    bar.set_description(f"{scorer.runtime} {scorer.precision}")
                    scores = []
                    for window in found:
                        scores.append(scorer.score(window.tokens))
                        bar.update(1)
                    reference.setdefault(corpus, scores)
                    row = _row(found, scores, reference[corpus])
                    bits = 8 * scorer.weight_bytes / model.hf.num_parameters()
                    rows.append(
                        {
                            "corpus": corpus,
                            "runtime": scorer.runtime,
                            "precision": scorer.precision,
                            **row,
                            "weight_bytes": scorer.weight_bytes,
                            "bits_per_weight": bits,
                        }
                    )
                scorer.close()
    finally:
        torch.set_num_threads(before)
    return {
        "model": path,
        "windows": effort.count,
        "window_tokens": effort.length,
        "rows": rows,
        "bars": bars(rows),
    }


def _scorers(
    model: BenchModel,
    against: Sequence[str],
    precisions: Sequence[str],
    threads: int,
    length: int,
    native: bool,
) -> Iterator[Scorer]:
    """The reference first."""
    yield HfScorer(model.hf)
    if "hf" in against:
        yield HfScorer(bench_models.in_dtype(model.hf, torch.bfloat16))
    kinds = [kind for precision in precisions for kind in EQUAL_GGUF[precision]]
    files = model.gguf(kinds, threads) if "llama.cpp" in against else {}
    for precision in precisions:
        if native:
            yield NativeScorer(model, precision, threads)
        if files:
            for kind in EQUAL_GGUF[precision]:
                yield LlamaCppScorer(files[kind], kind, threads, length)


class HfScorer(Scorer):
    """A plain model of transformers."""

    runtime = HF

    def __init__(self, model: Any) -> None:
        self.precision = str(model.dtype).removeprefix("torch.")
        self.weight_bytes = sum(p.nbytes for p in model.parameters())  # tied ones once
        self._model = model

    @torch.inference_mode()
    def score(self, tokens: Sequence[int]) -> Tensor:
        return log_probabilities(self._model(torch.tensor([tokens])).logits[0], tokens)


class LlamaCppScorer(Scorer):
    """llama.cpp on a GGUF file."""

    runtime = LLAMA_CPP

    def __init__(self, path: Any, kind: str, threads: int, length: int) -> None:
        from firstlm.llama_cpp_model import LlamaCppModel

        self.precision = kind
        self.weight_bytes = sum(gguf_files.tensor_bytes(path).values())
        self._model = LlamaCppModel(path, num_threads=threads, context=length)

    def score(self, tokens: Sequence[int]) -> Tensor:
        self._model.clear()
        logits = torch.from_numpy(self._model.extend(tokens, all_logits=True))
        return log_probabilities(logits, tokens)

    def close(self) -> None:
        self._model.close()


class NativeScorer(Scorer):
    """firstlm's engine, no layer skipped."""

    runtime = NATIVE

    def __init__(self, model: BenchModel, precision: str, threads: int) -> None:
        from firstlm.skip_plan import SkipPlan

        self.precision = precision
        self._engine = model.engine(precision, threads)
        self._plan = SkipPlan.full(model.hf.config.num_hidden_layers)
        self.weight_bytes = self._engine.weight_bytes

    def score(self, tokens: Sequence[int]) -> Tensor:
        [scores] = self._engine.score([list(tokens[:1])], [list(tokens[1:])], skip_plan=self._plan)
        return torch.as_tensor(scores).double()

    def close(self) -> None:
        self._engine = None


def log_probabilities(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Of tokens 1 to T - 1, f64 [T - 1], from the logits [T, V] after each token."""
    targets = torch.tensor(tokens[1:])
    scored = logits[:-1].float()
    chosen = scored.gather(1, targets[:, None])[:, 0]
    return (chosen.double() - scored.double().logsumexp(1)).cpu()


def _row(
    found: Sequence[Window], scores: Sequence[Tensor], reference: Sequence[Tensor]
) -> dict[str, Any]:
    """Perplexities of windows, and their ratios to the reference's."""
    answers = torch.cat([torch.tensor(window.is_answer[1:]) for window in found])
    own, other = torch.cat(list(scores)), torch.cat(list(reference))
    # Every window has the same number of tokens, so the mean of their means is the mean.
    gaps = torch.stack([(r - s).mean() for s, r in zip(scores, reference, strict=True)])
    ratio = math.exp(gaps.mean())
    error = ratio * float(gaps.std()) / len(gaps) ** 0.5 if len(gaps) > 1 else None
    has_answers = bool(answers.any())
    return {
        "tokens": own.numel(),
        "perplexity": math.exp(-own.mean()),
        "ratio": ratio,
        "ratio_error": error,
        "answer_tokens": int(answers.sum()),
        "answer_perplexity": math.exp(-own[answers].mean()) if has_answers else None,
        "answer_ratio": math.exp((other - own)[answers].mean()) if has_answers else None,
    }


def bars(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`{"quantity", "value", "limit", "met"}` of the engine's distances."""
    found = []
    for row in rows:
        if row["runtime"] == NATIVE and row["precision"] in BARS:
            distance, limit = abs(row["ratio"] - 1), BARS[row["precision"]]
            quantity = f"{row['precision']}, {row['corpus']}: perplexity's distance from float32's"
            met = distance <= limit
            found.append({"quantity": quantity, "value": distance, "limit": limit, "met": met})
    return found


def as_text(figures: Mapping[str, Any]) -> str:
    """The figures as a table for a terminal."""
    lines = []
    for corpus in dict.fromkeys(row["corpus"] for row in figures["rows"]):
        rows = [row for row in figures["rows"] if row["corpus"] == corpus]
        lines += [
            f"{figures['model']}, {corpus}: {figures['windows']} windows of "
            f"{figures['window_tokens']} tokens, {rows[0]['answer_tokens']} of them in answers",
            f"  {'':<26}{'bits/weight':>12}{'perplexity':>12}{'ratio':>18}"
            f"{'answers':>12}{'ratio':>9}",
        ]
        for row in rows:
            name = f"{row['runtime']} {row['precision']}"
            error = "" if row["ratio_error"] is None else f" ± {row['ratio_error']:.4f}"
            answers = row["answer_perplexity"]
            tail = "" if answers is None else f"{answers:12.3f}{row['answer_ratio']:9.4f}"
            lines.append(
                f"  {name:<26}{row['bits_per_weight']:12.2f}{row['perplexity']:12.3f}"
                f"{row['ratio']:9.4f}{error:>9}{tail}"
            )
        lines.append("")
    for bar in figures["bars"]:
        verdict = "met" if bar["met"] else "MISSED"
        lines.append(f"{bar['quantity']}: {bar['value']:.2%} (<= {bar['limit']:.1%}, {verdict})")
    return "\n".join(lines).rstrip()
