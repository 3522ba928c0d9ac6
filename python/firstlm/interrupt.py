"""Stopping a run on Ctrl-C or SIGTERM after the step at hand, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class TrainingInterrupted(KeyboardInterrupt):
    """A run was stopped by a signal after saving; the message says how to go on.

    Args:
        message: for the user.
        signal_number: what stopped it; an exit code of 128 + that number is the custom.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class InterruptGuard:
    """Turns the first SIGINT or SIGTERM into a request; the second one stops at once.

    Use it as a context manager around training. Outside the main thread, where Python delivers no
    signals, it does nothing; `request()` asks for a stop by hand.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.signal_number is not None

    def request(self, signal_number: int = signal.SIGINT) -> None:
        """Asks for a stop after the current step."""
        self.signal_number = int(signal_number)

    def __enter__(self) -> InterruptGuard:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.request(number)
        self._restore()  # the next signal acts as it would without us

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()
