"""Draw who answers what: python recipes/apart/picture.py routes.svg runs/apart/lands …

Each directory is an output of run.py. A panel shows, for the test questions of each source, the
share that the router by prompt gives to each adapter, the mean of seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib import rc_context
from matplotlib.figure import Figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("outputs", type=Path, nargs="+")
    args = parser.parse_args(arguments)
    figure = Figure(figsize=(4.2 * len(args.outputs), 3.4), layout="constrained")
    panels = figure.subplots(1, len(args.outputs), squeeze=False)[0]
    for panel, output in zip(panels, args.outputs, strict=True):
        seeds = [json.loads(path.read_text()) for path in sorted(output.glob("asked-*.json"))]
        adapters, tasks = list(seeds[0]["held out"]), list(seeds[0]["chosen"])
        shares = [
            [100 * fmean(one["chosen"][task][n] for one in seeds) for n in range(len(adapters))]
            for task in tasks
        ]
        panel.imshow(shares, cmap="Blues", vmin=0, vmax=130, aspect="auto")
        for row, of_task in enumerate(shares):
            for column, share in enumerate(of_task):
                if share >= 0.5:
                    panel.text(column, row, f"{share:.0f}", ha="center", va="center")
        panel.set_xticks(range(len(adapters)), adapters, rotation=45, ha="right")
        panel.set_yticks(range(len(tasks)), tasks)
        panel.set(xlabel="adapter that answers, %", ylabel="questions of")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": ""}):
        figure.savefig(args.image, metadata={"Date": None} if args.image.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
