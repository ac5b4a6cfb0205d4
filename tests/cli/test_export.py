import torch
from transformers import AutoModelForCausalLM

import loraloom
from loraloom.cli.main import main
from tests.tiny import relative_error, tiny_ids


def run(saved, adapter, output, *options) -> int:
    base = ["--base-model", str(saved / "base"), "--output", str(output)]
    return main(["export", str(saved / adapter), *base, *options])


@torch.no_grad()
def test_a_mixture_becomes_an_moe_checkpoint(saved, tmp_path, capsys):
    assert run(saved, "mixlora", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "MixtralForCausalLM" in said
    assert "relative difference from the adapter's logits" in said
    host = loraloom.attach(loraloom.load_base_model(str(saved / "base"))[0])
    host.load("a", saved / "mixlora")
    ids = tiny_ids(1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative_error(loaded(ids).logits, host(ids, adapters=["a"]).logits) < 1e-4


def test_a_lora_becomes_a_model_or_a_gguf_adapter(saved, tmp_path, capsys):
    assert run(saved, "lora", tmp_path / "out", "--dtype", "bfloat16") == 0
    base = ["--base-model", str(saved / "base"), "--adapter", str(saved / "lora")]  # as an option
    assert main(["export", *base, "--output", str(tmp_path / "lora.gguf"), "--to", "gguf"]) == 0
    said = capsys.readouterr().out
    assert "LlamaForCausalLM" in said
    assert "lora.gguf: llama" in said


def test_an_error_has_the_name_of_the_adapters_directory(saved, tmp_path, capsys):
    assert run(saved, "mixlora", tmp_path / "out", "--to", "merged") == 2
    assert "adapter 'mixlora' must be without routers" in capsys.readouterr().err


def test_a_wrong_output_is_refused_before_anything_is_loaded(saved, tmp_path, capsys):
    assert run(saved, "lora", tmp_path / "lora", "--to", "gguf") == 2
    assert "must be a file ….gguf" in capsys.readouterr().err
