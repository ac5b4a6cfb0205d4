"""Held-out losses as tables: on the terminal, in Markdown and in CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from loraloom.eval.comparison import Comparison
from loraloom.eval.pairs import pairs_table
from loraloom.eval.tables import comparison_tables
from loraloom.terminal import make_table


def loss_tables(
    results: Mapping[str, Mapping[str, Any]],
    seeds: Mapping[str, Any],
    comparisons: Sequence[Comparison],
) -> list[Table]:
    """Make the tables of held-out losses, by adapter, by group of seeds, and by comparison."""
    all_names = list(next(iter(results.values())))
    of_pairs = [name for name in all_names if "reward_margin" in next(iter(results.values()))[name]]
    names = [name for name in all_names if name not in of_pairs]
    titles = [title for name in names for title in (f"{name}\nnats a token", f"{name}\nperplexity")]
    table = make_table("adapter", values=titles, title="Held-out loss, with its 95 % interval")
    for adapter, by_name in results.items():
        table.add_row(adapter, *(cell for name in names for cell in _loss_cells(by_name[name])))
    groups = make_table(
        "adapters", values=["seeds", *all_names], title="Mean loss of seeds ± standard deviation"
    )
    for stem, group in seeds.items():
        spreads = [group["tasks"][name] for name in all_names]
        cells = (f"{spread['mean']:.4f} ± {spread['sd']:.4f}" for spread in spreads)
        groups.add_row(stem, str(len(group["adapters"])), *cells)
    tables = [table] if names else []
    tables += [pairs_table(results, of_pairs)] if of_pairs else []
    return [*tables, *([groups] if seeds else []), *comparison_tables(comparisons)]


def _loss_cells(result: Mapping[str, Any]) -> tuple[str, str]:
    loss, (low, high) = result["loss"], result["interval"]
    value = result["perplexity"]
    try:
        shown = f"{value:.4g} ({math.exp(low):.4g}–{math.exp(high):.4g})"
    except (OverflowError, TypeError):  # it is no number any more
        shown = "-"
    return f"{loss:.4f} ({low:.4f}–{high:.4f})", shown


def losses_csv(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Write a line for each adapter and data set."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    figures = ("loss", "stderr", "perplexity", "num_examples", "num_tokens")
    if any("reward_margin" in result for result in next(iter(results.values())).values()):
        figures += ("accuracy", "reward_accuracy", "reward_margin")
    writer.writerow(["adapter", "dataset", *figures, "low", "high"])
    for adapter, by_name in results.items():
        for name, result in by_name.items():
            writer.writerow([adapter, name, *map(result.get, figures), *result["interval"]])
    return text.getvalue()
