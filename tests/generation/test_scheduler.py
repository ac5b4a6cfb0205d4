"""Who comes next."""

from collections.abc import Sequence

from loraloom.generation.request import GenerationRequest, Row
from loraloom.generation.sampling import SamplingConfig
from loraloom.generation.scheduler import EngineLimits, Scheduler
from loraloom.host.choice import Choice
from tests.conftest import build_tokenizer

TOKENIZER = build_tokenizer()


def row(owner: str, length: int = 10, tenant: str = "") -> Row:
    ids, sampling = [3] * length, SamplingConfig()
    request = GenerationRequest(ids, Choice(owner), owner, sampling, tenant=tenant)
    return Row(request, TOKENIZER, [], lambda event: None)


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
    scheduler = Scheduler(EngineLimits(max_rows=4, cache_tokens=1000))
    queue(scheduler, *(row("many") for _ in range(6)), row("few"), row("few"))
    assert admitted(scheduler)[:4] == ["many", "few", "many", "few"]
