from __future__ import annotations

import random

from loraloom.data.grouping import group_by_length


def test_mega_batches_are_shuffled_and_sorted_within_as_in_transformers():
    lengths = list(range(1, 41))
    random.Random(0).shuffle(lengths)
    order = [100 + place for place in range(40)]
    grouped = group_by_length(order, lengths, batch_size=2)
    sizes = [lengths[index - 100] for index in grouped]
    assert sorted(grouped) == order
    parts = [sizes[start : start + 10] for start in range(0, 40, 10)]  # 5 batches, a quarter
    assert sizes[0] == 40
    assert all(part[1:] == sorted(part[1:], reverse=True) for part in parts)


def test_a_few_examples_are_mega_batches_of_one_batch():
    assert group_by_length([7, 8, 9], [1, 3, 2], batch_size=4) == [8, 9, 7]
