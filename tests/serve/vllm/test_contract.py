"""What the plug-in imports of vLLM is there, by the source of an unpacked wheel.

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


@pytest.fixture(params=SOURCES)
def package(request) -> Path:
    if not request.param:
        pytest.skip("LORALOOM_VLLM_SOURCE names no directory with an unpacked wheel of vLLM")
    return Path(request.param) / "vllm"


def test_what_is_imported_is_there(package):
    files = sorted((ROOT / "src/loraloom/serve/vllm").glob("*.py"))
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8")))]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    imports = [node for node in imports if node.module.partition(".")[0] == "vllm"]
    assert len(imports) >= 8
    for node in imports:
        path = package.parent.joinpath(*node.module.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for alias in node.names:
            submodule = path / f"{alias.name}.py"
            is_there = submodule.exists() or (path / alias.name).is_dir()
            assert is_there or alias.name in file.read_text("utf-8"), (node.module, alias.name)


def test_the_extra_takes_the_versions_that_the_plug_in_knows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["vllm"] == ["vllm>=0.32,<0.34"]
    assert KNOWN_VERSIONS == ("0.32.", "0.33.")
    accepted = [is_known(version) for version in ("0.31.9", "0.32.0", "0.33.1", "0.34.0", None)]
    assert accepted == [False, True, True, False, False]
