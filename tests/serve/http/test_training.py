"""A training client and a server share a host, and neither notices."""

import threading

import httpx2
import torch

from loraloom import OptimizerConfig, TrainingClient, example_of
from tests.generation.conftest import SIZES
from tests.serve.http.in_process import serving
from tests.tiny import METHODS, tiny_host, tiny_ids

STEPS = 6


def train(host, tokenizer):
    """The weights after some steps."""
    client = TrainingClient(
        host, tokenizer, "trained", METHODS["mixlora"], OptimizerConfig(learning_rate=1e-2)
    )
    for step in range(STEPS):
        rows = tiny_ids(4, seed=step).tolist()
        client.forward_backward([example_of(row, [True] * len(row)) for row in rows])
        client.optim_step()
    return client.adapter.state_dict()


def make_host():
    return tiny_host(dtype=torch.float32, **SIZES)


def chat(url, seed):
    body = {"model": "mixdora", "prompt": "one", "max_tokens": 30, "seed": seed}
    return httpx2.post(f"{url}/v1/completions", json=body).json()["choices"][0]["text"]


def test_both_give_what_each_gives_alone(tokenizer):
    alone = train(make_host(), tokenizer)
    with serving(make_host(), tokenizer) as (url, _):
        expected = [chat(url, seed) for seed in range(4)]
    host, weights = make_host(), {}
    with serving(host, tokenizer) as (url, _):
        trainer = threading.Thread(target=lambda: weights.update(train(host, tokenizer)))
        trainer.start()
        said = []
        while trainer.is_alive() or len(said) < 4:
            said.append(chat(url, len(said) % 4))
        trainer.join()
    assert said == [expected[place % 4] for place in range(len(said))]
    assert weights.keys() == alone.keys()
    assert all(torch.equal(weights[name], alone[name]) for name in alone)
