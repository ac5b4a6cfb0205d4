from __future__ import annotations

import csv

from rich.console import Console
from rich.table import Table

from loraloom.eval.comparison import Comparison
from loraloom.eval.statistics import PairedComparison
from loraloom.eval.tables import (
    all_tables,
    comparison_table,
    csv_page,
    group_table,
    markdown,
    results_table,
    seeds_table,
)
from tests.eval.test_results import toy

SEEDS = {
    "mix": {
        "adapters": ["mix@0", "mix@1"],
        "tasks": {"toy": {"mean": 0.625, "sd": 0.031, "num_seeds": 2}},
    }
}


def compared(p_value=0.0312):
    result = PairedComparison(-0.0125, 0.004, (-0.02, -0.005), p_value, 3, 13, 800)
    return Comparison("toy", "mix", "base", result, min(1.0, 2 * p_value))


def printed(table):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_table_has_accuracies_with_their_errors():
    text = printed(results_table([toy(), toy(task="other")]))
    assert "toy (test)" in text
    assert "base" in text
    assert "50.0 ± 50.0 %" in text
    assert "100.0 %" in text


def test_groups_have_a_table_where_there_are_some():
    assert group_table(toy()) is None
    table = group_table(toy(group="sums"))
    assert table is not None
    text = printed(table)
    assert "sums" in text
    assert "law" in text


def test_a_comparison_has_its_difference_in_points_and_how_sure_it_is():
    text = printed(comparison_table([compared()]))
    for cell in ("mix - base", "-1.2 ± 0.4", "-2.0 to -0.5", "3 : 13", "0.031", "0.062"):
        assert cell in text


def test_tiny_p_values_are_not_shown_as_zero():
    assert "< 0.001" in printed(comparison_table([compared(1e-9)]))


def test_seeds_have_mean_and_deviation():
    text = printed(seeds_table(SEEDS, ["toy"]))
    assert "62.5 ± 3.1 %" in text
    assert "toy (± sd)" in text


def test_tables_without_rows_are_left_out():
    assert comparison_table([]) is None
    assert seeds_table({}, ["toy"]) is None
    assert len(all_tables([toy()], {}, [])) == 1
    assert len(all_tables([toy(group="sums")], SEEDS, [compared()])) == 4


def test_markdown_keeps_cells_and_sides():
    table = Table("a|b")
    table.add_column("n", justify="right")
    table.add_row("x", "1")
    assert markdown(table) == "| a\\|b | n |\n| --- | ---: |\n| x | 1 |\n"


def test_csv_has_a_line_for_each_group():
    rows = list(csv.DictReader(csv_page([toy(group="sums")]).splitlines()))
    assert [(row["adapter"], row["group"]) for row in rows] == [
        ("base", ""),
        ("base", "sums"),
        ("law", ""),
        ("law", "sums"),
    ]
    assert rows[2]["stderr"] == ""
    assert rows[0]["split"] == "test"
