"""`loraloom bench`: what a layer, a training step and decoding cost, against a named baseline."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraloom.bench.cases import PEFT_CASES, StepSetting, adapter_cases, mixture_case
from loraloom.cli.options import (
    BaseModelOption,
    FixedDtypeOption,
    QuantizationOption,
    path_option,
)
from loraloom.config.quantization import AnyQuantization
from loraloom.durable import prepare_output
from loraloom.errors import ConfigError, shown
from loraloom.models.sources import SMALL_MODEL

if TYPE_CHECKING:
    from loraloom.bench.layer import LayerCase
    from loraloom.bench.report import Figures

CasesOption = Annotated[
    str | None,
    typer.Option(
        "--cases", help="What to measure, with commas; the first is the baseline. Default: all."
    ),
]
CaseOption = Annotated[
    str | None, typer.Option("--case", help="Name of an adapter that benchmarks know: a mixture.")
]
RoundsOption = Annotated[int, typer.Option("--rounds", min=1, help="Timed turns of every case.")]
HiddenOption = Annotated[int, typer.Option("--hidden-size", min=1, help="D.")]
FfnOption = Annotated[int, typer.Option("--ffn-size", min=1, help="F.")]
TokensOption = Annotated[int, typer.Option("--tokens", min=1, help="T.")]
LengthOption = Annotated[int, typer.Option("--length", min=2, help="Tokens of each.")]
RankOption = Annotated[int, typer.Option("--rank", min=1, help="Of LoRA and of each expert.")]
ExpertsOption = Annotated[int, typer.Option("--num-experts", min=1, help="Of a mixture.")]
TopKOption = Annotated[int, typer.Option("--top-k", min=1, help="Experts that a token uses.")]
PICTURES = (".png", ".svg", ".pdf", ".jpg")
"""Suffixes that --picture takes."""


def _check_picture(path: Path | None) -> Path | None:
    """Return where to draw as it came, before anything is measured."""
    if path is not None and path.suffix.lower() not in PICTURES:
        raise ConfigError(f"--picture must end in {', '.join(PICTURES)}, got {path}")
    prepare_output(path, "--picture")
    return path


PictureOption = Annotated[
    Path | None,
    path_option(
        "--picture", metavar="FILE", callback=_check_picture, help="Draw the ratios there."
    ),
]


def layer(
    hidden_size: HiddenOption = 576,
    ffn_size: FfnOption = 1536,
    num_tokens: TokensOption = 2048,
    rank: RankOption = 8,
    num_experts: ExpertsOption = 8,
    top_k: TopKOption = 2,
    cases: CasesOption = None,
    rounds: RoundsOption = 9,
    picture: PictureOption = None,
) -> None:
    """One FFN layer in bfloat16, forward and backward: time, and activations that it keeps."""
    from loraloom.bench.layer import LayerSetting, make_layer

    names = _names(cases, (*PEFT_CASES, "frozen", *adapter_cases()))
    setting = LayerSetting(hidden_size, ffn_size, num_tokens, rank, num_experts, top_k)
    layers = {name: make_layer(name, setting) for name in names}
    _show(_measure_layers(layers, rounds), "ms", picture)


SCALED = ("num-experts", "top-k", "rank", "tokens", "adapters")
"""What `loraloom bench scaling` varies."""


def scaling(
    over: Annotated[str, typer.Option("--over", help=f"One of {', '.join(SCALED)}.")],
    values: Annotated[str, typer.Option("--values", help="Numbers with commas; baseline first.")],
    case: CaseOption = None,
    hidden_size: HiddenOption = 576,
    ffn_size: FfnOption = 1536,
    num_tokens: TokensOption = 2048,
    rank: RankOption = 8,
    num_experts: ExpertsOption = 8,
    top_k: TopKOption = 2,
    num_adapters: Annotated[
        int, typer.Option("--adapters", min=1, help="Adapters that share the tokens.")
    ] = 1,
    rounds: RoundsOption = 9,
    picture: PictureOption = None,
) -> None:
    """One FFN layer in bfloat16 over a range of sizes: forward and backward, and AdamW apart."""
    name = case or mixture_case()
    _check_choice("--case", name, adapter_cases())
    numbers = _numbers(values)
    _check_choice("--over", over, SCALED)
    from loraloom.bench.layer import LayerSetting, make_layer
    from loraloom.bench.timing import alternate

    fixed = LayerSetting(hidden_size, ffn_size, num_tokens, rank, num_experts, top_k, num_adapters)
    field = {"tokens": "num_tokens", "adapters": "num_adapters"}.get(over, over.replace("-", "_"))
    layers = {
        f"{over} {number}": make_layer(name, replace(fixed, **{field: number}))
        for number in numbers
    }
    figures = _measure_layers(layers, rounds)
    steps = alternate({name: layer.optimise for name, layer in layers.items()}, rounds)
    _show(
        {name: {**values, "AdamW ms": 1e3 * steps[name]} for name, values in figures.items()},
        "ms",
        picture,
    )


def _measure_layers(layers: Mapping[str, LayerCase], rounds: int) -> Figures:
    from loraloom.bench.timing import alternate

    times = alternate({name: layer.run for name, layer in layers.items()}, rounds)
    return {
        name: {"ms": 1e3 * times[name], "saved MB": layer.saved_bytes / 1e6}
        for name, layer in layers.items()
    }


def step(
    base_model: BaseModelOption = SMALL_MODEL,
    dtype: FixedDtypeOption = "bfloat16",
    quantization: QuantizationOption = None,
    num_rows: Annotated[int, typer.Option("--rows", min=1, help="Sequences of a step.")] = 4,
    length: LengthOption = 256,
    rank: RankOption = 8,
    num_experts: ExpertsOption = 8,
    top_k: TopKOption = 2,
    cases: CasesOption = None,
    rounds: RoundsOption = 7,
    memory: Annotated[
        bool, typer.Option("--memory", help="Measure peak memory too, a process for each case.")
    ] = False,
    picture: PictureOption = None,
) -> None:
    """A training step, all linear layers adapted, loss on all tokens: time and peak memory."""
    from loraloom.bench.memory import step_peak_rss_bytes
    from loraloom.bench.step import make_step
    from loraloom.bench.timing import alternate, describe_machine

    names = _names(cases, (*PEFT_CASES, *adapter_cases()))
    setting = StepSetting(
        base_model,
        dtype,
        num_rows,
        length,
        rank,
        num_experts,
        top_k,
        quantization=_settings_of(quantization),
    )
    peaks = {name: step_peak_rss_bytes(name, setting) for name in names} if memory else {}
    times = alternate({name: make_step(name, setting) for name in names}, rounds)
    figures = {
        name: {"s": times[name]} | ({"peak GB": peaks[name] / 1e9} if memory else {})
        for name in names
    }
    typer.echo(describe_machine(dtype))
    _show(figures, "s", picture)


def jobs(
    base_model: BaseModelOption = SMALL_MODEL,
    dtype: FixedDtypeOption = "bfloat16",
    quantization: QuantizationOption = None,
    num_jobs: Annotated[int, typer.Option("--jobs", min=2, help="Adapters that train.")] = 8,
    num_rows: Annotated[int, typer.Option("--rows", min=1, help="Sequences of each job.")] = 1,
    length: LengthOption = 128,
    rank: RankOption = 8,
    num_experts: ExpertsOption = 8,
    top_k: TopKOption = 2,
    case: CaseOption = None,
    rounds: RoundsOption = 5,
    memory: Annotated[
        bool, typer.Option("--memory", help="Measure peak memory of one and of all jobs too.")
    ] = False,
    picture: PictureOption = None,
) -> None:
    """Training steps of many jobs: fused, against the same jobs one after another."""
    name = case or mixture_case()
    _check_choice("--case", name, adapter_cases())
    from loraloom.bench.memory import describe_jobs_memory
    from loraloom.bench.step import make_job_steps
    from loraloom.bench.timing import alternate

    setting = StepSetting(
        base_model,
        dtype,
        num_rows,
        length,
        rank,
        num_experts,
        top_k,
        num_jobs,
        _settings_of(quantization),
    )
    steps = make_job_steps(name, setting)
    peaks = describe_jobs_memory(name, setting, steps.adapters[0]) if memory else None
    times = alternate({"by turns": steps.by_turns, "fused": steps.fused}, rounds, warmup=1)
    tokens = num_jobs * num_rows * length
    figures = {way: {"tokens/s": tokens / time, "s": time} for way, time in times.items()}
    _show(figures, "tokens/s", picture)
    if peaks is not None:
        typer.echo(peaks)


def decode(
    base_model: BaseModelOption = SMALL_MODEL,
    dtype: FixedDtypeOption = "bfloat16",
    quantization: QuantizationOption = None,
    num_rows: Annotated[int, typer.Option("--rows", min=1, help="Sequences at once.")] = 16,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Of each row.")] = 32,
    rank: RankOption = 8,
    num_experts: ExpertsOption = 8,
    top_k: TopKOption = 2,
    cases: CasesOption = None,
    rounds: RoundsOption = 5,
    picture: PictureOption = None,
) -> None:
    """Greedy decoding with a cache: tokens a second."""
    names = _names(cases, ("base", *adapter_cases(), "mixed"))
    from loraloom.bench.decode import DecodeSetting, make_decode
    from loraloom.bench.timing import alternate

    adapter = StepSetting(
        base_model,
        dtype,
        rank=rank,
        num_experts=num_experts,
        top_k=top_k,
        quantization=_settings_of(quantization),
    )
    setting = DecodeSetting(adapter, rows=num_rows, new_tokens=new_tokens)
    times = alternate({name: make_decode(name, setting) for name in names}, rounds, warmup=1)
    tokens = num_rows * new_tokens
    figures = {name: {"tokens/s": tokens / time} for name, time in times.items()}
    _show(figures, "tokens/s", picture)


def count(
    shape: Annotated[str, typer.Option("--shape", help="Of Llama 2: 7b, 13b or 70b.")] = "7b",
    num_rows: Annotated[int, typer.Option("--rows", min=1, help="Sequences of a step.")] = 8,
    length: LengthOption = 512,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Of each expert.")] = 16,
    lora_rank: Annotated[int, typer.Option("--lora-rank", min=1, help="Without experts.")] = 80,
    num_experts: ExpertsOption = 8,
    top_k: TopKOption = 2,
    card: Annotated[str, typer.Option("--card", help="H100, A100, 4090 or L4.")] = "H100",
    cases: CasesOption = None,
    picture: PictureOption = None,
) -> None:
    """Operations, bytes and memory of a step's forward and backward, counted without a device."""
    from loraloom.bench.count import CARDS, COUNTED, SHAPES, count_step

    _check_choice("--shape", shape, SHAPES)
    _check_choice("--card", card, CARDS)
    setting = StepSetting(
        rows=num_rows, length=length, rank=rank, num_experts=num_experts, top_k=top_k
    )
    figures = {}
    for name in _names(cases, COUNTED):
        counted = count_step(name, SHAPES[shape], setting, lora_rank)
        figures[name] = {
            "operations": counted.operations,
            "GB moved": counted.bytes / 1e9,
            "peak GB": counted.peak_bytes / 1e9,
            f"{card} s": counted.time_on(card),
        }
    _show(figures, "GB moved", picture)


SUBCOMMANDS: Mapping[str, Callable[..., None]] = {
    "layer": layer,
    "scaling": scaling,
    "step": step,
    "jobs": jobs,
    "decode": decode,
    "count": count,
}


def _settings_of(quantization: AnyQuantization | None) -> dict[str, Any] | None:
    """Write a quantisation so that it goes to another process."""
    return None if quantization is None else quantization.model_dump()


def _check_choice(option: str, value: str, known: Collection[str]) -> None:
    """Hold an option to its choices."""
    if value not in known:
        raise ConfigError(f"{option} must be one of {', '.join(known)}, got {value!r}")


def _numbers(values: str) -> list[int]:
    """Split `--values`."""
    parts = [part.strip() for part in values.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and 0 < int(part[:10]) < 10**9 for part in parts):
        raise ConfigError(
            f"--values must be positive numbers with commas between, got {shown(values)}"
        )
    return [int(part) for part in dict.fromkeys(parts)]


def _names(cases: str | None, known: tuple[str, ...]) -> list[str]:
    """Split `--cases`; None is all that are known."""
    asked = known if cases is None else [name.strip() for name in cases.split(",")]
    names = [name for name in dict.fromkeys(asked) if name]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ConfigError(
            f"--cases must be some of {', '.join(known)}, got {', '.join(unknown) or 'none'}"
        )
    if any(map(_is_pefts, names)) and find_spec("peft") is None:
        others = ",".join(name for name in known if not _is_pefts(name))
        raise ConfigError(
            "the cases peft-… measure PEFT's LoRA, which is not installed; run: pip install "
            f"'loraloom[peft]', or leave them out: --cases {others}"
        )
    return names


def _is_pefts(case: str) -> bool:
    return case.startswith("peft-")


def _show(figures: Figures, column: str, picture: Path | None) -> None:
    from loraloom.bench.report import plot_ratios, results_table
    from loraloom.terminal import make_console, print_tables

    print_tables(make_console(), [results_table(figures)])
    if picture is not None:
        plot_ratios(figures, column, picture)
