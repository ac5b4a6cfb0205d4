import io
import re

from loraloom import terminal
from loraloom.terminal import make_console, make_table, print_tables, show_progress

FOREIGN = "[/INST] [bold]x[/bold] :tada: [link=https://a.b]c"


def printed(*tables, width=80):
    console = make_console(width=width)
    with console.capture() as capture:
        print_tables(console, tables)
    return capture.get()


def wide_table(num_columns=10, key="a name of several words"):
    table = make_table("name", values=[f"number-{place}" for place in range(num_columns)])
    table.add_row(key, *(f"{place} of them" for place in range(num_columns)))
    return table


def test_texts_are_printed_as_they_stand():
    table = make_table(FOREIGN, values=[FOREIGN], title=FOREIGN)
    table.add_row(FOREIGN, FOREIGN)
    table.caption = FOREIGN
    console = make_console(width=200)
    with console.capture() as capture:
        print_tables(console, [table])
        console.print(FOREIGN)
    assert capture.get().count(FOREIGN) == 7


def test_cells_that_do_not_fit_are_folded_and_nothing_is_lost():
    text = printed(wide_table(key="x" * 100))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.count("x") == 100
    for place in range(10):
        assert f"{place} of" in text


def test_files_get_lines_that_are_not_broken():
    stream = io.StringIO()
    print_tables(make_console(file=stream), [wide_table()])
    assert len(stream.getvalue().splitlines()) == 2


def progress(**console):
    """Show three items, the first as long as the others together."""
    stream = io.StringIO()
    with show_progress(make_console(file=stream, width=80, **console), "toy", [2, 1, 1]) as advance:
        for places in ([0], [1], [2]):
            advance(places)
    return stream.getvalue()


def test_progress_is_a_line_now_and_then_in_a_file(monkeypatch):
    assert progress() == ""  # within ten seconds
    monkeypatch.setattr(terminal, "PLAIN_INTERVAL_S", 0)
    assert progress().splitlines()[0] == "toy: 50 %"
    assert progress(quiet=True) == ""


def test_progress_disappears_from_a_terminal():
    shown = progress(force_terminal=True)
    assert "toy: 100 %" in shown
    assert shown.endswith("\x1b[2K")  # the line is erased


def test_the_time_left_is_estimated_without_the_first_items(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(terminal, "monotonic", lambda: now[0])
    stream = io.StringIO()
    console = make_console(file=stream, width=80)
    with show_progress(console, "toy", [1] * 1000) as advance:
        now[0] = 64.0  # of a machine that warms up
        advance([0])
        assert stream.getvalue() == "toy: 0 %\n"
        for index in range(1, 31):
            now[0] += 0.5
            advance([index])
    assert re.findall(r"ETA (\S+)", stream.getvalue()) == ["0:08:10"]  # 980 of half a second
