import math

import pytest
import torch
from torch import Tensor

from loraloom.errors import AdapterError, ConfigError, TrainingError
from loraloom.generation.sampling import SamplingConfig
from loraloom.host.host import Host
from loraloom.training.client import TrainingClient, example_of, example_of_completion, run_requests
from loraloom.training.settings import DpoConfig, OptimizerConfig, SftConfig
from loraloom.training.step.fused import add_gradients
from tests.tiny import ALL_METHODS, METHODS, randomise
from tests.training.step.test_fused import assert_same, run_window
from tests.training.toy import (
    ADAPTERS,
    PAD_ID,
    accept,
    add_job,
    padded,
    toy_config,
    toy_examples,
    toy_host,
    toy_pairs,
    toy_tokenizer,
    weights_of,
)

SGD = OptimizerConfig(optimizer="sgd", learning_rate=0.1)


def new_client(
    host: Host | None = None,
    name: str = "a",
    method: str = "lora",
    optimizer: OptimizerConfig | None = None,
    seed: int = 0,
) -> TrainingClient:
    """A client on a tiny model; its adapter has dropout."""
    host = host or toy_host()
    client = TrainingClient(host, toy_tokenizer(), name, ADAPTERS[method], optimizer, seed=seed)
    randomise(client.adapter, seed)
    return client


def grads_of(client: TrainingClient) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in client.parameters.items() if p.grad is not None}


@pytest.mark.parametrize("method", ["mixlora", "loramoe", "dynmole", "lora"])
def test_a_loop_of_ones_own_adds_the_auxiliary_loss_that_training_adds(method):
    host, examples = toy_host(), toy_examples(4)
    client = TrainingClient(host, toy_tokenizer(), "a", ALL_METHODS[method])
    randomise(client.adapter)
    ids, mask, _ = padded(examples)
    added = host.auxiliary_loss(host.hidden(ids, mask, ["a"] * 4, training=True))
    expected = client.forward_backward(examples).aux_loss
    assert (expected > 0) is (method != "lora")
    assert added.item() == pytest.approx(expected)
    assert added.requires_grad is (method != "lora")


@pytest.mark.parametrize("objective", [SftConfig(), DpoConfig(beta=0.5)], ids=["sft", "dpo"])
def test_a_step_is_that_of_a_job(objective):
    """A client and a job with the same data, objective and optimizer move alike."""
    adapter = METHODS["mixlora"]
    host = toy_host()
    settings = {"optimizer": "adamw", "learning_rate": 3e-3, "weight_decay": 0.1}
    config = toy_config(
        "job", adapter, objective=objective.model_dump(), max_grad_norm=0.5, **settings
    )
    job = add_job(host, config)
    client = TrainingClient(host, toy_tokenizer(), "own", adapter, OptimizerConfig(**settings))
    for one in (job.adapter, client.adapter):
        randomise(one)
    data = job.window.examples
    loss = run_window(host, [job])["job"]
    job.position.micro_step = 0

    output = client.forward_backward(data, objective)
    assert output.loss == pytest.approx(loss.loss)
    assert output.aux_loss == pytest.approx(loss.aux_loss)
    assert output.metrics == pytest.approx(loss.metrics)
    report = accept(job, loss)
    for wrong in ({"learning_rate": math.nan}, {"max_grad_norm": 0.0}):
        with pytest.raises(ConfigError, match="max_grad_norm above 0"):
            client.optim_step(**wrong)
    step = client.optim_step(max_grad_norm=0.5)
    assert step.step == 1
    assert step.grad_norm == pytest.approx(report["grad_norm"])
    assert_same(weights_of(client), weights_of(job), 1e-9)


def test_calls_between_steps_add_up_and_micro_batches_change_nothing():
    client = new_client()
    data = toy_examples(6)
    whole = client.forward_backward(data)
    expected = grads_of(client)
    client.zero_grad()
    client._num_forwards -= 1  # the same dropout again
    cut = client.forward_backward(data, micro_batch_size=2)
    assert cut.loss == pytest.approx(whole.loss)
    assert_same(grads_of(client), expected, 1e-6)
    for one, other in zip(cut.log_probs, whole.log_probs, strict=True):
        torch.testing.assert_close(one, other)
    before = grads_of(client)
    client.forward_backward(data)
    assert any(not torch.equal(grad, before[name]) for name, grad in grads_of(client).items())


def test_a_call_that_fails_half_way_leaves_the_gradients_as_they_were(monkeypatch):
    client, data = new_client(), toy_examples(4)
    client.forward_backward(data)
    before, calls = grads_of(client), []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return add_gradients(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("loraloom.training.client.add_gradients", failing)
        with pytest.raises(RuntimeError, match="no memory"):
            client.forward_backward(data, micro_batch_size=2)
    assert_same(grads_of(client), before, 1e-12)


def test_a_loss_of_ones_own_gets_its_gradient():
    """sft written by hand equals sft."""
    host = toy_host()
    client, other = new_client(host, "a"), new_client(host, "b")
    data = toy_examples(5)
    expected = client.forward_backward(data)

    def loss_fn(given, log_probs):
        assert given is data
        assert [len(one) for one in log_probs] == [len(example.labels) - 2 for example in data]
        joined = torch.cat(list(log_probs))
        return -joined.mean(), {"perplexity": joined.detach().mean().neg().exp(), "rows": 5}

    output = other.forward_backward_custom(data, loss_fn)
    assert output.loss == pytest.approx(expected.loss)
    assert output.metrics == pytest.approx({"perplexity": math.exp(expected.loss), "rows": 5})
    assert_same(grads_of(other), grads_of(client), 1e-9)


def test_forward_gives_log_probs_without_dropout():
    client = new_client()
    data = toy_examples(3)
    calm = client.forward(data)
    output = client.forward_backward(data)
    assert [len(one) for one in calm] == [len(one) for one in output.log_probs]
    assert not torch.allclose(torch.cat(calm), torch.cat(output.log_probs))
    assert all(torch.equal(*pair) for pair in zip(client.forward(data), calm, strict=True))


def test_clients_on_one_host_share_forwards_and_learn_as_alone(monkeypatch):
    examples, pairs = toy_examples(6), toy_pairs(4)
    host = toy_host()
    clients = [new_client(host, "a", "mixlora"), new_client(host, "b", "dora", seed=3)]
    requests = [clients[0].request(examples, micro_batch_size=2), clients[1].request(pairs, "dpo")]
    forwards = []
    hidden = host.hidden
    monkeypatch.setattr(host, "hidden", lambda *a, **k: forwards.append(1) or hidden(*a, **k))
    outputs = run_requests(host, requests, PAD_ID)
    assert len(forwards) == 3 + 1  # and one for the reference
    alone = [new_client(None, "a", "mixlora"), new_client(None, "b", "dora", seed=3)]
    expected = [
        alone[0].forward_backward(examples, micro_batch_size=2),
        alone[1].forward_backward(pairs, "dpo"),
    ]
    for place in (0, 1):
        assert outputs[place].loss == pytest.approx(expected[place].loss)
        assert_same(grads_of(clients[place]), grads_of(alone[place]), 1e-6)


def test_a_learning_rate_holds_from_its_step_on_and_loraplus_keeps_its_ratio():
    optimizer = OptimizerConfig(optimizer="sgd", learning_rate=0.1, loraplus_lr_ratio=4)
    client = new_client(optimizer=optimizer)
    for rate, expected in ((None, 0.1), (0.02, 0.02), (None, 0.02), (0.0, 0.0), (0.3, 0.3)):
        client.forward_backward(toy_examples(2))
        before, grads = weights_of(client), grads_of(client)
        client.optim_step(learning_rate=rate)
        for name, weight in client.parameters.items():
            factor = 4 if name.endswith("lora_B") else 1
            moved = before[name] - expected * factor * grads[name]
            torch.testing.assert_close(weight.detach(), moved)
    assert client.step == 5


def test_what_a_call_can_not_use_is_one_error():
    client, data, pairs = new_client(), toy_examples(2, longest=5), toy_pairs(2)
    request = client.request(data)
    with pytest.raises(TrainingError, match=r"adapter a: optim_step\(\) found no gradients"):
        client.optim_step()
    client.forward_backward(data)
    for call, message in (
        (lambda: client.forward_backward(data, micro_batch_size=0), "micro_batch_size must be 1"),
        (lambda: client.forward_backward(pairs), "sft must be of Example, got PreferencePair"),
        (lambda: client.forward_backward(data, "cpo"), "cpo must be of PreferencePair, got Exam"),
        (lambda: client.forward_backward([]), "adapter a: data must have examples, got none"),
        (lambda: client.forward_backward([example_of([], [])]), "examples, got one without tokens"),
        (lambda: client.sample("one"), "prompts must be a list of texts"),
        (lambda: run_requests(client.host, [request] * 2, PAD_ID), "requests must each be of anot"),
        (lambda: TrainingClient(toy_host(), toy_tokenizer(), "a"), "one of those on this host"),
        (lambda: new_client(client.host), "'a' has another TrainingClient"),
    ):
        with pytest.raises((ConfigError, AdapterError, TrainingError), match=message):
            call()
    with pytest.raises(ConfigError):
        new_client(client.host, "b", optimizer=OptimizerConfig(optimizer_args={"foo": 1}))
    assert list(client.host.adapters) == ["a"]


def test_what_is_not_finite_is_dropped_and_weights_are_left_alone():
    client = new_client(optimizer=SGD)
    before = weights_of(client)

    def infinite(data, log_probs):
        return log_probs[0].sum() * float("inf"), {}

    with pytest.raises(TrainingError, match="adapter a: loss must be finite"):
        client.forward_backward_custom(toy_examples(2), infinite)
    assert grads_of(client) == {}
    client.forward_backward(toy_examples(2))
    next(iter(client.parameters.values())).grad.fill_(float("nan"))
    with pytest.raises(TrainingError, match="gradient norm must be finite, got nan"):
        client.optim_step()
    assert grads_of(client) == {}
    assert all(torch.equal(weights_of(client)[name], weight) for name, weight in before.items())


def test_texts_become_data():
    client = new_client()
    example = client.example("ab", " cd")
    ids = client.tokenizer("ab cd").input_ids
    assert example.input_ids == (*ids, 2)
    assert example.labels == (-100, -100, *ids[2:], 2)
    assert client.pair("ab", " c", " d").rejected == client.example("ab", " d")


def test_samples_are_drawn_anew_and_are_data():
    client, twin = new_client(), new_client()
    drawn = SamplingConfig(max_new_tokens=5, temperature=1.0)
    first, second = (client.sample(["ab", "c"], drawn, num_samples=3) for _ in range(2))
    assert [len(one) for one in first] == [3, 3]
    assert len({tuple(one.ids) for one in first[0] + second[0]}) > 3
    assert twin.sample(["ab", "c"], drawn, num_samples=3) == first
    with pytest.raises(ConfigError, match="num_samples 1 or more"):
        twin.sample(["ab"], num_samples=0)
    completion = first[0][0]
    assert completion.prompt_ids == client.tokenizer("ab").input_ids
    example = example_of_completion(completion)
    assert example.input_ids == (*completion.prompt_ids, *completion.ids)
    assert example.labels == (-100, -100, *completion.ids)
    assert example_of([1, 2], [False, True]).labels == (-100, 2)


def learn(client: TrainingClient, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        losses.append(client.forward_backward(toy_examples(4, seed=step)).loss)
        client.optim_step(learning_rate=1e-2 / (step + 1))
    return losses


def test_a_loaded_state_goes_on_as_if_unbroken(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    client = new_client(method="mixlora")
    learn(client, 3)
    client.forward_backward(toy_examples(3))
    client.save_state("~/state")
    drawn = SamplingConfig(max_new_tokens=4, temperature=1.0)
    expected = client.optim_step(), learn(client, 2), client.sample(["a"], drawn)
    weights = weights_of(client)

    again = new_client(method="mixlora")
    again.load_state("~/state")
    assert again.step == 3
    assert (again.optim_step(), learn(again, 2), again.sample(["a"], drawn)) == expected
    assert all(torch.equal(weights_of(again)[name], weight) for name, weight in weights.items())
    again.load_state(tmp_path / "state")
    assert again.step == 3


def test_a_state_that_is_of_something_else_is_one_error(tmp_path):
    client = new_client()
    client.save_state(tmp_path)
    for other, message in (
        (new_client(method="mixlora"), r"state: adapter\.alpha was .*adapter\.method was 'lora'"),
        (new_client(seed=1), "seed was 0 and is 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            other.load_state(tmp_path)
    with pytest.raises(ConfigError, match="must contain a client's saved state: no checkpoint"):
        client.load_state(tmp_path / "gone")


@pytest.fixture
def reference(tmp_path) -> DpoConfig:
    """An objective that is held at an adapter on the disk."""
    new_client().save(tmp_path / "reference")
    return DpoConfig(reference=str(tmp_path / "reference"))


def test_a_reference_stays_while_another_client_is_held_at_it(reference):
    host = toy_host()
    first, second = new_client(host, "first"), new_client(host, "second")
    for client in (first, second):
        client.forward_backward(toy_pairs(2), reference)
    assert len(host.adapters) == 3
    waiting = second.request(toy_pairs(2), reference)
    first.close()
    run_requests(host, [waiting], PAD_ID)
    second.close()
    assert host.adapters == {}


def test_an_adapter_on_the_host_is_trained_from_where_it_is(tmp_path):
    host = toy_host()
    before = new_client(host, method="mixlora")
    before.forward_backward(toy_examples(4))
    before.save(tmp_path)
    loaded = host.load("loaded", tmp_path)
    added = TrainingClient(host, toy_tokenizer(), "loaded", optimizer=SGD)
    assert added.adapter is loaded
    with pytest.raises(AdapterError, match="'loaded' has another TrainingClient"):
        TrainingClient(host, toy_tokenizer(), "loaded")
    added.forward_backward(toy_examples(4))
    assert_same(grads_of(added), grads_of(before), 1e-9)
    added.optim_step()
    added.close()
    assert host.adapters["loaded"] is loaded  # its own weights, with a step more
    assert all(weight.grad is None for weight in loaded.parameters())
    assert not torch.equal(next(loaded.parameters()), next(before.adapter.parameters()))
