"""The context of a forward: seen by nobody else, stale for nobody."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import loraloom
from loraloom.errors import ModelError
from tests.host.test_checkpointing import noisy_host
from tests.tiny import METHODS, parameter_grads, tiny_host, tiny_ids, tiny_model


def in_threads(*works) -> None:
    """Run functions side by side, and raise what one raises."""
    with ThreadPoolExecutor(len(works)) as pool:
        for running in [pool.submit(work) for work in works]:
            running.result()


def test_threads_of_different_modes_and_adapters_do_not_see_each_other():
    host, ids = noisy_host(), tiny_ids(4)
    names, others = [*METHODS], [*reversed(METHODS)]
    keys = [1, 2, 3, 4]

    def trained():
        return host.hidden(ids, adapters=names, sample_keys=keys, training=True).last_hidden_state

    def evaluated():
        with torch.no_grad():
            return host.hidden(ids, adapters=others).last_hidden_state

    def bare():
        with torch.no_grad():
            return host.model(ids).logits

    def prepared():
        with host.prepared(), torch.no_grad():
            return host(ids[:, :1], adapters=others).logits

    works = (trained, evaluated, bare, prepared)
    expected = [work().detach() for work in works]

    def check(work, value):
        for _ in range(4):
            assert torch.equal(work().detach(), value), work.__name__

    in_threads(*(lambda pair=pair: check(*pair) for pair in zip(works, expected, strict=True)))
    assert torch.equal(bare(), expected[2])


def test_two_threads_train_two_adapters_at_once():
    """Each adds up its own gradients, with layers recomputed in its backward pass."""
    ids, grads = tiny_ids(2), []
    for together in (False, True):
        host = noisy_host()
        host.enable_gradient_checkpointing()

        def learn(name, host=host):
            for key in range(4):
                states = host.hidden(ids, None, [name] * 2, [key, key + 9], training=True)
                states.last_hidden_state.square().sum().backward()

        works = [lambda name=name: learn(name) for name in ("mixlora", "dora")]
        in_threads(*works) if together else [work() for work in works]
        grads.append(
            [p.grad for name in ("mixlora", "dora") for p in host.adapters[name].parameters()]
        )
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_prepared_weights_end_with_their_block():
    host, ids = tiny_host(configs={"a": METHODS["mixdora"]}), tiny_ids(2, 1)
    with torch.no_grad():
        with host.prepared():
            before = host(ids, adapters=["a", "a"]).logits
            with host.prepared():
                assert torch.equal(host(ids, adapters=["a", "a"]).logits, before)
            for parameter in host.adapters["a"].parameters():
                parameter.mul_(1.5)
            assert torch.equal(host(ids, adapters=["a", "a"]).logits, before)
        assert not torch.allclose(host(ids, adapters=["a", "a"]).logits, before)


@pytest.mark.filterwarnings("ignore:Dynamo does not know")  # of the tests' own checks of types
def test_a_compiled_model_is_refused_with_the_reason():
    with pytest.raises(ModelError, match="must not be compiled"):
        loraloom.attach(torch.compile(tiny_model(), backend="eager"))
    host, ids = tiny_host(configs={"a": METHODS["lora"]}), tiny_ids(2)
    view = torch.compile(host.as_model("a"), backend="eager")
    host.model.compile(backend="eager")
    for forward in (view, lambda ids: host(ids, adapters=["a", "a"])):
        with pytest.raises(ModelError, match="forwards with gradients must not be compiled"):
            forward(ids)


ROWS = [*METHODS, None]


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi", "phi3"])
def test_outputs_are_near_those_in_float32(family, with_gradients):
    host, ids = tiny_host(family, dtype=torch.float32), tiny_ids(len(ROWS))
    exact = host(ids, None, ROWS)
    with autocast(), torch.set_grad_enabled(with_gradients):
        out = host(ids, None, ROWS)
    assert out.logits.dtype == torch.bfloat16
    assert (out.logits.float() - exact.logits).norm() < 0.03 * exact.logits.norm()
    for name in ("mixlora", "mixdora"):
        ours, theirs = out.routing[name][0], exact.routing[name][0]
        assert ours.router_logits.dtype == ours.routing_weights.dtype == torch.float32
        error = (ours.router_logits - theirs.router_logits).norm()
        assert error < 0.03 * theirs.router_logits.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_near_those_in_float32(checkpointing):
    ids, results = tiny_ids(len(ROWS)), []
    for context in (torch.enable_grad(), autocast()):
        host = tiny_host("llama", dtype=torch.float32)
        host.train().enable_gradient_checkpointing(checkpointing)
        with context:
            states = host.hidden(ids, adapters=ROWS).last_hidden_state[:, :-1]
            losses = host.token_losses(states.flatten(0, 1), ids[:, 1:].flatten())
        assert losses.dtype == torch.float32
        losses.mean().backward()
        results.append({name: parameter_grads(host.adapters[name]) for name in METHODS})
    for name in METHODS:
        exact, ours = (torch.cat([g.flatten() for g in r[name].values()]) for r in results)
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() < 0.1 * exact.norm(), name


def test_rows_of_a_small_forward_get_what_a_large_one_gives_them(monkeypatch):
    host, ids = tiny_host("llama", dtype=torch.float32), tiny_ids(len(ROWS), 1)
    with autocast(), torch.no_grad():
        small = host(ids, None, ROWS).logits.float()
        monkeypatch.setattr("loraloom.host.prepared_weights.MAX_HIDDEN_BYTES", 0)
        large = host(ids, None, ROWS).logits.float()
    assert (small - large).norm() < 0.03 * large.norm()
