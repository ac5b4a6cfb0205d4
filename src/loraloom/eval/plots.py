"""Pictures of a run: learning curves, and where a mixture's tokens went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt

Curve = Sequence[tuple[int, float]]


def plot_loss_curves(curves: Mapping[str, Curve], path: Path, smoothing: float = 0.8) -> None:
    """Draw each job's training loss over its steps, smoothed, with the raw values behind.

    Args:
        curves: (step, loss) of each job.
        path: Picture to write; the suffix chooses the format.
        smoothing: Weight of the past in the running mean.
    """
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for index, (name, curve) in enumerate(curves.items()):
        steps, losses = zip(*curve, strict=True)
        axes.plot(steps, losses, color=f"C{index}", alpha=0.25, linewidth=1)
        axes.plot(steps, _smoothed(losses, smoothing), color=f"C{index}", label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per token (nats)")
    axes.set_ylim(bottom=0)
    axes.legend()
    save_figure(figure, path)


def plot_expert_load(
    by_layer: Sequence[Sequence[float]],
    by_group: Mapping[str, Sequence[float]],
    path: Path,
    title: str,
) -> None:
    """Draw the share of tokens that each expert got, by layer and by group of questions.

    Args:
        by_layer: For each layer the share of each expert; a row sums to one.
        by_group: The same over all layers, for each group (a skill, say).
        path: Picture to write.
        title: Heading.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 6), layout="constrained")
    peak = max(max(map(max, by_layer)), max(map(max, by_group.values())))
    options: dict[str, Any] = {"aspect": "auto", "cmap": "viridis", "vmin": 0, "vmax": peak}
    image = left.imshow(by_layer, **options)
    left.set(title="by layer", xlabel="expert", ylabel="layer")
    right.imshow(list(by_group.values()), **options)
    right.set(title="by skill", xlabel="expert")
    right.set_yticks(range(len(by_group)), list(by_group))
    figure.colorbar(image, ax=[left, right], label="share of tokens")
    figure.suptitle(title)
    save_figure(figure, path)


def _smoothed(values: Sequence[float], smoothing: float) -> list[float]:
    """Running mean without the pull of its start; values that are not finite are skipped."""
    total, weight, smoothed = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total = smoothing * total + (1 - smoothing) * value
            weight = smoothing * weight + (1 - smoothing)
        smoothed.append(total / weight if weight else math.nan)
    return smoothed


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure and forget it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
