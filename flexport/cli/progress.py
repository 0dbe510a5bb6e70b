"""How a job goes, for people: a bar on a terminal, a plain line now and then elsewhere.

All of it goes to stderr. The time left is what the rows (or bytes) so far took, for those to come;
before a row has ended, what the plan predicts.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from flexport.apps.batch import Progress
from flexport.engine.packing import PackProgress
from flexport.units import format_bytes, format_seconds

__all__ = ["PackingLines", "ProgressLines", "say", "show_packing", "show_progress"]

LINE_EVERY_S = 10.0
"""Often enough to see that a job lives, seldom enough for a log file."""

TICK_S = 1.0


def say(line: str) -> None:
    """A line for people on stderr, above the bar if there is one."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


class _Ticking(Progress, Protocol):
    """Progress that shows itself when it is told that time has passed."""

    def tick(self) -> None:
        """Show how things stand."""

    def close(self) -> None:
        """Show it for the last time."""


def _unknown() -> None:
    return None


@contextmanager
def show_progress(
    num_rows: int | None, predicted_s: Callable[[], float | None] = _unknown
) -> Iterator[Progress]:
    """Progress on stderr while the block runs; `num_rows` is None for an input of unknown end.

    `predicted_s` says how long it should take in all, once that is known.
    """
    on_terminal = sys.stderr.isatty()
    progress: _Ticking = (
        _ProgressBar(num_rows, predicted_s)
        if on_terminal
        else ProgressLines(num_rows, sys.stderr, predicted_s=predicted_s)
    )
    over = threading.Event()

    def tick() -> None:
        while not over.wait(TICK_S):
            progress.tick()

    # A thread of its own: rows end a block at a time, and minutes of silence look like a hang.
    ticker = threading.Thread(target=tick, name="flexport-progress", daemon=True)
    ticker.start()
    try:
        yield progress
    finally:
        over.set()
        ticker.join()
        progress.close()


class _ProgressBar:
    """A bar over rows, with the rate in tokens."""

    def __init__(self, num_rows: int | None, predicted_s: Callable[[], float | None]) -> None:
        from tqdm import tqdm

        self._predicted_s = predicted_s

        # Rows end in bursts, a block at a time: only the average over the whole run says anything.
        self._bar = tqdm(
            total=num_rows, unit="row", file=sys.stderr, dynamic_ncols=True, smoothing=0
        )
        self._started_s = time.monotonic()
        self._num_tokens = 0
        self._num_failed = 0

    def answered(self, num_tokens: int) -> None:
        """Advance, and bring the rate up to date."""
        self._num_tokens += num_tokens
        self._advance()

    def failed(self) -> None:
        """Advance, and say how many failed."""
        self._num_failed += 1
        self._advance()

    def skipped(self) -> None:
        """Advance without counting the row as work of this run."""
        self._bar.initial += 1
        self._bar.update()

    def tick(self) -> None:
        """Let the clock go on."""
        if not self._num_tokens and not self._num_failed:
            left = _left_text(self._predicted_s(), time.monotonic() - self._started_s)
            self._bar.set_postfix_str(left, False)
        self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()

    def _advance(self) -> None:
        elapsed_s = max(time.monotonic() - self._started_s, 1e-9)
        failed = f", {self._num_failed} failed" if self._num_failed else ""
        self._bar.set_postfix_str(f"{self._num_tokens / elapsed_s:.1f} tok/s{failed}", False)
        self._bar.update()


class ProgressLines:
    """A line every ten seconds."""

    def __init__(
        self,
        num_rows: int | None,
        stream: TextIO,
        clock_s: Callable[[], float] = time.monotonic,
        predicted_s: Callable[[], float | None] = _unknown,
    ) -> None:
        self._num_rows = num_rows
        self._predicted_s = predicted_s
        self._stream = stream
        self._clock_s = clock_s
        self._started_s = clock_s()
        self._next_line_s = self._started_s + LINE_EVERY_S
        self._num_tokens = self._num_answered = self._num_failed = self._num_skipped = 0

    def answered(self, num_tokens: int) -> None:
        """Count the row."""
        self._num_tokens += num_tokens
        self._num_answered += 1

    def failed(self) -> None:
        """Count the row."""
        self._num_failed += 1

    def skipped(self) -> None:
        """Count the row."""
        self._num_skipped += 1

    def close(self) -> None:
        """Nothing more to say: the job's summary follows."""

    def tick(self) -> None:
        """Print a line if it is time for one."""
        now_s = self._clock_s()
        if now_s < self._next_line_s:
            return
        self._next_line_s = now_s + LINE_EVERY_S
        elapsed_s = now_s - self._started_s
        num_now = self._num_answered + self._num_failed
        num_done = num_now + self._num_skipped
        parts = [f"{num_done} of {self._num_rows} rows" if self._num_rows else f"{num_done} rows"]
        if self._num_failed:
            parts.append(f"{self._num_failed} failed")
        parts.append(f"{self._num_tokens / elapsed_s:.1f} tok/s")
        if self._num_rows and num_now:
            left_s = max(0, self._num_rows - num_done) * elapsed_s / num_now
            parts.append(f"about {format_seconds(left_s)} left")
        elif not num_now and (left := _left_text(self._predicted_s(), elapsed_s)):
            parts.append(left)
        print(f"flexport: {', '.join(parts)}", file=self._stream, flush=True)


def _left_text(predicted_s: float | None, elapsed_s: float) -> str:
    """What is left of a prediction, as long as it is not over."""
    if predicted_s is None or predicted_s <= elapsed_s:
        return ""
    return f"about {format_seconds(predicted_s - elapsed_s)} left, as predicted"


@contextmanager
def show_packing() -> Iterator[PackProgress]:
    """Progress of packing weights on stderr, while the block runs."""
    progress = _PackingBar() if sys.stderr.isatty() else PackingLines(sys.stderr)
    try:
        yield progress
    finally:
        progress.close()


class _PackingBar:
    """A bar over bytes, one for each thing that takes a while."""

    def __init__(self) -> None:
        self._bar: Any = None

    def begin(self, what: str, total_bytes: int) -> None:
        """Say it, and show a new bar."""
        from tqdm import tqdm

        self.close()
        self.say(what)
        self._bar = tqdm(
            total=total_bytes,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            file=sys.stderr,
            dynamic_ncols=True,
        )

    def advance(self, num_bytes: int) -> None:
        """Advance the bar."""
        self._bar.update(num_bytes)

    def say(self, text: str) -> None:
        """A line above the bar."""
        say(f"flexport: {text}")

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


class PackingLines:
    """A line every ten seconds."""

    def __init__(self, stream: TextIO, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock_s = clock_s
        self._total_bytes = self._done_bytes = 0
        self._started_s = self._next_line_s = 0.0

    def begin(self, what: str, total_bytes: int) -> None:
        """Say it, and count from nothing."""
        self.say(what)
        self._total_bytes, self._done_bytes = total_bytes, 0
        self._started_s = self._clock_s()
        self._next_line_s = self._started_s + LINE_EVERY_S

    def advance(self, num_bytes: int) -> None:
        """Count, and print a line if it is time for one."""
        self._done_bytes += num_bytes
        now_s = self._clock_s()
        if now_s < self._next_line_s:
            return
        self._next_line_s = now_s + LINE_EVERY_S
        rate = self._done_bytes / (now_s - self._started_s)
        left_s = max(0, self._total_bytes - self._done_bytes) / rate
        self.say(
            f"{format_bytes(self._done_bytes)} of {format_bytes(self._total_bytes)}, "
            f"{rate / 1e6:.0f} MB/s, about {format_seconds(left_s)} left"
        )

    def say(self, text: str) -> None:
        """A line."""
        print(f"flexport: {text}", file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing more to say."""
