from __future__ import annotations

from dataclasses import asdict

import torch

from loraloom.adapters import MixLoraConfig
from loraloom.training.job import WINDOW_STEPS, CollapseWatch
from loraloom.training.step.batch import add_counts

CONFIG = MixLoraConfig(num_experts=4, top_k=1)
EVEN = {(0, None): [100] * 4, (3, None): [100] * 4}
COLLAPSED = {(0, None): [100] * 4, (3, None): [398, 2, 0, 0]}


def take(watch: CollapseWatch, counts, steps: int, first: int = 1) -> list[str]:
    return [w for step in range(first, first + steps) for w in watch.take(step, counts, CONFIG)]


def test_a_collapse_is_told_once_after_a_window():
    watch = CollapseWatch()
    assert take(watch, COLLAPSED, WINDOW_STEPS - 1) == []
    unused, collapsed = take(watch, COLLAPSED, 1, WINDOW_STEPS)
    assert unused.startswith(f"steps 1 to {WINDOW_STEPS}: 2 of 8 experts are hardly used")
    assert "layer 3 (experts 2, 3)" in unused
    assert "layer 3 (1.0)" in collapsed
    assert take(watch, COLLAPSED, 4 * WINDOW_STEPS, WINDOW_STEPS + 1) == []
    assert list(watch.warnings.values()) == [unused, collapsed]


def test_a_balanced_job_hears_nothing():
    assert take(CollapseWatch(), EVEN, 3 * WINDOW_STEPS) == []


def test_a_later_collapse_is_told_with_its_steps():
    watch = CollapseWatch()
    take(watch, EVEN, WINDOW_STEPS)
    first, _ = take(watch, COLLAPSED, WINDOW_STEPS, WINDOW_STEPS + 1)
    assert first.startswith(f"steps {WINDOW_STEPS + 1} to {2 * WINDOW_STEPS}:")


def test_a_window_lasts_until_there_are_tokens_enough():
    small = {layer: [count // 10 for count in counts] for layer, counts in COLLAPSED.items()}
    watch = CollapseWatch()
    assert take(watch, small, WINDOW_STEPS) == []
    assert take(watch, small, 2 * WINDOW_STEPS, WINDOW_STEPS + 1) != []


def test_it_goes_on_where_it_was_saved(tmp_path):
    watch = CollapseWatch()
    take(watch, COLLAPSED, 10)
    torch.save(asdict(watch), tmp_path / "state.pt")
    restored = CollapseWatch(**torch.load(tmp_path / "state.pt", weights_only=True))
    assert restored == watch
    rest = WINDOW_STEPS - 10
    assert take(restored, COLLAPSED, rest, 11) == take(watch, COLLAPSED, rest, 11) != []


def test_counts_are_added_by_layer():
    router = (2, None)
    first = {router: [1, 2]}
    assert add_counts({}, first) == add_counts(first, {}) == first
    assert add_counts(first, {router: [3, 4]}) == {router: [4, 6]}
