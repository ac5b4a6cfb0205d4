from __future__ import annotations

import json
import pickle
from dataclasses import replace
from typing import Literal

import pytest
import torch

import loraloom
from loraloom.data.tokens import Example
from loraloom.training.client import TrainingClient, run_requests
from loraloom.training.settings import ObjectiveConfig, OptimizerConfig
from tests.tiny import METHODS, randomise
from tests.training.toy import (
    PAD_ID,
    toy_config,
    toy_engine,
    toy_examples,
    toy_host,
    toy_set,
    toy_tokenizer,
)

ADVANTAGES = [1.0, -0.5, 2.0, 0.25]


class PolicyGradientConfig(ObjectiveConfig):
    """The mean of -advantage × log p, of each sample over the old log p of its labels."""

    name: Literal["policy_gradient"] = "policy_gradient"
    scale: float = 1.0

    def terms(self, scored, totals):
        advantages = scored.log_probs.new_tensor(scored.extras["advantage"])
        old = torch.stack([scored.log_probs.new_tensor(x).sum() for x in scored.extras["old"]])
        gains = self.scale * advantages * (scored.sums - old)
        return -gains.sum() / totals.num_examples, {"old": old.sum() / totals.num_examples}


def old_log_probs(example: Example) -> tuple[float, ...]:
    return tuple(-0.1 * token for token in example.input_ids[2:])


def weighed_examples() -> list[Example]:
    return [
        replace(example, extras={"advantage": advantage, "old": old_log_probs(example)})
        for example, advantage in zip(toy_examples(4), ADVANTAGES, strict=True)
    ]


@pytest.fixture
def objective(methods_as_before) -> PolicyGradientConfig:
    loraloom.register_objective(PolicyGradientConfig)
    return PolicyGradientConfig(scale=0.5)


def closed_formula(log_probs) -> torch.Tensor:
    sums = [values.sum() for values in log_probs]
    olds = [sum(old_log_probs(example)) for example in toy_examples(4)]
    gains = [a * (s - old) for a, s, old in zip(ADVANTAGES, sums, olds, strict=True)]
    return -0.5 * torch.stack(gains).mean()


@pytest.mark.parametrize("size", [None, 1, 2])
def test_a_clients_objective_sees_the_extras_of_each_sample(objective, size):
    client = TrainingClient(toy_host(), toy_tokenizer(), "a", METHODS["lora"])
    randomise(client.adapter)
    request = client.request(weighed_examples(), objective, micro_batch_size=size)
    assert pickle.loads(pickle.dumps(request)) == request
    (output,) = run_requests(client.host, [request], PAD_ID)
    gradients = [weight.grad.clone() for weight in client.parameters.values()]
    assert output.loss == pytest.approx(float(closed_formula(output.log_probs)))
    client.zero_grad()
    expected = client.forward_backward_custom(
        toy_examples(4), lambda data, log_probs: (closed_formula(log_probs), {})
    )
    assert output.loss == pytest.approx(expected.loss)
    for gradient, weight in zip(gradients, client.parameters.values(), strict=True):
        torch.testing.assert_close(gradient, weight.grad)


@pytest.mark.parametrize("packing", [False, True])
def test_a_jobs_objective_sees_the_extras_of_each_sample(objective, packing, tmp_path):
    settings = {"batch_size": 4, "micro_batch_size": 2, "max_steps": 1, "max_length": 20}
    config = toy_config(
        "a", METHODS["lora"], objective=objective.model_dump(), packing=packing, **settings
    )
    data = replace(toy_set(count=4), examples=weighed_examples(), validation=weighed_examples())
    engine = toy_engine(tmp_path, [config], {"a": data})
    client = TrainingClient(engine.host, toy_tokenizer(), "b", METHODS["lora"], OptimizerConfig())
    log_probs = client.forward(toy_examples(4))  # new adapters add nothing
    (result,) = engine.run()
    line = json.loads((tmp_path / "a/metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(float(closed_formula(log_probs)))
    olds = [sum(old_log_probs(example)) for example in toy_examples(4)]
    assert line["old"] == pytest.approx(sum(olds) / 4)
    assert result.metrics["eval/old"] == line["old"]


def test_a_sample_without_an_extra_has_none_of_it(objective):
    client = TrainingClient(toy_host(), toy_tokenizer(), "a", METHODS["lora"])
    with pytest.raises(KeyError, match="advantage"):
        client.forward_backward(toy_examples(4), objective)
    examples = [*weighed_examples()[:3], toy_examples(4)[3]]
    with pytest.raises(TypeError, match="NoneType"):
        client.forward_backward(examples, objective)
    assert dict.fromkeys(examples, 0)  # they have hashes
