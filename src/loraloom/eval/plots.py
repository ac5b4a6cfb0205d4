"""Pictures of a run: learning curves, and where a mixture's tokens went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from loraloom.durable import write_file

Point = tuple[int | float, int | float]
"""A step and what was measured there."""

Curve = Sequence[Point]


def plot_loss_curves(curves: Mapping[str, Curve], path: Path, smoothing: float = 0.8) -> Figure:
    """Draw each job's training loss over its steps, smoothed, with the raw values behind.

    Args:
        curves: (step, loss) of each job.
        path: Picture to write; the suffix chooses the format.
        smoothing: Weight of the past in the running mean.

    Returns:
        What was drawn.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for index, (name, curve) in enumerate(curves.items()):
        axes.plot(*zip(*curve, strict=True), color=f"C{index}", alpha=0.25, linewidth=1)
        means = smoothed(curve, smoothing)
        axes.plot([x for x, _ in means], [y for _, y in means], color=f"C{index}", label=name)
    axes.set(xlabel="step", ylabel="loss per token (nats)")
    axes.set_ylim(bottom=0)
    axes.legend()
    return save_figure(figure, path)


def plot_expert_load(
    by_layer: Sequence[Sequence[float]],
    by_group: Mapping[str, Sequence[float]],
    path: Path,
    title: str,
) -> Figure:
    """Draw the share of tokens that each expert got, by layer and by group of questions.

    Args:
        by_layer: For each layer the share of each expert; a row sums to one.
        by_group: The same over all layers, for each group (a skill, say).
        path: Picture to write.
        title: Heading.

    Returns:
        What was drawn.
    """
    figure = Figure(figsize=(11, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    peak = max(max(map(max, by_layer)), max(map(max, by_group.values())))
    options: dict[str, Any] = {"aspect": "auto", "cmap": "viridis", "vmin": 0, "vmax": peak}
    image = left.imshow(by_layer, **options)
    left.set(title="by layer", xlabel="expert", ylabel="layer")
    right.imshow(list(by_group.values()), **options)
    right.set(title="by skill", xlabel="expert")
    right.set_yticks(range(len(by_group)), list(by_group))
    figure.colorbar(image, ax=[left, right], label="share of tokens")
    figure.suptitle(title)
    return save_figure(figure, path)


def smoothed(curve: Curve, past: int | float) -> list[Point]:
    """Take a running mean without the pull of its start; values that are not finite are left out.

    Args:
        curve: What was measured.
        past: Weight of what was before.
    """
    total = weight = 0.0
    means = []
    for step, value in curve:
        if math.isfinite(value):
            total = past * total + (1 - past) * value
            weight = past * weight + (1 - past)
            means.append((step, total / weight))
    return means


def save_figure(figure: Figure, path: Path) -> Figure:
    """Write a figure and return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix[1:] or None
    write_file(path, lambda aside: figure.savefig(aside, dpi=120, format=kind))
    return figure
