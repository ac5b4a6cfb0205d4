from __future__ import annotations

import pytest
import yaml

from loraloom.adapters import LoraConfig, MixLoraConfig
from loraloom.formats import model_card
from tests.formats.tiny import llama_base


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LoraConfig(), "LoRA"),
        (LoraConfig(weight_decomposition=True), "DoRA"),
        (MixLoraConfig(), "MixLoRA"),
        (MixLoraConfig(weight_decomposition=True), "MixDoRA"),
    ],
)
def test_methods_have_the_papers_names(config, name):
    assert config.title == name


def test_front_matter_names_base_and_library():
    base = llama_base()
    assert front_matter(model_card(LoraConfig(), base)) == {
        "base_model": "some-org/tiny-llama",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["loraloom", "lora", "base_model:adapter:some-org/tiny-llama"],
    }
    assert front_matter(model_card(MixLoraConfig(), base))["library_name"] == "loraloom"


@pytest.mark.parametrize("name", ["/models/llama", "./llama", "smollm2-135m", "", "a: b\n---"])
def test_a_base_model_that_is_not_on_the_hub_stays_out_of_the_front_matter(name):
    matter = front_matter(model_card(LoraConfig(), llama_base(name_or_path=name)))
    assert "base_model" not in matter


def test_the_card_tells_method_data_and_results():
    config = MixLoraConfig(rank=4, num_experts=6, target_modules=("up_proj",))
    card = model_card(
        config, llama_base(), name="arc", data="1,600 questions", results="accuracy: 0.7"
    )
    for text in ("# arc", "6 experts", "rank 4", "up_proj", "1,600 questions", "accuracy: 0.7"):
        assert text in card


def test_sections_without_content_are_left_out():
    card = model_card(LoraConfig(), llama_base())
    assert "## Data" not in card
    assert "## Results" not in card
