"""A benchmark's table and picture: medians, and ratios to the baseline of the same run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One case's outcome.

    Args:
        case: Its name.
        values: Column to value, with units in the columns' names.
    """

    case: str
    values: Mapping[str, float]


def results_table(figures: Sequence[Figure], baseline: str) -> Table:
    """Lay figures out, each with its ratio to the baseline's."""
    columns = list(figures[0].values)
    table = Table("case", *(cell for column in columns for cell in (column, "ratio")), box=None)
    base = next(figure for figure in figures if figure.case == baseline)
    for figure in figures:
        cells = [
            cell
            for column in columns
            for cell in (
                f"{figure.values[column]:.3f}",
                f"{figure.values[column] / base.values[column]:.2f}",
            )
        ]
        table.add_row(figure.case, *cells)
    return table


def plot_ratios(figures: Sequence[Figure], baseline: str, column: str, path: Path) -> None:
    """Draw every case's ratio to the baseline as a bar."""
    base = next(figure for figure in figures if figure.case == baseline).values[column]
    names = [figure.case for figure in figures]
    ratios = [figure.values[column] / base for figure in figures]
    chart, axes = plt.subplots(figsize=(7, 0.5 * len(names) + 1.2), layout="constrained")
    bars = axes.barh(names[::-1], ratios[::-1])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel(f"{column} as a multiple of {baseline}'s")
    path.parent.mkdir(parents=True, exist_ok=True)
    chart.savefig(path, dpi=120)
    plt.close(chart)
