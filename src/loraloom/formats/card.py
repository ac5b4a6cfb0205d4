"""The README.md beside an adapter's weights: a model card for the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from loraloom.adapters.base import BaseInfo
from loraloom.adapters.method import AdapterConfig
from loraloom.config.data import PromptForm
from loraloom.formats.hub import HUB_ID


def model_card(
    config: AdapterConfig,
    base: BaseInfo,
    *,
    name: str | None = None,
    data: str | None = None,
    results: str | None = None,
    prompt: PromptForm | None = None,
) -> str:
    """Write a short model card: base, method, and what is known of prompts, data and results."""
    architecture = f" (architecture: {base.model_type})" if base.model_type else ""
    front_matter = yaml.safe_dump(_front_matter(config, base), sort_keys=False)
    sections = [
        f"---\n{front_matter}---",
        f"# {name or config.title}",
        f"An adapter for {_base_name(base)}{architecture}, written by loraloom.",
        f"## Method\n\n{_method(config)}",
    ]
    if prompt is not None:
        sections.append(f"## Prompts\n\n{_prompts(prompt)}")
    if data:
        sections.append(f"## Data\n\n{data}")
    if results:
        sections.append(f"## Results\n\n{results}")
    sections.append(f"## Use\n\n{_usage(config, base)}")
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
    if _is_on_hub(base):
        front_matter["tags"].append(f"base_model:adapter:{base.name_or_path}")
        return {"base_model": base.name_or_path, **front_matter}
    return front_matter


def _method(config: AdapterConfig) -> str:
    settings = {
        name: value
        for name, value in config.model_dump(mode="json").items()
        if value not in (None, [], {})
    }
    section = yaml.safe_dump({"adapter": settings}, sort_keys=False, allow_unicode=True)
    return (
        f"{config.title}: {config.formula}\n\nIts settings, as in a run file of loraloom:\n\n"
        f"```yaml\n{section}```"
    )


def _prompts(prompt: PromptForm) -> str:
    """The form that training data had; templates of several lines are indented as code."""
    lines = []
    for line in prompt.describe():
        name, _, value = line.partition(": ")
        block = value.replace("\n", "\n      ")
        lines.append(f"- {name}:\n\n      {block}" if "\n" in value else f"- {line}")
    return "\n".join(lines)


def _usage(config: AdapterConfig, base: BaseInfo) -> str:
    text = (
        "```python\nimport loraloom\n\nhost = loraloom.attach(model)\n"
        'host.load("my-adapter", "path-or-hub-id")\n```'
    )
    if config.layout != "peft":
        return text
    if _is_on_hub(base) or not base.name_or_path:
        return f"{text}\n\nThe files are PEFT's: `PeftModel.from_pretrained` loads them too."
    code = (
        "import loraloom\nfrom peft import PeftModel\n\n"
        f"model, tokenizer = loraloom.load_base_model({json.dumps(base.name_or_path)})\n"
        'model = PeftModel.from_pretrained(model, "path-or-hub-id")'
    )
    return (
        f"{text}\n\nThe files are PEFT's, which finds no base model of this name by itself. Give "
        f"it the one that loraloom loads:\n\n```python\n{code}\n```"
    )


def _is_on_hub(base: BaseInfo) -> bool:
    is_id = HUB_ID.fullmatch(base.name_or_path) is not None
    return is_id and not Path(base.name_or_path).exists()
