"""Targets: from what a user or a file names to a base model's projections, and back.

A target is a kind of block, or words at the end of a path in the base model:

    attention                        every projection of the attention blocks
    q_proj                           every linear layer of that name
    shared_expert.down_proj          those that end by these words
    experts.down_proj                a weight of stacked experts, which is a parameter
    model.layers.3.mlp.up_proj       one linear layer; `layers.3.mlp.up_proj` is the same

A single word names linear layers, as PEFT's `target_modules` do; weights of stacked experts are
named with their module, as PEFT's `target_parameters` are. A pattern, a string in place of a list,
is a regular expression that matches whole paths.

Source: peft 0.21.2, `peft/tuners/tuners_utils.py` (`check_target_module_exists`,
`BaseTuner._inject_parameters`), `peft/utils/other.py` (`get_pattern_key`).
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import SchemaError, SchemaValidator, core_schema

from loraloom.base.blocks import BLOCK_KINDS, BaseInfo, BaseLayer, BaseProjection
from loraloom.errors import shown

ALL_LINEAR = "all-linear"
# What the group's name stands for.
_LINEAR_KINDS = ("attention", "ffn")
_MAX_LENGTH = 1000
# Names of experts' projections before transformers 5, by the type that has them first.
_RENAMED = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
# PEFT's index of the decoder layer that a module belongs to, for `layers_to_transform`.
_PEFT_LAYER = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")


def is_meant(target: str, path: str) -> bool:
    """Whether a target is a path or words at its end."""
    return f".{path}".endswith(f".{target}")


def is_pattern(text: str) -> bool:
    """Whether a string is a regular expression and not a misspelled word."""
    return re.search(r"[.*+?|()\[\]\\^$]", text) is not None


def check_pattern(pattern: str) -> str:
    """Return a pattern that is one; a ValueError otherwise."""
    _compiled(pattern)
    return pattern


Pattern = Annotated[str, AfterValidator(check_pattern)]


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches the end of a module's name, at a dot or as a whole.

    Raises:
        ValueError: If it is not a regular expression, or one of another kind than pydantic's.
    """
    return _compiled(rf"(.*\.)?({pattern})").isinstance_python(name)


@lru_cache(maxsize=1000)
def _compiled(pattern: str) -> SchemaValidator:
    """Compile an expression that must match a whole text."""
    if len(pattern) > _MAX_LENGTH or "{" in pattern:  # counted repeats make large programs
        raise ValueError(
            f"{shown(pattern)} is not a regular expression of up to {_MAX_LENGTH} characters "
            "without `{`"
        )
    # pydantic's engine takes linear time, where `re` may search for ever.
    schema = core_schema.str_schema(pattern=rf"^(?:{pattern})$")
    try:
        return SchemaValidator(schema)
    except SchemaError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{shown(pattern)} is not a regular expression: {reason}") from None


@dataclass(frozen=True)
class TargetSelection:
    """The projections that targets mean on a base model."""

    keys: frozenset[str]  # `layers.{L}.{block}.{projection}`
    unknown: tuple[str, ...] = ()  # targets that name nothing
    stack_words: tuple[str, ...] = ()
    """Single words that name weights of stacked experts, because no linear layer is called so."""


@dataclass(frozen=True)
class _Location:
    """A projection with its paths."""

    base: BaseProjection
    kind: str  # of its block
    layer: BaseLayer

    @property
    def path_in_layer(self) -> str:
        return self.base.key.split(".", 2)[2]

    @property
    def path(self) -> str:
        """The path in the base model."""
        return f"{self.layer.path}.{self.path_in_layer}"

    @property
    def is_stack(self) -> bool:
        return self.base.num_experts is not None

    @property
    def names(self) -> set[str]:
        """All targets but the kind that mean this projection and have several words."""
        names = {self.base.key, *_endings(self.path)}
        names.discard(self.base.name)
        return names


def _locations(layers: Iterable[BaseLayer]) -> Iterator[_Location]:
    for layer in layers:
        for block in layer.blocks:
            for base in block.projections.values():
                yield _Location(base, block.kind, layer)


def _endings(path: str) -> list[str]:
    """Return what a path ends by in whole words, the last word first and the path last."""
    words = path.split(".")
    return [".".join(words[start:]) for start in reversed(range(len(words)))]


def select(targets: str | Collection[str], layers: Sequence[BaseLayer]) -> TargetSelection:
    """Find the projections that targets mean.

    Args:
        targets: Kinds of blocks and paths, or a string: a kind, `all-linear`, or a pattern.
        layers: Decoder layers of the base model.

    Raises:
        ValueError: If a pattern is not a regular expression.
    """
    locations = list(_locations(layers))
    if isinstance(targets, str):
        return TargetSelection(frozenset(_select_by_string(targets, locations)))
    linear_words = {location.base.name for location in locations if not location.is_stack}
    keys = set()
    matched_targets = set()
    stack_words = dict[str, None]()
    remaining = set(targets)
    for location in locations:
        word = location.base.name
        named = remaining & location.names
        if location.kind in remaining:
            named.add(location.kind)
        if word in remaining and not (location.is_stack and word in linear_words):
            named.add(word)
            if location.is_stack:
                stack_words[word] = None
        if named:
            keys.add(location.base.key)
            matched_targets |= named
    unknown = [target for target in targets if target not in matched_targets]
    return TargetSelection(frozenset(keys), tuple(unknown), tuple(stack_words))


def _select_by_string(target: str, locations: Iterable[_Location]) -> set[str]:
    kinds = _LINEAR_KINDS if target == ALL_LINEAR else (target,)
    if target == ALL_LINEAR or target in BLOCK_KINDS:
        return {location.base.key for location in locations if location.kind in kinds}
    pattern = _compiled(target)
    return {location.base.key for location in locations if pattern.isinstance_python(location.path)}


def name_targets(keys: Set[str], layers: Sequence[BaseLayer]) -> tuple[str, ...]:
    """Write the fewest words that select exactly these projections; the inverse of `select`.

    Where words can't tell a projection from others, its key stands.
    """
    locations = list(_locations(layers))
    selected = [location for location in locations if location.base.key in keys]
    excluded = set[str]()
    for location in locations:
        if location.base.key in keys:
            continue
        excluded |= location.names
        if not location.is_stack:
            excluded.add(location.base.name)

    def shortest(location: _Location) -> str:
        endings = _endings(location.path_in_layer)
        if location.is_stack:
            endings = endings[1:]
        for ending in endings:
            if ending not in excluded:
                return ending
        return location.base.key

    return tuple(dict.fromkeys(map(shortest, selected)))


def names_layers(targets: Iterable[str]) -> bool:
    """Whether some targets are of one layer."""
    return any(re.search(r"\.\d+\.", target) for target in targets)


def peft_target_modules(
    paths: Sequence[str], base: BaseInfo, layers: Collection[int] | None = None
) -> list[str] | str:
    """Write `target_modules` that select exactly these modules in PEFT.

    Args:
        paths: Paths of linear layers in the base model, in order.
        base: The base model, with all of its modules' paths.
        layers: The `layers_to_transform` that is written beside; None for none.

    Returns:
        The shortest words, or a pattern where other parts of the model have layers that are called
        the same, or whole paths.
    """
    modules: Collection[str] = base.module_paths
    if layers is not None:
        modules = [path for path in modules if _peft_layer(path) in layers]
    names = _peft_names(paths, modules, base)
    if layers is not None or not names_layers(names):
        return names
    # A pattern is far shorter than a name for each layer, where it means all of them.
    prefix = f"{base.layers_path}."
    in_layers = dict.fromkeys(path.removeprefix(prefix).partition(".")[2] for path in paths)
    escaped = "|".join(map(re.escape, in_layers))
    pattern = rf"{re.escape(base.layers_path)}\.\d+\.({escaped})"
    matched = {path for path in base.module_paths if re.fullmatch(pattern, path)}
    return pattern if matched == set(paths) else names


def peft_target_parameters(paths: Sequence[str], base: BaseInfo) -> list[str]:
    """Write `target_parameters` that select exactly these parameters in PEFT.

    Args:
        paths: Paths of parameters in the base model, in order.
        base: The base model, with all of its parameters' paths.
    """
    return _peft_names(paths, base.parameter_paths, base)


def is_renamed_by_peft(word: str, base: BaseInfo) -> bool:
    """Whether PEFT takes a name in `target_modules` for one of a model's stacked experts.

    In some types experts were linear layers before transformers 5, and PEFT translates their names,
    whatever stands in front of them. A linear layer that is called the same, in a shared expert for
    instance, is then out of reach, except by the name of its weight in `target_parameters`.

    Source: peft 0.21.2, `peft/utils/transformers_weight_conversion.py`
    (`_convert_peft_config_moe`); transformers 5.24, `conversion_mapping.py`.
    """
    from transformers import conversion_mapping  # late, as most commands do without it

    form = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}).get(base.model_type)
    if base.model_type == "mixtral":
        form = base.model_type
    return word in _RENAMED.get(form, ())


def _peft_names(paths: Sequence[str], universe: Iterable[str], base: BaseInfo) -> list[str]:
    """Name paths by their shortest ends that no other path of a universe has."""

    def min_words(path: str) -> int:
        """Parameters are named with their module, and a linear layer's weight with that's block."""
        if path not in parameters:
            return 1
        return 3 if path.endswith(".weight") else 2

    parameters = set(base.parameter_paths)
    selected = set(paths)
    excluded = set[str]()
    for path in universe:
        if path not in selected:
            excluded.update(_endings(path))
    layers_name = base.layers_path.rpartition(".")[2]
    names = dict[str, None]()
    for path in paths:
        index, _, in_layer = path.removeprefix(f"{base.layers_path}.").partition(".")
        candidates = _endings(in_layer)[min_words(path) - 1 :]
        candidates += [f"{layers_name}.{index}.{in_layer}", path]
        names[next((name for name in candidates if name not in excluded), path)] = None
    return list(names)


def _peft_layer(path: str) -> int | None:
    match = _PEFT_LAYER.match(path)
    return None if match is None else int(match["index"])
