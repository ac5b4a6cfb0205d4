"""How lm-eval's tasks say that tokens are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from loraloom.errors import ConfigError
from loraloom.infer.sampling import SamplingConfig, parse_sampling

_DRAWING = ("temperature", "top_k", "top_p")
_ALWAYS = ("repetition_penalty", "num_beams")


def parse_generation(settings: Mapping[str, Any], max_new_tokens: int) -> SamplingConfig:
    """Read a task's `generation_kwargs`.

    Args:
        settings: `until`, `max_gen_toks` or another of its names, `do_sample`, `temperature`,
            `top_k`, `top_p`, `repetition_penalty`, `num_beams`. What only concerns drawing has no
            effect where `do_sample` is false, as in lm-eval.
        max_new_tokens: Where the settings don't say.

    Raises:
        ConfigError: If a setting is unknown or out of its range.
    """
    normal: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), max_new_tokens))
    stop = tuple(dict.fromkeys(text for text in normal.pop("until") if text))
    length, do_sample = normal.pop("max_gen_toks"), normal.pop("do_sample")
    unknown = [name for name in normal if name not in (*_DRAWING, *_ALWAYS)]
    if unknown:
        known = ", ".join(("until", "max_gen_toks", "do_sample", *_DRAWING, *_ALWAYS))
        raise ConfigError(f"generation_kwargs may hold {known}, got {', '.join(unknown)}")
    if do_sample and float(normal.setdefault("temperature", 1.0)) == 0:
        raise ConfigError(
            "generation_kwargs: do_sample draws at a temperature above 0, got 0; "
            "leave do_sample out or raise the temperature"
        )
    names = (*_ALWAYS, *(_DRAWING if do_sample else ()))
    chosen = {name: normal[name] for name in names if normal.get(name) is not None}
    return parse_sampling(max_new_tokens=length, stop=stop, **chosen)
