from __future__ import annotations

import json

import pytest
import torch
from torch import distributed, multiprocessing

from loraloom.eval.harness import HostLM, evaluate_adapters, load_tasks
from tests.conftest import build_tokenizer
from tests.eval.scoring import scoring_host

NAMES = [None, "lora"]
OPTIONS = {"bootstrap_iters": 0, "limit": 7}


def evaluate(directory):
    tasks = load_tasks(["toy_choice", "toy_generate"], directory)
    return evaluate_adapters(scoring_host(), build_tokenizer(), tasks, NAMES, **OPTIONS)


def run_process(rank, directory, store):
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    results = evaluate(directory)
    if rank == 0:
        figures = [results[name]["results"] for name in NAMES]
        (store.parent / "figures.json").write_text(json.dumps(figures))
    else:
        assert list(results.values()) == [None, None]
    distributed.destroy_process_group()


def test_one_process_gathers_from_itself(host, tiny_tokenizer):
    lm = HostLM(host, tiny_tokenizer)
    assert (lm.rank, lm.world_size) == (0, 1)
    assert lm.all_gather(torch.tensor(3)) == torch.tensor(3)
    assert lm.gather_object("a") == ["a"]
    lm.barrier()


@pytest.mark.slow
def test_two_processes_have_the_results_of_one(toy_tasks, tmp_path):
    multiprocessing.spawn(run_process, (toy_tasks, tmp_path / "store"), nprocs=2)
    together = json.loads((tmp_path / "figures.json").read_text())
    alone = evaluate(toy_tasks)
    assert together == [alone[name]["results"] for name in NAMES]
