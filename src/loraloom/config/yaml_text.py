"""YAML as loraloom reads it: safe_load, with two of YAML 1.1's traps taken out, and bounded.

`1e-4` is a number here (1.1 wants `1.0e-4`), and a key that stands twice in one mapping is an error
(safe_load silently keeps the last). Aliases are for sharing: a document of more than `MAX_VALUES`
when they are written out, or an alias inside of what it stands for, is an error. So are whole
numbers of more than `MAX_DIGITS` and halves of surrogate pairs, which no file can hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain
from typing import Any

import yaml

from loraloom.errors import ConfigError, shown

MAX_VALUES = 100_000
MAX_DIGITS = 100

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
                    raise _problem(f"the key {shown(key.value)} stands twice", key)
                seen.add(key.value)
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _count_values(node, {})
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MAX_DIGITS:
            raise _problem(f"a whole number has more than {MAX_DIGITS} digits", node)
        return super().construct_yaml_int(node)

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        text = super().construct_yaml_str(node)
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise _problem("half of a surrogate pair is no character", node)
        return text


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Count the values of a document with its aliases written out."""
    if id(node) not in counts:
        counts[id(node)] = 0
        counts[id(node)] = 1 + sum(_count_values(child, counts) for child in _children(node))
    if counts[id(node)] == 0:
        raise _problem("an alias stands inside of what it stands for", node)
    if counts[id(node)] > MAX_VALUES:
        raise _problem(f"there are more than {MAX_VALUES:,} values, aliases written out", node)
    return counts[id(node)]


def _children(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return chain.from_iterable(node.value)
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def _problem(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_yaml_str)
_Loader.add_implicit_resolver(_FLOAT_TAG, _EXPONENT_FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, origin: str) -> Any:
    """The value of a YAML document; None if it is empty."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ConfigError(f"{origin} must be valid YAML{place}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
        # a date with a 13th month, say, or `!!bool maybe`
        raise ConfigError(f"{origin} must be valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{origin} must be YAML of a few levels, its are too deep") from None
