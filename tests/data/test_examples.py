from __future__ import annotations

from loraloom.data.examples import NO_LOSS, Example, collate

EXAMPLES = [
    Example(input_ids=(5, 6, 7), labels=(NO_LOSS, 6, 7), sample_id=40),
    Example(input_ids=(8,), labels=(8,), sample_id=2),
]


def test_collate_pads_on_the_right_without_loss():
    batch = collate(EXAMPLES, pad_id=9)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[NO_LOSS, 6, 7], [8, NO_LOSS, NO_LOSS]]
    assert batch.sample_ids == (40, 2)


def test_collate_pads_on_the_left():
    batch = collate(EXAMPLES, pad_id=9, side="left")
    assert batch.input_ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.labels.tolist() == [[NO_LOSS, 6, 7], [NO_LOSS, NO_LOSS, 8]]
