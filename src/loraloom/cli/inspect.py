"""`loraloom inspect`: what an adapter is, from its files alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from loraloom.errors import shown

if TYPE_CHECKING:
    from rich.table import Table

    from loraloom.formats.description import AdapterDescription


def inspect(
    path: Annotated[str, typer.Argument(help="Directory of an adapter, or its id on the Hub.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show an adapter's method, sizes, parameters in % of the base model, and norms."""
    from loraloom.formats.description import describe

    description = describe(path)
    if as_json:
        typer.echo(json.dumps(description.to_json(), indent=2, allow_nan=False))
        return
    from loraloom.terminal import make_console, print_tables

    console = make_console()
    print_tables(console, [_settings_table(description), _norms_table(description)])
    if description.num_non_finite:
        console.print(f"{description.num_non_finite} tensors have infinite or NaN values")


def _settings_table(description: AdapterDescription) -> Table:
    from rich.table import Table

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
    rows["parameters"] = f"{description.num_parameters:,} ({_share(description)})"
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


def _share(description: AdapterDescription) -> str:
    percent = description.percent_of_base
    return "base model's size unknown" if percent is None else f"{percent:.3g} % of the base model"


def _norms_table(description: AdapterDescription) -> Table:
    from loraloom.terminal import make_table

    table = make_table("norm of", values=["tensors", "min", "median", "max"])
    for norm in description.norms:
        numbers = (f"{value:.4g}" for value in (norm.min, norm.median, norm.max))
        table.add_row(norm.name, str(norm.count), *numbers)
    return table
