"""What the plug-in takes of vLLM's inside is there, by the source of an unpacked wheel.

pip download --no-deps vllm==0.33.0; unzip vllm-0.33.0-*.whl 'vllm/*.py' -d source
LORALOOM_VLLM_SOURCE=source pytest tests/serve/vllm/test_contract.py
"""

import ast
import os
import tomllib
from pathlib import Path

import pytest

from loraloom.serve.vllm import KNOWN_VERSIONS, is_known

ROOT = Path(__file__).parents[3]
SOURCES = os.environ.get("LORALOOM_VLLM_SOURCE", "").split(os.pathsep)
# Functions that are called or wrapped, and the parameters that they are given, by file.
FUNCTIONS = {
    "lora/worker_manager.py": {
        "WorkerLoRAManager.create_lora_manager": "self model vllm_config",
        "LRUCacheWorkerLoRAManager.create_lora_manager": "self model vllm_config",
        "WorkerLoRAManager._load_adapter": "self lora_request",
    },
    "lora/lora_model.py": {
        "LoRAModel.from_lora_tensors": "cls lora_model_id tensors peft_helper device dtype "
        "model_vocab_size weights_mapper",
    },
    "lora/punica_wrapper/punica_base.py": {
        "PunicaWrapperBase.add_shrink": "self y x lora_a_stacked scale",
        "PunicaWrapperBase.add_expand": "self y x lora_b_stacked output_slices",
    },
    "model_executor/models/utils.py": {"WeightsMapper.get_rename_mapper": "self"},
    "model_executor/layers/linear.py": {
        "ReplicatedLinear.__init__": "self input_size output_size bias params_dtype prefix"
    },
}
# Attributes, environment variables and options, by file.
WORDS = {
    "lora/punica_wrapper/punica_base.py": "_token_lora_indices no_lora",
    "lora/layers/base_linear.py": "lora_a_stacked lora_b_stacked n_slices output_slices base_layer "
    "tp_size punica_wrapper",
    "lora/peft_helper.py": "r lora_alpha target_modules",
    "config/compilation.py": "static_forward_context",
    "config/lora.py": "max_lora_rank fully_sharded_loras lora_dtype",
    "forward_context.py": "no_compile_layers",
    "envs.py": "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "engine/arg_utils.py": "--enable-lora --max-loras --max-lora-rank --max-num-seqs --dtype",
    "entrypoints/*/cli_args.py": "lora_modules api_key allowed_origins",
    "model_executor/models/llama.py": "gate_up_proj down_proj act_fn",
    "model_executor/models/mistral.py": "gate_up_proj down_proj act_fn",
    "model_executor/models/qwen2.py": "gate_up_proj down_proj act_fn",
    "model_executor/models/gemma2.py": "gate_up_proj down_proj act_fn",
}


@pytest.fixture(params=SOURCES)
def package(request) -> Path:
    if not request.param:
        pytest.skip("LORALOOM_VLLM_SOURCE names no directory with an unpacked wheel of vLLM")
    return Path(request.param) / "vllm"


def nodes_of(file: Path, kind: type) -> list:
    return [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, kind)]


def test_what_is_imported_is_there(package):
    files = sorted((ROOT / "src/loraloom/serve/vllm").glob("*.py"))
    nodes = [node for file in files for node in nodes_of(file, ast.ImportFrom)]
    imports = [node for node in nodes if node.module.partition(".")[0] == "vllm"]
    assert len(imports) >= 8
    for node in imports:
        path = package.parent.joinpath(*node.module.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for alias in node.names:
            submodule = path / f"{alias.name}.py"
            is_there = submodule.exists() or (path / alias.name).is_dir()
            assert is_there or alias.name in file.read_text("utf-8"), (node.module, alias.name)


def test_functions_have_the_parameters_that_are_used(package):
    for file, functions in FUNCTIONS.items():
        defined = {
            f"{owner.name}.{function.name}": [*function.args.args, *function.args.kwonlyargs]
            for owner in nodes_of(package / file, ast.ClassDef)
            for function in owner.body
            if isinstance(function, ast.FunctionDef)
        }
        for name, parameters in functions.items():
            names = [argument.arg for argument in defined[name]]
            assert {*parameters.split()} <= {*names}, (file, name)


def test_attributes_and_options_have_the_names_that_are_used(package):
    for file, words in WORDS.items():
        text = "".join(path.read_text("utf-8") for path in package.glob(file))
        assert [word for word in words.split() if word not in text] == [], file


def test_the_extra_takes_the_versions_that_the_plug_in_knows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["vllm"] == ["vllm>=0.32,<0.34"]
    assert KNOWN_VERSIONS == ("0.32.", "0.33.")
    accepted = [is_known(version) for version in ("0.31.9", "0.32.0", "0.33.1", "0.34.0", None)]
    assert accepted == [False, True, True, False, False]
