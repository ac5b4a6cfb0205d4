"""What a router by prompt needs: example prompts of each source, and which states it reads.

    python recipes/apart/router.py recipes/apart/lands.yaml --adapters runs/apart/lands/apart

Fits a router with so many prompts of a source and so many layers read, and tells how many of those
that were held out, a fifth, go to their own source's adapter (the first seed's, in `--adapters`):
the mean over seeds, the least, and the seconds of a fit.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

import loraloom

PROMPTS, LAYERS = (8, 16, 32, 64, 200), (0, 1, 2, 3)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("settings", type=Path, help="as of run.py")
    parser.add_argument("--base-model", help="in place of the file's")
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--layers", type=lambda text: [*map(int, text.split(","))], default=LAYERS)
    parser.add_argument("--seeds", type=int, default=5, help="of what is held out")
    args = parser.parse_args(arguments)
    of: dict[str, Any] = yaml.safe_load(args.settings.read_text())
    model, tokenizer = loraloom.load_base_model(args.base_model or of["base_model"], of["dtype"])
    host = loraloom.attach(model)
    experts = {name: str(args.adapters / f"{name}@0") for name in of["sources"]}
    print("| prompts of a source | " + " | ".join(f"layers: {n}" for n in args.layers) + " |")
    for count in PROMPTS:
        cells = []
        for layers in args.layers:
            name, began = f"r{count}-{layers}", time.monotonic()
            host.add(name, loraloom.RoutedConfig(experts=experts, num_layers_read=layers))
            shares = [
                100
                * loraloom.fit_router(
                    host, tokenizer, name, of["sources"], limit=count, seed=seed
                ).accuracy
                for seed in range(args.seeds)
            ]
            host.remove(name)
            seconds = (time.monotonic() - began) / args.seeds
            cells.append(f"{fmean(shares):.1f} ({min(shares):.1f}), {seconds:.1f} s")
        print(f"| {count} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
