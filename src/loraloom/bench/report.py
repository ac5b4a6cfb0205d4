"""A benchmark's table and picture: medians, and ratios to the baseline of the same run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from loraloom.eval.plots import save_figure
from loraloom.terminal import make_table

Figures = Mapping[str, Mapping[str, float]]
"""By case, column to value, with units in the columns' names; the first case is the baseline."""


def results_table(figures: Figures) -> Table:
    """Lay figures out, each with its ratio to the baseline's."""
    baseline = next(iter(figures.values()))
    titles = [cell for column in baseline for cell in (column, "ratio")]
    table = make_table("case", values=titles)
    for case, values in figures.items():
        cells = [
            (_digits(value), f"{value / baseline[name]:.2f}") for name, value in values.items()
        ]
        table.add_row(case, *(cell for pair in cells for cell in pair))
    return table


def _digits(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.0f}"


def plot_ratios(figures: Figures, column: str, path: Path) -> None:
    """Draw every case's ratio to the baseline as a bar."""
    baseline, values = next(iter(figures.items()))
    ratios = {case: figures[case][column] / values[column] for case in figures}
    chart = Figure(figsize=(7, 0.5 * len(ratios) + 1.2), layout="constrained")
    axes = chart.subplots()
    bars = axes.barh(list(ratios), list(ratios.values()))
    axes.invert_yaxis()
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel(f"{column} as a multiple of {baseline}'s")
    save_figure(chart, path)
