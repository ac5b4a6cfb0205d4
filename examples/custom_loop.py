"""A custom training loop: supervised steps, preferences, policy gradients on sampled answers.

Three adapters share one base model, a tiny one with random weights, so this takes seconds and no
download. With your model: `host = loraloom.attach(model)` and its tokenizer.

    python examples/custom_loop.py
"""

from __future__ import annotations

import tempfile

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import loraloom
from loraloom import (
    DpoConfig,
    Host,
    LoraConfig,
    MixLoraConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainingClient,
    example_of_completion,
    run_requests,
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of letters and digits."""
    letters = {letter: place for place, letter in enumerate("~.?0123456789abcdefghij")}
    tokenizer = Tokenizer(WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="~", eos_token=".", unk_token="?"
    )


def tiny_host(tokenizer: PreTrainedTokenizerFast) -> Host:
    """Attach to a model with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
    )
    return loraloom.attach(LlamaForCausalLM(config))


def learn_to_answer(writer: TrainingClient, judge: TrainingClient) -> tuple[float, float]:
    """Train two adapters in the same forwards: one on answers, one on preferences."""
    answers = [writer.example(letter, "1234") for letter in "abcdefgh"]
    pairs = [judge.pair(letter, chosen="22", rejected="99") for letter in "abcdefgh"]
    outputs = []
    for step in range(30):
        learning_rate = 2e-2 * (1 - step / 30)
        outputs = run_requests(
            writer.host,
            [writer.request(answers), judge.request(pairs, DpoConfig(beta=0.5))],
            writer.pad_id,
        )
        for client in (writer, judge):
            client.optim_step(learning_rate=learning_rate, max_grad_norm=1.0)
    return outputs[0].loss, outputs[1].metrics["rewards/margins"]


def learn_from_rewards(client: TrainingClient, wanted: str) -> list[float]:
    """Raise the share of a digit in what is sampled, by policy gradients (REINFORCE)."""
    sampling = SamplingConfig(max_new_tokens=6, temperature=1.0)
    shares = []
    for _ in range(15):
        (completions,) = client.sample(["a"], sampling, num_samples=16)
        rewards = torch.tensor([one.text.count(wanted) / 6 for one in completions])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)

        def loss_fn(data, log_probs, advantages=advantages):
            gains = [gain * own.sum() for gain, own in zip(advantages, log_probs, strict=True)]
            return -torch.stack(gains).mean(), {"advantage": advantages.mean()}

        client.forward_backward_custom([example_of_completion(one) for one in completions], loss_fn)
        client.optim_step(learning_rate=2e-2, max_grad_norm=1.0)
        shares.append(float(rewards.mean()))
    return shares


def main() -> None:
    """Train, show what was learned, and save and load a state."""
    tokenizer = tiny_tokenizer()
    host = tiny_host(tokenizer)
    adam = OptimizerConfig(optimizer="adamw", optimizer_args={"betas": [0.9, 0.95]})
    writer = TrainingClient(host, tokenizer, "writer", LoraConfig(rank=4), adam)
    judge = TrainingClient(
        host, tokenizer, "judge", MixLoraConfig(rank=2, num_experts=4, top_k=2), adam
    )
    loss, margin = learn_to_answer(writer, judge)
    print(f"writer: loss {loss:.3f}; judge: margin {margin:.3f}")
    (answer,) = writer.sample(["b"], SamplingConfig(max_new_tokens=6))[0]
    print(f"writer, asked for b:{answer.text}")

    player = TrainingClient(host, tokenizer, "player", LoraConfig(rank=4), adam)
    shares = learn_from_rewards(player, wanted="7")
    print(f"player: share of 7s from {shares[0]:.2f} to {shares[-1]:.2f}")

    with tempfile.TemporaryDirectory() as directory:
        player.save_state(f"{directory}/state")
        player.save(f"{directory}/adapter")  # PEFT's format, for loraloom generate and others
        player.close()
        again = TrainingClient(host, tokenizer, "player", LoraConfig(rank=4), adam)
        again.load_state(f"{directory}/state")
        print("player goes on after step", again.step)


if __name__ == "__main__":
    main()
