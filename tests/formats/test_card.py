import torch
import yaml

import loraloom
from loraloom.adapters import LoraConfig, MixLoraConfig
from loraloom.formats import model_card
from tests.formats.tiny import llama_base
from tests.tiny import randomise, tiny_ids, tiny_model


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_front_matter_names_base_and_library():
    base = llama_base()
    assert front_matter(model_card(LoraConfig(), base)) == {
        "base_model": "some-org/tiny-llama",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["loraloom", "lora", "base_model:adapter:some-org/tiny-llama"],
    }
    assert front_matter(model_card(MixLoraConfig(), base))["library_name"] == "loraloom"


def test_the_card_tells_method_data_and_results():
    config = MixLoraConfig(rank=4, num_experts=6, target_modules=("up_proj",))
    card = model_card(
        config, llama_base(), name="arc", data="1,600 questions", results="accuracy: 0.7"
    )
    for text in ("# arc", "num_experts: 6", "rank: 4", "up_proj", "1,600 questions", "0.7"):
        assert text in card


def test_the_code_of_a_card_loads_the_adapter(tmp_path, tiny_tokenizer):
    tiny_model(dtype=torch.float32, vocab_size=300).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    model, _ = loraloom.load_base_model(str(tmp_path / "base"))
    host = loraloom.attach(model)
    randomise(host.add("a", LoraConfig(rank=2)))
    host.save("a", tmp_path / "a")
    code = (tmp_path / "a/README.md").read_text().split("```python\n")[1].partition("```")[0]
    known = {}
    exec(code.replace("path-or-hub-id", str(tmp_path / "a")), known)
    ids = tiny_ids(2)
    expected = host(ids, adapters=["a", "a"]).logits
    actual = known["host"](ids, adapters=["my-adapter"] * 2).logits
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)
