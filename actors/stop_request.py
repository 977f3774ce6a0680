"""SIGTERM (a spot notice, the stop of a job): an interruption, or a request to a training to save its state and end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType

_LOOK_S = 0.2


class StoppedError(RuntimeError):
    """A run that was asked to stop, has saved its state, and can be resumed."""


def sigterm_interrupts() -> AbstractContextManager[None]:
    """Inside, SIGTERM is what Ctrl-C is: KeyboardInterrupt. Does nothing outside the main thread."""
    return _on_sigterm(signal.default_int_handler)


class StopRequest:
    """A file beside the checkpoints, on the storage that all nodes share: driver and workers see the same one."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "stop"
        self._looked_at = 0.0
        self._made = False

    def make(self) -> None:
        """Ask for the stop."""
        self._path.touch()

    def clear(self) -> None:
        """Forget an earlier run's request."""
        self._path.unlink(missing_ok=True)

    def is_made(self) -> bool:
        """Whether the training is to stop. Cheap enough for every step: the file is looked for now and then."""
        now = time.monotonic()
        if not self._made and now - self._looked_at >= _LOOK_S:
            self._looked_at, self._made = now, self._path.exists()
        return self._made

    def by_sigterm(self) -> AbstractContextManager[None]:
        """Let SIGTERM make the request, in place of ending the process; a second one is what Ctrl-C is.

        Does nothing outside the main thread.
        """
        signals = 0

        def handle(number: int, frame: FrameType | None) -> None:
            nonlocal signals
            signals += 1
            if signals > 1:  # Whoever asks again does not want to wait for the answer, or has seen that there is none.
                signal.default_int_handler(number, frame)
            self.make()

        return _on_sigterm(handle)


@contextmanager
def _on_sigterm(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
