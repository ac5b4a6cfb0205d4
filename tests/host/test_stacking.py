"""Small forwards without gradients: like adapters are computed together, and nobody notices."""

import pytest
import torch

from loraloom.host.host import Host, HostOutput
from tests.tiny import ALL_METHODS, METHODS, changed, tiny_host, tiny_ids

ROWS = ["lora", None, "mixlora-b", "lora-b", "mixlora", "mixlora-b", "dora", None, "mixdora"]
ROWS += ["lora"]


def host_with_pairs(family: str) -> Host:
    """A host with two like adapters of some methods; the second ones have other weights."""
    host = tiny_host(family)
    for name in ("lora", "mixlora"):
        first = host.adapters[name]
        second = host.add(f"{name}-b", METHODS[name], seed=5)
        second.load_tensors({key: value.roll(1, 0) for key, value in first.tensors().items()})
    return host


def test_the_record_follows_the_rows_when_scales_come_and_go():
    host, ids = tiny_host(configs={"mix": METHODS["mixlora"]}), tiny_ids(2, 3)
    whole, half = "mix", ("mix", 0.5)
    with torch.no_grad(), host.prepared():
        host(ids, adapters=[whole, half])
        swapped = host(ids, adapters=[half, whole]).routing["mix"]
    with torch.no_grad():
        alone = [
            host(ids[[r]], adapters=[one]).routing["mix"] for r, one in enumerate((half, whole))
        ]
    for layer, record in enumerate(swapped):
        expected = torch.cat([one[layer].router_logits for one in alone])
        torch.testing.assert_close(record.router_logits, expected, rtol=0, atol=1e-10)


def stacked(host: Host, ids: torch.Tensor, adapters) -> HostOutput:
    """Run a small forward on prepared weights."""
    with torch.no_grad(), host.prepared():
        return host(ids, adapters=adapters)


@torch.no_grad()
@pytest.mark.parametrize("diverged", ["lora", "mixlora-b", "dora", "mixdora"])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_diverged_adapter_leaves_its_companions_alone(family, diverged):
    host, ids = host_with_pairs(family), tiny_ids(len(ROWS), 2)
    before = stacked(host, ids, ROWS).logits
    for parameter in host.adapters[diverged].parameters():
        parameter.fill_(torch.nan)
    after = stacked(host, ids, ROWS).logits
    others = [row for row, name in enumerate(ROWS) if name != diverged]
    assert torch.equal(after[others], before[others])
    assert not after[ROWS.index(diverged)].isfinite().any()


@pytest.mark.parametrize(
    ("method", "targets"),
    [
        *((method, ("q_proj", "v_proj")) for method in ("lora", "dora", "mola")),
        *((method, ("k_proj", "up_proj")) for method in ("lora", "mixdora", "hydralora")),
        *((method, ("o_proj", "down_proj")) for method in ("dora", "mixlora", "mola")),
        *((method, "ffn") for method in ("vera", "mixlora", "mola")),
    ],
)
def test_adapters_of_some_projections_are_stacked_too(method, targets):
    part = changed(ALL_METHODS[method], target_modules=targets)
    host = tiny_host(configs={"part": part, "part-b": part, "whole": ALL_METHODS["lora"]})
    ids, rows = tiny_ids(5, 2), ["part-b", "whole", None, "part", "part-b"]
    expected = host(ids, None, rows).logits.detach()
    torch.testing.assert_close(stacked(host, ids, rows).logits, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("method", ["lora", "mixdora", "hydralora"])
def test_like_adapters_that_have_no_rows_change_nothing(method):
    """Not while they lie between the others, and not when they are too many and go."""
    host, ids = tiny_host(configs=dict.fromkeys("abcdef", ALL_METHODS[method])), tiny_ids(6, 1)
    batches = [[*"abcdef"], [*"acf", None, *"ca"], [*"afa", None, *"fa"], [*"bbbbbb"], [*"fedcba"]]
    with host.prepared():
        served = [host(ids, None, rows) for rows in batches]
    for rows, out in zip(batches, served, strict=True):
        expected = host(ids, None, rows)
        torch.testing.assert_close(out.logits, expected.logits, rtol=1e-9, atol=1e-9)
        assert out.routing.keys() == expected.routing.keys()
