from __future__ import annotations

from loraloom.training.cluster.rounds import Event, Rounds
from loraloom.training.run.job import Position


def event(round_: int) -> Event:
    return Event(round_, Position(step=round_))


def test_an_event_waits_until_all_others_have_come_as_far():
    rounds = Rounds()
    rounds.note("fast", event(4))
    assert rounds.take({"slow": 3}) == {}
    assert rounds.take({"slow": 4}) == {"fast": event(4)}
    assert rounds.now == 4


def test_events_of_one_round_are_judged_together_and_earlier_ones_first():
    rounds = Rounds()
    for name, round_ in (("a", 8), ("b", 4), ("c", 4)):
        rounds.note(name, event(round_))
    assert set(rounds.take({})) == {"b", "c"}
    assert set(rounds.take({"b": 5, "c": 8})) == set()
    assert set(rounds.take({"b": 8, "c": 9})) == {"a"}


def test_old_news_of_what_was_judged_count_once_unless_the_job_comes_there_again():
    rounds = Rounds()
    rounds.note("a", event(4))
    rounds.take({})
    rounds.note("a", event(4))
    assert rounds.events == {}
    rounds.forget("a")
    rounds.note("a", event(4))
    assert set(rounds.take({})) == {"a"}
