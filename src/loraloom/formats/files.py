"""Adapters to and from directories, whichever layout they are in.

    peft_type LORA       PEFT's layout (peft.py): plain LoRA and DoRA, also MoE-PEFT's and mLoRA's
    peft_type MIXLORA    MoE-PEFT's layout (reference.py), its pickles and our safetensors
    older names          brought up to date first (legacy.py)

Code in a pickle is never run.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from loraloom.config.adapter import LoraConfig, MixLoraConfig
from loraloom.errors import AdapterError
from loraloom.formats import legacy, peft, reference
from loraloom.formats.base import BaseInfo
from loraloom.formats.card import model_card
from loraloom.formats.contents import CONFIG_FILE, AdapterFiles, BaseRecord, StoredAdapter, names_in
from loraloom.formats.disk import read_files, refuse_to_overwrite, replace_files
from loraloom.formats.fit import check_shapes, fit_to_base
from loraloom.formats.hub import find_adapter
from loraloom.formats.keys import tensor_shapes

_PARSERS = {"LORA": peft.parse, "MIXLORA": reference.parse}
_PLANNED = ("MOLA", "LORAMOE")


def read_adapter(
    path_or_hub_id: str | Path, base: BaseInfo
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read an adapter for a base model.

    Args:
        path_or_hub_id: A directory, or `owner/name` on the Hugging Face Hub.
        base: The base model that it must fit. Other weights than those it was trained on
            (another fingerprint) give a warning.

    Returns:
        The configuration (a MixLoraConfig for a mixture), and the tensors by our keys, on the
        CPU, at least in float32.

    Raises:
        FormatError: If files are missing, broken, or say what loraloom can't represent.
        AdapterError: If the adapter is for another base model.
    """
    return fit_to_base(read_stored(find_adapter(path_or_hub_id)), base)


def read_stored(directory: Path) -> StoredAdapter:
    """Read an adapter as its files describe it, with no base model at hand."""
    return parse_files(read_files(directory))


def parse_files(files: AdapterFiles) -> StoredAdapter:
    """Find out the layout from configuration and names, and understand the files by it."""
    if legacy.is_legacy(files):
        files = legacy.upgrade(files)
    peft_type = files.config.get("peft_type")
    if peft_type is None and "routing_strategy" in files.config:
        peft_type = "MIXLORA"
    if peft_type in _PLANNED:
        raise files.error(f"`peft_type` {peft_type} is not supported yet")
    parser = _PARSERS.get(str(peft_type))
    if parser is None:
        known = " or ".join(_PARSERS)
        raise files.error(f"`peft_type` in {CONFIG_FILE} must be {known}, got {peft_type!r}")
    return parser(files)


def write_adapter(
    directory: str | Path,
    config: LoraConfig,
    tensors: dict[str, Tensor],
    base: BaseInfo,
    card: str | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Save an adapter: adapter_config.json, adapter_model.safetensors and README.md.

    Other files in the directory stay. The three are written aside and renamed (disk.py).

    Args:
        directory: Made if it isn't there.
        config: A MixLoraConfig goes to MoE-PEFT's layout, a LoraConfig to PEFT's.
        tensors: By our keys (keys.py), all of them.
        base: The base model, whose name, size and fingerprint are stored.
        card: Text of README.md, see `model_card`; None for a card with method and base alone.
        overwrite: Replace an adapter that is there already.

    Raises:
        AdapterError: If the directory has an adapter already, can't be written, or the tensors
            aren't the configuration's.
    """
    directory = Path(directory)
    if not overwrite:
        refuse_to_overwrite(directory)
    _check_complete(config, tensors, base)
    record = BaseRecord(base.name_or_path, base.model_type, base.fingerprint, base.num_parameters)
    if isinstance(config, MixLoraConfig):
        files = reference.render(config, tensors, base, record)
    else:
        files = peft.render(config, tensors, base, record)
    replace_files(directory, files, model_card(config, base) if card is None else card)


def _check_complete(config: LoraConfig, tensors: dict[str, Tensor], base: BaseInfo) -> None:
    shapes = tensor_shapes(config, base)
    odd = sorted(shapes.keys() ^ tensors.keys())
    if odd:
        raise AdapterError(
            f"tensors must be exactly those of the configuration, missing or extra: {names_in(odd)}"
        )
    check_shapes("the adapter to save", tensors, shapes, base)
