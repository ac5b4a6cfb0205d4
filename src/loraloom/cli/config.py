"""`loraloom config`: what a run file may say, and what one says in full."""

import json
from pathlib import Path

from loraloom.cli.options import Sets
from loraloom.config.text import to_yaml
from loraloom.training.settings import load_run_config
from loraloom.training.settings import schema as run_file_schema


def schema() -> None:
    """Print the JSON Schema of run files, for completion and checks in an editor."""
    print(json.dumps(run_file_schema(), indent=2))


def show(run_file: Path, /, *, overrides: Sets = ()) -> None:
    """Check a run file and print all its settings, defaults filled in, and a sweep's jobs.

    Args:
        run_file: YAML file with a base model and jobs.
    """
    run = load_run_config(run_file, overrides)
    print(to_yaml(run.model_dump(mode="json")), end="")
    if run.sweep is not None:
        print(f"# The sweep's {run.sweep.num_jobs} jobs:")
        for job in run.trials:
            print(f"# {job.name}")
