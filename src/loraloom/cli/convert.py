"""`loraloom convert`: an adapter's files in another program's form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from loraloom.cli.options import path_argument


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="The adapter's directory or hub id.")
    ],
    destination: Annotated[Path, path_argument("DST", help="Where to: a new directory.")],
    to: Annotated[
        Literal["native", "peft", "reference", "axolotl"],
        typer.Option(
            "--to",
            help="native: as loraloom saves it; peft: for PEFT (LoRA, DoRA, VeRA); reference: for "
            "MoE-PEFT 2.0.2; axolotl: a MixLoRA for axolotl's plug-in.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="A setting of the adapter that its files don't tell, or another one in its "
            "place: top_k=2, experts.alpha=32. May be repeated.",
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            metavar="MODEL",
            help="The base model, to check that the adapter fits. Needed for a DoRA whose files "
            "have no magnitudes, and for VeRA.",
        ),
    ] = None,
) -> None:
    """Write an adapter for another program: PEFT, MoE-PEFT, axolotl, loraloom itself."""
    from loraloom.config.overrides import apply_override
    from loraloom.models.converting import convert as write

    settings: dict = {}
    for override in overrides or ():
        settings = apply_override(settings, override)
    host = None
    if base_model is not None:
        from loraloom.generation.loading import check_sources, load_host

        check_sources(base_model, {}, "cpu")
        host, _ = load_host(base_model, {}, "float32", "cpu", None)
    config = write(source, destination, to, settings=settings, host=host)
    typer.echo(f"wrote {destination}: {config.title}, rank {config.rank}, for {to}")
