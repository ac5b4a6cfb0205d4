"""The benchmarks run, or can be imported at least; tests assert no times."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks import decode, layer, step
from benchmarks.cases import ADAPTERS, PEFT_CASES, StepSetting
from tests.generation.saved import save_tiny


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("saved")) / "base")


def test_a_mixture_keeps_less_than_pefts_lora():
    setting = layer.LayerSetting(hidden_size=64, ffn_size=128, num_tokens=256)
    kept = {case: layer.make_layer(case, setting).saved_bytes for case in ("peft-lora", "mixlora")}
    assert kept["mixlora"] < 0.9 * kept["peft-lora"]


@pytest.mark.parametrize("over", [None, "num-experts", "num-tokens", "num-adapters"])
def test_the_layer_benchmark_prints_all_cases_or_one_over_a_size(over, capsys):
    words = ["--hidden-size", "32", "--ffn-size", "64", "--num-tokens", "16", "--rounds", "1"]
    layer.main(words if over is None else [*words, "--over", over, "--values", "2", "4"])
    printed = capsys.readouterr().out
    scaled = (f"{over} 2", f"{over} 4", "AdamW")
    for case in (*PEFT_CASES, "frozen", *ADAPTERS) if over is None else scaled:
        assert case in printed


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_the_step_benchmark_runs_all_cases(base_model, capsys):
    step.main(["--base-model", base_model, "--rows", "2", "--length", "8", "--rounds", "1"])
    assert "mixdora" in capsys.readouterr().out


def test_fused_steps_and_turns_give_the_same_weights(base_model):
    setting = StepSetting(base_model, dtype="float32", length=8, num_jobs=3)
    fused, turns = (step.JobSteps("mixlora", setting) for _ in range(2))
    for _ in range(2):
        fused.fused()
        turns.by_turns()
    for one, other in zip(fused.adapters, turns.adapters, strict=True):
        for weight, expected in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)


def test_the_decode_benchmark_runs_all_cases(base_model, capsys):
    decode.main(["--base-model", base_model, "--rows", "5", "--new-tokens", "2", "--rounds", "1"])
    assert "mixed" in capsys.readouterr().out


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# These are imported by others.
PARTS = {"cases", "serve_bodies", "serve_watch"}
SCRIPTS = sorted({path.stem for path in BENCHMARKS.glob("*.py")} - PARTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_can_be_imported(name):
    assert callable(import_module(f"benchmarks.{name}").main)
