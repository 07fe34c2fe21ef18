"""What a person sees: progress with an honest ETA, tables, durations. Everything but results goes to stderr."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

QUIET_SECONDS = 60.0


def duration(seconds: float) -> str:
    """`75` -> `1 min 15 s`; whole units only."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def say(message: str) -> None:
    """One line for the person at the terminal, on stderr."""
    print(message, file=sys.stderr, flush=True)


@dataclass
class Progress:
    """Progress lines with the time left, from the speed of this session only (a resumed run is no fast one).

    On a terminal one line is rewritten; elsewhere a line is printed at most every QUIET_SECONDS.
    """

    started: float | None = None
    start: int = 0
    spoken: float = field(default=float("-inf"))

    def __call__(self, done: int, total: int, message: str) -> None:
        now = time.monotonic()
        if self.started is None or done < self.start:
            self.started, self.start, self.spoken = now, done, float("-inf")
        live = sys.stderr.isatty()
        if not live and now - self.spoken < QUIET_SECONDS and done < total:
            return
        self.spoken = now
        text = f"{message}: {done} of {total}"
        if done > self.start and done < total:
            left = (now - self.started) / (done - self.start) * (total - done)
            text += f", about {duration(left)} left"
        if not live:
            say(text)
            return
        print(f"\r\x1b[2K{text}", end="\n" if done >= total else "", file=sys.stderr, flush=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout; columns that start with `>` are aligned to the right. Cells are text, never markup."""
    made = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        made.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    for row in rows:
        made.add_row(*(str(cell).replace("[", r"\[") for cell in row))
    Console(width=None if sys.stdout.isatty() else 160).print(made)
