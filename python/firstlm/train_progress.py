"""What a run shows and writes while it trains: a bar with skip rates, and train_log.jsonl."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

if TYPE_CHECKING:
    from firstlm.run_folder import RunFolder


@contextlib.contextmanager
def bar(what: str, total: int | None, show: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar; yields the function that moves it."""
    with tqdm(total=total, desc=what, disable=not show, leave=False, dynamic_ncols=True) as shown:
        yield lambda count: (shown.update(count), None)[1]


class ProgressAndLog(TrainerCallback):
    """The bar of one phase and its lines in the log.

    Args:
        folder: of the run.
        phase: its name.
        steps: of the phase.
        steps_before: of the phases before it, so that curves join.
        show: show the bar.
        eval_every: steps between calls of `evaluate`; 0 for none.
        evaluate: gives validation figures.
    """

    def __init__(
        self,
        folder: RunFolder,
        phase: str,
        steps: int,
        *,
        steps_before: int,
        show: bool,
        eval_every: int,
        evaluate: Callable[[], dict[str, float]],
    ) -> None:
        self.folder, self.phase, self.steps = folder, phase, steps
        self.steps_before = steps_before
        self.show, self.eval_every, self.evaluate = show, eval_every, evaluate
        self.bar: tqdm | None = None
        self.started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(
            total=self.steps,
            initial=state.global_step,
            desc=self.phase,
            unit="step",
            disable=not self.show,
            dynamic_ncols=True,
        )
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.bar is not None
        self.bar.update(1)
        if self.eval_every and state.global_step % self.eval_every == 0:
            figures = self.evaluate()
            self.folder.log(self._record(state.global_step, figures))
            self._show(f"validation CE {figures['eval_cross_entropy']:.3f}", figures)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not logs or "loss" not in logs or self.bar is None:
            return
        figures = {name: value for name, value in logs.items() if name != "epoch"}
        self.folder.log(self._record(state.global_step, figures))
        shown = {
            "loss": f"{figures['loss']:.3f}",
            "CE": f"{figures['cross_entropy']:.3f}",
            "skip": f"{figures['skip_rate']:.0%}/{figures['skip_rate_asked']:.0%}",
            "plans": f"{figures['recent_plans']}/{figures['recent_sequences']}",
        }
        self.bar.set_postfix(shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def _record(self, step: int, figures: dict[str, Any]) -> dict[str, Any]:
        return {
            "phase": self.phase,
            "step": step,
            "total_step": self.steps_before + step,
            "seconds": round(time.perf_counter() - self.started, 3),
            **figures,
        }

    def _show(self, text: str, figures: dict[str, float]) -> None:
        if self.show:
            tqdm.write(
                f"{self.phase} {self.bar.n if self.bar else 0}: {text}, "
                f"skip rate {figures['eval_skip_rate']:.1%}, {figures['eval_plans']} plans"
            )
