"""Any two settings meet in a run of several jobs, and each job is what it is by itself.

Runs are fused, some are broken off and resumed, some go on two ranks. A job's weights are held
against those of the same job trained alone, unbroken, in whole batches without packing or
checkpointing; the texts of all adapters, decoded in one batch, against a loop without a cache.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import loraloom
from loraloom.host.host import Host
from tests.conftest import build_tokenizer
from tests.generation.saved import write_rows
from tests.pairwise.cases import Case, pairwise
from tests.tiny import randomise, tiny_model
from tests.training.running import pressing
from tests.training.world import run_ranks

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 3},
    "dora": {"method": "lora", "rank": 2, "weight_decomposition": True},
    "vera": {"method": "vera", "rank": 5},
    "moslora": {"method": "moslora", "rank": 4},
    "hydralora": {"method": "hydralora", "rank": 2, "num_experts": 3},
    "mola": {"method": "mola", "rank": 2, "num_experts": [3, 4]},
    "loramoe": {"method": "loramoe", "rank": 2, "num_experts": 3},
    "dynmole": {"method": "dynmole", "rank": 2, "num_experts": 4},
    "smora": {"method": "smora", "rank": 6, "top_k": 2},
    "mixlora": {"method": "mixlora", "rank": 2, "num_experts": 4},
    "mixdora": {"method": "mixlora", "rank": 2, "num_experts": 3, "weight_decomposition": True},
}
for _name in METHODS.keys() - {"vera"}:
    METHODS[_name]["alpha"] = 4
AUXILIARY = {
    "mola": ("router_aux_loss_coef",),
    "loramoe": ("balance_coef",),
    "dynmole": ("router_aux_loss_coef", "router_entropy_loss_coef"),
    "smora": ("router_aux_loss_coef",),
    "mixlora": ("router_aux_loss_coef",),
    "mixdora": ("router_aux_loss_coef",),
}
"""Losses of whole micro-batches: those of two halves don't add up to that of both."""
ON_EXPERTS = ("lora", "dora", "mixlora", "mixdora")
"""Methods on a base model's experts; others are next to the block."""
FACTORS: dict[str, list[Any]] = {
    "method": list(METHODS),
    "base": ["llama", "phi3", "gpt_neox", "llama-nf4", "qwen3_moe"],
    "dtype": ["float32", "bfloat16"],
    "ending": ["unbroken", "broken", "two ranks"],
    "micro_batch_size": [4, 2, 1],
    "packing": [False, True],
    "gradient_checkpointing": [False, True],
    "dropout": [0.0, 0.2],
    "objective": ["sft", "dpo"],
    "optimizer": ["sgd", "adamw"],
    "starts": ["new", "trained"],
}
SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128}
"""bitsandbytes takes rows of 64 numbers on a CPU."""
PROMPTS = ("Say blue", "no")
# A bfloat16 product rounds by the shape of its batch, and a step carries that into the weights.
TOLERANCE = {"float32": 2e-4, "bfloat16": 0.06}


REFUSED = (
    {"packing": True, "objective": "dpo"},  # a pair is no row
    {"method": "loramoe", "ending": "two ranks"},  # its loss joins the tokens of all ranks
    {"method": "dynmole", "ending": "two ranks"},
)


def _is_possible(case: Case) -> bool:
    return not any(refused.items() <= case.items() for refused in REFUSED)


CASES = pairwise(FACTORS, _is_possible)
RUNS = sorted({(case["base"], case["dtype"], case["ending"]) for case in CASES})


def _run_of(case: Case) -> tuple[str, str, str]:
    return case["base"], case["dtype"], case["ending"]


def _settings(directory: Path, output: str, case: Case, numbers: list[int]) -> dict[str, Any]:
    """Make a run of cases, which have base, dtype and ending in common."""
    base, _, quantization = case["base"].partition("-")
    return {
        "base_model": str(directory / base),
        "dtype": case["dtype"],
        "device": "cpu",
        "quantization": quantization or None,
        "output_dir": str(directory / output),
        "jobs": [_job(directory, CASES[number], number) for number in numbers],
    }


def _job(directory: Path, case: Case, number: int) -> dict[str, Any]:
    data = {"dataset": str(directory / "rows.jsonl"), "format": "instruction"}
    if case["objective"] == "dpo":
        data = {"dataset": str(directory / "pairs.jsonl"), "format": "preference"}
    train = {name: case[name] for name in ("packing", "gradient_checkpointing", "optimizer")}
    base = _family_of(case["base"])
    start = str(directory / f"{base}-{case['method']}") if case["starts"] == "trained" else None
    return {
        "name": f"job-{number}",
        "seed": number,
        "adapter": _adapter(case),
        "start_from": start,
        "data": data,
        "train": {
            **train,
            "objective": {"name": case["objective"]},
            "batch_size": 4,
            "micro_batch_size": case["micro_batch_size"],
            "max_steps": 3,
            "learning_rate": 0.01 if case["optimizer"] == "adamw" else 0.1,
            "weight_decay": 0.01,
            "max_length": 48,
            "save_steps": 1,
        },
    }


def _family_of(base: str) -> str:
    return base.partition("-")[0]


def _method_on(family: str, method: str) -> dict[str, Any]:
    settings = dict(METHODS[method])
    if family == "qwen3_moe":
        place = "experts" if method in ON_EXPERTS else "moe"
        settings["target_modules"] = ["attention", place]
    return settings


def _adapter(case: Case) -> dict[str, Any]:
    method = _method_on(_family_of(case["base"]), case["method"])
    adapter = {"dropout": case["dropout"], **method}
    if case["micro_batch_size"] < 4:
        adapter |= dict.fromkeys(AUXILIARY.get(case["method"], ()), 0.0)
    return adapter


def _alone(directory: Path, number: int) -> None:
    """Train a job as plainly as can be."""
    run = _settings(directory, f"alone-{number}", CASES[number], [number])
    run["jobs"][0]["train"] |= {
        "micro_batch_size": 4,
        "packing": False,
        "gradient_checkpointing": False,
        "save_steps": None,
    }
    _train_on(directory, CASES[number], run)


@cache
def _loaded(directory: Path, base: str, dtype: str) -> tuple[Host, Any]:
    family, _, quantization = base.partition("-")
    model, tokenizer = loraloom.load_base_model(
        str(directory / family), dtype, quantization=quantization or None
    )
    return loraloom.attach(model), tokenizer


def _train_on(directory: Path, case: Case, settings: dict[str, Any], **options: Any) -> None:
    """Train a run on the base model of a case, which is loaded once."""
    loraloom.train(settings, base=_loaded(directory, case["base"], case["dtype"]), **options)


def _train(directory: Path, run: tuple[str, str, str]) -> None:
    """Train the cases of a run together."""
    numbers = [number for number, case in enumerate(CASES) if _run_of(case) == run]
    case = CASES[numbers[0]]
    settings = _settings(directory, "-".join(run), case, numbers)
    if run[2] == "broken":
        with pytest.raises(KeyboardInterrupt):
            _train_on(directory, case, settings, between_steps=pressing(2))
    _train_on(directory, case, settings, resume=run[2] == "broken")


def _be_rank(rank: int, directory: Path) -> None:
    for run in RUNS:
        if run[2] == "two ranks":
            _train(directory, run)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*was trained on"),  # 4-bit ones
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Base models, adapters to start from, data, and all runs."""
    directory = tmp_path_factory.mktemp("pairwise")
    words = ("blue", "one", "two", "yes", "no", "short", "true", "a longer answer than that")
    rows = [{"instruction": f"Say {word} {n}", "output": word} for n, word in enumerate(words)]
    pairs = [
        {"prompt": f"Say {word}", "chosen": f" {word}", "rejected": " no no"} for word in words
    ]
    write_rows(directory / "rows.jsonl", *rows)
    write_rows(directory / "pairs.jsonl", *pairs)
    for family in sorted(set(map(_family_of, FACTORS["base"]))):
        model = tiny_model(family, torch.float32, **SIZES)
        model.save_pretrained(directory / family)
        build_tokenizer().save_pretrained(directory / family)
        host = loraloom.attach(model)
        for seed, method in enumerate(METHODS):
            config = loraloom.adapters.parse_adapter_config(_method_on(family, method))
            randomise(host.add(method, config, seed=seed), seed)
            host.save(method, directory / f"{family}-{method}")
    assert run_ranks(2, _be_rank, directory) == [0, 0]
    for run in RUNS:
        if run[2] != "two ranks":
            _train(directory, run)
    return directory


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_job_learns_what_it_learns_alone(directory, number):
    case = CASES[number]
    _alone(directory, number)
    name = f"job-{number}/adapter_model.safetensors"
    learnt = load_file(directory / "-".join(_run_of(case)) / name)
    expected = load_file(directory / f"alone-{number}" / name)
    assert learnt.keys() == expected.keys()
    error = _norm([learnt[key] - tensor for key, tensor in expected.items()])
    assert error < TOLERANCE[case["dtype"]] * _norm(list(expected.values())), case


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())


@pytest.mark.parametrize("base", FACTORS["base"])
def test_texts_of_one_batch_are_those_of_a_loop_without_cache(directory, base):
    host, tokenizer = _loaded(directory, base, "float32")
    names = []
    for run in RUNS:
        if run[:2] == (base, "float32"):
            for path in sorted((directory / "-".join(run)).glob("job-*")):
                host.load(path.name, path)
                names.append(path.name)
    prompts = [(text, name) for name in (*names, None) for text in PROMPTS]
    sampling = loraloom.SamplingConfig(max_new_tokens=4)
    texts = loraloom.generate(
        host, tokenizer, [loraloom.Prompt(*prompt) for prompt in prompts], sampling, raw=True
    )
    assert texts == [_slow_text(host, tokenizer, text, name) for text, name in prompts]


def _slow_text(host: Any, tokenizer: Any, text: str, name: str | None) -> str:
    ids = tokenizer(text, return_tensors="pt").input_ids
    length = ids.shape[1]
    while ids.shape[1] < length + 4 and ids[0, -1] != tokenizer.eos_token_id:
        with torch.no_grad():
            logits = host(input_ids=ids, adapters=[name]).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0, length:], skip_special_tokens=True)
