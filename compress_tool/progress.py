"""What a person sees while a job runs: bars with the time left, or plain lines in a log.

Everything goes to stderr, so that stdout carries only the result.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from compress_tool.units import clock_text

PLAIN_INTERVAL_S = 10.0
"""Between two plain lines of one stage: rare enough for a log, often enough to see it live."""


class Progress:
    """A callback `progress(stage, done, total, detail)` that owns the terminal while it is open.

    Call it as often as you like: `done` of `total` steps of `stage` are finished, `detail` says
    what comes next (a layer, a file). `total` 0 means unknown. A new stage name ends the stage
    before it. Example, when stderr is a file:

        calibrate 0/8 · layer 0
        calibrate 3/8 · layer 3 · 0:31 elapsed, 0:52 left
        calibrate 8/8 · done in 1:22
    """

    def __init__(
        self,
        *,
        stream: TextIO | None = None,
        silent: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._silent = silent
        self._clock = clock
        self._bars: RichProgress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._done = self._first_done = self._total = 0
        self._started_at = self._stepped_at = self._printed_at = 0.0

    def __enter__(self) -> Progress:
        interactive = self._stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        if interactive and not self._silent:
            self._bars = RichProgress(
                TextColumn("{task.description:<10}"),
                BarColumn(bar_width=32),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[detail]}", style="dim"),
                console=Console(file=self._stream),
                # The rate of a layer-by-layer job is judged over its last quarter of an hour.
                speed_estimate_period=900.0,
            )
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        if self._silent:
            return
        is_new = stage != self._stage
        if is_new:
            self._stage, self._first_done = stage, done
            self._started_at = self._stepped_at = self._clock()
        elif done > self._done:
            self._stepped_at = self._clock()
        finished_now = total > 0 and done >= total and (is_new or self._done < self._total)
        self._done, self._total = done, total
        if self._bars is not None:
            self._draw(self._bars, is_new, detail)
        elif is_new or finished_now or self._clock() - self._printed_at >= PLAIN_INTERVAL_S:
            self._print(self._plain_line(detail))

    def note(self, text: str) -> None:
        """Show one line, a warning for instance, between or above the bars."""
        if self._silent:
            return
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._print(text)

    def _draw(self, bars: RichProgress, is_new: bool, detail: str) -> None:
        total = float(self._total) if self._total else None
        if is_new or self._task is None:
            self._task = bars.add_task(
                self._stage, total=total, completed=self._done, detail=detail
            )
        else:
            bars.update(self._task, completed=self._done, total=total, detail=detail)

    def _plain_line(self, detail: str) -> str:
        elapsed = self._clock() - self._started_at
        count = f"{self._done}/{self._total}" if self._total else f"{self._done}"
        parts = [f"{self._stage} {count}"]
        if self._total and self._done >= self._total:
            return f"{parts[0]} · done in {clock_text(elapsed)}"
        if detail:
            parts.append(detail)
        steps = self._done - self._first_done
        if steps > 0 and self._total:
            # The rate of finished steps, less what the step that runs has taken so far.
            rate = (self._stepped_at - self._started_at) / steps
            running = self._clock() - self._stepped_at
            left = max(rate * (self._total - self._done) - running, 0.0)
            parts.append(f"{clock_text(elapsed)} elapsed, {clock_text(left)} left")
        return " · ".join(parts)

    def _print(self, line: str) -> None:
        self._printed_at = self._clock()
        # A reader that went away (`2>&1 | head`) must not end a job of hours.
        with contextlib.suppress(OSError):
            self._stream.write(f"{line}\n")
            self._stream.flush()
