"""Make a base model of the first layers of another: a step takes a fraction of the time.

    python recipes/mixture/cut_base.py --layers 6 --output runs/mixture/smollm2-6

What it says of the whole model's knowledge is little; its words, their embeddings and its sizes by
layer are the whole model's, so that ranks, rates and scalings are of the same order.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import loraloom


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base-model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    model, tokenizer = loraloom.load_base_model(args.base_model, dtype="bfloat16", device="cpu")
    model.model.layers = model.model.layers[: args.layers]
    model.config.num_hidden_layers = args.layers
    layer_types = getattr(model.config, "layer_types", None)
    if layer_types is not None:
        model.config.layer_types = layer_types[: args.layers]
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
