"""YAML as loraloom reads it: safe_load, with two of YAML 1.1's traps taken out.

`1e-4` is a number here (1.1 wants `1.0e-4`), and a key that stands twice in one mapping is an error
(safe_load silently keeps the last).
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from loraloom.errors import ConfigError

_FLOAT_TAG = "tag:yaml.org,2002:float"
_MERGE_TAG = "tag:yaml.org,2002:merge"
_EXPONENT_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """safe_load's loader, with its own table of what is a number."""


_Loader.add_implicit_resolver(_FLOAT_TAG, _EXPONENT_FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, origin: str) -> Any:
    """The value of a YAML document; None if it is empty.

    Args:
        text: The document.
        origin: What an error calls it, a file's name say.

    Raises:
        ConfigError: If it is not valid YAML, is nested too deeply, or a key stands twice in a
            mapping.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _check_keys_differ(node, origin, seen=set())
        return None if node is None else loader.construct_document(node)
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        place = _place(error.problem_mark)
        raise ConfigError(f"{origin} must be valid YAML{place}: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date with a 13th month, say
        raise ConfigError(f"{origin} must be valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{origin} must be YAML of a few levels, its are too deep") from None


def _check_keys_differ(node: yaml.Node | None, origin: str, seen: set[int]) -> None:
    if id(node) in seen:  # an alias, perhaps to a node around it
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _check_keys_differ(child, origin, seen)
    elif isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, child in node.value:
            if key.tag != _MERGE_TAG and isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    place = _place(key.start_mark)
                    raise ConfigError(f"{origin} has the key {key.value!r} twice{place}")
                keys.add(key.value)
            _check_keys_differ(child, origin, seen)


def _place(mark: yaml.Mark | None) -> str:
    return "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
