"""What a person sees: progress with an honest ETA, tables, durations. Everything but results goes to stderr."""

import math
import sys
import time
from collections.abc import Sequence

QUIET_SECONDS = 60.0
_WITHOUT_END = 100_000  # columns of a table that goes to a file or a pipe: what reads it takes a line for a row

_CLEAR_LINE = "\r\x1b[2K"


def duration(seconds: float) -> str:
    """`75` -> `1 min 15 s`; whole units only."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def say(message: str) -> None:
    """A message for the person at the terminal, on stderr; it takes the place of an unfinished progress line."""
    print(f"{_CLEAR_LINE if sys.stderr.isatty() else ''}{message}", file=sys.stderr, flush=True)


class Progress:
    """Progress lines, with the time left from the speed since the first call: a resumed run is no fast one.

    A job is over when all is done, or when less is done than before; what comes then is another. On a terminal one line
    is rewritten; elsewhere there is a line for the first call, one at most every QUIET_SECONDS after it, and one when
    all is done.
    """

    def __init__(self) -> None:
        self._first = (0.0, 0)
        self._last, self._total = 0, 0
        self._spoken = -math.inf

    def __call__(self, done: int, total: int, message: str) -> None:
        now = time.monotonic()
        if done < self._last or self._last >= self._total:
            self._first = (now, done)
        self._last, self._total = done, total
        since, before = self._first
        live = sys.stderr.isatty()
        if done < total and not live and now - self._spoken < QUIET_SECONDS:
            return
        self._spoken = now
        text = f"{message}: {done} of {total}"
        if before < done < total:
            text += f", about {duration((now - since) / (done - before) * (total - done))} left"
        if live and done < total:
            print(f"{_CLEAR_LINE}{text}", end="", file=sys.stderr, flush=True)
        else:
            say(text)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout; columns that start with `>` are aligned to the right. Cells are text, never markup.

    On a terminal long cells are folded, those of the first column only if they take more than half of it.
    """
    from rich.console import Console  # late: `--help` needs no tables, and would take half as long again
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(title, style="table.title"), title_justify="left", header_style="bold")
    console = Console(width=None if sys.stdout.isatty() else _WITHOUT_END)
    longest = max((len(str(row[0])) for row in rows), default=0)
    for number, column in enumerate(columns):
        name = column.removeprefix(">")
        whole = number == 0 and longest <= console.width // 2
        made.add_column(name, justify="left" if name == column else "right", overflow="fold", no_wrap=whole)
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    with console.capture() as captured:
        console.print(made)
    print(captured.get(), end="")  # not by rich, which ends the process when the reader of a pipe is gone
