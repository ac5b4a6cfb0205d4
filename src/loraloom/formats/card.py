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

_USE = """\
```python
import loraloom

host = loraloom.attach(model)
host.load("my-adapter", "path-or-hub-id")
```"""
_USE_BY_NAME = """

The files are PEFT's, which finds no base model of this name by itself. Give it the one that \
loraloom loads:

```python
import loraloom
from peft import PeftModel

model, tokenizer = loraloom.load_base_model({name})
model = PeftModel.from_pretrained(model, "path-or-hub-id")
```"""


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
    is_peft = config.layout == "peft"
    is_on_hub = HUB_ID.fullmatch(base.name_or_path) and not Path(base.name_or_path).exists()
    front: dict[str, Any] = {  # the Hub takes no local path as a base model
        **({"base_model": base.name_or_path} if is_on_hub else {}),
        "library_name": "peft" if is_peft else "loraloom",
        "pipeline_tag": "text-generation",
        "tags": ["loraloom", config.title.lower()],
    }
    if is_on_hub:
        front["tags"].append(f"base_model:adapter:{base.name_or_path}")
    base_name = f"`{base.name_or_path}`" if base.name_or_path else "a base model without a name"
    architecture = f" (architecture: {base.model_type})" if base.model_type else ""
    use = _USE
    if is_peft and (is_on_hub or not base.name_or_path):
        use += "\n\nThe files are PEFT's: `PeftModel.from_pretrained` loads them too."
    elif is_peft:
        use += _USE_BY_NAME.format(name=json.dumps(base.name_or_path))
    sections = {
        "Method": _method(config),
        "Prompts": prompt and _prompts(prompt),
        "Data": data,
        "Results": results,
        "Use": use,
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name or config.title}",
        f"An adapter for {base_name}{architecture}, written by loraloom.",
        *(f"## {title}\n\n{text}" for title, text in sections.items() if text),
    ]
    return "\n\n".join(parts) + "\n"


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
    for name, value in prompt.model_dump(exclude_none=True).items():
        name = name.replace("_", " ")
        block = value.replace("\n", "\n      ")
        lines.append(f"- {name}:\n\n      {block}" if "\n" in value else f"- {name}: {value}")
    return "\n".join(lines)
