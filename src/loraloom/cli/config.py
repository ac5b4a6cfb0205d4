"""`loraloom config`: what a run file may say, and what one says in full."""

from __future__ import annotations

import json

import typer
import yaml

from loraloom.cli.options import RunFileArgument, SetOption


def schema() -> None:
    """Print the JSON Schema of run files, for an editor to check and complete them by."""
    from loraloom.config.loading import schema as run_file_schema

    typer.echo(json.dumps(run_file_schema(), indent=2))


def show(run_file: RunFileArgument, overrides: SetOption = None) -> None:
    """Check a run file and print all its settings, defaults filled in, and a sweep's jobs."""
    from loraloom.config.loading import load_run_config
    from loraloom.config.sweep import format_values

    run = load_run_config(run_file, overrides or ())
    settings = run.model_dump(mode="json")
    typer.echo(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), nl=False)
    if run.sweep is not None:
        typer.echo(f"# The sweep's {run.sweep.num_jobs} jobs:")
        for trial in run.trials:
            typer.echo(f"# {trial.name} {format_values(trial.parameters)}")
        if len(run.trials) < run.sweep.num_jobs:
            typer.echo("# and those that tpe chooses in the course of the run")


SUBCOMMANDS = {"schema": schema, "show": show}
