"""Rows of different adapters in one batch, in training as in evaluation."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from loraloom.adapters import LoraConfig, MixLoraConfig
from loraloom.models.host import Host
from loraloom.ops.dropout import sample_key
from tests.tiny import (
    METHODS,
    changed,
    padded_mask,
    parameter_grads,
    router_loss,
    tiny_host,
    tiny_ids,
)

NAMES = ["mixlora", None, "lora", "mixdora", "dora", "mixlora"]
LENGTHS = [7, 5, 3, 7, 6, 4]
KEYS = [sample_key(0, 0, sample) for sample in range(6)]
NOISY: dict[str, LoraConfig] = {
    name: changed(config, dropout=0.3, **({"router_jitter": 0.2} if "mix" in name else {}))
    for name, config in METHODS.items()
}


def train_rows(host: Host, rows: list[int], names: list, side: str = "right") -> dict[str, Tensor]:
    """Return the gradients of the rows' summed losses, router losses left out."""
    ids, mask = tiny_ids(6)[rows], padded_mask(LENGTHS, side)[rows]
    if side == "left":
        ids = shifted(ids, mask)
    host.train()
    keys = [KEYS[row] for row in rows]
    states = host.hidden(
        ids, mask, names, keys, position_ids=(mask.cumsum(1) - 1).clamp_min(0)
    ).last_hidden_state
    real = mask.bool()
    host.token_losses(states[real], ids[real]).sum().backward()
    return {
        f"{name}.{key}": grad
        for name, adapter in host.adapters.items()
        for key, grad in parameter_grads(adapter).items()
    }


def shifted(ids: Tensor, mask: Tensor) -> Tensor:
    """Move each row's first tokens to where the mask has its real ones."""
    moved = torch.zeros_like(ids)
    for row, real in enumerate(mask.bool()):
        moved[row, real] = ids[row, : int(real.sum())]
    return moved


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 0, 4, 1, 5, 3]])
def test_rows_come_in_any_order(order):
    host, ids, mask = tiny_host(), tiny_ids(6), padded_mask(LENGTHS)
    with torch.no_grad():
        expected = host(ids, mask, NAMES).logits
        actual = host(ids[order], mask[order], [NAMES[row] for row in order]).logits
    for place, row in enumerate(order):
        real = mask[row].bool()
        torch.testing.assert_close(actual[place][real], expected[row][real], rtol=0, atol=1e-10)


def test_every_grouping_of_three_rows_gives_each_its_own_logits():
    host, ids = tiny_host(), tiny_ids(3)
    with torch.no_grad():
        alone = {name: host(ids, adapters=[name] * 3).logits for name in (None, "lora", "mixdora")}
        for names in itertools.product(alone, repeat=3):
            together = host(ids, adapters=list(names)).logits
            for row, name in enumerate(names):
                torch.testing.assert_close(together[row], alone[name][row], rtol=0, atol=1e-10)


def test_an_adapter_trains_as_if_it_were_alone():
    together = train_rows(tiny_host(configs=NOISY), list(range(6)), NAMES)
    for name in METHODS:
        host = tiny_host(configs=NOISY)
        rows = [row for row, other in enumerate(NAMES) if other == name]
        alone = train_rows(host, rows, [name] * len(rows))
        assert alone.keys() == {key for key in together if key.startswith(f"{name}.")}
        assert_same({key: together[key] for key in alone}, alone)


def test_training_rows_come_in_any_order():
    order = [3, 0, 5, 2, 4, 1]
    expected = train_rows(tiny_host(configs=NOISY), list(range(6)), NAMES)
    actual = train_rows(tiny_host(configs=NOISY), order, [NAMES[row] for row in order])
    assert_same(actual, expected)


def test_the_side_of_the_padding_does_not_matter_in_training():
    right = train_rows(tiny_host(configs=NOISY), list(range(6)), NAMES)
    left = train_rows(tiny_host(configs=NOISY), list(range(6)), NAMES, side="left")
    assert_same(left, right)


def test_micro_batches_add_up():
    whole = train_rows(tiny_host(configs=NOISY), list(range(6)), NAMES)
    host, total = tiny_host(configs=NOISY), {}
    for row in (row for row, name in enumerate(NAMES) if name is not None):
        for key, grad in train_rows(host, [row], [NAMES[row]]).items():
            total[key] = total.get(key, 0) + grad
    assert_same(total, whole)


def test_the_router_loss_of_an_adapter_knows_its_rows_alone():
    host, ids, mask = tiny_host(), tiny_ids(6), padded_mask(LENGTHS)
    with torch.no_grad():
        together = host(ids, mask, NAMES).routing
        for name in ("mixlora", "mixdora"):
            rows = [row for row, other in enumerate(NAMES) if other == name]
            alone = host(ids[rows], mask[rows], [name] * len(rows)).routing[name]
            config: MixLoraConfig = host.adapters[name].config
            torch.testing.assert_close(
                router_loss(together[name], config), router_loss(alone, config)
            )


def test_two_adapters_of_one_method_and_different_ranks_do_not_mix():
    configs = {
        "small": MixLoraConfig(rank=1, alpha=2, num_experts=2, top_k=1),
        "large": MixLoraConfig(rank=4, alpha=4, num_experts=5, top_k=3),
        "part": LoraConfig(rank=2, alpha=4, target_modules=("v_proj", "down_proj")),
    }
    host, ids, names = tiny_host(configs=configs), tiny_ids(4), ["large", "part", "small", "large"]
    with torch.no_grad():
        together = host(ids, adapters=names).logits
        for row, name in enumerate(names):
            alone = host(ids[row : row + 1], adapters=[name]).logits[0]
            torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "phi", "phi3"])
def test_adapters_of_attention_alone_leave_the_ffn_to_the_base(family):
    configs = {"attention": LoraConfig(rank=2, target_modules="attention"), **METHODS}
    host, ids, names = tiny_host(family, configs), tiny_ids(3), ["attention", None, "mixlora"]
    with torch.no_grad():
        together = host(ids, adapters=names).logits
        for row, name in enumerate(names):
            alone = host(ids[row : row + 1], adapters=[name]).logits[0]
            torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-10)


def test_padding_rows_get_the_base_ffn():
    """A mixture never routes padding: its FFN there is the base's own."""
    host, ids = tiny_host(configs={"a": METHODS["mixlora"]}), tiny_ids(2)
    outputs, inputs = [], []
    mlp = host.model.model.layers[0].mlp
    hooks = [
        mlp.register_forward_hook(lambda module, args, output: outputs.append(output)),
        mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0])),
    ]
    mask = padded_mask([7, 3])
    with torch.no_grad():
        host(ids, mask, ["a", "a"])
        for hook in hooks:
            hook.remove()
        states, padding = inputs[0], ~mask.bool()
        expected = mlp.down_proj(mlp.act_fn(mlp.gate_proj(states)) * mlp.up_proj(states))
    torch.testing.assert_close(outputs[0][padding], expected[padding], rtol=0, atol=1e-12)
    assert not torch.allclose(outputs[0][~padding], expected[~padding])


def test_bool_masks_are_masks_too():
    host, ids, mask = tiny_host(), tiny_ids(6), padded_mask(LENGTHS)
    with torch.no_grad():
        expected = host(ids, mask, NAMES).logits
        assert torch.equal(host(ids, mask.bool(), NAMES).logits, expected)
