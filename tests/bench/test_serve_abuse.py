"""No key takes another's share, whatever it asks for."""

import pytest

from benchmarks import serve_abuse

SHARES = (
    "history",
    "full_queue",
    "large_prompts",
    "many_messages",
    "long_prompts",
    "scored_prompts",
    "routed_prompts",
    "text_that_does_not_settle",
)


@pytest.fixture(scope="module")
def server():
    with serve_abuse.served(scale=0.1) as server:
        yield server


@pytest.mark.parametrize("name", SHARES)
def test_the_server_holds_against(server, name):
    (result,) = serve_abuse.attack(server, [name])
    assert result.held, result.outcome
