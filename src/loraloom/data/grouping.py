"""An epoch's order in which examples of similar length share a step."""

from __future__ import annotations

from collections.abc import Sequence

_MAX_MEGA_BATCH = 50
_MIN_MEGA_BATCHES = 4


def group_by_length(order: Sequence[int], lengths: Sequence[int], batch_size: int) -> list[int]:
    """Sort a shuffled order by length within mega-batches, the longest first.

    A mega-batch is 50 batches, or a quarter of the epoch where that is less. The batch with the
    longest example of all comes first, so that memory runs out early if it does.

    Source:
        transformers 5.24, `trainer_pt_utils.get_length_grouped_indices`.
    """
    mega_batch = min(len(order) // (batch_size * _MIN_MEGA_BATCHES), _MAX_MEGA_BATCH)
    size = max(mega_batch, 1) * batch_size
    places = [
        sorted(range(start, min(start + size, len(order))), key=lambda place: -lengths[place])
        for start in range(0, len(order), size)
    ]
    longest = max(range(len(places)), key=lambda part: lengths[places[part][0]])
    places[0][0], places[longest][0] = places[longest][0], places[0][0]
    return [order[place] for part in places for place in part]
