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
    console = make_console()
    print_tables(console, [_settings_table(description), _norms_table(description)])
    if description.num_non_finite:
        console.print(f"{description.num_non_finite} tensors have infinite or NaN values")


def _settings_table(description: AdapterDescription) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for label, value in _settings(description).items():
        table.add_row(label, value)
    return table


def _settings(description: AdapterDescription) -> dict[str, str]:
    stabilized = ", rank-stabilized" if description.rank_stabilized else ""
    prompt = description.prompt or {}
    rows = {
        "adapter": description.path,
        "method": f"{description.method}{stabilized} ({description.layout} layout)",
        "formula": description.formula,
        "base model": description.base_model or "unknown",
        "prompt": ", ".join(f"{name}: {shown(text)}" for name, text in prompt.items()) or "unknown",
        "rank": _rank(description),
    }
    if experts := description.experts:
        rows["experts"] = (
            f"{experts['num_experts']}, {experts['routing']}, rank {experts['rank']}, "
            f"alpha {experts['alpha']:g}, dropout {experts['dropout']:g}"
        )
    rows["target modules"] = ", ".join(description.target_modules)
    rows["layers"] = str(description.num_layers)
    percent = description.percent_of_base
    share = "base model's size unknown" if percent is None else f"{percent:.3g} % of the base model"
    rows["parameters"] = f"{description.num_parameters:,} ({share})"
    for kind, count in description.parameters.items():
        rows[f"  {kind}"] = f"{count:,}"
    rows["dtype"] = ", ".join(description.dtypes)
    for name, size in description.file_bytes.items():
        rows[name] = f"{size:,} bytes"
    return rows


def _rank(description: AdapterDescription) -> str:
    scaling = ""
    if description.alpha is not None:
        scaling = f", alpha {description.alpha:g} (scaling {description.scaling:g})"
    return f"{description.rank}{scaling}, dropout {description.dropout:g}"


def _norms_table(description: AdapterDescription) -> Table:
    table = make_table("norm of", values=["tensors", "min", "median", "max"])
    for norm in description.norms:
        numbers = (f"{value:.4g}" for value in (norm.min, norm.median, norm.max))
        table.add_row(norm.name, str(norm.count), *numbers)
    return table
