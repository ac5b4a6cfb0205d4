from __future__ import annotations

import io

from rich.console import Console

from loraloom.training.ranking import (
    Ranking,
    Standing,
    ranking_csv,
    ranking_line,
    ranking_table,
)


def standing(name: str, **fields) -> Standing:
    parameters = {"train.learning_rate": 1e-4, "adapter.method": name}
    return Standing(name, parameters, total_steps=9, **fields)


RANKING = Ranking(
    "eval/loss",
    (3, 6),
    (
        standing("failed", status="failed", steps=2, value=0.1, seconds=1.25),
        standing("lost", status="stopped", steps=3, rung_values={3: 2.5}, value=2.5, seconds=2.0),
        standing("new", steps=2, seconds=9.0),
        standing("best", steps=8, rung_values={3: 2.0, 6: 1.5}, value=1.5, seconds=9.0),
        standing(
            "late", status="stopped", steps=6, rung_values={3: 1.0, 6: 1.75}, value=1.0, seconds=5.0
        ),
    ),
    num_jobs=7,
)


def test_those_that_passed_most_rungs_are_ahead():
    names = [one.name for one in RANKING.ranked]
    assert names == ["best", "late", "lost", "new", "failed"]
    assert RANKING.best.name == "best"
    assert Ranking("eval/loss", (), (standing("new"),), num_jobs=1).best is None


def test_those_at_their_own_end_go_by_the_metric_alone():
    short = standing("short", status="stopped early", steps=2, value=1.2)
    long = standing("long", status="finished", rung_values={3: 1.1, 6: 1.4}, value=1.4)
    ranking = Ranking("eval/loss", (3, 6), (*RANKING.standings, long, short), num_jobs=7)
    assert [one.name for one in ranking.ranked][:3] == ["short", "long", "best"]


def test_the_csv_has_a_line_for_each_job_in_the_order_of_the_sweep():
    assert ranking_csv(RANKING).splitlines() == [
        "name,rank,status,steps,train.learning_rate,adapter.method,eval/loss@3,eval/loss@6,"
        "eval/loss,seconds",
        "failed,5,failed,2,0.0001,failed,,,0.1,1.2",
        "lost,3,stopped,3,0.0001,lost,2.5,,2.5,2.0",
        "new,4,running,2,0.0001,new,,,,9.0",
        "best,1,running,8,0.0001,best,2.0,1.5,1.5,9.0",
        "late,2,stopped,6,0.0001,late,1.0,1.75,1.0,5.0",
    ]


def test_the_table_has_the_best_first():
    console = Console(file=io.StringIO(), width=120)
    console.print(ranking_table(RANKING))
    header, first, *_ = console.file.getvalue().splitlines()
    assert header.split() == [
        *("job", "train.learning_rate", "adapter.method", "steps", "@3", "@6"),
        *("eval/loss", "status"),
    ]
    cells = "1 best 0.0001 best 8/9 2.0000 1.5000 1.5000 running"
    assert first.split() == cells.split()


def test_a_line_says_how_many_train_and_which_is_best():
    assert ranking_line(RANKING) == (
        "sweep: 2 of 7 jobs train, at step 8/9; best best (train.learning_rate=0.0001 "
        "adapter.method=best), eval/loss 1.5000"
    )


def test_parameters_that_look_like_markup_stand_as_they_are():
    parameters = {"data.template": "[INST] {{ instruction }} [/INST]"}
    ranking = Ranking("eval/[/x]", (), (Standing("a", parameters),), num_jobs=1)
    screen = Console(file=io.StringIO(), width=200)
    screen.print(ranking_table(ranking))
    assert "[INST] {{ instruction }} [/INST]" in screen.file.getvalue()
    assert "eval/[/x]" in screen.file.getvalue()
