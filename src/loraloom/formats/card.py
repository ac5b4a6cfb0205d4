"""The README.md beside an adapter's weights: a model card for the Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from loraloom.config.adapter import LoraConfig, MixLoraConfig
from loraloom.formats.base import BaseInfo

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def method_name(config: LoraConfig) -> str:
    """Name the method as papers do: LoRA, DoRA, MixLoRA or MixDoRA."""
    kind = "DoRA" if config.weight_decomposition else "LoRA"
    return f"Mix{kind}" if isinstance(config, MixLoraConfig) else kind


def model_card(
    config: LoraConfig,
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
        f"# {name or method_name(config)}",
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


def _front_matter(config: LoraConfig, base: BaseInfo) -> dict[str, Any]:
    """Metadata that the Hub reads; it takes no local path as a base model."""
    is_mixture = isinstance(config, MixLoraConfig)
    front_matter: dict[str, Any] = {
        "library_name": "loraloom" if is_mixture else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["loraloom", method_name(config).lower()],
    }
    if _HUB_ID.fullmatch(base.name_or_path) and not Path(base.name_or_path).exists():
        front_matter["tags"].append(f"base_model:adapter:{base.name_or_path}")
        return {"base_model": base.name_or_path, **front_matter}
    return front_matter


def _method(config: LoraConfig) -> str:
    targets = config.target_modules
    lines = [
        f"- method: {method_name(config)}{' (rank-stabilized)' if config.rank_stabilized else ''}",
        f"- rank {config.rank}, alpha {config.alpha:g}, dropout {config.dropout:g}",
        f"- target modules: {targets if isinstance(targets, str) else ', '.join(targets)}",
    ]
    if isinstance(config, MixLoraConfig):
        expert = config.expert_config
        lines += [
            f"- {config.num_experts} experts in each FFN, {config.top_k} for each token",
            f"- experts: rank {expert.rank}, alpha {expert.alpha:g}, dropout {expert.dropout:g}",
        ]
    return "\n".join(lines)


def _usage(config: LoraConfig) -> str:
    text = (
        "```python\nimport loraloom\n\nhost = loraloom.attach(model)\n"
        'host.load("my-adapter", "path-or-hub-id")\n```'
    )
    if isinstance(config, MixLoraConfig):
        return text
    return f"{text}\n\nThe files are PEFT's: `PeftModel.from_pretrained` loads them too."
