from __future__ import annotations

import pytest

from loraloom.errors import ConfigError
from loraloom.eval.comparison import (
    TaskAnswers,
    adjusted,
    choose_pairs,
    compare,
    contestants,
    seed_groups,
    shares_right,
    summarise_seeds,
)
from loraloom.eval.statistics import compare_paired

ANSWERS = TaskAnswers(
    "toy",
    (0, 1, 2, 3),
    {
        "base": (False, False, True, False),
        "mix@0": (True, False, True, True),
        "mix@1": (True, True, False, True),
        "lora": (True, False, False, False),
    },
)
NAMES = list(ANSWERS.right)


def test_adapters_with_an_at_are_seeds_of_what_stands_before_it():
    assert seed_groups(NAMES) == {"mix": ["mix@0", "mix@1"]}
    assert contestants(NAMES) == ["base", "mix", "lora"]


def test_a_single_seed_is_no_group():
    assert seed_groups(["mix@0", "lora"]) == {}
    assert contestants(["mix@0", "lora"]) == ["mix@0", "lora"]


def test_a_group_must_not_have_an_adapters_name():
    with pytest.raises(ConfigError, match="got 'mix' and its seeds mix@0, mix@1; call one"):
        seed_groups(["mix@0", "mix@1", "mix"])


def test_everybody_is_compared_with_the_base_model_and_few_with_each_other():
    assert choose_pairs(NAMES) == [("mix", "base"), ("lora", "base"), ("mix", "lora")]
    assert choose_pairs(["a", "b"]) == [("a", "b")]
    assert choose_pairs([None]) == []
    assert choose_pairs([None, *"abcde"]) == [(name, "base") for name in "abcde"]


def test_pairs_can_be_asked_for():
    wanted = ["mix@0:mix@1", "lora:mix"]
    assert choose_pairs(NAMES, wanted) == [("mix@0", "mix@1"), ("lora", "mix")]


def test_a_single_seed_may_be_asked_for_by_the_name_of_its_group():
    assert choose_pairs(["base", "mix@0", "lora"], ["mix:base"]) == [("mix@0", "base")]
    single = TaskAnswers("toy", (0, 1), {"mix@0": (True, False), "lora": (True, True)})
    assert shares_right(single, "mix") == [1.0, 0.0]


@pytest.mark.parametrize("text", ["mix:mix@0", "mix@0:mix"])
def test_a_single_seed_is_not_compared_with_itself(text):
    with pytest.raises(ConfigError, match="--compare must be FIRST:SECOND"):
        choose_pairs(["base", "mix@0"], [text])


@pytest.mark.parametrize("text", ["lora", "lora:", "lora:law", "lora:lora", "lora:base:mix"])
def test_a_pair_of_others_is_an_error(text):
    message = "--compare must be FIRST:SECOND, two of base, mix@0, mix@1, lora, mix, got"
    with pytest.raises(ConfigError, match=message):
        choose_pairs(NAMES, [text])


def test_seeds_answer_as_the_share_of_them_that_are_right():
    assert shares_right(ANSWERS, "mix") == [1.0, 0.5, 0.5, 1.0]
    assert shares_right(ANSWERS, "lora") == [1.0, 0.0, 0.0, 0.0]


def test_a_comparison_is_paired():
    assert compare(ANSWERS, "mix", "lora") == compare_paired([1, 0.5, 0.5, 1], [1, 0, 0, 0])
    with pytest.raises(ConfigError, match="toy must have answers of 'law', got base, mix@0"):
        compare(ANSWERS, "law", "lora")


def test_several_comparisons_are_adjusted_for_their_number():
    pairs = [("mix", "base"), ("lora", "base")]
    results = adjusted([("toy", *pair, compare(ANSWERS, *pair), "accuracy") for pair in pairs])
    assert [(one.first, one.second) for one in results] == pairs
    for one in results:
        assert one.result == compare(ANSWERS, one.first, one.second)
        assert one.adjusted_p_value >= one.result.p_value
    written = results[0].to_json()
    assert (written["task"], written["first"], written["second"]) == ("toy", "mix", "base")
    assert written["difference"] == 0.5


def test_seeds_have_a_mean_and_a_sample_deviation_in_each_task():
    right = {f"mix@{seed}": (True,) * (2 + seed) + (False,) * (2 - seed) for seed in range(3)}
    (group,) = summarise_seeds([TaskAnswers("toy", (0, 1, 2, 3), right)]).values()
    assert group["adapters"] == ["mix@0", "mix@1", "mix@2"]
    assert group["tasks"] == {"toy": {"mean": 0.75, "sd": pytest.approx(0.25), "num_seeds": 3}}


def test_a_group_must_not_be_called_as_the_base_model():
    with pytest.raises(ConfigError, match="got 'base' and its seeds base@0, base@1; call one"):
        choose_pairs(["base@0", "base@1", "x"])
    with pytest.raises(ConfigError, match="got 'mix' and its seeds mix@0, mix@1; call one"):
        choose_pairs(["mix", "mix@0", "mix@1"], ["mix:mix@0"])


@pytest.mark.parametrize("again", ["lora:base", "base:lora"])
def test_a_pair_is_compared_once(again):
    with pytest.raises(ConfigError, match="--compare must name each pair once, got lora:base, "):
        choose_pairs(NAMES, ["lora:base", again])
