"""A method is known in adapters/, and its files in formats/: elsewhere nothing asks which it is."""

import re
from pathlib import Path

import loraloom
from loraloom.adapters import CONFIGS

SOURCES = Path(loraloom.__file__).parent
METHODS = (SOURCES / "adapters", SOURCES / "formats", SOURCES / "exports/gguf.py")
_SHARED = {
    *"combining contract experts extra_modules low_rank projection prompt_router "
    "segment tensor_names weighted_sum".split()
}
"""Files in adapters/ that belong to no method."""
NAMES = sorted(
    {config.model_fields["method"].default for config in CONFIGS}
    | {config.peft_type for config in CONFIGS}
    | {alias for config in CONFIGS for alias in config.aliases}
)
CLASSES = sorted(
    {
        name
        for path in METHODS[0].rglob("*.py")
        if path.stem not in _SHARED
        for name in re.findall(r"^class (\w+)", path.read_text(), re.MULTILINE)
    }
    | {"LowRankConfig", "RouterLossConfig", "LowRankAdapter"}
)
PATTERNS = {
    "the quoted name of a method": rf"(?P<quote>[\"'])(?:{'|'.join(NAMES)})(?P=quote)",
    "a method's class": rf"(?<!peft\.)\b(?:{'|'.join(CLASSES)})\b",
    "a question which configuration it is": r"isinstance\([^()]*\bAdapterConfig\b",
}


def offences(source: str) -> list[str]:
    return [
        f"{kind}: {match[0]}"
        for kind, pattern in PATTERNS.items()
        for match in re.finditer(pattern, source)
    ]


def test_no_file_outside_adapters_and_formats_names_a_method():
    others = [p for p in SOURCES.rglob("*.py") if not {*METHODS} & {p, *p.parents}]
    found = {path.relative_to(SOURCES).as_posix(): offences(path.read_text()) for path in others}
    assert {name: own for name, own in found.items() if own} == {}
