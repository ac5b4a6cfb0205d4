"""What training and evaluations leave, broken: results, metrics, evaluations, answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from loraloom.eval.results import read_evaluation
from loraloom.eval.statistics import read_answers
from loraloom.report.jobs import read_runs
from loraloom.report.page import make_page
from tests.fuzz.harness import broken_bytes, fuzz, mutated, survives
from tests.report.made import evaluation, write_evaluation, write_run

ANSWERS = [
    {
        "task": "arc_easy",
        "split": "test",
        "index": index,
        "question": "0123456789abcdef",
        "adapter": adapter,
        "correct": index % 2 == 0,
        "chosen": "A",
        "correct_label": "B",
        "scores": [-1.0, -2.0],
    }
    for adapter in ("mix@0", "mix@1", "base")
    for index in range(3)
]


def break_json(draw: st.DrawFn, path: Path) -> None:
    """Break a JSON file's value or its bytes."""
    if draw(st.integers(0, 3)) == 0:
        path.write_bytes(draw(broken_bytes(path.read_bytes())))
    else:
        path.write_text(json.dumps(draw(mutated(json.loads(path.read_text())))))


def break_lines(draw: st.DrawFn, path: Path) -> None:
    """Break a line, or the bytes, of a file of JSON lines."""
    if draw(st.integers(0, 3)) == 0:
        path.write_bytes(draw(broken_bytes(path.read_bytes())))
        return
    lines = path.read_text().splitlines()
    place = draw(st.integers(0, len(lines) - 1))
    lines[place] = json.dumps(draw(mutated(json.loads(lines[place]))))
    path.write_text("\n".join(lines) + "\n")


@st.composite
def results(draw: st.DrawFn, place: Path) -> tuple[Path, Path]:
    """A run and its evaluation; one of their files is broken."""
    shutil.rmtree(place, ignore_errors=True)
    run = write_run(place / "run", ["mix"], num_steps=3)
    evaluated = write_evaluation(place / "evaluation.json", evaluation(["mix"], ["piqa"]))
    match draw(st.sampled_from(["evaluation", "evaluation", "result", "metrics"])):
        case "evaluation":
            break_json(draw, evaluated)
        case "result":
            break_json(draw, run / "mix/result.json")
        case "metrics":
            break_lines(draw, run / "mix/metrics.jsonl")
    return run, evaluated


@fuzz
@given(st.data())
def test_broken_results_are_read_or_refused(tmp_path, data):
    run, evaluated = data.draw(results(tmp_path / "results"))
    faults = [survives(lambda: read_runs([run])), survives(lambda: read_evaluation(evaluated))]
    if faults == [None, None] and data.draw(st.integers(0, 39)) == 0:  # a page takes half a second
        survives(lambda: make_page([run], [evaluated]))


@fuzz
@given(st.data())
def test_broken_answers_are_read_or_refused(tmp_path, data):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(f"{json.dumps(answer)}\n" for answer in ANSWERS))
    data.draw(st.composite(break_lines)(path))
    survives(lambda: read_answers(path))


def test_what_is_broken_was_whole(tmp_path):
    run = write_run(tmp_path / "run", ["mix"], num_steps=3)
    evaluated = write_evaluation(tmp_path / "e.json", evaluation(["mix"], ["piqa"]))
    assert "piqa" in make_page([run], [evaluated])
    (tmp_path / "answers.jsonl").write_text("".join(f"{json.dumps(a)}\n" for a in ANSWERS))
    (answers,) = read_answers(tmp_path / "answers.jsonl")
    assert answers.right["base"] == (True, False, True)
