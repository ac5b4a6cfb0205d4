"""`loraloom convert`: an adapter's files in another program's form."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from loraloom.cli.options import LocalPath
from loraloom.config.model import BaseModelConfig
from loraloom.config.text import apply_override
from loraloom.models import converting


def convert(
    source: str,
    destination: LocalPath,
    /,
    *,
    to: converting.Program,
    overrides: Annotated[list[str] | None, Parameter("--set", allow_leading_hyphen=True)] = None,
    base_model: str | None = None,
) -> None:
    """Write an adapter for another program: PEFT, MoE-PEFT, loraloom itself.

    Args:
        source: The adapter's directory or hub id.
        destination: A new directory to write.
        to: native: as loraloom saves it; peft: for PEFT (LoRA, DoRA, VeRA); reference: for MoE-PEFT
            2.0.2.
        overrides: A setting of the adapter that its files lack, or another one, PATH=VALUE:
            top_k=2, experts.alpha=32. May be repeated.
        base_model: The base model, to check that the adapter fits. Needed for a DoRA whose files
            have no magnitudes, and for VeRA.
    """
    settings: dict = {}
    for override in overrides or ():
        settings = apply_override(settings, override)
    host = None
    if base_model is not None:
        from loraloom.generation.loading import check_sources, load_host  # with transformers

        model = BaseModelConfig(base_model=base_model, dtype="float32", device="cpu")
        check_sources(model, {})
        host, _ = load_host(model, {})
    config = converting.convert(source, destination, to, settings=settings, host=host)
    print(f"wrote {destination}: {config.title}, rank {config.rank}, for {to}")
