"""The benchmarks run; tests assert no times."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from loraloom.bench import memory as bench_memory
from loraloom.bench import step as bench_step
from loraloom.bench.cases import PEFT_CASES, StepSetting, adapter_cases
from loraloom.bench.layer import LayerSetting, make_layer
from loraloom.bench.memory import describe_peaks
from loraloom.bench.step import make_job_steps
from loraloom.bench.timing import alternate
from loraloom.cli import main as cli
from loraloom.models.loading import load_base_model
from loraloom.models.quantised import quantised_linears
from tests.infer.saved import save_tiny


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("saved")) / "base")


def test_cases_take_turns_after_the_warmup():
    calls = []
    cases = {name: lambda name=name: calls.append(name) for name in "ab"}
    medians = alternate(cases, rounds=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert list(medians) == ["a", "b"]


def test_a_mixture_keeps_less_than_pefts_lora():
    setting = LayerSetting(hidden_size=64, ffn_size=128, num_tokens=256)
    kept = {case: make_layer(case, setting).saved_bytes for case in ("peft-lora", "mixlora")}
    assert kept["mixlora"] < 0.9 * kept["peft-lora"]


def test_the_layer_benchmark_prints_ratios_and_draws(tmp_path, capsys):
    picture = tmp_path / "layer.png"
    words = ["--hidden-size", "32", "--ffn-size", "64", "--tokens", "16", "--rounds", "1"]
    assert cli.main(["bench", "layer", *words, "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    for case in (*PEFT_CASES, "frozen", *adapter_cases()):
        assert case in printed
    assert picture.is_file()


@pytest.mark.parametrize("over", ["num-experts", "top-k", "rank", "tokens", "adapters"])
def test_the_scaling_benchmark_varies_one_size(over, capsys):
    words = ["--hidden-size", "32", "--ffn-size", "64", "--tokens", "16", "--rounds", "1"]
    assert cli.main(["bench", "scaling", "--over", over, "--values", "2,4", *words]) == 0
    printed = capsys.readouterr().out
    assert f"{over} 2" in printed
    assert f"{over} 4" in printed
    assert "AdamW" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--over", "layers", "--values", "2"], "--over must be one of num-experts"),
        (["--over", "rank", "--values", "2,x"], "--values must be positive numbers"),
        (["--over", "rank", "--values", "2", "--case", "lora,dora"], "--case must be one of lora"),
        (["--over", "adapters", "--values", "3", "--tokens", "16"], "a multiple of adapters"),
    ],
)
def test_a_wrong_scaling_is_an_error(words, message, capsys):
    assert cli.main(["bench", "scaling", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_the_step_benchmark_runs_all_cases(base_model, capsys):
    words = ["--base-model", base_model, "--rows", "2", "--length", "8", "--rounds", "1"]
    assert cli.main(["bench", "step", *words]) == 0
    assert "mixdora" in capsys.readouterr().out


@pytest.mark.slow
def test_the_jobs_benchmark_compares_fused_steps_with_turns_and_measures_memory(base_model, capsys):
    words = ["--base-model", base_model, "--jobs", "3", "--length", "8", "--rounds", "1"]
    assert cli.main(["bench", "jobs", *words, "--memory"]) == 0
    printed = capsys.readouterr().out
    for word in ("by turns", "fused", "of 3 times one", "each further job adds"):
        assert word in printed


def test_the_figures_of_jobs_memory():
    text = describe_peaks(num_jobs=5, one_bytes=100, all_bytes=180, state_bytes=16)
    assert f"{180 / 500:.2f} of 5 times one" in text
    assert f"each further job adds {20 / 16:.2f} times" in text


def test_fused_steps_and_turns_give_the_same_weights(base_model):
    setting = StepSetting(base_model, dtype="float32", length=8, num_jobs=3)
    fused, turns = (make_job_steps("mixlora", setting) for _ in range(2))
    for _ in range(2):
        fused.fused()
        turns.by_turns()
    for one, other in zip(fused.adapters, turns.adapters, strict=True):
        for weight, expected in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)


def test_the_decode_benchmark_runs_all_cases(base_model, capsys):
    words = ["--base-model", base_model, "--rows", "5", "--new-tokens", "2", "--rounds", "1"]
    assert cli.main(["bench", "decode", *words]) == 0
    assert "mixed" in capsys.readouterr().out


def _length_as_json(case: str, setting: StepSetting) -> int:
    """Take the place of a measurement in another process, to which the setting goes as JSON."""
    return len(json.dumps(asdict(setting)))


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize(
    "words",
    [
        ["step", "--length", "8", "--cases", "peft-lora,mixlora", "--memory"],
        ["jobs", "--jobs", "2", "--length", "8"],
        ["decode", "--new-tokens", "2", "--cases", "base,mixlora"],
    ],
    ids=lambda words: words[0],
)
def test_benchmarks_run_on_a_quantised_base(base_model, words, monkeypatch):
    pytest.importorskip("bitsandbytes")
    loaded = []

    def load(*args, **options):
        loaded.append(load_base_model(*args, **options))
        return loaded[-1]

    monkeypatch.setattr(bench_step, "load_base_model", load)
    monkeypatch.setattr(bench_memory, "step_peak_rss_bytes", _length_as_json)
    options = ["--base-model", base_model, "--rounds", "1", "--quantization", "int8"]
    assert cli.main(["bench", *words, *options]) == 0
    assert all(quantised_linears(model) for model, _ in loaded)
    assert loaded


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layer", "--top-k", "9"], "--top-k must be at most --num-experts 8, got 9"),
        (["step", "--quantization", "nf5"], "quantization must be nf4, int8"),
        (["step", "--top-k", "9"], "--top-k must be at most --num-experts 8, got 9"),
        (["scaling", "--over", "top-k", "--values", "2,9"], "at most --num-experts 8, got 9"),
        (["layer", "--picture", "x.zzz"], "--picture must end in .png, .svg, .pdf, .jpg, got x"),
        (["decode", "--picture", "."], "--picture must end in"),
    ],
)
def test_what_cannot_be_measured_or_drawn_is_an_error_at_once(words, message, capsys, monkeypatch):
    monkeypatch.setattr("loraloom.bench.timing.alternate", lambda *_, **__: pytest.fail("timed"))
    assert cli.main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_case_is_an_error(capsys):
    assert cli.main(["bench", "layer", "--cases", "qlora"]) == 2
    assert "--cases must be some of peft-lora" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["layer", "step", "count"])
def test_pefts_cases_need_peft(command, capsys, monkeypatch):
    monkeypatch.setattr("loraloom.cli.bench.find_spec", lambda name: None)
    assert cli.main(["bench", command]) == 2
    error = capsys.readouterr().err
    assert "pip install 'loraloom[peft]', or leave them out: --cases" in error
    assert "peft-lora" not in error
