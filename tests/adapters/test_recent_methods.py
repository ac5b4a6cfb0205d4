"""GOAT and CoMoL of recipes/methods against their formulas, arXiv:2502.16894 and 2603.00573."""

import math
import runpy
from pathlib import Path

import torch

from loraloom.training.settings import load_run_config
from tests.adapters.plain import compare
from tests.tiny import tiny_host, tiny_ids

RECIPES = Path(__file__).parents[2] / "recipes" / "methods"


def expert_sum(x, own, weights, part):
    return sum(
        weights[..., expert, None]
        * (x @ own[f"experts.{expert}.{part}_A"].T @ own[f"experts.{expert}.{part}_B"].T)
        for expert in range(weights.shape[-1])
    )


def test_goat_computes_its_formula_and_starts_from_parts_of_the_spectrum(methods_as_before):
    config = runpy.run_path(str(RECIPES / "goat.py"))["GoatConfig"](rank=2, num_experts=3)

    def update(x, own, key):
        best = (x @ own["router"].T).softmax(-1).topk(2)
        weights = best.values / best.values.sum(-1, keepdim=True)
        weights = x.new_zeros(*x.shape[:-1], 3).scatter(-1, best.indices, weights)
        own = {n: t * 0 + t.detach() if "start" in n else t for n, t in own.items()}  # is frozen
        uniform = torch.full_like(weights, 1 / 3)
        change = expert_sum(x, own, weights, "lora") - expert_sum(x, own, uniform, "start")
        return math.sqrt(3 * x.shape[-1] / 2) * change

    compare(config, update, "llama")
    host = tiny_host(configs={})
    for projection in host.add("a", config.model_copy(update={"top_k": 3})).projections():
        torch.nn.init.zeros_(projection.router.weight)  # which then prefers nobody
        left, values, right = torch.linalg.svd(projection.base.weight, full_matrices=False)
        part = slice(len(values) // 3, len(values) // 3 + 2)
        expected = left[:, part] * values[part] @ right[part] / (projection.scaling * 10)
        torch.testing.assert_close(projection.lora_B[1] @ projection.lora_A[1], expected)
    with torch.no_grad():
        logits = [host(tiny_ids(1), adapters=[name]).logits for name in ("a", None)]
    torch.testing.assert_close(*logits)


def test_comol_computes_its_formula(methods_as_before):
    config = runpy.run_path(str(RECIPES / "comol.py"))["ComolConfig"](rank=3, num_experts=4)

    def update(x, own, key):
        low_rank = x @ own["lora_A"].T
        weights, mixed = (low_rank @ own["router"].T).softmax(-1), 0
        for expert in range(4):
            core = own[f"experts.{expert}.core"]
            mixed = mixed + weights[..., expert, None] * (low_rank @ core.T)
        return config.scaling * mixed @ own["lora_B"].T

    compare(config, update, "llama")


def test_their_study_is_a_run_file(methods_as_before):
    for name in ("goat", "comol"):
        runpy.run_path(str(RECIPES / f"{name}.py"))
    assert len(load_run_config(RECIPES / "recent.yaml").jobs) == 4
