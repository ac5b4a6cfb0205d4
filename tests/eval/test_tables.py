from __future__ import annotations

import csv
from dataclasses import replace

from rich.table import Table

from loraloom.eval.comparison import Comparison
from loraloom.eval.evaluation import Evaluation
from loraloom.eval.scores import summarise
from loraloom.eval.statistics import PairedComparison
from loraloom.eval.tables import comparison_tables, data_frame, evaluation_tables, markdown
from loraloom.terminal import make_console, print_tables
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


def tables_of(*tasks, seeds=None, comparisons=()):
    return evaluation_tables(summarise(tasks), seeds or {}, comparisons)


def printed(*tables):
    console = make_console(width=80)
    with console.capture() as capture:
        print_tables(console, tables)
    return capture.get()


def test_the_table_has_accuracies_with_their_intervals():
    text = printed(*tables_of(toy(), toy(task="other")))
    assert "toy" in text
    assert "(test)" in text
    assert "50.0 (9.5–90.5)" in text
    assert "100.0 (20.7–100.0)" in text


def test_accuracies_that_a_constant_answer_reaches_are_marked():
    values = ((-1.0, -2.0), (-2.0, -1.0))
    text = printed(*tables_of(toy(), toy(task="other", values=values)))
    base = next(line for line in text.splitlines() if line.startswith("base"))
    assert base.split() == ["base", "50.0", "(9.5–90.5)†", "100.0", "(34.2–100.0)"]
    constant = next(line for line in text.splitlines() if line.startswith("constant answer"))
    assert constant.split()[2:] == ["50.0", "50.0"]
    assert "† no better than a constant answer" in text


def test_groups_have_a_table_where_there_are_some():
    assert len(tables_of(toy())) == 1
    _, table = tables_of(toy(group="sums"))
    text = printed(table)
    assert "sums" in text
    assert "law" in text
    assert "constant answer" in text


def test_a_comparison_has_its_difference_in_points_and_how_sure_it_is():
    text = printed(*comparison_tables([compared()]))
    for cell in ("mix - base", "-1.2", "-2.0 to -0.5", "3 : 13", "0.031", "0.062"):
        assert cell in text


def test_eight_adapters_with_long_names_fit_80_columns():
    task = toy(group="agreement_of_nouns")
    scores = {f"skills-mixlora-{seed}": task.scores["base"] for seed in range(8)}
    tasks = [replace(task, scores=scores, name=name) for name in ("arc_easy", "social_i_qa")]
    evaluation = Evaluation(tasks, [("skills-mixlora-0", "skills-mixlora-1")], {})
    for line in printed(*evaluation.tables()).splitlines():
        assert len(line.rstrip()) <= 80, line
        assert "…" not in line


def test_tiny_p_values_are_not_shown_as_zero():
    assert "< 0.001" in printed(*comparison_tables([compared(1e-9)]))


def test_seeds_have_mean_and_deviation():
    text = printed(*tables_of(toy(), seeds=SEEDS))
    assert "62.5 ± 3.1" in text
    assert "standard deviation" in text


def test_tables_without_rows_are_left_out():
    assert comparison_tables([]) == []
    assert len(tables_of(toy())) == 1
    assert len(tables_of(toy(group="sums"), seeds=SEEDS, comparisons=[compared()])) == 4


def test_markdown_keeps_cells_and_sides():
    table = Table("a|b")
    table.add_column("n", justify="right")
    table.add_row("x", "1")
    assert markdown(table) == "| a\\|b | n |\n| --- | ---: |\n| x | 1 |\n"


def test_the_frame_has_a_row_for_each_group():
    text = data_frame(summarise([toy(group="sums")])).to_csv(index=False)
    rows = list(csv.DictReader(text.splitlines()))
    assert [(row["adapter"], row["group"]) for row in rows] == [
        ("base", ""),
        ("base", "sums"),
        ("law", ""),
        ("law", "sums"),
    ]
    assert rows[2]["stderr"] == ""
    assert rows[0]["split"] == "test"
    assert len(data_frame(summarise([toy(group="")]))) == len(rows)
