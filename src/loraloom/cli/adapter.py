"""`loraloom inspect` and `loraloom convert`: an adapter's files, without its base weights."""

import json
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from loraloom.config.fields import checked
from loraloom.config.model import BaseModelConfig
from loraloom.config.text import apply_override
from loraloom.exports import converting
from loraloom.formats.files import describe
from loraloom.terminal import make_console, make_table, print_tables


def inspect(path: str, /, *, as_json: Annotated[bool, Parameter("--json")] = False) -> None:
    """Show an adapter's method, sizes, and parameters in % of the base model.

    Args:
        path: Directory or Hub ID of the adapter.
        as_json: Print JSON instead of tables.
    """
    description = describe(path)
    if as_json:
        print(json.dumps(description, indent=2, allow_nan=False))
        return
    settings = make_table("setting", "value")
    settings.show_header = False
    for name, value in description.items():
        if value not in (None, []):
            settings.add_row(name.replace("_", " "), _text(value))
    print_tables(make_console(), [settings])


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value, ensure_ascii=False)


def convert(
    source: str,
    destination: Path,
    /,
    *,
    to: converting.Program,
    overrides: Annotated[tuple[str, ...], Parameter(name="--set", allow_leading_hyphen=True)] = (),
    base_model: str | None = None,
) -> None:
    """Convert an adapter's files for another program: PEFT, MoE-PEFT, vLLM, SGLang or loraloom.

    Args:
        source: Directory or Hub ID of the adapter.
        destination: New directory to write.
        to: Write files for loraloom (native), PEFT (peft: LoRA, DoRA, VeRA), MoE-PEFT 2.0.2
            (reference), vLLM 0.33 (vllm) or SGLang 0.5.23 (sglang; both: LoRA, also on experts).
        overrides: Set a setting that the files lack or that you want to change, PATH=VALUE:
            top_k=2 or experts.alpha=32. Repeatable.
        base_model: Check that the adapter fits this base model. Required if the base model that the
            files name is not there, and for a DoRA whose files contain no magnitudes.
    """
    settings: dict[str, Any] = reduce(apply_override, overrides, {})
    host = None
    if base_model is not None:
        from loraloom.generation.loading import load_host  # with transformers

        settings_of_base = {"base_model": base_model, "dtype": "float32", "device": "cpu"}
        host, _ = load_host(checked(BaseModelConfig, settings_of_base), {})
    config = converting.convert(source, destination, to, settings=settings, host=host)
    print(f"wrote {destination}: {config.title}, rank {config.rank}, for {to}")
