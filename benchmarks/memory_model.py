"""The predicted memory of training steps against the measured one (Linux).

Each setting runs three steps of jobs in a process of its own; what is measured is the high-water
mark of resident memory above what was there before the first step.

    .venv/bin/python benchmarks/memory_model.py --base-model smollm2-135m
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict

import torch

from loraloom.bench.prediction import JobsSetting, predict_and_measure

SETTINGS = [
    JobsSetting("lora", 4, 256),
    JobsSetting("lora", 8, 256, rank=64, padded=True),
    JobsSetting("lora", 2, 512, padded=True),
    JobsSetting("dora", 4, 256, padded=True),
    JobsSetting("mixlora", 4, 256, padded=True),
    JobsSetting("mixlora", 4, 128, rank=16, jobs=4, padded=True),
    JobsSetting("mixdora", 2, 256, padded=True),
    JobsSetting("lora", 4, 128, jobs=4, micro_batches=2, padded=True),
    JobsSetting("lora", 8, 256, checkpointing=True, padded=True),
    JobsSetting("mixlora", 8, 256, checkpointing=True, padded=True),
    JobsSetting("mixlora", 4, 256, dropout=0.05, padded=True),
    JobsSetting("lora", 4, 128, dtype="float32", padded=True),
]


def measure(base_model: str, setting: JobsSetting, threads: int) -> dict[str, int]:
    command = [sys.executable, __file__, "--base-model", base_model, "--threads", str(threads)]
    command += ["--setting", json.dumps(asdict(setting))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", type=int, nargs="+", help="places of settings")
    parser.add_argument("--setting", help="run this one in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.setting:
        print(
            json.dumps(
                predict_and_measure(
                    arguments.base_model, JobsSetting(**json.loads(arguments.setting))
                )
            )
        )
        return
    errors = []
    print("predicted MB  measured MB   error  setting")
    chosen = SETTINGS if arguments.only is None else [SETTINGS[place] for place in arguments.only]
    for setting in chosen:
        found = measure(arguments.base_model, setting, arguments.threads)
        error = found["predicted"] / found["measured"] - 1
        errors.append(error)
        predicted, measured = round(found["predicted"] / 1e6), round(found["measured"] / 1e6)
        print(f"{predicted:12} {measured:12}  {100 * error:+5.1f} %  {setting}", flush=True)
    print(f"worst error {100 * max(errors, key=abs):+.1f} %")


if __name__ == "__main__":
    main()
