"""The README.md beside an adapter's weights: a model card for the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from loraloom.adapters.base import BaseInfo
from loraloom.adapters.method import AdapterConfig
from loraloom.config.data import PromptForm
from loraloom.formats.disk import HUB_ID

_USE = """\
```python
import loraloom

model, tokenizer = loraloom.load_base_model({name!r})
host = loraloom.attach(model)
host.load("my-adapter", "path-or-hub-id")
```"""
_USE_BY_PEFT = """

The files are PEFT's: `PeftModel.from_pretrained(model, "path-or-hub-id")` loads them too."""


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
    is_peft, base_name = config.layout == "peft", base.name_or_path
    front: dict[str, Any] = {
        "library_name": "peft" if is_peft else "loraloom",
        "pipeline_tag": "text-generation",
        "tags": ["loraloom", config.title.lower()],
    }
    if HUB_ID.fullmatch(base_name) and not Path(base_name).exists():  # the Hub takes no local path
        front = {"base_model": base_name, **front}
        front["tags"].append(f"base_model:adapter:{base_name}")
    settings = config.model_dump(mode="json", exclude_none=True)
    settings = {name: value for name, value in settings.items() if value not in ([], {})}
    method = f"{config.title}: {config.formula}\n\nIts settings, as in a run file of loraloom:\n\n"
    needed = f"The method is the package {config.package}'s, which must be installed.\n\n"
    needed *= bool(config.package)
    sections = {
        "Method": method + _as_yaml({"adapter": settings}),
        "Prompts": prompt and _as_yaml(prompt.model_dump(exclude_none=True)),
        "Data": data,
        "Results": results,
        "Use": needed + _USE.format(name=base_name or "base-model") + _USE_BY_PEFT * is_peft,
    }
    about = f"`{base_name}`" if base_name else "a base model without a name"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name or config.title}",
        f"An adapter for {about} (architecture: {base.model_type}), written by loraloom.",
        *(f"## {title}\n\n{text}" for title, text in sections.items() if text),
    ]
    return "\n\n".join(parts) + "\n"


def _as_yaml(settings: dict[str, Any]) -> str:
    return f"```yaml\n{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}```"
