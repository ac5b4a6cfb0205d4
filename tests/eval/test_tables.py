import csv
import math
import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from rich.table import Table
from scipy.optimize import brentq
from scipy.stats import norm

from loraloom.eval.evaluation import summarise
from loraloom.eval.results import Comparison, Evaluation, num_examples_needed
from loraloom.eval.statistics import compare_paired, compare_ratios, mcnemar_p_value
from tests.eval.scoring import toy_scores
from tests.test_terminal import printed

SEEDS = {
    "mix": {
        "adapters": ["mix@0", "mix@1"],
        "tasks": {"toy": {"mean": 0.625, "sd": 0.031, "num_seeds": 2}},
    }
}


def compared(p_value=0.0312):
    names = {"task": "toy", "first": "mix", "second": "base", "p_value": p_value}
    figures = {"difference": -0.0125, "stderr": 0.004, "interval": (-0.02, -0.005)}
    counts = {"num_first_better": 3, "num_second_better": 13, "num_examples": 800}
    return Comparison(**names, **figures, **counts, adjusted_p_value=min(1.0, 2 * p_value))


def tables_of(*scores, **details) -> list[Table]:
    return Evaluation(schema_version=1, results=summarise(scores, []).results, **details).tables()


def test_the_table_has_accuracies_and_marks_those_that_a_constant_answer_reaches():
    other = toy_scores(task="other", values=((-1.0, -2.0), (-2.0, -1.0)))
    (table,) = tables_of(toy_scores(group="sums"), other)
    toy, group, right = printed(table, width=120).splitlines()[2:5]
    assert toy.split()[:5] == ["toy", "(test)", "accuracy", "%", "2"]
    assert toy.split()[5:] == ["50.0", "(9.5–90.5)†"] * 2 + ["50.0"]
    assert group.split()[:2] == ["toy/sums", "accuracy"]
    assert right.split()[5:] == ["100.0", "(34.2–100.0)"] * 2 + ["50.0"]
    assert "† no better than the majority class" in printed(table)


def test_other_figures_have_rows_of_their_own():
    results = {
        "base": {"rows": {"loss": 2.0, "interval": [1.5, 2.5], "perplexity": 7.389}, "new": {}},
        "mix": {"wiki": {"metrics": {"acc,none": {"value": 0.5, "stderr": None}}}},
    }
    text = printed(*Evaluation(schema_version=1, results=results).tables(), width=200)
    cells = ("2.0000 (1.5000–2.5000)", "7.389 (4.482–12.18)", "acc", "0.5000 ± –")
    for cell in cells:
        assert cell in text


def test_seeds_and_comparisons_have_a_table_where_there_are_some():
    tables = tables_of(toy_scores(), seeds=SEEDS, comparisons=[compared(), compared(1e-9)])
    _, seeds, comparisons = map(printed, tables)
    assert "62.5 ± 3.1" in seeds
    for cell in ("mix - base", "-1.2", "-2.0 to -0.5", "3 : 13", "0.031", "0.062", "< 0.001 *"):
        assert cell in comparisons


def test_differences_of_accuracies_and_of_losses_each_have_their_unit():
    loss = replace(compared(), metric="loss")
    for both in ([compared(), loss], [loss, compared()]):
        *_, table = tables_of(toy_scores(), comparisons=both)
        text = printed(table, width=120)
        for cell in ("-1.2 points", "-0.0125 nats a token", "-2.0 to -0.5", "-0.0200 to -0.0050"):
            assert cell in text


@pytest.fixture(scope="module")
def undecided():
    """Forty rows of losses that `mix` predicts a little better."""
    generator = random.Random(0)
    differences = [-generator.gauss(0.05, 0.3) for _ in range(40)]
    paired = compare_ratios(differences, [0.0] * 40, [1] * 40, better=-1)
    names = {"task": "toy", "metric": "loss", "first": "mix", "second": "base"}
    return Comparison(**vars(paired), **names, adjusted_p_value=paired.p_value)


def caption_of(*comparisons) -> str:
    return tables_of(toy_scores(), comparisons=comparisons)[-1].caption


def test_a_sentence_says_what_a_comparison_means(undecided):
    none = "toy: no difference in {} was found between {} on 40 examples. To find this lead of "
    for other, text in [
        (undecided, none.format("loss", "mix and base")),
        (replace(undecided, difference=-undecided.difference), none.format("loss", "base and mix")),
        (replace(undecided, metric="accuracy"), none.format("accuracy", "base and mix")),
        (replace(undecided, adjusted_p_value=0.01), "toy: mix beats base in loss, significantly."),
        (replace(undecided, difference=0.0), "toy: mix and base have the same loss."),
    ]:
        assert text in caption_of(other)
    few = replace(undecided, num_first_better=5, num_second_better=4)
    assert "takes about" not in caption_of(few)


@pytest.mark.parametrize("num_compared", [1, 8])
def test_the_examples_needed_find_the_lead_in_four_of_five_tests(undecided, num_compared):
    spread = undecided.stderr * math.sqrt(undecided.num_examples)

    def power(num_examples: float) -> float:
        critical = norm.isf(0.025 / num_compared)
        shift = abs(undecided.difference) * math.sqrt(num_examples) / spread
        return norm.sf(critical, loc=shift) + norm.cdf(-critical, loc=shift)

    oracle = brentq(lambda num_examples: power(num_examples) - 0.8, 1, 1e6)
    num_needed = num_examples_needed(undecided, num_compared)
    assert num_needed == pytest.approx(oracle, abs=1.01)
    caption = caption_of(*[undecided] * num_compared)
    assert f"in 80% of tests takes about {float(f'{oracle:.2g}'):,.0f}." in caption


def test_tests_on_the_examples_needed_are_significant_in_four_of_five_cases():
    pilot = np.repeat([1.0, -1.0, 0.0], [18, 11, 71])
    num_needed = num_examples_needed(compare_paired(pilot, np.zeros(100)))
    generator = np.random.default_rng(0)
    counts = generator.multinomial(num_needed, [0.18, 0.11, 0.71], size=1000).tolist()
    p_values = [mcnemar_p_value(won, lost) for won, lost, _ in counts]
    assert np.less(p_values, 0.05).mean() == pytest.approx(0.8, abs=0.05)


def test_an_interval_that_contradicts_its_p_value_is_explained(undecided):
    assert "trust p" not in caption_of(undecided)
    paired = compare_paired([1.0] * 9 + [-1.0] * 2 + [0.0] * 49, [0.0] * 60)
    assert paired.interval[0] > 0
    assert paired.p_value > 0.05
    names = {"task": "toy", "first": "mix", "second": "base"}
    contradiction = Comparison(**vars(paired), **names, adjusted_p_value=paired.p_value)
    note = "An interval excludes 0 although p (Holm) is 0.05 or more."
    assert note in caption_of(contradiction)
    assert caption_of(*[contradiction] * 9).count(note) == 1
    adjusted = replace(contradiction, p_value=0.01, adjusted_p_value=0.08)
    assert note in caption_of(adjusted)
    assert note not in caption_of(replace(contradiction, adjusted_p_value=0.04))


def test_many_comparisons_have_no_sentences(undecided):
    assert "toy:" not in caption_of(*[undecided] * 9)


def test_eight_adapters_with_long_names_fit_80_columns():
    names = [f"skills-mixlora-{seed}" for seed in range(8)]
    tasks = [toy_scores("agreement_of_nouns", task, names=names) for task in ("arc", "social_i_qa")]
    evaluation = summarise(tasks, [("skills-mixlora-0", "skills-mixlora-1")])
    for line in printed(*evaluation.tables()).splitlines():
        assert len(line.rstrip()) <= 80, line
        assert "…" not in line


def test_the_frame_has_a_row_for_each_group():
    evaluation = summarise([toy_scores(group="sums")], [])
    rows = list(csv.DictReader(evaluation.frame().to_csv(index=False).splitlines()))
    places = [(row["adapter"], row["group"]) for row in rows]
    assert places == list(product(("base", "law"), ("", "sums")))
    assert list(rows[0]) == [
        "adapter", "task", "split", "group", "accuracy", "stderr", "low", "high", "num_examples",
        "majority",
    ]  # fmt: skip
    assert rows[0]["split"] == "test"
