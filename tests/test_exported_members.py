import ast
import inspect
import json
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import loraloom
from loraloom import adapters, errors
from loraloom.host.outer_forward import AdapterModel

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
OTHER_MODULES = ("loraloom.peft", "loraloom.eval.harness")
"""Public modules that need an extra."""


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


def is_of_loraloom(member):
    return (getattr(member, "__module__", None) or "").startswith("loraloom")


def public_functions():
    """Yield the exported functions, and the public methods of exported classes, by name."""
    exported = {name: getattr(loraloom, name) for name in loraloom.__all__}
    for module in map(import_module, OTHER_MODULES):
        for name, member in vars(module).items():
            if not name.startswith("_") and is_of_loraloom(member):
                exported[f"{module.__name__}.{name}"] = member
    exported["AdapterModel"] = AdapterModel  # what `Host.as_model` returns
    for name, member in exported.items():
        if inspect.isfunction(member):
            yield name, member
        for method_name, method in inspect.getmembers(member, inspect.isroutine):
            is_public = not method_name.startswith("_") or method_name in ("__init__", "__call__")
            if is_public and is_of_loraloom(method):
                yield f"{name}.{method_name}", method


def test_keywords_of_public_functions_have_types():
    pytest.importorskip("lm_eval")
    untyped = [
        name
        for name, function in public_functions()
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.VAR_KEYWORD
        and parameter.annotation in (Any, "Any", parameter.empty)
    ]
    assert untyped == []


def test_type_checkers_may_read_the_annotations():
    assert (Path(loraloom.__file__).parent / "py.typed").exists()


def test_version_is_that_of_the_package():
    assert loraloom.__version__ == version("loraloom")
    assert f"\nversion: {loraloom.__version__}\n" in (ROOT / "CITATION.cff").read_text()
