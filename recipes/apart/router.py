"""What a router by prompt needs: example prompts of each source, which states, and how pooled.

    python recipes/apart/router.py recipes/apart/lands.yaml --adapters runs/apart/lands/apart

Fits routers to so many prompts of a source, and tells how many of further ones go to their own
source. A prompt's tokens are pooled as loraloom does (the log of the mean of exp(w·h + b)), or
their states' mean, or the last one's state, are read by the same linear head.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import loraloom
from loraloom.adapters.routed.prompt_router import PromptRouter
from loraloom.generation.router import prompt_ids
from loraloom.host.choice import prompt_states

COUNTS = (8, 16, 32, 64, 200)
POOLINGS = ("tokens", "mean", "last")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("settings", type=Path, help="as of run.py")
    parser.add_argument("--base-model", help="in place of the file's")
    parser.add_argument("--adapters", type=Path, required=True, help="of run.py")
    parser.add_argument("--layers", type=lambda text: [*map(int, text.split(","))], default=[0, 1])
    parser.add_argument("--held-out", type=int, default=100, help="prompts of each source")
    args = parser.parse_args(arguments)
    of: dict[str, Any] = yaml.safe_load(args.settings.read_text())
    model, tokenizer = loraloom.load_base_model(args.base_model or of["base_model"], of["dtype"])
    host = loraloom.attach(model)
    experts = {name: str(args.adapters / f"{name}@0") for name in of["sources"]}
    host.add("auto", loraloom.RoutedConfig(experts=experts))
    limit = max(COUNTS) + args.held_out
    prompts = [
        [*prompt_ids(host, tokenizer, source, "auto", limit)][:limit]
        for source in of["sources"].values()
    ]
    ids = [one for own in prompts for one in own]
    targets = torch.tensor([number for number, own in enumerate(prompts) for _ in own])
    places = torch.cat([torch.arange(len(own)) for own in prompts])
    print("| layers, pooling | " + " | ".join(map(str, COUNTS)) + " |")
    for layers in args.layers:
        states, owners = read(host, ids, layers)
        for pooling in POOLINGS:
            pooled = pool(states, owners, pooling)
            shares = []
            for count in COUNTS:
                router = PromptRouter((len(prompts), states.shape[1]), layers, 1.0)
                fitted, asked = places < count, places >= max(COUNTS)
                chosen = fit(router, pooled, targets, fitted, asked)
                shares.append(100 * float((chosen == targets[asked]).float().mean()))
            cells = " | ".join(f"{share:.1f}" for share in shares)
            print(f"| {layers}, {pooling} | {cells} |", flush=True)


def read(host: loraloom.Host, ids: Sequence[Sequence[int]], layers: int) -> tuple[Tensor, Tensor]:
    """States of all prompts' tokens, and whose they are, in the prompts' order."""
    found = []
    for batch, states, owners in prompt_states(host, ids, layers):
        found += [(place, states[owners == n].float()) for n, place in enumerate(batch)]
    ordered = [states for _, states in sorted(found, key=lambda one: one[0])]
    lengths = torch.tensor([*map(len, ordered)])
    return torch.cat(ordered), torch.arange(len(ordered)).repeat_interleave(lengths)


def pool(states: Tensor, owners: Tensor, pooling: str) -> tuple[Tensor, Tensor]:
    if pooling == "tokens":
        return states, owners
    parts = states.split(owners.bincount().tolist())
    pooled = [part.mean(0) if pooling == "mean" else part[-1] for part in parts]
    return torch.stack(pooled), torch.arange(len(pooled))


def fit(
    router: PromptRouter,
    pooled: tuple[Tensor, Tensor],
    targets: Tensor,
    fitted: Tensor,
    asked: Tensor,
) -> Tensor:
    """Fit a router to some prompts, and return what it chooses for others."""

    def part(wanted: Tensor) -> tuple[Tensor, Tensor]:
        states, owners = pooled
        kept = wanted[owners]
        return states[kept], (wanted.cumsum(0) - 1)[owners[kept]]

    router.fit(*part(fitted), targets[fitted], range(len(router.router)))
    with torch.no_grad():
        return router(*part(asked)).argmax(1)


if __name__ == "__main__":
    main()
