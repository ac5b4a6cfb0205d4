import pytest
import torch

from loraloom.data.tokens import NO_LOSS, Example, TokenPair
from loraloom.errors import DataError
from loraloom.generation.scoring import collate, example_row, fit_pair, make_rows

CPU = torch.device("cpu")


def test_choices_with_one_context_share_a_row():
    (row,) = make_rows([TokenPair([1, 2], [3, 4, 5]), TokenPair([1, 2], [6, 7])], shared=True)
    assert row.input_ids == [1, 2, 3, 4, 6]
    assert row.position_ids == [0, 1, 2, 3, 2]
    assert row.branches == [0, 0, 1, 1, 2]
    assert row.predictors == [1, 2, 3, 1, 4]
    assert row.targets == [3, 4, 5, 6, 7]
    assert row.choices == [0, 0, 0, 1, 1]


def test_what_all_choices_begin_with_stands_in_the_context():
    (row,) = make_rows(
        [TokenPair([1, 2], [7, 8, 3, 4]), TokenPair([1, 2], [7, 8, 5, 6]), TokenPair([9], [7, 8])],
        shared=True,
    )[:1]
    assert row.input_ids == [1, 2, 7, 8, 3, 5]
    assert row.position_ids == [0, 1, 2, 3, 4, 4]
    assert row.branches == [0, 0, 0, 0, 1, 2]
    assert row.predictors == [1, 2, 3, 4, 1, 2, 3, 5]
    assert row.targets == [7, 8, 3, 4, 7, 8, 5, 6]


def test_a_choice_may_be_the_beginning_of_another_or_the_same():
    (row,) = make_rows([TokenPair([1], [7, 8]), TokenPair([1], [7, 8, 9])], shared=True)
    assert row.input_ids == [1, 7, 8]
    assert row.branches == [0, 0, 2]
    assert row.predictors == [0, 1, 0, 1, 2]
    (row,) = make_rows([TokenPair([1], [7, 8])] * 2, shared=True)
    assert row.input_ids == [1, 7]
    assert row.predictors == [0, 1, 0, 1]


def test_choices_have_a_row_for_each_context():
    (row,) = make_rows([TokenPair([1, 2], [label]) for label in (3, 4, 5)], shared=True)
    assert (row.input_ids, row.predictors, row.choices) == ([1, 2], [1, 1, 1], [0, 1, 2])
    pairs = [TokenPair([1], [9]), TokenPair([2], [9]), TokenPair([1], [8])]
    assert [row.choices for row in make_rows(pairs, shared=True)] == [[0, 2], [1]]
    rows = make_rows([TokenPair([1, 2], [3, 4]), TokenPair([1, 2], [5, 6])], shared=False)
    assert [row.input_ids for row in rows] == [[1, 2, 3], [1, 2, 5]]


def test_a_mask_of_its_own_is_made_for_branches_only():
    single = make_rows([TokenPair([1, 2], [3, 4]), TokenPair([1, 2], [5])], shared=True)
    branching = make_rows([TokenPair([1, 2, 6], [3, 4]), TokenPair([1, 2, 6], [5, 7])], shared=True)
    assert collate(single, torch.float32, CPU).attention_mask.tolist() == [[1, 1, 1]]
    mask = collate(single + branching, torch.float32, CPU).attention_mask
    assert mask.shape == (2, 1, 5, 5)
    assert (mask[1, 0] == 0).long().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 0, 1],
    ]


def test_examples_are_padded_on_the_right_with_the_token_that_is_given():
    examples = [Example((5, 6, 7), (NO_LOSS, 6, 7), 40), Example((8,), (8,), 2)]
    batch = collate([example_row(example) for example in examples], torch.float32, CPU, pad_id=9)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.targets.tolist() == [6, 7]


def test_contexts_are_cut_from_the_left():
    assert fit_pair(TokenPair([1, 2, 3], [4, 5]), 3) == TokenPair([2, 3], [4, 5])
    assert fit_pair(TokenPair([1, 2, 3], [4, 5]), 2) == TokenPair([3], [4, 5])


@pytest.mark.parametrize("num_tokens", [0, 2])
def test_a_continuation_that_does_not_fit_is_an_error(num_tokens):
    with pytest.raises(DataError, match=f"a choice must have 1 to 1 tokens, got {num_tokens}"):
        fit_pair(TokenPair([1, 2, 3], [4] * num_tokens), 1, "a choice")
