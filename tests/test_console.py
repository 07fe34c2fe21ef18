"""What people read: durations, progress that does not lie about speed, tables that show names as they are."""

import io
import re

import pytest

from blockpruner import console
from blockpruner.console import Progress, duration, say, table


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (75, "1 min 15 s"),
        (3599.6, "1 h 00 min"),
        (3661, "1 h 01 min"),
        (90_000, "25 h 00 min"),
    ],
)
def test_durations_are_in_whole_units(seconds, text):
    assert duration(seconds) == text


@pytest.fixture
def clock(monkeypatch):
    """The time, as a list whose only entry may be changed."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def reports(clock, capsys, *calls):
    """The lines that calls (seconds since the last one, done, total) lead to."""
    progress = Progress()
    for seconds, done, total in calls:
        clock[0] += seconds
        progress(done, total, "step 1")
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_the_time_left_is_told_from_the_speed_of_this_session(clock, capsys):
    lines = reports(clock, capsys, (0, 80, 100), (100, 90, 100))
    assert lines == ["step 1: 80 of 100", "step 1: 90 of 100, about 1 min 40 s left"]


def test_where_nobody_watches_a_line_comes_once_a_minute_at_most(clock, capsys):
    lines = reports(clock, capsys, *((1, done, 1000) for done in range(1, 200)))
    assert [line.split(",")[0] for line in lines] == [f"step 1: {done} of 1000" for done in (1, 61, 121, 181)]


def test_the_end_is_always_told_and_has_no_time_left(clock, capsys):
    assert reports(clock, capsys, (0, 0, 2), (1, 1, 2), (1, 2, 2))[-1] == "step 1: 2 of 2"


def test_the_time_left_of_a_job_is_not_told_by_the_speed_of_the_one_before_it(clock, capsys):
    lines = reports(clock, capsys, (0, 0, 9), (600, 9, 9), (20, 11, 24), (100, 13, 24), (0, 1, 24), (80, 2, 24))
    assert lines == [
        *("step 1: 0 of 9", "step 1: 9 of 9", "step 1: 13 of 24, about 9 min 10 s left"),
        "step 1: 2 of 24, about 29 min 20 s left",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_every_call_on_one_line_and_a_message_takes_its_place(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(console.sys, "stderr", terminal)
    progress = Progress()
    progress(0, 9, "step 1")
    clock[0] += 1
    progress(1, 9, "step 1")
    assert "\n" not in terminal.getvalue()
    assert terminal.getvalue().split("\r\x1b[2K")[1:] == ["step 1: 0 of 9", "step 1: 1 of 9, about 8 s left"]
    say("interrupted")
    assert terminal.getvalue().endswith("left\r\x1b[2Kinterrupted\n")
    progress(9, 9, "step 1")
    assert terminal.getvalue().endswith("step 1: 9 of 9\n")


def test_tables_show_text_and_never_take_it_for_markup_or_emoji(capsys):
    table("[bold]title[/bold]", ("name", ">n"), [("[red]a[/red]", 1), (r"b\[x]", 22), (":smile:", 3)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "[bold]title[/bold]"
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert cells == [["[red]a[/red]", "1"], [r"b\[x]", "22"], [":smile:", "3"]]


def test_numbers_are_aligned_to_the_right(capsys):
    table("t", ("name", ">n"), [("a", 1), ("b", 22)])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row.rstrip("│ ")[-2:] for row in rows] == [" 1", "22"]


ALPHABET = "".join(chr(ord("a") + i % 26) for i in range(400))


def test_what_reads_a_table_from_a_file_finds_every_cell_on_one_line(capsys):
    table("t", ("name", "what"), [("relative-magnitude:of=updates", ALPHABET)])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["relative-magnitude:of=updates", ALPHABET]


@pytest.mark.parametrize("name", ["relative-magnitude:of=updates", ALPHABET])
def test_a_terminal_folds_long_cells_and_loses_nothing_but_keeps_names_whole(monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    monkeypatch.setattr(console.sys, "stdout", terminal)
    table("t", ("name", "what"), [(name, ALPHABET)])
    lines = re.sub(r"\x1b\[\d*m", "", terminal.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert ["".join(column) for column in zip(*cells, strict=True)] == [name, ALPHABET]
    assert name == ALPHABET or cells[0][0] == name
