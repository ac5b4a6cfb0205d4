"""Train on several ranks and on one, and compare the weights; let a rank die, and go on.

    python -m benchmarks.parallel [--ranks 2 4] [--base replicated fsdp]
    python -m benchmarks.parallel --memory smollm2-135m [--ranks 2]

A LoRA, a DoRA, a MixLoRA and a MixDoRA job with dropout and jitter train together on a tiny base
model in float32: plainly, with accumulation, with packing, and on pairs (DPO), in batches that no
number of ranks divides. Printed is ‖a - b‖ / ‖b‖ of all weights of an adapter, and of the tensor
where that is largest. Then one of two ranks is killed, and its run goes on, on one rank and on
three.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

import loraloom
from benchmarks.kills import ADAPTERS
from tests.training.saved import run_settings, save_inputs, write_run_file
from tests.training.world import hold_base, run_ranks

MODES: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"batch_size": 6, "micro_batch_size": 3},
    "packing": {"packing": True, "max_length": 64},
    "pairs": {"objective": {"name": "dpo"}},
}
"""Settings of `train` by what they try."""


def settings(
    inputs: Path, output_dir: Path, modes: Sequence[str], base: str = "replicated"
) -> dict[str, Any]:
    """Make a run of four jobs, one of each method, in the mode of its place."""
    run = run_settings(inputs, output_dir)
    methods = zip(ADAPTERS.items(), modes, strict=True)
    run["jobs"] = [
        _job(run["jobs"][0], inputs, name, seed, adapter, mode)
        for seed, ((name, adapter), mode) in enumerate(methods)
    ]
    return {**run, "parallel": {"base": base}}


def _job(
    template: dict[str, Any],
    inputs: Path,
    name: str,
    seed: int,
    adapter: dict[str, Any],
    mode: str,
) -> dict[str, Any]:
    """Make a job whose routers, if it has any, are away from ties: rounding would decide these."""
    data = dict(template["data"])
    if mode == "pairs":
        data |= {"dataset": str(inputs / "pairs.jsonl"), "format": "preference"}
    clear = {"router_init_std": 1.0} if "num_experts" in adapter else {}
    train = {**template["train"], "batch_size": 5, "eval_steps": 2, **MODES[mode]}
    adapter = {"alpha": 4, **adapter, **clear}
    return {
        **template,
        "name": name,
        "seed": seed,
        "data": data,
        "adapter": adapter,
        "train": train,
    }


def train_on(
    num_ranks: int,
    run_files: Sequence[Path],
    *,
    resume: bool = False,
    dies: tuple[int, int] | None = None,
) -> list[int | None]:
    """Train runs one after the other on so many ranks, and return the ranks' exit codes.

    Args:
        num_ranks: Processes.
        run_files: Of the runs.
        resume: Go on from the newest snapshots.
        dies: A rank, and the number of rounds after which it kills itself.
    """
    return run_ranks(num_ranks, _train, list(run_files), resume, dies)


def _train(
    rank: int, run_files: Sequence[Path], resume: bool, dies: tuple[int, int] | None
) -> None:
    def between_steps(engine: Any, _: Any) -> None:
        if dies == (rank, engine.round):
            os.kill(os.getpid(), signal.SIGKILL)

    for run_file in run_files:
        loraloom.train(run_file, resume=resume, between_steps=between_steps)


class Difference(NamedTuple):
    """How far an adapter is from another one.

    Args:
        whole: ‖a - b‖ / ‖b‖ over all weights.
        tensor: The same of the tensor where it is largest. Adam divides by gradients near zero, so
            that one weight may carry rounding into its tensor.
    """

    whole: float
    tensor: float

    @property
    def is_rounding(self) -> bool:
        """Whether it is no more than float32's rounding."""
        return self.whole < 1e-5 and self.tensor < 1e-4


def difference(directory: Path, expected: Path) -> Difference:
    """Compare two adapters' files."""
    file = "adapter_model.safetensors"
    tensors, others = load_file(directory / file), load_file(expected / file)
    assert tensors.keys() == others.keys()
    apart = torch.stack([(tensors[name] - other).norm() for name, other in others.items()])
    norms = torch.stack([other.norm() for other in others.values()])
    return Difference(float(apart.norm() / norms.norm()), float((apart / norms).max()))


def compare(directory: Path, num_ranks: int, base: str) -> dict[tuple[str, str], Difference]:
    """Train every mode on so many ranks, and on one where that was not done before.

    Args:
        directory: For everything that is written; with what `save_inputs` wrote.
        num_ranks: To compare with one.
        base: replicated or fsdp.

    Returns:
        How far each job's weights are from one rank's, by mode and method.
    """
    _train_modes(directory, 1, "replicated")
    _train_modes(directory, num_ranks, base)
    return {
        (mode, name): difference(
            directory / f"{base}-{num_ranks}-{mode}" / name,
            directory / f"replicated-1-{mode}" / name,
        )
        for mode in MODES
        for name in ADAPTERS
    }


def _train_modes(
    directory: Path, num_ranks: int, base: str, modes: Sequence[str] = tuple(MODES)
) -> None:
    files = []
    for mode in modes:
        output_dir = directory / f"{base}-{num_ranks}-{mode}"
        if not output_dir.exists():
            run = settings(directory, output_dir, [mode] * len(ADAPTERS), base)
            files.append(write_run_file(output_dir.with_suffix(".yaml"), run))
    if files and any(codes := train_on(num_ranks, files)):
        raise SystemExit(f"ranks ended with {codes}")


def resume_elsewhere(directory: Path, numbers: Sequence[int]) -> dict[int, list[Difference]]:
    """Kill one of two ranks, go on with other numbers of ranks, and compare with one rank's run.

    Args:
        directory: As in `compare`.
        numbers: Of ranks.

    Returns:
        How far each job's weights are from the unbroken run's, by number of ranks.
    """
    _train_modes(directory, 1, "replicated", ["accumulation"])
    run = settings(directory, directory / "killed", ["accumulation"] * len(ADAPTERS))
    run["jobs"][0]["train"] |= {"micro_batch_size": 2, "save_steps": 1}  # amid the others' steps
    codes = train_on(2, [write_run_file(directory / "killed.yaml", run)], dies=(1, 5))
    if 0 in codes:
        raise SystemExit(f"ranks ended with {codes} though one was killed")
    differences = {}
    for number in numbers:
        copy = directory / f"killed-{number}"
        shutil.copytree(directory / "killed", copy)
        file = write_run_file(directory / f"killed-{number}.yaml", {**run, "output_dir": str(copy)})
        if any(codes := train_on(number, [file], resume=True)):
            raise SystemExit(f"resumed on {number} ranks, they ended with {codes}")
        differences[number] = [
            difference(copy / name, directory / "replicated-1-accumulation" / name)
            for name in ADAPTERS
        ]
    return differences


def base_memory(directory: Path, base_model: str, num_ranks: int, base: str) -> list[list[int]]:
    """Return for each rank the bytes of its weights, what they added to memory, and at most."""
    if any(codes := run_ranks(num_ranks, hold_base, directory, base_model, base)):
        raise SystemExit(f"ranks ended with {codes}")
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def print_memory(base_model: str, numbers: Sequence[int]) -> None:
    """Print what ranks hold of a base model in bfloat16."""
    with tempfile.TemporaryDirectory() as name:
        for num_ranks in numbers:
            for base in ("replicated", "fsdp"):
                held = base_memory(Path(name), base_model, num_ranks, base)
                parts = (
                    f"{weights / 1e6:.1f} MB (resident {rss / 1e6:.0f}, at most {most / 1e6:.0f})"
                    for weights, rss, most in held
                )
                print(f"{num_ranks} ranks, {base} base: {', '.join(parts)}", flush=True)


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--base", nargs="+", default=["replicated", "fsdp"])
    parser.add_argument("--memory", metavar="BASE_MODEL", help="measure this, and nothing else")
    options = parser.parse_args()
    if options.memory is not None:
        return print_memory(options.memory, options.ranks)
    found: list[Difference] = []
    with tempfile.TemporaryDirectory() as name:
        directory = save_inputs(Path(name))
        for base in options.base:
            for num_ranks in options.ranks:
                print(f"{num_ranks} ranks, {base} base: all weights, the worst tensor")
                for (mode, method), one in compare(directory, num_ranks, base).items():
                    found.append(one)
                    print(f"  {mode:13} {method:8} {one.whole:.1e} {one.tensor:.1e}", flush=True)
        for number, differences in resume_elsewhere(directory, [1, 3]).items():
            found += differences
            whole = max(one.whole for one in differences)
            tensor = max(one.tensor for one in differences)
            print(f"one of two ranks killed, resumed on {number}: {whole:.1e} {tensor:.1e}")
    raise SystemExit(0 if all(one.is_rounding for one in found) else 1)


if __name__ == "__main__":
    main()
