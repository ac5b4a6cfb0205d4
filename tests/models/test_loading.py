from __future__ import annotations

import errno
import json
import os
import platform
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from loraloom.config.model import BaseDtype, Dtype
from loraloom.errors import ConfigError, ModelError
from loraloom.models import loading
from loraloom.models.loading import DTYPES, find_device, load_base_model, load_tokenizer
from tests.models.tiny_gguf import write_gguf

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
    assert set(DTYPES) == set(get_args(BaseDtype)) - {"auto"}
    assert set(get_args(Dtype)) == set(DTYPES) - {"float64"}  # which no file is written in


def test_a_model_is_loaded_in_float64(directory):
    model, _ = load_base_model(str(directory), "float64")
    assert {weight.dtype for weight in model.parameters()} == {torch.float64}
    with pytest.raises(ModelError, match="dtype float64 does not exist on mps; use float32"):
        loading._find_dtype("float64", {}, torch.device("mps"))


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.bfloat16),  # nothing trains in float16
        ("float64", torch.float32),
        (None, torch.float32),
    ],
)
def test_dtype_auto_is_the_checkpoints(directory, saved, loaded, monkeypatch):
    monkeypatch.setattr(loading, "_multiplies_in_bfloat16", lambda device: True)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "dtype": saved}))
    model, _ = load_base_model(str(directory))
    assert model.dtype == loaded


def test_dtype_auto_is_float16_where_the_device_has_no_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    device = torch.device("cuda")
    assert loading._find_dtype("auto", {"torch_dtype": "bfloat16"}, device) == torch.float16
    assert loading._find_dtype("auto", {"torch_dtype": "float32"}, device) == torch.float32


def test_a_cpu_without_products_in_16_bits_gets_float32(directory, monkeypatch):
    monkeypatch.setattr(loading, "_multiplies_in_bfloat16", lambda device: False)
    cpu = torch.device("cpu")
    for saved in ("bfloat16", "float16", "float32"):
        assert loading._find_dtype("auto", {"dtype": saved}, cpu) == torch.float32
    assert loading._find_dtype("auto", {}, cpu) == torch.float32  # a GGUF file
    for asked in ("bfloat16", "float16"):
        with pytest.warns(UserWarning, match=f"16 bits: {asked} takes 2 to 20 times"):
            assert load_base_model(str(directory), asked)[0].dtype == DTYPES[asked]


@pytest.mark.parametrize(
    ("machine", "flags", "answer"),
    [
        ("x86_64", {"onednn"}, False),  # AVX-512 alone: emulated
        ("x86_64", {"onednn", "avx512_bf16"}, True),
        ("AMD64", {"onednn", "amx_tile"}, True),
        ("aarch64", {"onednn"}, True),
        ("aarch64", set(), False),
    ],
)
def test_a_cpu_multiplies_in_bfloat16_by_its_own_instructions(monkeypatch, machine, flags, answer):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    for flag in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{flag}_supported", lambda flag=flag: flag in flags)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: "onednn" in flags)
    assert loading._multiplies_in_bfloat16(torch.device("cpu")) is answer


def test_dtype_auto_of_a_gguf_file_is_bfloat16(gguf_file, cache, monkeypatch):
    monkeypatch.setattr(loading, "_multiplies_in_bfloat16", lambda device: True)
    assert load_base_model(str(gguf_file))[0].dtype == torch.bfloat16


def test_flash_attention_needs_16_bits(directory):
    with pytest.raises(ModelError, match="computes in 16 bits only, got dtype float32"):
        load_base_model(str(directory), attn_implementation="flash_attention_2")


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


def test_a_quantised_checkpoint_is_not_sharded(directory):
    file = directory / "config.json"
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantised}))
    with pytest.raises(ModelError, match="needs weights in floating point"):
        load_base_model(str(directory), sharded=True)


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
    with pytest.raises(ModelError, match=r"can't load owner/model: .*HF_HUB_OFFLINE"):
        load_base_model("owner/model")


@pytest.fixture
def ask(monkeypatch):
    """Have the hub answer with an error, and count how often it is asked."""

    def answer(error):
        questions = []

        def metadata(url, timeout):
            questions.append(url)
            raise error

        monkeypatch.setattr(loading, "get_hf_file_metadata", metadata)
        return questions

    return answer


def refusal(kind, status):
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("a page of text", response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (refusal(RepositoryNotFoundError, 401), "the hub has no public one of that name; check"),
        (refusal(GatedRepoError, 403), "owner/model is gated: accept its terms"),
        (refusal(RemoteEntryNotFoundError, 404), "whose repository on the hub has no config.json"),
        (refusal(HfHubHTTPError, 503), r"the hub can't be reached \(a page of text\)"),
        (OSError("no route to host"), r"the hub can't be reached \(no route to host\)"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_one_error_after_one_question(
    ask, capfd, error, message
):
    questions = ask(error)
    with pytest.raises(ModelError, match=message):
        load_base_model("owner/model")
    assert questions == ["https://huggingface.co/owner/model/resolve/main/config.json"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_model_in_the_cache_is_loaded_without_the_hub(ask, directory, monkeypatch, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub/models--owner--model/snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    directory.rename(snapshot)
    references = snapshot.parent.parent / "refs"
    references.mkdir()
    (references / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    ask(OSError("no route to host"))
    model, tokenizer = load_base_model("owner/model")
    assert model.config.name_or_path == "owner/model"
    assert tokenizer.eos_token == "<eos>"


@pytest.mark.parametrize("kind", ["pad_token", "eos_token"])
def test_a_token_that_was_added_without_a_row_for_it_is_an_error(directory, kind):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({kind: "<new>"})
    tokenizer.save_pretrained(directory)
    message = rf"{kind} .* must be in the model's embedding of 5 rows, got 5 \('<new>'\)"
    with pytest.raises(ModelError, match=message):
        load_base_model(str(directory))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": "int8"},
            "dtype must be one of auto, float32, bfloat16, float16, float64, got 'int8'",
        ),
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


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "loraloom" / "gguf"


@pytest.fixture
def gguf_file(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def count_dequantised(monkeypatch):
    """How often a GGUF file is dequantised."""
    calls = []
    make = loading.GgufConfig
    monkeypatch.setattr(loading, "GgufConfig", lambda **options: calls.append(1) or make(**options))
    return lambda: len(calls)


def copies(cache):
    return sorted(path for path in cache.iterdir() if path.is_dir())


def assert_same(loaded, again):
    """Weights to the bit, and all that their users look at."""
    (model, tokenizer), (other, other_tokenizer) = loaded, again
    expected, actual = model.state_dict(), other.state_dict()
    assert expected.keys() == actual.keys()
    assert all(expected[name].equal(actual[name]) for name in expected)
    assert all(expected[name].dtype == actual[name].dtype for name in expected)
    assert type(model) is type(other)
    assert not other.training
    for one in ("config", "generation_config"):
        ignored = {"architectures", "transformers_version"}
        first, second = getattr(model, one).to_dict(), getattr(other, one).to_dict()
        assert {name: first[name] for name in first.keys() - ignored} == {
            name: second[name] for name in second.keys() - ignored
        }
    assert model.config.name_or_path == other.config.name_or_path
    assert_same_tokenizer(tokenizer, other_tokenizer)


def assert_same_tokenizer(tokenizer, other):
    assert tokenizer.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    assert type(tokenizer) is type(other)
    for name in ("special_tokens_map", "chat_template", "padding_side", "name_or_path"):
        assert getattr(tokenizer, name) == getattr(other, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gguf_file_is_dequantised_once(gguf_file, cache, count_dequantised, capfd, dtype):
    first = load_base_model(str(gguf_file), dtype)
    (copy,) = copies(cache)
    assert copy.name.startswith("tiny-")
    again = load_base_model(str(gguf_file), dtype)
    assert count_dequantised() == 1
    assert_same(first, again)
    direct = LlamaForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=DTYPES[dtype],
        quantization_config=GgufConfig(dequantize=True),
    )
    weights = again[0].state_dict()
    assert all(weight.equal(weights[name]) for name, weight in direct.state_dict().items())


@pytest.mark.parametrize("damage", ["none", "cut", "missing"])
def test_the_tokenizer_of_a_gguf_file_is_converted_once(gguf_file, cache, monkeypatch, damage):
    converted = []
    read = AutoTokenizer.from_pretrained

    def count(location, **options):
        converted.append(options.get("gguf_file"))
        return read(location, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", count)
    first = load_tokenizer(str(gguf_file))
    (copy,) = cache.with_name("tokenizers").iterdir()
    if damage == "cut":
        (copy / "tokenizer.json").write_text("{")
    elif damage == "missing":
        (copy / "tokenizer.json").unlink()
    assert_same_tokenizer(first, load_tokenizer(str(gguf_file)))
    assert converted.count("tiny.gguf") == (1 if damage == "none" else 2)
    os.utime(gguf_file, (1, 1))  # another file now
    load_tokenizer(str(gguf_file))
    assert converted[-1] == "tiny.gguf"


def test_loading_a_gguf_file_is_silent(gguf_file, cache, capfd):
    for _ in range(2):
        load_base_model(str(gguf_file))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("part", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "junk"])
def test_a_broken_copy_is_made_again(gguf_file, cache, count_dequantised, part, damage):
    first = load_base_model(str(gguf_file))
    (copy,) = copies(cache)
    content = (copy / part).read_bytes()
    if damage == "missing":
        (copy / part).unlink()
    else:
        (copy / part).write_bytes(b"junk" if damage == "junk" else content[: len(content) // 2])
    assert_same(first, load_base_model(str(gguf_file)))
    assert count_dequantised() == 2
    assert (copy / part).read_bytes() == content


def test_another_file_or_dtype_has_a_copy_of_its_own(gguf_file, cache):
    load_base_model(str(gguf_file), "float32")
    load_base_model(str(gguf_file), "bfloat16")
    model, _ = load_base_model(str(write_gguf(gguf_file, seed=1)), "bfloat16")
    assert len(copies(cache)) == 3
    assert_same((model, _), load_base_model(str(gguf_file), "bfloat16"))


def test_the_name_that_was_given_is_kept_in_a_copy_of_another_name(gguf_file, cache, monkeypatch):
    load_base_model(str(gguf_file))
    monkeypatch.chdir(gguf_file.parent)
    assert load_base_model("tiny.gguf")[0].config.name_or_path == "tiny.gguf"


def test_a_cache_that_cant_be_written_keeps_nothing(gguf_file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert_same(load_base_model(str(gguf_file)), load_base_model(str(gguf_file)))
    assert_same_tokenizer(load_tokenizer(str(gguf_file)), load_tokenizer(str(gguf_file)))


def test_a_full_disk_leaves_no_copy(gguf_file, cache, monkeypatch):
    def fail(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("loraloom.durable.sync", fail)
    load_base_model(str(gguf_file))
    assert copies(cache) == []


@pytest.mark.parametrize("length", [0, 3, 100, 2000, 3000, 20_000])
def test_a_broken_gguf_file_is_an_error_and_leaves_no_copy(gguf_file, cache, length):
    gguf_file.write_bytes(gguf_file.read_bytes()[:length])
    with pytest.raises(ModelError, match=r"can't load .*tiny\.gguf: .*; check that the file is"):
        load_base_model(str(gguf_file))
    assert copies(cache) == []
