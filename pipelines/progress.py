"""Progress of a long job: a bar on a terminal, a log line every few seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)


class GenerationProgress:
    """Counts rows and tokens as shards finish, and shows rates and the time left.

    Args:
        total_rows: rows of the whole run.
        done_rows: rows that were finished before this process began; they count as done, not towards rates.
        every_s: seconds between log lines.
    """

    def __init__(self, total_rows: int, done_rows: int, every_s: float) -> None:
        self.total_rows = total_rows
        self.done_rows = done_rows
        self.new_rows = 0
        self.new_tokens = 0
        self._every_s = every_s
        self._start = time.monotonic()
        self._bar: Progress | None = None
        self._ended = threading.Event()

    def __enter__(self) -> GenerationProgress:
        if sys.stderr.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}"), TimeRemainingColumn())
            self._bar = Progress(TextColumn("generate"), *columns)
            self._task = self._bar.add_task("", total=self.total_rows, completed=self.done_rows, rates="")
            self._bar.start()
        else:
            threading.Thread(target=self._log_until_ended, name="progress", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._bar:
            self._bar.stop()
        else:
            self._log()

    @property
    def seconds(self) -> float:
        """Seconds since this process began to work."""
        return time.monotonic() - self._start

    @property
    def tokens_per_second(self) -> float:
        """Response tokens a second, of this process alone."""
        return self.new_tokens / max(self.seconds, 1e-9)

    def add(self, rows: int, tokens: int) -> None:
        """A shard finished."""
        self.new_rows += rows
        self.new_tokens += tokens
        if self._bar:
            self._bar.update(self._task, advance=rows, rates=self._rates())

    def _log_until_ended(self) -> None:
        """Also while no shard finishes: silence would look like a hang."""
        while not self._ended.wait(self._every_s):
            self._log()

    def _log(self) -> None:
        done = self.done_rows + self.new_rows
        logger.info("generate: %d/%d rows, %s, %s left", done, self.total_rows, self._rates(), self._left())

    def _rates(self) -> str:
        return f"{self.new_rows / max(self.seconds, 1e-9):.1f} rows/s, {self.tokens_per_second:.0f} tokens/s"

    def _left(self) -> str:
        rows = self.total_rows - self.done_rows - self.new_rows
        if rows and not self.new_rows:
            return "unknown time"
        return f"{rows * self.seconds / max(self.new_rows, 1):.0f} s"
