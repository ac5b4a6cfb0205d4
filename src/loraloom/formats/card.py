"""The README.md beside an adapter's weights: a model card for the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment

from loraloom.adapters.base import BaseInfo
from loraloom.adapters.method import AdapterConfig
from loraloom.config.data import PromptForm
from loraloom.formats.disk import HUB_ID


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
    base_name = base.name_or_path
    front: dict[str, Any] = {
        "library_name": "peft" if config.layout == "peft" else "loraloom",
        "pipeline_tag": "text-generation",
        "tags": ["loraloom", config.title.lower()],
    }
    if HUB_ID.fullmatch(base_name) and not Path(base_name).exists():  # the Hub takes no local path
        front = {"base_model": base_name, **front}
        front["tags"].append(f"base_model:adapter:{base_name}")
    settings = config.model_dump(mode="json", exclude_none=True)
    settings = {name: value for name, value in settings.items() if value not in ([], {})}
    template = Path(__file__).with_suffix(".md.jinja").read_text("utf-8")
    jinja = Environment(trim_blocks=True, keep_trailing_newline=True)
    return jinja.from_string(template).render(
        {"config": config, "base": base, "name": name, "data": data, "results": results},
        base_model=repr(base_name or "base-model"),
        front=yaml.safe_dump(front, sort_keys=False),
        settings=_as_yaml({"adapter": settings}),
        prompt=prompt and _as_yaml(prompt.model_dump(exclude_none=True)),
    )


def _as_yaml(settings: dict[str, Any]) -> str:
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
