"""`loraloom report`: a run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loraloom.cli.options import path_argument, path_option
from loraloom.errors import ConfigError

DEFAULT_NAME = "report.html"


def report(
    run_dirs: Annotated[
        list[Path],
        path_argument(
            "RUN_DIR...",
            help="Output directories of `loraloom train`; several may be seeds of one recipe.",
        ),
    ],
    evaluations: Annotated[
        list[Path] | None,
        path_option(
            "--eval",
            metavar="FILE.json",
            help="What `loraloom eval --output` wrote. May be repeated.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        path_option(
            "--output", metavar="FILE.html", help="Where to; report.html in the first RUN_DIR."
        ),
    ] = None,
) -> None:
    """Put results, learning curves and the experts' load of a run on one HTML page.

    The page needs no other file and no network.
    """
    from loraloom.durable import prepare_output, write_output
    from loraloom.report.page import make_page

    if output is not None and output.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output must end in .html, got {output}")
    page = make_page(run_dirs, evaluations or ())
    path = output or run_dirs[0] / DEFAULT_NAME
    prepare_output(path, "--output")
    write_output(path, page)
    typer.echo(f"wrote {path}")
