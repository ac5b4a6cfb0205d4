"""Types of loraloom's functions are checked while tests run: with their axes where they have some.

All are checked by beartype, and those with axes in a context of jaxtyping's: its own decorator,
whose messages are better, checks arguments twice. Functions inside of others would have to be
prepared at each call, and are left alone.

jaxtyping's own import hook has all modules compiled anew that loraloom's modules import, as long as
they load. Here compiled files of other names are for loraloom's modules alone.
"""

import ast
import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import is_dataclass
from functools import partial, wraps
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, get_type_hints
from unittest.mock import patch

from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

_beartype: Any = beartype(conf=BeartypeConf(violation_type=TypeError))
_PACKAGE = "loraloom"
_CACHE_TAG = "checked" + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
_WITH_AXES = re.compile(r"\b(Float|Int|Bool|Shaped)\[")


def install() -> None:
    """Check the modules that are imported from now on."""
    assert _PACKAGE not in sys.modules
    sys.meta_path.insert(0, _Finder())


def checked(function: Any) -> Any:
    """A function that checks its types, or a dataclass whose `__init__` does."""
    if inspect.isclass(function):
        if is_dataclass(function) and "__init__" in vars(function):
            function.__init__ = checked(function.__init__)
        return function
    written = function.__annotations__
    function.__annotations__ = _resolved(written, function.__globals__)
    result = _beartype(function)
    function.__annotations__ = result.__annotations__ = written
    has_axes = any(_WITH_AXES.search(str(hint)) for hint in written.values())
    return _remembering_axes(result) if has_axes else result


def _remembering_axes(function: Any) -> Any:
    """A function in each of whose calls an axis of one name has one size."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jaxtyped("context"):
            return function(*args, **kwargs)

    return call


def _resolved(annotations: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    """Annotations as types; one with a name that type checkers alone import may be anything."""
    holder = FunctionType(_resolved.__code__, names)
    holder.__annotations__ = annotations
    try:
        return get_type_hints(holder, include_extras=True)
    except Exception:
        if len(annotations) == 1:
            return dict.fromkeys(annotations, Any)
        alone = ({name: hint} for name, hint in annotations.items())
        return {name: hint for one in alone for name, hint in _resolved(one, names).items()}


class _Decorating(ast.NodeTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        """Check a function before what else decorates it."""
        arguments = ast.walk(node.args)
        if node.returns or any(isinstance(a, ast.arg) and a.annotation for a in arguments):
            node.decorator_list.append(_decorator(node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        """Check a class after it has become a dataclass."""
        self.generic_visit(node)
        node.decorator_list.insert(0, _decorator(node))
        return node


def _decorator(node: ast.stmt) -> ast.expr:
    text = f"__import__('{__name__}', fromlist=['checked']).checked"
    decorator = ast.parse(text, mode="eval").body
    for part in ast.walk(decorator):
        ast.copy_location(part, node)
    return decorator


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType | None:
        """The compiled module, of a file of its own name."""
        cached = partial(importlib.util.cache_from_source, optimization=_CACHE_TAG)
        with patch("importlib._bootstrap_external.cache_from_source", cached):
            return super().get_code(fullname)

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> CodeType:
        """Compile a module whose functions check their types."""
        tree = _Decorating().visit(ast.parse(data, path))
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimize)


class _Finder:
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module of loraloom's."""
        if name.partition(".")[0] != _PACKAGE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec
