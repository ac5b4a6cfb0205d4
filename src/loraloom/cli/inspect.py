"""`loraloom inspect`: what an adapter is, from its files alone."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table

from loraloom.errors import shown
from loraloom.formats.description import AdapterDescription, describe
from loraloom.terminal import make_console, make_table, print_tables


def inspect(path: str, /, *, as_json: Annotated[bool, Parameter("--json")] = False) -> None:
    """Show an adapter's method, sizes, parameters in % of the base model, and norms.

    Args:
        path: Directory of an adapter, or its id on the Hub.
        as_json: Print JSON instead of tables.
    """
    description = describe(path)
    if as_json:
        print(json.dumps(description.to_json(), indent=2, allow_nan=False))
        return
    settings = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for label, value in _settings(description).items():
        settings.add_row(label, value)
    norms = make_table("norm of", values=["tensors", "min", "median", "max"])
    for name, norm in description.norms.items():
        norms.add_row(name, *(f"{value:.4g}" for value in norm.values()))
    console = make_console()
    print_tables(console, [settings, norms])
    if description.num_non_finite:
        console.print(f"{description.num_non_finite} tensors have infinite or NaN values")


def _settings(one: AdapterDescription) -> dict[str, str]:
    prompt = [f"{name}: {shown(text)}" for name, text in (one.prompt or {}).items()]
    share = "base model's size unknown"
    if one.percent_of_base is not None:
        share = f"{one.percent_of_base:.3g} % of the base model"
    return {
        "adapter": one.path,
        "method": f"{one.method} ({one.layout} layout)",
        "formula": one.formula,
        "base model": one.base_model or "unknown",
        "prompt": ", ".join(prompt) or "unknown",
        "settings": ", ".join(f"{n} {value}" for n, value in one.settings.items() if value),
        "target modules": ", ".join(one.target_modules),
        "layers": str(one.num_layers),
        "parameters": f"{one.num_parameters:,} ({share})",
        **{f"  {kind}": f"{count:,}" for kind, count in one.parameters.items()},
        "dtype": ", ".join(one.dtypes),
        **{name: f"{size:,} bytes" for name, size in one.file_bytes.items()},
    }
