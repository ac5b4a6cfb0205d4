"""Which rows of a batch belong to which adapter."""

from __future__ import annotations

import pytest
import torch

from loraloom.models.forward import query_mask
from loraloom.models.layout import Layout, make_layout
from loraloom.models.view import Rows
from loraloom.ops.dropout import mix64
from tests.tiny import padded_mask

CPU = torch.device("cpu")


def layout(names, length: int = 3, mask=None, keys=None) -> Layout:
    return make_layout(names, length, mask, keys, CPU)


def test_rows_that_come_grouped_stay_where_they_are():
    made = layout(["a", "a", None, "b"])
    assert made.row_order is None
    assert [segment.adapter_name for segment in made.segments] == ["a", None, "b"]
    assert [segment.tokens for segment in made.segments] == [slice(0, 6), slice(6, 9), slice(9, 12)]


def test_segments_of_grouped_rows_are_views():
    values = torch.randn(4, 3, 2)
    for part in layout(["a", "a", None, "b"]).split(values):
        assert part.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "names",
    [
        ["a"],
        [None, None],
        ["a", "b", "a"],
        ["b", None, "a", "b", None, "a", "c"],
        ["a", "a", None, "b"],
    ],
)
def test_join_undoes_split(names):
    values = torch.randn(len(names), 3, 2)
    made = layout(names)
    parts = made.split(values)
    assert torch.equal(made.join(parts, values.shape), values)
    for segment, part in zip(made.segments, parts, strict=True):
        rows = [row for row, name in enumerate(names) if name == segment.adapter_name]
        assert torch.equal(part, values[rows].flatten(0, 1))


def test_each_adapter_has_one_segment_in_the_order_of_first_rows():
    made = layout(["b", None, "a", "b", None])
    assert [segment.adapter_name for segment in made.segments] == ["b", None, "a"]


def test_real_tokens_are_those_of_the_segments_own_rows():
    mask = padded_mask([3, 1, 2], length=3)
    first, second = layout(["a", "b", "a"], mask=mask).segments
    assert first.real.tolist() == [True] * 3 + [True, True, False]
    assert first.real_index.tolist() == [0, 1, 2, 3, 4]
    assert second.real.tolist() == [True, False, False]
    assert second.real_index.tolist() == [0]


def test_without_padding_there_is_no_index():
    for mask in (None, torch.ones(2, 3, dtype=torch.long)):
        assert all(s.real is None for s in layout(["a", "b"], mask=mask).segments)
    mask = padded_mask([3, 2], length=3)
    assert [s.real is None for s in layout(["a", "b"], mask=mask).segments] == [True, False]


def test_samples_are_spans_of_real_tokens():
    mask = torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 0]])
    keys = [mix64(row) for row in range(3)]
    (segment,) = layout(["a"] * 3, mask=mask, keys=keys).segments
    first, second, third = segment.spans
    assert [span.key for span in segment.spans] == keys
    assert first.tokens == slice(1, 3)
    assert second.tokens.tolist() == [3, 5]
    assert third.tokens == slice(6, 6)


def test_samples_follow_their_rows_into_the_segment():
    mask = padded_mask([2, 3, 1], length=3)
    first, second = layout(["a", "b", "a"], mask=mask, keys=[10, 20, 30]).segments
    assert [(s.key, s.tokens) for s in first.spans] == [(10, slice(0, 2)), (30, slice(3, 4))]
    assert [(s.key, s.tokens) for s in second.spans] == [(20, slice(0, 3))]


def test_outside_training_there_are_no_samples():
    (segment,) = layout(["a"]).segments
    assert segment.spans is None
    assert segment.at_layer(0, CPU).noise is None


def test_adapters_are_repeated_for_beams_and_returned_sequences():
    assert Rows(["a", None]).expanded(6) == ["a", "a", "a", None, None, None]
    assert Rows(["a", None]).expanded(2) == ["a", None]


def test_the_query_mask_is_the_last_part_of_a_padding_mask():
    mask = padded_mask([5, 3], "left", 5)
    assert query_mask(mask, 1).tolist() == [[1], [1]]
    assert query_mask(mask, 5) is not None
    assert torch.equal(query_mask(mask, 5), mask)


def test_masks_of_another_form_are_the_base_models_own():
    assert query_mask(None, 3) is None
    assert query_mask(torch.zeros(1, 1, 3, 3), 3) is None
