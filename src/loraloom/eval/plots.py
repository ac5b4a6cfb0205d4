"""Pictures of a run: learning curves, and where a mixture's tokens went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from loraloom.durable import write_file

# A step and what was measured there.
Point = tuple[int | float, int | float]

Curve = Sequence[Point]


def plot_loss_curves(curves: Mapping[str, Curve], path: Path) -> Figure:
    """Draw each job's training loss over its steps, smoothed, with the raw values behind."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    late: list[float] = []
    for index, (name, curve) in enumerate(curves.items()):
        steps, means = zip(*smoothed(curve, 0.8), strict=True)
        axes.plot(*zip(*curve, strict=True), color=f"C{index}", alpha=0.25, linewidth=1)
        axes.plot(steps, means, color=f"C{index}", label=name)
        late += means[len(means) // 10 :]  # losses fall from far above in their first tenth
    room = 0.1 * (max(late) - min(late)) or 1.0
    axes.set(xlabel="step", ylabel="loss per token (nats)")
    axes.set_ylim(min(late) - room, max(late) + room)
    axes.legend()
    return _save(figure, path)


def plot_experts(
    load: Sequence[Sequence[float]],
    by_topic: Mapping[str, Sequence[float]],
    information: Mapping[str, Sequence[float]],
    path: Path,
    title: str,
) -> Figure:
    """Draw what the experts of each layer do, one layer above the other."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=[3, 3, 2])
    options: dict[str, Any] = {"aspect": "auto", "cmap": "viridis", "vmin": 0}
    image = left.imshow(load, **options)
    left.set(title="where tokens go", xlabel="expert", ylabel="layer")
    left.yaxis.set_major_locator(MaxNLocator(integer=True))  # the others share it
    figure.colorbar(image, ax=left, label="share of tokens")
    image = middle.imshow(list(zip(*by_topic.values(), strict=True)), **options)
    middle.set(title="what sets a skill apart")
    middle.set_xticks(range(len(by_topic)), list(by_topic), rotation=60, ha="right")
    figure.colorbar(image, ax=middle, label="distance from all tokens' load (bits)")
    for name, bits in information.items():
        right.plot(bits, range(len(bits)), marker=".", label=name)
    right.set(title="what an expert tells", xlabel="mutual information (bits)", xlim=(0, None))
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)  # below the curves
    figure.suptitle(title)
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Figure:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda aside: figure.savefig(aside, dpi=120, format="png"))
    return figure


def smoothed(curve: Curve, past: int | float) -> list[Point]:
    """Take a running mean without the pull of its start over finite values."""
    total, weight, means = 0.0, 0.0, []
    for step, value in curve:
        if math.isfinite(value):
            total, weight = past * total + (1 - past) * value, past * weight + (1 - past)
            means.append((step, total / weight))
    return means
