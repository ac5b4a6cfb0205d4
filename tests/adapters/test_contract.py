"""What every method owes the rest of the system, whatever it computes.

A new method in `adapters.CONFIGS` gets an entry in `tests.tiny.ALL_METHODS`, and is held to all of
this.
"""

import re
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from loraloom.adapters import CONFIGS
from loraloom.adapters.contract import AdapterConfig
from loraloom.adapters.experts import RouterLossConfig
from loraloom.formats.files import describe
from loraloom.host.host import Host, HostOutput
from loraloom.host.stacked_forward import StackedForward
from loraloom.ops.dropout import sample_key
from loraloom.routing.record import LayerRouting
from tests.blocks import names_of, shapes_of
from tests.tiny import (
    ALL_FAMILIES,
    ALL_METHODS,
    METHODS,
    PADS_RIGHT_ONLY,
    VOCAB_SIZE,
    changed,
    padded_mask,
    parameter_grads,
    relative_error,
    tiny_host,
    tiny_ids,
)

FAMILIES = ("llama", "phi", "phi3")
"""A gated FFN, an ungated one, and one whose gate and up are one projection."""
NAMES = (*list(ALL_METHODS)[1::2], None, "vera", *list(ALL_METHODS)[::2], None)
"""All methods in one batch, like ones not side by side, and rows without any."""
LENGTHS = [7 - 5 * row % 6 for row in range(len(NAMES))]
KEYS = [sample_key(0, 0, sample) for sample in range(len(NAMES))]
TOLERANCE = 1e-9

each_method = pytest.mark.parametrize("method", ALL_METHODS)
each_family = pytest.mark.parametrize("family", FAMILIES)
each_side = pytest.mark.parametrize("side", ["left", "right"])


def noisy(config: AdapterConfig) -> AdapterConfig:
    """The configuration with all its noise on."""
    jitter = {"router_jitter": 0.2} if "router_jitter" in type(config).model_fields else {}
    dropout = {} if config.method == "routed" else {"dropout": 0.3}
    return changed(config, **dropout, **jitter)


NOISY = {name: noisy(config) for name, config in ALL_METHODS.items()}


def pair_host(method: str, family: str = "llama") -> Host:
    """A host with two adapters of a method, `a` and `b`, whose weights differ."""
    return tiny_host(family, {"a": ALL_METHODS[method], "b": ALL_METHODS[method]})


def positions(mask: Tensor) -> Tensor:
    return mask.cumsum(1).sub(1).clamp_min(0)


def placed(ids: Tensor, mask: Tensor) -> Tensor:
    """Put the first tokens of each row where the mask has its real ones."""
    moved = torch.randint(3, VOCAB_SIZE, mask.shape, generator=torch.Generator().manual_seed(9))
    for row, real in enumerate(mask.bool()):
        moved[row, real] = ids[row, : int(real.sum())]
    return moved


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def assert_same_grads(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-8, atol=1e-10, msg=name)


def assert_same_routing(
    actual: Sequence[LayerRouting], expected: Sequence[LayerRouting], *, exactly: bool = False
) -> None:
    assert [layer.router for layer in actual] == [layer.router for layer in expected]
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours.selected_experts, theirs.selected_experts)
        for name in ("router_logits", "routing_weights"):
            values = getattr(ours, name).detach(), getattr(theirs, name).detach()
            assert torch.equal(*values) if exactly else torch.allclose(*values, rtol=1e-9)


def summed_loss(host: Host, out: HostOutput, ids: Tensor, mask: Tensor) -> Tensor:
    """Add up what each real token says of its own id, and all router losses."""
    real = mask.bool()
    loss = host.token_losses(out.last_hidden_state[real], ids[real]).sum()
    for name, routing in out.routing.items():
        added = host.adapters[name].config.auxiliary_loss(routing)
        loss = loss if added is None else loss + 10 * added
    return loss


@pytest.fixture
def stacked_layers(monkeypatch) -> list[int]:
    """The layers whose FFN blocks were computed by cohorts."""
    layers, ffn = [], StackedForward.ffn

    def spy(self, block, *arguments):
        layers.append(block.layer)
        return ffn(self, block, *arguments)

    monkeypatch.setattr(StackedForward, "ffn", spy)
    return layers


def test_every_method_has_a_name_of_its_own():
    for names in (
        [config.peft_type for config in CONFIGS],
        [config.model_fields["method"].default for config in CONFIGS],
        [alias for config in CONFIGS for alias in config.aliases],
    ):
        assert len(set(names)) == len(names)
    assert {type(config) for config in ALL_METHODS.values()} == set(CONFIGS)


@each_method
def test_a_new_adapter_changes_no_logits(method):
    host = tiny_host(configs={})
    host.add("a", ALL_METHODS[method])
    with torch.no_grad():
        expected = host(tiny_ids(2)).logits
        actual = host(tiny_ids(2), adapters=["a", "a"]).logits
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@each_family
@each_method
def test_a_saved_adapter_is_described_and_read_back_as_it_was(tmp_path, method, family):
    config, ids = ALL_METHODS[method], tiny_ids(2)
    host = tiny_host(family, {"a": config})
    tensors = host.adapters["a"].tensors()
    assert {name: t.shape for name, t in tensors.items()} == config.tensor_shapes(host.base)
    host.save("a", tmp_path)
    description = describe(tmp_path)
    parameters = host.adapters["a"].parameters()
    assert (description["method"], description["settings"]["rank"]) == (config.title, config.rank)
    assert description["num_parameters"] == sum(parameter.numel() for parameter in parameters)
    assert len(description["target_modules"]) == len(shapes_of(host.base))
    loaded = host.load("b", tmp_path)
    targets = config.target_modules if config.layout == "native" else names_of(host.base)
    assert loaded.config == changed(config, target_modules=targets)
    with torch.no_grad():
        logits = [host(ids, adapters=[name] * 2).logits for name in ("a", "b")]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("family", "side"),
    [
        (family, "left" if place % 2 and family not in PADS_RIGHT_ONLY else "right")
        for place, family in enumerate(ALL_FAMILIES)
    ],
)
def test_a_row_of_a_mixed_batch_gets_what_it_gets_alone(family, side):
    host, mask = tiny_host(family, ALL_METHODS), padded_mask(LENGTHS, side)
    ids = placed(tiny_ids(len(NAMES)), mask)
    tolerance = 1e-5 if family == "gemma2" else 1e-9  # its softmax is float32's
    with torch.no_grad():
        together = host(ids, mask, NAMES, position_ids=positions(mask))
        for row, name in enumerate(NAMES):
            real = mask[row].bool()
            alone = host(ids[row : row + 1, real], adapters=[name])
            assert relative_error(together.logits[row, real], alone.logits[0]) < tolerance, name
    routed = {name for name, config in ALL_METHODS.items() if config.experts_per_router}
    assert together.routing.keys() == routed >= {"mola", "mixlora", "mixdora", "hydralora"}


@each_family
@each_method
def test_all_ways_through_a_forward_agree(monkeypatch, stacked_layers, method, family):
    """With gradients; without; from prepared weights; and prepared for like adapters at once."""
    host, ids, names = pair_host(method, family), tiny_ids(4, 3), ["b", None, "a", "b"]
    expected = host(ids, adapters=names)
    with torch.no_grad():
        outputs = [host(ids, adapters=names)]
        with monkeypatch.context() as patch, host.prepared():
            patch.setattr("loraloom.host.prepared_weights.MAX_HIDDEN_BYTES", 0)
            outputs.append(host(ids, adapters=names))
        assert stacked_layers == []
        with host.prepared():
            outputs += [host(ids, adapters=names), host(ids, adapters=names)]
        assert stacked_layers == [0, 1, 0, 1]
    for out in outputs:
        assert_close(out.logits, expected.logits.detach())
        assert out.routing.keys() == expected.routing.keys()
        for name, routing in out.routing.items():
            assert_same_routing(routing, expected.routing[name])


@each_method
def test_decoding_is_what_full_forwards_say(stacked_layers, method):
    host, lengths, names = pair_host(method), [5, 3, 4, 5], ["a", "b", None, "b"]
    mask = padded_mask(lengths, "left", 5)
    ids = placed(tiny_ids(4, 5), mask)
    texts = [row[real] for row, real in zip(ids, mask.bool(), strict=True)]
    session = host.prefill(ids, mask, names)
    for _ in range(3):
        with torch.no_grad():
            for row, text in enumerate(texts):
                alone = host(text[None], adapters=[names[row]]).logits[0, -1]
                assert_close(session.logits[row], alone)
        tokens = session.logits.argmax(-1)
        texts = [torch.cat([text, token[None]]) for text, token in zip(texts, tokens, strict=True)]
        host.decode(session, tokens)
    assert stacked_layers == [0, 1] * 3


@each_method
def test_checkpointing_gives_the_same_gradients_and_one_record(method):
    ids, mask, results = tiny_ids(3), padded_mask([7, 4, 6]), []
    for enabled in (False, True):
        host = tiny_host("phi3", {"a": NOISY[method]})
        host.enable_gradient_checkpointing(enabled)
        out = host.hidden(ids, mask, ["a"] * 3, [1, 2, 3], training=True)
        summed_loss(host, out, ids, mask).backward()
        results.append((parameter_grads(host.adapters["a"]), out.routing.get("a", [])))
    (plain, routing), (recomputed, same_routing) = results
    assert all(torch.equal(recomputed[name], grad) for name, grad in plain.items())
    assert_same_routing(same_routing, routing, exactly=True)


@each_method
def test_packed_rows_are_rows_of_their_own(method):
    ids, lengths, keys, results = tiny_ids(2), [[4, 3], [2, 5]], [11, 12, 13, 14], []
    samples = [part for row, own in zip(ids, lengths, strict=True) for part in row.split(own)]
    for packed in (False, True):
        host = tiny_host(configs={"a": NOISY[method]})
        if packed:
            ids, mask = tiny_ids(2), torch.ones(2, 7)
            out = host.hidden(ids, None, ["a"] * 2, keys, sample_lengths=lengths, training=True)
        else:
            mask = padded_mask([4, 3, 2, 5])
            ids = torch.nn.utils.rnn.pad_sequence([*samples, ids[0]], batch_first=True)[:4]
            out = host.hidden(ids, mask, ["a"] * 4, keys, training=True)
        summed_loss(host, out, ids, mask).backward()
        results.append((out.last_hidden_state[mask.bool()], parameter_grads(host.adapters["a"])))
    (states, grads), (packed_states, packed_grads) = results
    assert_close(packed_states, states)
    assert_same_grads(packed_grads, grads)


@each_side
@each_method
def test_padding_influences_nothing(method, side):
    results = []
    for length in (7, 10):
        mask = padded_mask([7, 4, 6], side, length)
        ids, host = placed(tiny_ids(3), mask), tiny_host(configs={"a": NOISY[method]})
        out = host.hidden(
            ids, mask, ["a"] * 3, [1, 2, 3], training=True, position_ids=positions(mask)
        )
        summed_loss(host, out, ids, mask).backward()
        results.append((out.last_hidden_state[mask.bool()], parameter_grads(host.adapters["a"])))
    assert_close(results[1][0], results[0][0])
    assert_same_grads(results[1][1], results[0][1])


@cache
def trained(
    names: tuple[str | None, ...],
    rows: Sequence[int],
    family: str = "llama",
    diverged: str | None = None,
) -> tuple[Tensor, dict]:
    """Run rows of the mixed batch in training; return states and each adapter's gradients."""
    host = tiny_host(family, NOISY)
    if diverged is not None:
        diverge(host, diverged)
    mask = padded_mask(LENGTHS)[[*rows]]
    ids = tiny_ids(len(NAMES))[[*rows]]
    out = host.hidden(ids, mask, names, [KEYS[row] for row in rows], training=True)
    summed_loss(host, out, ids, mask).backward()
    grads = {name: parameter_grads(adapter) for name, adapter in host.adapters.items()}
    return out.last_hidden_state.detach(), grads


def test_training_with_dropout_does_not_depend_on_neighbours():
    states, grads = trained(NAMES, range(len(NAMES)))
    for method in ALL_METHODS:
        rows = [row for row, name in enumerate(NAMES) if name == method]
        alone, alone_grads = trained((method,) * len(rows), tuple(rows))
        real = padded_mask(LENGTHS)[rows].bool()
        assert_close(states[rows][real], alone[real])
        assert_same_grads(grads[method], alone_grads[method])


def diverge(host: Host, name: str) -> None:
    with torch.no_grad():
        for parameter in host.adapters[name].parameters():
            parameter.fill_(torch.nan)


@pytest.mark.parametrize(
    ("family", "method"),
    [*(("llama", method) for method in ALL_METHODS), *(("phi3", method) for method in METHODS)],
)
def test_a_diverged_adapter_leaves_the_others_alone(family, method):
    rows = range(len(NAMES))
    states, grads = trained(NAMES, rows, family)
    states_beside, grads_beside = trained(NAMES, rows, family, diverged=method)
    others = [row for row, name in enumerate(NAMES) if name != method]
    assert torch.equal(states_beside[others], states[others])
    assert any(grad.isnan().any() for grad in grads_beside[method].values())
    for name in grads.keys() - {method}:
        for key, grad in grads[name].items():
            assert torch.equal(grads_beside[name][key], grad), (name, key)


@each_method
def test_each_router_is_recorded_once_and_has_its_loss(method):
    host, mask = tiny_host("phi3", {"a": ALL_METHODS[method]}), padded_mask([7, 3])
    adapter, routing = host.adapters["a"], host(tiny_ids(2), mask, ["a"] * 2).routing.get("a", [])
    routers = [layer.router for layer in routing]
    assert len(set(routers)) == len(routers)
    assert all((layer.routing_weights.diff(dim=1) <= 0).all() for layer in routing)  # best first
    names = (re.sub(r"\.experts\.\d+", "", name) for name in adapter.tensors())
    assert len(routers) == len({name for name in names if name.endswith(".router")})
    assert all(len(layer.router_logits) == 10 for layer in routing)
    loss = adapter.config.auxiliary_loss(routing)
    if loss is None:
        assert not isinstance(adapter.config, RouterLossConfig)
        return
    loss.backward()
    assert {layer.router: layer.router_logits for layer in routing}[routers[-1]].requires_grad
    grads = parameter_grads(adapter)
    assert {name for name, grad in grads.items() if "router" in name and grad.any()}


@each_method
def test_a_bfloat16_base_computes_about_the_same(method):
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        host, ids = tiny_host("llama", {"a": ALL_METHODS[method]}, dtype=dtype), tiny_ids(3)
        out = host.hidden(ids, None, ["a"] * 3, training=True, sample_keys=[0, 1, 2])
        for layer in out.routing.get("a", []):
            assert layer.router_logits.dtype == layer.routing_weights.dtype == torch.float32
        summed_loss(host, out, ids, torch.ones_like(ids)).backward()
        grads = parameter_grads(host.adapters["a"])
        assert all(grad.dtype == torch.float32 for grad in grads.values())
        values = [out.last_hidden_state, *grads.values()]
        results.append(torch.cat([value.flatten().float() for value in values]))
    assert torch.cosine_similarity(*results, dim=0) > 0.97
