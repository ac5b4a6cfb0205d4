"""Write SmolLM2-135M as a bfloat16 model directory that transformers 4 reads too.

python benchmarks/peers/export_small_model.py DIRECTORY
"""

import json
import sys
from pathlib import Path

from loraloom import load_base_model


def main(directory: str) -> None:
    model, tokenizer = load_base_model("smollm2-135m", dtype="bfloat16")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    path = Path(directory, "config.json")
    config = json.loads(path.read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # where transformers 4 looks
    path.write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
