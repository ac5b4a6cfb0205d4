"""`loraloom eval --dataset`: held-out loss."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from loraloom.cli.scoring import open_cache, present, score_parts, tell_kept
from loraloom.config.objective import DpoConfig
from loraloom.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from loraloom.cli.eval import EvalRun
    from loraloom.config.data import SourceConfig
    from loraloom.eval.loss import LossEvaluation

DEFAULT_BETA = DpoConfig.model_fields["beta"].default


def score_held_out(
    run: EvalRun,
    datasets: Sequence[str],
    *,
    settings: dict[str, Any],
    max_length: int | None,
    beta: float | None,
    compare: Sequence[str],
) -> None:
    """Compute losses on data sets, write the results and print them."""
    from loraloom.data.locations import read_rows
    from loraloom.data.rows import check_faults
    from loraloom.durable import write_output
    from loraloom.eval.comparison import choose_pairs
    from loraloom.eval.held_out import data_set_name, parse_source
    from loraloom.eval.joining import join_losses
    from loraloom.terminal import make_console

    given = {name: value for name, value in settings.items() if value}
    if "format" not in given:
        given = {**_trained_on(run.adapters), **given}
    sources = [parse_source({"dataset": dataset, **given}) for dataset in datasets]
    _check_names([data_set_name(dataset) for dataset in datasets])
    if beta is not None and given.get("format") != "preference":
        raise ConfigError("--beta has an effect with --format preference only; leave it out")
    pairs = choose_pairs(run.names, compare)
    run.check()
    for source in sources:  # so that what is missing or broken is told before the model is loaded
        assert source.dataset is not None, "parse_source wants one"
        rows = read_rows(source.dataset, source.split or "validation", source.config)
        check_faults([(row.origin, row.fault) for row in rows if row.fault], len(rows))
    messages = make_console(stderr=True, soft_wrap=True)
    parts = score_parts(run, partial(_score, sources, max_length, beta or DEFAULT_BETA), messages)
    evaluation = join_losses(parts, run.names, pairs)
    if run.ray is not None:  # whose workers are silent
        for one in evaluation.losses:
            messages.print(one.data.describe())
    present(run, evaluation, messages)
    if run.per_question is not None:
        lines = (json.dumps(line, ensure_ascii=False) for line in evaluation.lines())
        write_output(run.per_question, "".join(f"{line}\n" for line in lines))


def _score(
    sources: Sequence[SourceConfig],
    max_length: int | None,
    beta: float,
    run: EvalRun,
    messages: Console,
) -> LossEvaluation:
    from loraloom.eval.held_out import load_held_out
    from loraloom.eval.loss import evaluate_loss
    from loraloom.eval.progress import EvaluationProgress

    host, tokenizer = run.load()
    sets = [load_held_out(host, tokenizer, one, max_length, run.limit, beta) for one in sources]
    for one in sets:
        messages.print(one.describe())
    kept = open_cache(run, host, messages)
    with tell_kept(kept, messages), EvaluationProgress(messages) as progress:
        return evaluate_loss(
            host,
            tokenizer,
            sets,
            run.names,
            pairs=(),
            cache=kept,
            max_tokens_per_batch=run.batch_tokens,
            progress=progress,
            sources=run.adapters,
            command=run.command,
        )


def _trained_on(adapters: Mapping[str, str]) -> dict[str, str]:
    """The format and templates that all adapters were trained on; nothing if they differ."""
    from loraloom.formats.files import read_stored
    from loraloom.formats.hub import find_adapter

    forms = [read_stored(find_adapter(path)).base.prompt for path in adapters.values()]
    form = forms[0] if forms and all(one == forms[0] for one in forms) else None
    if form is None or form.format not in ("instruction", "chat", "text"):
        return {}
    return form.model_dump(include={"format", "template", "chat_template"}, exclude_none=True)


def _check_names(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise ConfigError(f"--dataset must give different names, got {', '.join(names)}")
