"""How an evaluation finds the plans of its methods: FiRST's own first, which make those of others.

What takes work is found by the main process and goes to disk at once, where every process reads it.
N examples, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from firstlm.data import PromptAnswerCollator
from firstlm.decode_paths import Arm
from firstlm.evaluation import early_exit
from firstlm.evaluation import methods as rules
from firstlm.evaluation.data import EvaluationData, fingerprint
from firstlm.evaluation.methods import FirstPlans
from firstlm.evaluation.records import Method
from firstlm.evaluation.weights import Weights
from firstlm.held_out import Example, rows_of
from firstlm.length_plans import LengthPlans

if TYPE_CHECKING:
    from firstlm.evaluation.run import Run


class Plans:
    """The plans of all methods, found one set of weights after the other.

    Attributes:
        keep: method key -> keep mask [N, L] on test examples.
        exits: method key -> threshold of an early exit by confidence.
        notes: method key -> what a reader must know of its plans.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._first: dict[Method, FirstPlans] = {}
        self.keep: dict[str, torch.Tensor] = {}
        self.exits: dict[str, float] = {}
        self.notes: dict[str, list[str]] = {method.key: [] for method in run.methods}

    def find(self, weights: Weights, group: Sequence[Method]) -> None:
        """Of the methods that share weights; the groups that FiRST is in come first."""
        for method in group:
            if (method.name, method.weights) == ("first", "first"):
                self._first[method] = self._find_first(weights, method)
        for method in group:
            self.keep[method.key] = self._find(weights, method)

    def bits(self, method: Method, rows: Sequence[int] | slice = slice(None)) -> list[str]:
        """A method's plans, of all or some test examples, as text that keys are made of."""
        return mask_to_bits(self.keep[method.key][rows])

    def thresholds(self, method: Method) -> list[float]:
        """Of FiRST's routers [L]."""
        return self._first[method].thresholds

    # ---- FiRST's own ----

    def _find_first(self, weights: Weights, method: Method) -> FirstPlans:
        run, rate = self._run, method.skip_rate_asked
        key = {
            "what": "first", "weights": weights.key, "rate": rate, **run.prints,
            **weights.quality_key,
        }  # fmt: skip

        def find() -> dict[str, Any]:
            thresholds = weights.use_thresholds(rate, None)
            parts = {"validation": run.data.validation, "test": run.data.test}
            return {"thresholds": thresholds} | {
                name: mask_to_bits(self._routed(weights, {"budget": rate}, examples))
                for name, examples in parts.items()
            }

        value = run.once(key, find)
        weights.thresholds[rate] = value["thresholds"]
        validation, test = (bits_to_mask(value[part]) for part in ("validation", "test"))
        achieved = 1.0 - test.double().mean().item()
        if abs(achieved - rate) > 0.02:
            note = f"asked for {rate:.1%}, skips {achieved:.1%} of the test prompts' layers"
            self.notes[method.key].append(note)
        exact = None
        if any((m.name, m.skip_rate_asked) == ("exact", rate) for m in run.methods):
            arm = {"budget": rate, "budget_mode": "exact"}
            bits = run.once(
                {**key, "what": "exact"},
                lambda: mask_to_bits(self._routed(weights, arm, run.data.test)),
            )
            exact = bits_to_mask(bits)
        return FirstPlans(value["thresholds"], validation, test, exact)

    def _routed(self, weights: Weights, arm: Arm, examples: Sequence[Example]) -> torch.Tensor:
        """The routers' plans [N, L], in the batches in which they are measured."""
        data = EvaluationData([], list(examples), 0)
        batches = data.batches(self._run.effort.batch_size)
        found: list[Any] = [None] * len(examples)
        at = f" at {arm['budget']:g}" if "budget" in arm else ""
        with self._run.bar(f"plans{at}: examples", len(examples)) as update:
            for batch in batches:
                mask = weights.path.plans([examples[i] for i in batch], arm)
                for row, i in zip(mask, batch, strict=True):
                    found[i] = row
                update(len(batch))
        return torch.stack(found)

    def _first_of(self, method: Method) -> FirstPlans:
        """FiRST's plans that a control of one rate is made from."""
        candidates = [m for m in self._first if m.skip_rate_asked == method.skip_rate_asked]
        own = [m for m in candidates if m.checkpoint == method.checkpoint]
        return self._first[(own or candidates)[0]]

    # ---- of any method ----

    def _find(self, weights: Weights, method: Method) -> torch.Tensor:
        """Keep mask [N, L] of a method on the test examples."""
        data, draw = self._run.data, self._run.seed + method.seed
        name, rate, count = method.name, method.skip_rate_asked, len(data.test)
        num_layers, protected = weights.num_layers, weights.protected
        if name == rules.CONFIDENT_EXIT:
            self.exits[method.key] = self._exit_threshold(weights, rate)
            self.notes[method.key].append(early_exit.NOTE)
        if name in (*rules.UNSKIPPED, rules.CONFIDENT_EXIT):
            return torch.ones(count, num_layers, dtype=torch.bool)
        if method.weights == "trained":
            return self._trained(weights)
        if name == "first":
            return self._first_of(method).test
        if name in rules.FROM_FIRST:
            return rules.plans_from_first(
                name, self._first_of(method), data.validation, data.test, draw, protected, rate
            )
        if name in rules.BY_POSITION:
            plan = rules.plan_by_position(name, num_layers, rate, protected, draw)
        elif name == "static":
            plan = self._static(weights, method)
        else:
            plan = self._measured(weights, name, rate)
        return torch.tensor(plan).expand(count, -1)

    def _trained(self, weights: Weights) -> torch.Tensor:
        """Of a trained control [N, L]: what its own routers, which carry its plan, say, or the
        plans for prompt lengths in its folder."""
        run = self._run
        if by_length := LengthPlans.load(weights.folder):
            return by_length.of(torch.tensor([len(e.prompt_ids) for e in run.data.test]))

        def find() -> list[str]:
            return mask_to_bits(self._routed(weights, {}, run.data.test))

        key = {"what": "trained", "weights": weights.key, **run.prints, **weights.quality_key}
        return bits_to_mask(run.once(key, find))

    # ---- measured on validation examples ----

    def _examples(self) -> list[Example]:
        """The validation examples, some of each task, that plans are measured on."""
        data, count = self._run.data, self._run.effort.plan_examples
        return [
            example
            for task in data.tasks
            for example in [e for e in data.validation if e.task == task][:count]
        ]

    def _key(self, what: str, weights: Weights, examples: Sequence[Example]) -> dict[str, Any]:
        """What a plan or threshold that is measured on examples depends on, beside the rate."""
        return {
            "what": what, "weights": weights.key, "examples": fingerprint(examples),
            "dtype": str(self._run.request.dtype),
        }  # fmt: skip

    def _exit_threshold(self, weights: Weights, rate: float) -> float:
        """Of an early exit by confidence."""
        run, examples = self._run, self._examples()
        key = self._key(rules.CONFIDENT_EXIT, weights, examples)

        def find() -> float:
            collator, rows = PromptAnswerCollator(run.tokenizer), rows_of(examples)
            return early_exit.calibrate_early_exit(weights.model, rows, collator, [rate])[rate]

        return run.once({**key, "rate": rate, "protected": weights.protected}, find)

    def _measured(self, weights: Weights, name: str, rate: float) -> list[bool]:
        """Of greedy or block_influence [L]; what is measured serves all rates."""
        run, examples = self._run, self._examples()
        most = max(method.skip_rate_asked for method in run.methods)
        key = {**self._key(name, weights, examples), "protected": weights.protected}

        def influence() -> list[float]:
            with run.bar("block influence: examples", len(examples)) as update:
                return rules.block_influence(weights.model, examples, run.tokenizer, update)

        def order() -> list[int]:
            with run.bar("greedy plan: plans", None) as update:
                return rules.greedy_order(weights.model, examples, run.tokenizer, most, update)

        if name == "block_influence":
            found = run.once(key, influence)
            return rules.controls.importance_plan(found, rate, weights.protected)
        dropped = run.once({**key, "rate": most}, order)
        count = rules.controls.layers_to_drop(rate, weights.num_layers, weights.protected)
        return rules.controls.plan_without(weights.num_layers, dropped[:count])

    def _static(self, weights: Weights, method: Method) -> list[bool]:
        """The better of two plans [L]."""
        run, rate, examples = self._run, method.skip_rate_asked, self._examples()
        share = self._first_of(method).keep_share
        plans = {
            "most_kept": rules.controls.most_kept_plan(share, rate, weights.protected),
            "greedy": self._measured(weights, "greedy", rate),
        }
        better = run.once(
            {**self._key("static", weights, examples), "rate": rate, "plans": plans},
            lambda: rules.better_plan(plans, weights.model, examples, run.tokenizer),
        )
        self.notes[method.key].append(f"the better on validation examples: {better}")
        return plans[better]


def mask_to_bits(mask: torch.Tensor) -> list[str]:
    """A keep mask [N, L] as short text, a string of 0 and 1 a row."""
    return ["".join("1" if kept else "0" for kept in row) for row in mask.tolist()]


def bits_to_mask(bits: Sequence[str]) -> torch.Tensor:
    """The inverse of `mask_to_bits`."""
    return torch.tensor([[bit == "1" for bit in row] for row in bits])
