"""Targets against PEFT's own matching, and written out and read back."""

from types import SimpleNamespace

import pytest
from peft.tuners.tuners_utils import check_target_module_exists

from loraloom.base.blocks import BaseLayer
from loraloom.base.structure import Structure, read_structure
from loraloom.base.targets import (
    name_targets,
    names_layers,
    peft_target_modules,
    peft_target_parameters,
    select,
)
from tests.tiny import tiny_model

FAMILIES = ["llama", "gpt_neox", "gemma3", "qwen2_moe", "deepseek_v3", "gemma4_text", "qwen3_next"]
# As in PEFT a list means modules by the ends of their paths, and a string whole paths.
WRITTEN = [
    ["q_proj"],
    ["q_proj", "down_proj"],
    ["mlp.down_proj", "self_attn.o_proj"],
    ["layers.1.mlp.down_proj", "v_proj"],
    ["model.layers.1.self_attn.q_proj"],
    ["shared_expert.gate_proj", "shared_experts.gate_proj"],
    ["1.self_attn.o_proj", "proj"],
    r".*\.(q_proj|o_proj|dense)",
    r"model\.layers\.1\..*_proj",
    r".*\.shared_experts?\.\w+",
]


@pytest.fixture(scope="module", params=FAMILIES)
def structure(request) -> Structure:
    return read_structure(tiny_model(request.param))


def linears(structure: Structure) -> dict[str, str]:
    """The keys of linear layers by their paths in the model."""
    paths = {}
    for layer in structure.layers:
        for base in layer.projections:
            if base.has_weight and base.num_experts is None:
                paths[f"{layer.path}.{base.key.split('.', 2)[2]}"] = base.key
    return paths


def stacks(layers: list[BaseLayer]) -> set[str]:
    return {base.key for layer in layers for base in layer.projections if base.num_experts}


@pytest.mark.parametrize("written", WRITTEN, ids=str)
def test_names_and_patterns_mean_what_they_mean_in_peft(structure, written):
    config = SimpleNamespace(target_modules=written)
    expected = {
        key for path, key in linears(structure).items() if check_target_module_exists(config, path)
    }
    selection = select(written, structure.layers)
    assert selection.keys - stacks(structure.layers) == expected
    assert bool(selection.stack_words) == (not isinstance(written, str)) * bool(
        selection.keys & stacks(structure.layers)
    )


def subsets(structure: Structure) -> list[set[str]]:
    """Projections of one kind, name, block, layer, and every other."""
    keys = [base.key for layer in structure.layers for base in layer.projections]
    words = {key.rpartition(".")[2] for key in keys}
    blocks = {key.split(".", 2)[2].rpartition(".")[0] for key in keys}
    chosen = [{key for key in keys if key.endswith(f".{word}")} for word in words]
    chosen += [{key for key in keys if f".{block}." in key} for block in blocks]
    chosen += [{key for key in keys if key.startswith("layers.1.")}, set(keys[::2]), set(keys)]
    return chosen


def test_what_is_written_selects_what_was_meant(structure):
    for keys in subsets(structure):
        names = name_targets(keys, structure.layers)
        selection = select(names, structure.layers)
        assert selection.keys == keys
        assert not selection.unknown
        assert not selection.stack_words


@pytest.mark.parametrize("layers", [None, (1,)])
def test_what_is_written_for_peft_selects_the_same_modules_there(structure, layers):
    paths = linears(structure)
    for keys in subsets(structure):
        selected = [
            path
            for path, key in paths.items()
            if key in keys and (layers is None or int(key.split(".")[1]) in layers)
        ]
        config = SimpleNamespace(
            target_modules=peft_target_modules(selected, structure.info, layers),
            layers_to_transform=layers,
        )
        matched = [
            path for path in structure.info.module_paths if check_target_module_exists(config, path)
        ]
        assert sorted(matched) == sorted(selected)


def test_parameters_written_for_peft_end_as_no_others_do(structure):
    parameters = structure.info.parameter_paths
    for layer in (0, 1):
        paths = [path for path in parameters if "experts." in path and f".{layer}." in path]
        names = peft_target_parameters(paths, structure.info)
        # PEFT 0.21.2, `BaseTuner._inject_parameters`
        matched = [
            path
            for path in parameters
            if path in names or any(path.endswith(f".{name}") for name in names)
        ]
        assert matched == paths


def test_names_are_short_where_words_tell_projections_apart():
    layers = read_structure(tiny_model("qwen2_moe")).layers
    keys = {base.key for layer in layers for base in layer.projections}
    shared = {key for key in keys if "shared_expert." in key}
    assert name_targets(shared, layers) == ("gate_proj", "up_proj", "down_proj")
    assert name_targets(stacks(layers), layers) == ("experts.gate_up_proj", "experts.down_proj")
    of_one_layer = name_targets({"layers.1.mlp.experts.down_proj"}, layers)
    assert of_one_layer == ("layers.1.mlp.experts.down_proj",)
    assert names_layers(of_one_layer)
