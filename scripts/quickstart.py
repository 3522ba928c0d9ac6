"""FiRST on the embedded model, end to end: train, decode held-out prompts adaptively, compare.

    python scripts/quickstart.py                      # what scripts/quickstart.sh runs
    python scripts/quickstart.py --prompts 50 lora.steps=100    # other settings, kept apart

Leaves in the output folder: checkpoint/ (for firstlm.from_pretrained), summary.json, overview.png,
answers.jsonl, and stages/ with the result of every stage, named by a hash of what it depends on. A
second run with the same settings finds them all; an interrupted one goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is missing; returns the content of summary.json."""
    options = parse(arguments)
    started = time.perf_counter()
    say("firstlm quickstart: importing torch and transformers")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries about each other
    from firstlm.train_config import TrainConfig

    config = TrainConfig.from_yaml(options.config, options.overrides).validate()
    run = Quickstart(config, options)
    summary = run.all_stages()
    say(f"\ndone in {(time.perf_counter() - started) / 60:.1f} minutes; see {options.output}/")
    return summary


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="training settings")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts to answer")
    parser.add_argument("--answer-tokens", type=int, default=24, help="longest answer")
    parser.add_argument(
        "--timed-prompts", type=int, default=6, help="prompts to measure latency on"
    )
    parser.add_argument("--timed-tokens", type=int, default=24, help="tokens of each measurement")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each prompt")
    return parser.parse_args(arguments)


class Quickstart:
    """The stages in order; each is a method that returns what `stage` stores."""

    def __init__(self, config: Any, options: argparse.Namespace) -> None:
        self.config, self.options = config, options
        self.folder: Path = options.output
        self.key = key_of(config)
        self.number = 0

    def all_stages(self) -> dict[str, Any]:
        """From nothing to the summary."""
        from firstlm import figures, plots

        self.heading("the embedded model" if self.config.base == "embedded" else "the base model")
        self.obtain_model()
        self.heading("FiRST: routers, then LoRA, every prompt with its own layers")
        first = self.train("first")
        self.heading("control: LoRA alone, the same steps on the same examples, no layer skipped")
        lora = self.train("lora", control="lora_only")
        self.heading("answers to held-out prompts")
        answers = {
            "base": self.answers("base", self.config.base),
            "lora": self.answers("lora", lora.checkpoint),
            "first": self.answers("first", first.checkpoint),
        }
        self.heading("latency, layer calls and cache bytes, with and without skipping")
        timings = self.stage("timings", lambda: self.measure(first.checkpoint))
        self.heading("results")
        publish(first.checkpoint, self.folder / "checkpoint")
        summary = figures.write(
            self.folder / "summary.json",
            self.summarise(answers, timings),
            seed=self.config.seed,
        )
        log = [json.loads(line) for line in first.log.read_text(encoding="utf-8").splitlines()]
        plans = plans_of(answers["first"])
        tasks = [example["task"] for example in self.held_out(self.options.prompts)]
        plots.overview(
            self.folder / "overview.png",
            plans,
            [row for row in log if "loss" in row],
            title=f"{self.model_title()} on {', '.join(sorted(set(tasks)))}",
            groups=tasks if len(set(tasks)) > 1 else None,
        )
        self.write_answers(answers)
        say(examples_of(answers["first"], self.held_out(self.options.prompts)))
        say(table(summary, self.config.skip_rate))
        return summary

    # ---- stages ----

    def obtain_model(self) -> None:
        from firstlm import embedded_model

        if embedded_model.is_alias(self.config.base):
            say(f"in {embedded_model.path()}")

    def train(self, name: str, **changes: Any):
        """A training run; firstlm.train itself finds a finished or interrupted one."""
        import dataclasses

        import firstlm.training

        folder = self.folder / "stages" / f"train-{name}-{self.key}"
        config = dataclasses.replace(self.config, output_dir=str(folder), **changes)
        known = (folder / "result.json").is_file()
        result = firstlm.training.train(config)
        note = " (reused)" if known else ""
        say(f"{name}: cross-entropy {result.health.cross_entropy:.3f} on held-out prompts{note}")
        return result

    def answers(self, name: str, checkpoint: Any) -> dict[str, Any]:
        from firstlm import measure

        def compute() -> dict[str, Any]:
            model, tokenizer = self.load(checkpoint)
            examples = self.held_out(self.options.prompts)
            found = measure.answer(
                model,
                tokenizer,
                [prompt for prompt, _ in map(prompt_and_answer, examples)],
                max_new_tokens=self.options.answer_tokens,
                progress=f"answers, {name}",
            )
            references = [reference for _, reference in map(prompt_and_answer, examples)]
            return {
                "texts": found.texts,
                "rouge_l": measure.rouge_l(found.texts, references),
                "plans": [json.loads(plan.to_json()) for plan in found.skip_plans],
                "layer_calls_per_token": found.layer_calls_per_token,
            }

        return self.stage(f"answers-{name}", compute)

    def measure(self, checkpoint: Path) -> dict[str, Any]:
        from firstlm import SkipPlan, measure

        model, tokenizer = self.load(checkpoint)
        layers = len(model.decoder_layers)
        examples = self.held_out(self.options.timed_prompts)
        timings = measure.time_arms(
            model,
            tokenizer,
            [prompt for prompt, _ in map(prompt_and_answer, examples)],
            {"full": {"skip_plan": SkipPlan.full(layers)}, "routed": {}},
            new_tokens=self.options.timed_tokens,
            repeats=self.options.repeats,
            progress="latency",
        )
        return {name: vars(timing) for name, timing in timings.items()}

    def summarise(self, answers: dict[str, Any], timings: dict[str, Any]) -> dict[str, Any]:
        from firstlm.figures import measured

        plans = plans_of(answers["first"])
        arms = ("full", "routed")
        return {
            "skip_rate": mean([plan.skip_rate for plan in plans]),
            "distinct_plans": len(set(plans)),
            "prompts": len(plans),
            "layers": plans[0].num_layers,
            "layer_calls_per_token": answers["first"]["layer_calls_per_token"],
            "rouge_l": {name: mean(found["rouge_l"]) for name, found in answers.items()},
            "tpot_ms": {arm: measured(timings[arm]["tpot_ms"]) for arm in arms},
            "ttft_ms": {arm: measured(timings[arm]["ttft_ms"]) for arm in arms},
            "kv_bytes": {arm: measured(timings[arm]["kv_bytes"]) for arm in arms},
        }

    # ---- what the stages share ----

    def stage(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stored result of a stage with these settings, or a fresh one, stored."""
        from firstlm.atomic import write_json

        counts = {
            option: value
            for option, value in sorted(vars(self.options).items())
            if isinstance(value, int)
        }
        path = self.folder / "stages" / f"{name}-{hash_of([self.key, counts])}.json"
        if path.is_file():
            say(f"{name}: reused")
            return json.loads(path.read_text(encoding="utf-8"))
        value = compute()
        write_json(path, value)
        return value

    def held_out(self, count: int):
        """The first `count` examples of the test split."""
        from firstlm.data import load_corpus

        data = self.config.data
        source, split = (data.test, None) if data.test is not None else (data.train, "test")
        return load_corpus(source, split, max_examples=count, seed=self.config.seed)

    def load(self, checkpoint: Any):
        import torch

        import firstlm
        from firstlm.tokenizer import load_tokenizer

        model = firstlm.from_pretrained(checkpoint, dtype=self.config.dtype, merge_adapter=True)
        if self.config.device is not None:
            model.to(self.config.device)
        elif torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())
        return model, load_tokenizer(checkpoint)

    def write_answers(self, answers: dict[str, Any]) -> None:
        from firstlm.atomic import write_text

        rows = []
        plans = plans_of(answers["first"])
        for i, example in enumerate(self.held_out(self.options.prompts)):
            prompt, reference = prompt_and_answer(example)
            texts = {name: found["texts"][i] for name, found in answers.items()}
            row = {"id": example["id"], "prompt": prompt, "reference": reference, **texts}
            rows.append(json.dumps({**row, "plan": str(plans[i])}, ensure_ascii=False) + "\n")
        write_text(self.folder / "answers.jsonl", "".join(rows))

    def model_title(self) -> str:
        if self.config.base == "embedded":
            return "SmolLM2-135M-Instruct (4-bit weights, dequantised)"
        return Path(self.config.base).name

    def heading(self, text: str) -> None:
        self.number += 1
        say(f"\n[{self.number}/6] {text}")


# ---- helpers ----


def key_of(config: Any) -> str:
    """Hash of the settings that change results, and of the package's version."""
    import firstlm

    values = config.to_dict()
    for harmless in ("output_dir", "resume", "overwrite", "progress", "save_every", "log_every"):
        values.pop(harmless)
    return hash_of([firstlm.__version__, values])


def hash_of(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def prompt_and_answer(example: Any) -> tuple[Any, str]:
    from firstlm.corpus import answer_of, prompt_of

    return prompt_of(example), answer_of(example)


def plans_of(answers: dict[str, Any]) -> list[Any]:
    from firstlm import SkipPlan

    return [SkipPlan.from_json(json.dumps(plan)) for plan in answers["plans"]]


def publish(checkpoint: Path, target: Path) -> None:
    """Copy a checkpoint so that `target` is whole at any time."""
    from firstlm.atomic import staged_folder

    with staged_folder(target) as staging:
        shutil.copytree(checkpoint, staging, dirs_exist_ok=True)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def examples_of(answers: dict[str, Any], examples: Any, count: int = 3) -> str:
    """A few prompts with their plans and answers, the plans as different as they come."""
    plans = plans_of(answers)
    shown: list[int] = []
    for i in range(len(plans)):
        if len(shown) < count and plans[i] not in [plans[j] for j in shown]:
            shown.append(i)
    lines = []
    for i in shown:
        prompt, _ = prompt_and_answer(examples[i])
        # The instruction is every prompt's first line; what tells them apart comes after it.
        text = str(prompt[-1]["content"]).partition("\n")
        question = " ".join((text[2] or text[0]).split())
        lines += [
            f"{plans[i]}  {question[:90]}",
            f"{'':{plans[i].num_layers}}  → {answers['texts'][i]}",
        ]
    return "\n".join(lines)


def rows_of(summary: dict[str, Any], asked: float | None = None) -> list[tuple[str, str, str]]:
    """The figures as rows: name, without skipping, FiRST."""

    def time_row(name: str, key: str) -> tuple[str, str, str]:
        full, routed = summary[key]["full"], summary[key]["routed"]
        change = routed["median"] / full["median"] - 1
        return (name, f"{full['median']:.1f} ms", f"{routed['median']:.1f} ms ({change:+.0%})")

    layers, rouge = summary["layers"], summary["rouge_l"]
    kv = {arm: summary["kv_bytes"][arm]["median"] for arm in ("full", "routed")}
    asked_for = "" if asked is None else f" (asked: {asked:.0%})"
    return [
        ("", "without skipping", "FiRST"),
        ("skip rate", "0 %", f"{summary['skip_rate']:.1%}{asked_for}"),
        ("distinct plans", "1", f"{summary['distinct_plans']} over {summary['prompts']} prompts"),
        ("layer calls per token, counted", f"{layers}", f"{summary['layer_calls_per_token']:.2f}"),
        ("ROUGE-L, base, not finetuned", f"{rouge['base']:.3f}", ""),
        ("ROUGE-L, LoRA, as many steps", f"{rouge['lora']:.3f}", f"{rouge['first']:.3f}"),
        time_row("TPOT, batch 1, median", "tpot_ms"),
        time_row("TTFT, batch 1, median", "ttft_ms"),
        ("KV bytes, median", f"{kv['full']:,.0f}", f"{kv['routed']:,.0f}"),
    ]


def table(summary: dict[str, Any], asked: float) -> str:
    """The figures for a terminal."""
    rows = rows_of(summary, asked)
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    rule = "-" * (sum(widths) + 4)
    return "\n".join(["", lines[0], rule, *lines[1:]])


def markdown(summary: dict[str, Any]) -> str:
    """The figures as the README shows them."""
    head, *rows = ["| " + " | ".join(row) + " |" for row in rows_of(summary)]
    return "\n".join([head, "|---|---|---|", *rows])


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt as interrupt:
        again = "all finished stages are kept: run the same command again to go on"
        print(f"\ninterrupted: {interrupt}" if str(interrupt) else f"\ninterrupted; {again}")
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        sys.exit(1)
