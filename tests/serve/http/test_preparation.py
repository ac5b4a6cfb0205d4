"""Work before the engine is done by turns of API keys."""

import asyncio
import time
from contextlib import ExitStack

import pytest

from loraloom.generation.request import RequestError
from loraloom.serve.http.preparation import Preparations


def test_a_key_with_much_work_keeps_nobody_waiting():
    done = []

    async def ask(preparations, tenant, seconds):
        await preparations.run(tenant, lambda: time.sleep(seconds))
        done.append(tenant)

    async def ask_all():
        preparations = Preparations()
        crowd = [ask(preparations, "many", 0.05) for _ in range(20)]
        late = [ask(preparations, "few", 0.01) for _ in range(5)]
        await asyncio.gather(*crowd, *late)

    asyncio.run(ask_all())
    assert done.index("few") < 3
    assert done[:12].count("few") == 5


def test_a_key_prepares_as_many_requests_as_its_part_of_the_line():
    preparations = Preparations(max_requests=8)
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(preparations.preparing("many"))
        with pytest.raises(RequestError, match="8 requests of this key are being prepared"):
            stack.enter_context(preparations.preparing("many"))
        for _ in range(4):
            stack.enter_context(preparations.preparing("few"))
        with pytest.raises(RequestError) as caught:
            stack.enter_context(preparations.preparing("few"))
    assert caught.value.code == "queue_full"
    with preparations.preparing("many"):
        pass
