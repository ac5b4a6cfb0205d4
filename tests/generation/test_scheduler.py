"""Who comes next."""

from collections.abc import Sequence

import torch

from loraloom.adapters.routed.choice import Choice
from loraloom.generation.request import GenerationRequest, Row
from loraloom.generation.sampling import SamplingConfig
from loraloom.generation.scheduler import Scheduler
from tests.conftest import build_tokenizer

TOKENIZER = build_tokenizer()


def row(owner: str, length: int = 10, tenant: str = "") -> Row:
    ids, sampling = [3] * length, SamplingConfig()
    request = GenerationRequest(ids, Choice(owner), owner, sampling, tenant=tenant)
    return Row(request, TOKENIZER, [], torch.device("cpu"), lambda event: None)


def queue(scheduler: Scheduler, *rows: Row) -> None:
    for one in rows:
        scheduler.add(one)


def admitted(scheduler: Scheduler, served: Sequence[Row] = ()) -> list[str]:
    """Who is admitted in turn, each charged for its tokens; rows end at once."""
    owners = []
    while (one := scheduler.admit(list(served))) is not None:
        scheduler.charge(one.share, one.length)
        owners.append(one.owner)
    return owners


def test_adapters_take_turns_however_many_requests_one_has():
    scheduler = Scheduler(max_rows=4, max_tokens=1000)
    queue(scheduler, *(row("many") for _ in range(6)), row("few"), row("few"))
    assert admitted(scheduler)[:4] == ["many", "few", "many", "few"]


def test_customers_take_turns_however_many_adapters_one_has():
    scheduler = Scheduler(max_rows=4, max_tokens=1000)
    queue(scheduler, *(row(name, tenant="many") for name in "abcd"), row("a", tenant="one"))
    assert admitted(scheduler)[:3] == ["a", "a", "b"]


def test_rows_give_way_to_whoever_has_fewer():
    scheduler = Scheduler(max_rows=4, max_tokens=1000)
    served = [row("many") for _ in range(4)]
    queue(scheduler, late := row("late"))
    assert scheduler.victim(served, served) is None  # nobody is ahead of it
    for tokens, rows, gives_way in ((1, 4, True), (9, 2, True), (9, 1, False), (65, 1, True)):
        scheduler.charge(served[0].share, tokens - scheduler.used(served[0].share)[1])
        assert (scheduler.victim(served[:rows], served[:rows]) is not None) == gives_way
    assert scheduler.victim(served, []) is None
    scheduler.charge(late.share, 100)
    assert scheduler.victim(served, served) is None


def test_adapters_of_one_customer_drive_nobody_elses_out():
    scheduler = Scheduler(max_rows=4, max_tokens=1000)
    served = [row("a", tenant="one"), row("a", tenant="two"), row("a", tenant="two")]
    queue(scheduler, row("b", tenant="two"))
    scheduler.charge(served[0].share, 1000)
    scheduler.charge(served[1].share, 950)
    assert scheduler.victim(served, served[:1]) is None
    assert scheduler.victim(served, served) in served[1:]


def test_suspects_are_served_apart():
    scheduler = Scheduler(max_rows=4, max_tokens=1000)
    bad, good, late = row("bad"), row("good"), row("bad")
    bad.is_suspect = True
    queue(scheduler, late)
    assert scheduler.admit([good, bad]) is None
    assert scheduler.admit([bad]) is late
    queue(scheduler, good)
    assert scheduler.admit([bad]) is None
    bad.is_suspect = False
    assert scheduler.admit([bad]) is good
