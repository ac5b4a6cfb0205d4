"""Draw maps of studies: python recipes/mixture/picture.py maps.svg OUTPUT...

Each OUTPUT is a directory that `maps.py` has filled along two axes. A panel shows how many test
questions a mixture has right minus how many one of the LoRAs has, in points, with the standard
error over seeds.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

LABELS = {
    "lands": "countries to memorize",
    "capacity": "rank of experts, ×",
    "steps": "training steps",
    "experts": "number of experts",
}
LORAS = {"lora-size": "as many parameters", "lora-compute": "as much compute"}
Map = tuple[tuple[str, str], dict[tuple[int, int], dict[str, Any]]]
"""The names of its axes, and its studies by their place on them."""
CELL = re.compile(r"([a-z]+)(\d+)-([a-z]+)(\d+)")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw maps of studies.")
    parser.add_argument("image", type=Path)
    parser.add_argument("outputs", type=Path, nargs="+")
    args = parser.parse_args(arguments)
    figure = draw([read_map(output) for output in args.outputs])
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": ""}):
        figure.savefig(args.image, metadata={"Date": None} if args.image.suffix == ".svg" else None)


def read_map(output: Path) -> Map:
    """Read the studies of a map that are done."""
    cells = {}
    axes = None
    for path in sorted(output.glob("*/result.json")):
        if (place := CELL.fullmatch(path.parent.name)) is None:
            raise SystemExit(f"{output} must be a map along two axes, got {path.parent.name}")
        axes = place[1], place[3]
        cells[int(place[2]), int(place[4])] = json.loads(path.read_text())
    if axes is None:
        raise SystemExit(f"{output} must have studies that are done, got none")
    return axes, cells


def draw(maps: Sequence[Map]) -> Figure:
    """Draw a row for each map, with a panel for each LoRA that the mixture is compared to."""
    figure = Figure(figsize=(7.5, 0.6 + 2 * len(maps)), layout="constrained")
    figure.suptitle("Accuracy of the mixture minus that of a LoRA, in points")
    rows = figure.subplots(len(maps), 2, squeeze=False)
    for row, ((across, up), cells) in zip(rows, maps, strict=True):
        lengths, heights = (sorted({cell[axis] for cell in cells}) for axis in (0, 1))
        for panel, second in zip(row, LORAS, strict=True):
            points = [[float("nan")] * len(lengths) for _ in heights]
            for (x, y), study in cells.items():
                column, line = lengths.index(x), heights.index(y)
                (found,) = (one for one in study["comparisons"] if one["second"] == second)
                value = found["over_seeds"]["accuracy"]
                points[line][column] = 100 * value["mean"]
                text = f"{100 * value['mean']:+.1f}"
                if value["stderr"] is not None:  # of several seeds
                    text += f"\n± {100 * value['stderr']:.1f}"
                panel.text(column, line, text, ha="center", va="center")
            panel.imshow(points, cmap="RdBu", vmin=-12, vmax=12, origin="lower", aspect="auto")
            panel.set_title(f"LoRA with {LORAS[second]}", fontsize=10)
            panel.set_xticks(range(len(lengths)), map(str, lengths))
            panel.set_yticks(range(len(heights)), map(str, heights))
            panel.set(xlabel=LABELS[across], ylabel=LABELS[up])
    return figure


if __name__ == "__main__":
    main()
