"""Compile a block as for an accelerator, and print how it differs from the plain one.

    python -m tests.ops.compiled_blocks inductor    # a minute, most of it g++'s

A process of its own: checks of types, which tests have, are no part of what is compiled.
"""

import json
import sys
from functools import partial
from unittest.mock import patch

import torch
from torch._dynamo.utils import counters

from loraloom.ops import fused, slot_pieces
from loraloom.ops.lean_expert_ffn import lean_expert_ffn
from tests.ops.ffn_case import make_case, run, with_gradients
from tests.tiny import relative_error


def main() -> None:
    sizes = {"dropout": 0.4, "features": 36, "rank": 3, "padding": [4]}
    errors = []
    compile_ = partial(torch.compile, backend=sys.argv[1])
    with (
        patch.object(slot_pieces, "has_cache", lambda device: False),
        patch.object(torch, "compile", compile_),
    ):
        for num_tokens in (70, 71, 90):
            case = make_case("gated", num_tokens=num_tokens, **sizes).to(torch.float32)
            expected = with_gradients(run(lean_expert_ffn, case), case)
            with patch.object(fused, "COMPILED_FOR", ("cpu",)):
                actual = with_gradients(run(lean_expert_ffn, case), case)
            errors += [relative_error(*pair) for pair in zip(actual, expected, strict=True)]
    print(json.dumps({"error": max(errors), "graphs": counters["stats"]["unique_graphs"]}))


if __name__ == "__main__":
    main()
