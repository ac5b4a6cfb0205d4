"""What `loraloom serve --engine vllm` hands on, and vLLM itself where a Python has both."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from loraloom.cli.main import main
from loraloom.errors import AdapterError, ConfigError
from loraloom.serve import vllm
from loraloom.serve.vllm import serve_with_vllm, vllm_command
from loraloom.serve.vllm.folding import FoldedAdapter


def options(**changes):
    settings: Any = {"base_model": "some/base", "adapters": {"mix": "runs/rank=8,16"}, "port": 8000}
    settings |= {"adapter_dir": None, "max_adapters": 8, "host": "127.0.0.1", "dtype": "float32"}
    settings |= {"allow_loading": False, "cors_origin": (), "max_rows": 32}
    settings |= {"served_model_name": ()}
    return SimpleNamespace(**settings | changes)


def test_options_are_said_in_vllms_words():
    words, settings = vllm_command(
        options(
            cors_origin=["https://a.example"], allow_loading=True, served_model_name=("a", "b")
        ),
        ["one", "two"],
        [FoldedAdapter({}, 48, 3), FoldedAdapter({}, 8, None)],
        {},
    )
    said = " ".join(words)
    for part in (
        "--model some/base",
        "--max-num-seqs 32 --max-loras 2 --max-lora-rank 64 --enable-lora",
        '--lora-modules {"name": "mix", "path": "runs/rank=8,16"} --served-model-name a b',
        "--api-key one two",
        '--allowed-origins ["https://a.example"]',
    ):
        assert part in said
    assert settings == {"LORALOOM_MAX_TOP_K": "3", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}


def test_a_key_that_begins_with_a_dash_is_no_option_of_vllms():
    assert "--api-key=-one" in vllm_command(options(), ["-one"], [], {})[0]
    with pytest.raises(ConfigError, match="several keys for --engine vllm must not begin with '-'"):
        vllm_command(options(), ["one", "-two"], [], {})


@pytest.mark.parametrize("found", [None, "0.31.0"])
def test_a_version_that_is_not_known_is_refused(monkeypatch, found):
    monkeypatch.setattr("loraloom.serve.vllm.vllm_version", lambda: found)
    with pytest.raises(ConfigError, match=f"needs vLLM 0.32 or 0.33, got {found}"):
        serve_with_vllm(options(), [])


def test_options_that_vllm_can_not_honour_are_refused(capsys, monkeypatch):
    given = ["serve", "--base-model=~/base", "--engine", "vllm"]
    assert main([*given, "--max-waiting", "3"]) == 2
    assert "--max-waiting is not supported with --engine vllm" in capsys.readouterr().err
    monkeypatch.setattr(vllm, "serve_with_vllm", asked := Mock())
    assert main(given) == 0
    assert asked.call_args.args[0].base_model == os.path.expanduser("~/base")
    monkeypatch.setenv("LORALOOM_MAX_TOP_K", "two")
    with pytest.raises(ConfigError, match="LORALOOM_MAX_TOP_K must be a whole number of 1 or more"):
        vllm_command(options(), [], [], {})


def test_adapters_of_the_directory_that_are_left_out_are_told_and_need_no_room(
    monkeypatch, tmp_path, capsys
):
    for name in ("a b", "bad", "good"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")

    def fold(path):
        if path.name == "bad":
            raise AdapterError("no")
        return FoldedAdapter({}, {"a b": 512, "good": 8}[path.name], None)

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", Mock())
    monkeypatch.setattr("loraloom.serve.vllm.folding.Folder", Mock(return_value=Mock(fold=fold)))
    folded, names = vllm._fold_all(options(adapters={}, adapter_dir=tmp_path))
    assert ([adapter.rank for adapter in folded], [*names]) == ([8], ["good"])
    told = capsys.readouterr().err
    assert "bad is not served: no" in told
    assert "a b is not served" in told


def test_a_version_that_is_not_known_leaves_vllm_as_it_is(monkeypatch, caplog):
    monkeypatch.setattr(vllm, "vllm_version", lambda: "0.99.0")
    vllm.register()
    assert "supports vLLM 0.32 or 0.33, got 0.99.0; vLLM serves no mixtures" in caplog.text


PYTHON = os.environ.get("LORALOOM_VLLM_PYTHON", "")
ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="LORALOOM_VLLM_PYTHON names no Python with vLLM")
def test_mixtures_loras_and_the_base_say_in_one_batch_what_they_say_here():
    ran = subprocess.run(
        [PYTHON, "-m", "benchmarks.vllm_plugin", "check", "--families", "llama"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert json.loads(ran.stdout.splitlines()[-1])["equal"]
