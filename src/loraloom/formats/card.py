"""The README.md beside an adapter's weights: a model card for the Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from loraloom.adapters.base import BaseInfo
from loraloom.adapters.config import AdapterConfig

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def model_card(
    config: AdapterConfig,
    base: BaseInfo,
    *,
    name: str | None = None,
    data: str | None = None,
    results: str | None = None,
) -> str:
    """Write a short model card: base, method, and what is known of data and results.

    Args:
        config: The adapter's configuration.
        base: The base model.
        name: Title; None for the method's name.
        data: Markdown on the training data.
        results: Markdown on evaluations, a table for instance.
    """
    front_matter = yaml.safe_dump(_front_matter(config, base), sort_keys=False)
    sections = [
        f"---\n{front_matter}---",
        f"# {name or config.title}",
        f"An adapter for {_base_name(base)} (architecture: {base.model_type}), "
        "trained with loraloom.",
        f"## Method\n\n{_method(config)}",
    ]
    if data:
        sections.append(f"## Data\n\n{data}")
    if results:
        sections.append(f"## Results\n\n{results}")
    sections.append(f"## Use\n\n{_usage(config)}")
    return "\n\n".join(sections) + "\n"


def _base_name(base: BaseInfo) -> str:
    return f"`{base.name_or_path}`" if base.name_or_path else "a base model without a name"


def _front_matter(config: AdapterConfig, base: BaseInfo) -> dict[str, Any]:
    """Metadata that the Hub reads; it takes no local path as a base model."""
    front_matter: dict[str, Any] = {
        "library_name": "peft" if config.layout == "peft" else "loraloom",
        "pipeline_tag": "text-generation",
        "tags": ["loraloom", config.title.lower()],
    }
    if _HUB_ID.fullmatch(base.name_or_path) and not Path(base.name_or_path).exists():
        front_matter["tags"].append(f"base_model:adapter:{base.name_or_path}")
        return {"base_model": base.name_or_path, **front_matter}
    return front_matter


def _method(config: AdapterConfig) -> str:
    targets = config.target_modules
    lines = [
        f"method: {config.title}, {config.formula}",
        f"rank {config.rank}, dropout {config.dropout:g}",
        f"target modules: {targets if isinstance(targets, str) else ', '.join(targets)}",
        *config.card_lines(),
    ]
    return "\n".join(f"- {line}" for line in lines)


def _usage(config: AdapterConfig) -> str:
    text = (
        "```python\nimport loraloom\n\nhost = loraloom.attach(model)\n"
        'host.load("my-adapter", "path-or-hub-id")\n```'
    )
    if config.layout != "peft":
        return text
    return f"{text}\n\nThe files are PEFT's: `PeftModel.from_pretrained` loads them too."
