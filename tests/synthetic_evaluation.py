"""An `Evaluation` made up by rule: what a method loses is known, to check statistics."""

from __future__ import annotations

import numpy as np

from firstlm.evaluation.records import Evaluation, ExampleResult, Method, MethodResult, Timing

TASKS = ("debian-synopsis", "debian-en-de")
LAYERS = 30
_WORDS = ["a", "tool", "library", "for", "fast", "files", "that", "reads", "writes", "network"]


def result(
    method: Method,
    cost: float = 0.0,
    *,
    n: int = 60,
    plans: int = 1,
    shared_noise: float = 0.5,
    own_noise: float = 0.05,
    timed: bool = True,
    tasks: tuple[str, ...] = TASKS,
) -> MethodResult:
    """A method whose cross-entropy is `cost` nats a token above 2.0 in expectation.

    Args:
        n: examples a task.
        plans: distinct skip plans; a task has some of its own.
        shared_noise, own_noise: deviation of an example's cross-entropy that all methods have in
            common, and that this one has alone.
    """
    common, own = np.random.default_rng(1), np.random.default_rng(abs(hash_of(method)))
    skipped = round(method.skip_rate_asked * LAYERS)
    examples = []
    for task_index, task in enumerate(tasks):
        for index in range(n):
            tokens = int(common.integers(5, 30))
            level = 2.0 + 0.3 * task_index + shared_noise * common.standard_normal()
            reference = [str(word) for word in common.choice(_WORDS, 9)]
            loss = level + cost + own_noise * own.standard_normal()
            wrong = own.random(9) < 0.4 + 0.3 * cost
            answer = ["wrong" if bad else w for bad, w in zip(wrong, reference, strict=True)]
            shift = int(own.integers(plans)) if plans > 1 else 0
            drop = {3 + (2 * step + shift + 3 * task_index * (plans > 1)) % (LAYERS - 5)
                    for step in range(skipped)}  # fmt: skip
            kept = tuple(layer for layer in range(LAYERS) if layer not in drop)
            examples.append(
                ExampleResult(
                    example=f"{index}",
                    task=task,
                    prompt_tokens=int(common.integers(20, 200)),
                    kept=kept,
                    layers_run=float(len(kept)),
                    loss=tokens * loss,
                    tokens=tokens,
                    answer=" ".join(answer),
                    reference=" ".join(reference),
                )
            )
    return MethodResult(method, LAYERS, examples, _timing(skipped) if timed else None)


def hash_of(method: Method) -> int:
    """The same in every process, unlike `hash`."""
    return int.from_bytes(method.key.encode()[-12:], "little")


def _timing(skipped: int, prompts: int = 8, repeats: int = 3) -> Timing:
    generator = np.random.default_rng(skipped)
    share = (LAYERS - skipped + 8) / (LAYERS + 8)

    def times(level: float) -> list[float]:
        return (level * (1 + 0.02 * generator.random(prompts * repeats))).tolist()

    kept = LAYERS - skipped
    return Timing(
        "native", "int8", 2, prompts, repeats, 32, times(10 * (share + 0.01)), times(40 * share),
        times(10), times(40), 1 / share, [kept * 4096] * prompts, [LAYERS * 4096] * prompts,
    )  # fmt: skip


def evaluation(n: int = 60, *, adaptive: bool = True, timed: bool = True) -> Evaluation:
    """FiRST with three seeds beside its rivals at 25 and 50 %; without `adaptive` it loses."""
    methods = [
        result(Method("base", "base", 0.0), 1.2, n=n, timed=timed),
        result(Method("lora_only", "trained", 0.0), 0.0, n=n, timed=timed),
    ]
    for rate in (0.25, 0.5):
        worse = 1.0 if adaptive else -0.3
        for seed in range(3):
            first = Method("first", "first", rate, seed)
            methods.append(result(first, 0.6 * rate + 0.01 * seed, n=n, plans=9, timed=timed))
            static = Method("static", "trained", rate, seed)
            methods.append(result(static, (0.6 + 0.25 * worse) * rate, n=n, timed=timed))
        costs = {"uniform": 1.6, "random": 2.2, "length": 0.85, "greedy": 0.62}
        for name, cost in costs.items():
            methods.append(result(Method(name, "trained", rate), cost * rate, n=n, timed=timed))
        for name, cost in {"first_layers": 9.0, "last_layers": 8.0, "block_influence": 6.0}.items():
            methods.append(result(Method(name, "base", rate), cost * rate, n=n, timed=timed))
        for name, cost in {"most_kept": 1.1, "length": 0.9}.items():
            method = Method(name, "first", rate)
            methods.append(result(method, cost * rate, n=n, timed=timed))
        shuffled = Method("shuffled", "first", rate)
        cost = (0.6 + max(worse, 0)) * rate
        methods.append(result(shuffled, cost, n=n, plans=9, timed=False))
    settings = {"data": list(TASKS), "examples": n, "rates": [0.25, 0.5], "split": "test"}
    return Evaluation(settings, methods, {"layer calls equal the plans": "1,200 answers"})
