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


def test_a_choice_may_be_the_beginning_of_another_or_the_same():
    (row,) = make_rows([TokenPair([1], [7, 8]), TokenPair([1], [7, 8, 9])], shared=True)
    assert row.input_ids == [1, 7, 8]
    assert row.branches == [0, 0, 2]
    assert row.predictors == [0, 1, 0, 1, 2]
    (row,) = make_rows([TokenPair([1], [7, 8])] * 2, shared=True)
    assert row.input_ids == [1, 7]
    assert row.predictors == [0, 1, 0, 1]


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
