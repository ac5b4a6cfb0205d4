"""Modules that adapters have as their own, in files: PEFT's names, whatever the layout is.

    base_model.model.{path}.{parameter}                              a module of modules_to_save
    base_model.model.{path}.token_adapter.trainable_tokens_delta     rows of some tokens

Embeddings and head are there too, without being named, where PEFT saves them as resized or by
`save_embedding_layers`. A resized table beside rows of some tokens is read with these put into it.

Source: peft 0.21.2, `peft/utils/{other,save_and_load}.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loraloom.adapters.base import BaseInfo
from loraloom.adapters.files import AdapterFiles
from loraloom.adapters.keys import is_meant
from loraloom.adapters.method import AdapterConfig
from loraloom.adapters.own import MODULES, OWN_FIELDS, TOKENS, own_parts

_PREFIX = "base_model.model."
_TOKENS = ".token_adapter.trainable_tokens_delta"
_TABLE = ".token_adapter.base_layer.weight"
_WHOLE = re.compile(r"(?P<path>(?:\w+\.)*(?P<last>\w+))\.(?:weight|bias)", re.ASCII)


def set_apart(files: AdapterFiles, parts: Collection[str]) -> AdapterFiles:
    """Take own modules' tensors out of an adapter's, and name them by our keys."""
    files = _with_tables(files)
    own = {name: key for name in files.tensors if (key := _key(name, parts)) is not None}
    tensors = {name: tensor for name, tensor in files.tensors.items() if name not in own}
    return replace(
        files,
        tensors=tensors,
        own={key: files.tensors[name] for name, key in own.items()},
    )


def own_settings(files: AdapterFiles) -> dict[str, Any]:
    """Read the settings; which modules they mean is told by the tensors, where there are any."""
    config = files.config
    names = config.get("modules_to_save") or []
    whole = [key.removeprefix(MODULES) for key in files.own if key.startswith(MODULES)]
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in whole))
    if paths and not _mean_just(names, paths):
        names = paths
    settings = {name: config.get(name) for name in OWN_FIELDS} | {"modules_to_save": names}
    return {name: value for name, value in settings.items() if value}


def own_fields(config: AdapterConfig, base: BaseInfo) -> dict[str, Any]:
    """Write the settings; PEFT takes every module whose path ends so, even within a word."""
    parts = own_parts(config, base)
    settings = config.model_dump(mode="json", include={"trainable_token_indices"})
    fields = {
        "modules_to_save": [_name(path, base) for path in parts.modules if path not in parts.tied],
        **settings,
        "ensure_weight_tying": config.ensure_weight_tying,
    }
    return {name: value for name, value in fields.items() if value}


def _name(path: str, base: BaseInfo) -> str:
    last = path.rpartition(".")[2]
    alike = [other for other in base.modules if other.endswith(last)]
    return last if path in (base.embedding, base.head) and len(alike) == 1 else path


def own_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Give the names in files of those tensors that belong to own modules, by our keys."""
    whole = {key: key.removeprefix(MODULES) for key in tensors if key.startswith(MODULES)}
    rows = {
        key: f"{key.removeprefix(TOKENS)}{_TOKENS}" for key in tensors if key.startswith(TOKENS)
    }
    return {key: f"{_PREFIX}{name}" for key, name in (whole | rows).items()}


def _key(name: str, parts: Collection[str]) -> str | None:
    inner = name.removeprefix(_PREFIX)
    if inner == name:
        return None
    if inner.endswith(_TOKENS):
        return f"{TOKENS}{inner.removesuffix(_TOKENS)}"
    match = _WHOLE.fullmatch(inner)
    return None if match is None or match["last"] in parts else f"{MODULES}{inner}"


def _with_tables(files: AdapterFiles) -> AdapterFiles:
    """Put tokens' rows into the resized tables that PEFT saves beside them."""
    tables = {
        name.removesuffix(_TABLE): tensor
        for name, tensor in files.tensors.items()
        if name.endswith(_TABLE)
    }
    if not tables:
        return files
    whole = {f"{path}.weight": _with_rows(files, path, table) for path, table in tables.items()}
    others = {
        name: tensor
        for name, tensor in files.tensors.items()
        if not name.endswith((_TABLE, _TOKENS))
    }
    config = {k: v for k, v in files.config.items() if k != "trainable_token_indices"}
    return replace(files, config=config, tensors=others | whole)


def _with_rows(files: AdapterFiles, path: str, table: Tensor) -> Tensor:
    """Take the rows of the table's own tokens, or those of the table that it is tied to."""
    given = files.config.get("trainable_token_indices") or []
    by_name = given if isinstance(given, dict) else {path: given}
    tokens = next((own for name, own in by_name.items() if is_meant(name, path)), None)
    tokens = next(iter(by_name.values()), []) if tokens is None else tokens
    found = {name: rows for name, rows in files.tensors.items() if name.endswith(_TOKENS)}
    rows = found.get(f"{path}{_TOKENS}", next(iter(found.values()), None))
    fits = rows is not None and rows.shape == (len(tokens), *table.shape[1:])
    if rows is None or not fits or not all(token < len(table) for token in tokens):
        raise files.error(
            f"`trainable_token_indices` must name a row of {path}{_TABLE} for each row of "
            f"{path}{_TOKENS}, got {len(tokens)} tokens"
        )
    return table.index_copy(0, torch.tensor(tokens), rows.to(table.dtype))


def _mean_just(names: list[str], paths: list[str]) -> bool:
    """Whether names mean these modules: each of them one, and nothing else."""
    return all(any(is_meant(name, path) for path in paths) for name in names) and all(
        any(is_meant(name, path) for name in names) for path in paths
    )
