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
    """safe_load's loader, with its own table of what is a number and each key only once."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_TAG:
                if key.value in seen:
                    problem = f"the key {key.value!r} stands twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return node


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
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ConfigError(f"{origin} must be valid YAML{place}: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date with a 13th month, say
        raise ConfigError(f"{origin} must be valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{origin} must be YAML of a few levels, its are too deep") from None
