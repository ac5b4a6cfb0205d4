import ast
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import loraloom
from loraloom import adapters, errors

ROOT = Path(__file__).parent.parent
INSIDE = (
    "loraloom.data.skills",
    "loraloom.data.tiny_base",
    "loraloom.eval.harness",
    "loraloom.base.families",
)
"""An extra, generated rows and a base model that knows them, and the table of families."""
OF_METHODS = ("loraloom.adapters", "loraloom.routing.routes")
"""What docs/add_a_method.md builds methods of."""
OF_ROUTERS = (
    "loraloom.adapters.routed.prompt_router",
    "loraloom.generation.router",
    "loraloom.host.choice",
)
"""What recipes/apart/router.py takes a router to pieces with."""
BESIDE = ("loraloom.peft",)
"""What needs another package is public under a name of its own."""


@pytest.mark.parametrize("name", loraloom.__all__)
def test_every_exported_name_resolves_to_what_bears_it(name):
    assert getattr(loraloom, name).__name__ == name


def test_dir_lists_all_names_once():
    assert sorted(dir(loraloom)) == sorted([*loraloom.__all__, "__version__"])
    assert len(set(loraloom.__all__)) == len(loraloom.__all__)


def test_all_errors_are_exported():
    tree = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.LoraloomError)
    }
    assert tree <= set(loraloom.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'loraloom' has no attribute 'atach'"):
        _ = loraloom.atach


def test_the_settings_of_every_method_are_exported():
    assert {config.__name__ for config in adapters.CONFIGS} <= set(loraloom.__all__)


def test_the_package_and_its_errors_load_nothing_heavy():
    code = (
        "import json, sys, loraloom; loraloom.ConfigError; print(json.dumps(sorted(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = json.loads(ran.stdout)
    assert not {"torch", "transformers", "pydantic", "datasets", "numpy"} & set(modules)


@pytest.mark.parametrize(
    "path",
    sorted(path for name in ("examples", "recipes") for path in ROOT.glob(f"{name}/**/*.py")),
    ids=lambda path: path.name,
)
def test_scripts_import_from_the_public_face(path):
    allowed = BESIDE if "examples" in path.parts else INSIDE
    allowed += OF_METHODS if path.parent.name == "methods" else ()
    allowed += OF_ROUTERS if path.name == "router.py" else ()
    imported = [
        node.module
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("loraloom")
    ]
    assert [name for name in imported if name != "loraloom" and not name.startswith(allowed)] == []


def test_type_checkers_may_read_the_annotations():
    assert (Path(loraloom.__file__).parent / "py.typed").exists()


def test_version_is_that_of_the_package():
    assert loraloom.__version__ == version("loraloom")
    assert f"\nversion: {loraloom.__version__}\n" in (ROOT / "CITATION.cff").read_text()
