"""`loraloom report`: a run as one HTML page."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from loraloom.atomic_io import prepare_output, write_output
from loraloom.errors import ConfigError
from loraloom.report.page import make_page


def report(
    run_dirs: Annotated[list[Path], Parameter(name="RUN_DIR")],
    /,
    *,
    evaluations: Annotated[list[Path] | None, Parameter(name="--eval")] = None,
    output: Path | None = None,
) -> None:
    """Write results, learning curves and expert load of a run to one self-contained HTML page.

    Args:
        run_dirs: Output directories of `loraloom train`, of one run or several.
        evaluations: Add the results in FILE.json of `loraloom eval --output`. Repeatable.
        output: Write the page to FILE.html. Default: report.html in the first RUN_DIR.
    """
    if output is not None and output.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output must end in .html, got {output}")
    page = make_page(run_dirs, evaluations or ())
    path = output or run_dirs[0] / "report.html"
    prepare_output(path, "--output")
    write_output(path, page)
    print(f"wrote {path}")
