from __future__ import annotations

import pytest
import torch

from loraloom.training.cluster.board import MAX_LOSSES, Board, Size, memory_together
from loraloom.training.run.memory import predict_memory
from tests.training.toy import add_job, toy_config, toy_host


def board(*rooms: int | None, jobs: dict[str, int] | None = None, **options) -> Board:
    """A board with workers of so much room, and jobs that take so much."""
    result = Board(**options)
    for worker, room in enumerate(rooms):
        result.open(worker, room)
    for name, need in (jobs or {}).items():
        result.enter(name, Size(need, 0, 1))
    return result


def test_jobs_are_spread_by_the_share_of_the_room_that_they_fill():
    jobs = board(100, 200, jobs={"a": 20, "b": 20, "c": 20})
    assert jobs.place() == [("a", 1), ("b", 0), ("c", 1)]


def test_a_job_of_higher_priority_goes_first():
    jobs = board(10, jobs={"low": 10})
    jobs.enter("high", Size(10, 0, 1), priority=2.0)
    assert jobs.place() == [("high", 0)]
    assert jobs.waiting == ["low"]


def test_a_waiting_job_goes_to_whoever_is_free():
    jobs = board(10, 10, jobs={"a": 10, "b": 10, "c": 10})
    assert jobs.place() == [("a", 0), ("b", 1)]
    assert jobs.place() == []
    jobs.leave("b")
    assert jobs.place() == [("c", 1)]


def test_small_jobs_go_past_a_large_one_but_not_to_the_worker_that_it_waits_for():
    jobs = board(10, 10, jobs={"a": 3, "b": 5})
    jobs.place()
    jobs.enter("large", Size(10, 0, 1))
    jobs.enter("small", Size(1, 0, 1))
    assert jobs.place() == [("small", 1)]
    jobs.leave("a")
    assert jobs.place() == [("large", 0)]


def test_where_room_is_not_known_jobs_go_where_fewest_bytes_are():
    assert board(None, None, jobs={"a": 5, "b": 1, "c": 1}).place() == [
        ("a", 0),
        ("b", 1),
        ("c", 1),
    ]


def test_a_job_that_fits_nowhere_is_tried_alone_where_most_room_is():
    jobs = board(5, 9, jobs={"a": 12, "b": 1})
    assert jobs.place() == [("a", 1), ("b", 0)]


def test_bounded_rounds_are_no_larger_than_one_full_of_the_dearest_tokens():
    """Three jobs of 40 bytes a step, but a round has tokens for one and a half."""
    sizes = {name: Size(10, 40, 20) for name in "abc"}
    unbounded, bounded = Board(), Board(max_tokens_per_step=30)
    for one in (unbounded, bounded):
        one.open(0, 95)
        for name, size in sizes.items():
            one.enter(name, size)
    assert len(unbounded.place()) == 1
    assert len(bounded.place()) == 3


def test_jobs_of_a_lost_worker_wait_again_in_their_old_order():
    jobs = board(10, 10, jobs={"a": 10, "b": 10, "c": 10})
    jobs.place()
    assert jobs.lose(0) == []
    assert jobs.waiting == ["a", "c"]
    jobs.open(2, 10)
    assert jobs.place() == [("a", 2)]


def test_a_job_that_loses_workers_goes_on_alone_and_is_given_up_when_it_loses_that_too():
    jobs = board(10, jobs={"bad": 1, "good": 1})
    for lost in range(MAX_LOSSES - 1):
        assert [name for name, _ in jobs.place()] == ["bad", "good"]
        assert jobs.lose(lost) == []
        jobs.open(lost + 1, 10)
    assert [name for name, _ in jobs.place()] == ["bad"]
    assert jobs.lose(MAX_LOSSES - 1) == ["bad"]
    jobs.leave("bad")
    jobs.open(MAX_LOSSES, 10)
    assert [name for name, _ in jobs.place()] == ["good"]


def test_a_job_that_got_further_between_losses_is_not_given_up():
    jobs = board(10, jobs={"a": 1})
    for lost in range(2 * MAX_LOSSES):
        jobs.place()
        jobs.began("a", step=lost)
        assert jobs.lose(lost) == []
        jobs.open(lost + 1, 10)


def test_a_job_that_is_refused_is_tried_alone_once():
    jobs = board(10, jobs={"a": 1, "b": 1})
    jobs.place()
    assert jobs.refuse("b")
    assert jobs.place() == []
    jobs.leave("a")
    assert jobs.place() == [("b", 0)]
    assert not jobs.refuse("b")


@pytest.mark.parametrize("bound", [None, 60])
def test_jobs_measured_alone_take_no_less_than_together(bound):
    """What the board adds up is a bound of what the worker's own prediction says of all."""
    host = toy_host(torch.float32)
    jobs = [add_job(host, toy_config(f"job-{n}", batch_size=4, seed=n)) for n in range(3)]
    together = predict_memory(host, jobs, bound)
    sizes = []
    for job in jobs:
        one = predict_memory(host, [job], bound)
        kept = sum(p.numel() * p.itemsize for p in job.parameters.values()) + one.learning
        sizes.append(Size(kept, one.activations + one.loss, one.rows * one.length))
    need = memory_together(sizes, bound)
    assert need >= 0.95 * (together.total - together.base_model)
