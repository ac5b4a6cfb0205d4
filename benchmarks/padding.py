"""How much of what a step computes is padding, by how examples are put into rows.

Instructions (Alpaca's first 5,000 rows, say) and BoolQ mixed, one epoch of steps; several jobs
differ in their seeds and share each step. Rows are laid out, nothing is computed.

    .venv/bin/python benchmarks/padding.py --data data --instructions alpaca.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path

from loraloom import load_base_model
from loraloom.bench.padding import count_padding, load_sets

CASES: dict[str, dict[str, bool]] = {
    "plain": {},
    "group_by_length": {"group_by_length": True},
    "packing": {"packing": True},
    "both": {"group_by_length": True, "packing": True},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-model", default="smollm2-135m", help="whose tokenizer is used")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--instructions", required=True, help="rows as JSON lines, or a hub id")
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 4], help="jobs in a step")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--max-steps", type=int, help="steps to lay out; an epoch by default")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    _, tokenizer = load_base_model(arguments.base_model)
    boolq = {"task": "boolq", "scoring": "text", "path": str(arguments.data)}
    data = {"mix": [{"dataset": arguments.instructions, "format": "instruction"}, boolq]}
    sets = load_sets(data, tokenizer, arguments.max_length, max(arguments.jobs))
    sizes = {"batch_size": arguments.batch_size, "max_length": arguments.max_length}
    print("jobs  case               real tokens  computed tokens  padding  mean row")
    for count in arguments.jobs:
        for name, settings in CASES.items():
            found = count_padding(sets[:count], sizes | settings, arguments.max_steps)
            print(
                f"{count:4}  {name:17}  {found.real:11,}  {found.computed:15,}  "
                f"{100 * found.share:5.1f} %  {found.row_length:8.0f}"
            )


if __name__ == "__main__":
    main()
