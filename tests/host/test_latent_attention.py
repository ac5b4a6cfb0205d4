"""Multi-head latent attention, where a projection reads all tokens of the cache in each step."""

from functools import lru_cache
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from loraloom.adapters import LoraConfig, MolaConfig
from loraloom.generation.loading import default_cache_tokens
from loraloom.host.decoding import Decoding
from loraloom.host.host import Host
from loraloom.host.layout import RowAdapter
from tests.tiny import LATENT_TYPES, padded_mask, relative_error, tiny_host, tiny_ids

TYPES = [family for family in LATENT_TYPES if family in CONFIG_MAPPING]
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(rank=3, alpha=6, target_modules="attention"),
    "other": LoraConfig(rank=3, alpha=6, target_modules="attention"),
    "dora": LoraConfig(rank=2, weight_decomposition=True, target_modules=("kv_b_proj",)),
    "mola": MolaConfig(rank=2, num_experts=3, top_k=2, target_modules="attention"),
}
# The first are computed by stacks; the others, each adapter for itself.
ROWS: tuple[list[RowAdapter], ...] = (
    ["lora", "other"],
    ["other", None, "lora"],
    ["dora", ("mola", 0.5), None],
)
LENGTHS = [7, 4, 6]


@lru_cache(maxsize=1)
def host_of(family: str) -> Host:
    return tiny_host(family, CONFIGS)


@pytest.mark.parametrize("names", ROWS, ids=str)
@pytest.mark.parametrize("family", TYPES)
def test_decoded_rows_are_what_each_is_alone(family, names):
    host = host_of(family)
    lengths = LENGTHS[: len(names)]
    mask = padded_mask(lengths, "left")
    ids = torch.where(mask.bool(), tiny_ids(len(names)), 0)
    added = [tiny_ids(len(names), length, seed=length) for length in (1, 2, 1)]
    session = host.prefill(ids, mask, names)
    together = [host.extend(session, tokens) for tokens in added]
    for row, name in enumerate(names):
        session = host.prefill(ids[row : row + 1, -lengths[row] :], None, [name])
        for step, tokens in enumerate(added):
            alone = host.extend(session, tokens[row : row + 1])
            assert relative_error(together[step][row], alone[0]) < 1e-4, (name, step)


def test_routers_record_a_step_without_the_tokens_before_it():
    host = host_of("deepseek_v3")
    names: list[RowAdapter] = ["mola", "lora", "mola"]
    session = host.prefill(tiny_ids(3), None, names)
    record: dict[str, Any] = {}
    host.extend(session, tiny_ids(3, 2), record)
    assert {len(routing.router_logits) for routing in record["mola"]} == {2 * 2}


@pytest.mark.parametrize("family", TYPES)
def test_a_session_goes_on_from_a_rows_states(family):
    host = host_of(family)
    session = host.prefill(tiny_ids(2), None, ["lora", "dora"])
    states = session.states(1, 0, 7)
    resumed = Decoding.resume("dora", states, session.prepared)
    tokens = tiny_ids(2, 1, seed=1)
    expected = host.decode(session, tokens[:, 0])[1]
    assert relative_error(host.decode(resumed, tokens[1])[0], expected) < 1e-6
    assert default_cache_tokens(host, max_rows=1) > 0


def test_transformers_generate_computes_rows_as_sessions_do():
    host = host_of("deepseek_v3")
    names: list[RowAdapter] = ["lora", None, "mola"]
    options: Any = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    generated = host.generate(tiny_ids(3), adapters=names, pad_token_id=0, **options)[:, 7:]
    session = host.prefill(tiny_ids(3), None, names)
    for column in generated.T:
        assert torch.equal(session.logits.argmax(-1), column)
        host.decode(session, column)
